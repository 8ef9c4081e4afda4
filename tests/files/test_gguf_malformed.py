"""The GGUF reader on hand-made bad files: one exception type that names file, field, place and reason."""

from __future__ import annotations

import os
import re
import shutil
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.files import gguf_builder as build
from tests.files.gguf_builder import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, U64, Gguf, Sample, Tensor, key, number
from turbomoe.errors import ModelFileError
from turbomoe.files.gguf import GgufFile
from turbomoe.files.gguf_cursor import STRINGS_LIMIT, TEXT_LIMIT
from turbomoe.files.gguf_header import KEYS_LIMIT, TENSORS_LIMIT

SAMPLE = Sample().gguf


@dataclass(frozen=True)
class Case:
    """A bad file; the field that the error must name and a pattern for the reason.

    ``near``: the error must point to ``ahead`` bytes after the first place of these; None: anywhere inside the file.
    """

    name: str
    content: Gguf | bytes
    field: str
    reason: str
    near: bytes | None = None
    ahead: int = 0

    @property
    def raw(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.build()


def with_key(*keys: bytes) -> Gguf:
    return SAMPLE.but(keys=(*SAMPLE.keys, *keys))


def aligned_to(kind: int, value: object) -> Gguf:
    return SAMPLE.but(keys=(SAMPLE.keys[0], key("general.alignment", kind, value), *SAMPLE.keys[2:]))


def with_tensor(*tensors: Tensor) -> Gguf:
    return SAMPLE.but(tensors=(*SAMPLE.tensors, *tensors))


def floats(name: str | bytes = "t", dims: tuple[int, ...] = (8,), **changes: int) -> Tensor:
    return Tensor(name, dims, 0, bytes(32), **changes)


def typed(type_id: int, cols: int = 256) -> Gguf:
    return with_tensor(Tensor("t", (cols,), type_id, bytes(1024)))


def nested(depth: int) -> bytes:
    return number(U32, ARRAY) + number(U64, 1) if depth == 1 else nested(1) + nested(depth - 1)


HEADER_CASES = [
    Case("one byte", b"G", "header", "1 bytes are too few"),
    Case("magic alone", b"GGUF", "header", "4 bytes are too few"),
    Case("one byte short of a header", Gguf().build()[:23], "header", "23 bytes are too few"),
    Case("older format's magic", SAMPLE.but(magic=b"ggml"), "magic", "b'ggml'", b"ggml"),
    Case("zeros", bytes(4096), "magic", "not with the GGUF magic"),
    Case("safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a":1}'.ljust(16), "magic", "not with the GGUF magic"),
    Case("version 0", SAMPLE.but(version=number(U32, 0)), "version", "version 0 is not supported", b"GGUF", 4),
    Case("version 1", SAMPLE.but(version=number(U32, 1)), "version", "version 1 is not supported; versions 2 and 3"),
    Case("version 4", SAMPLE.but(version=number(U32, 4)), "version", "version 4 is not supported"),
    Case("version 2^32-1", SAMPLE.but(version=b"\xff" * 4), "version", "version 4294967295 is not supported"),
    Case("big-endian 3", SAMPLE.but(version=b"\0\0\0\3"), "version", "big-endian"),
    Case("big-endian 2", SAMPLE.but(version=b"\0\0\0\2"), "version", "big-endian"),
    Case("2^63 tensors", SAMPLE.but(tensor_count=1 << 63), "tensor count", f"a count of {1 << 63} tensors", b"GGUF", 8),
    Case("2^64-1 tensors", SAMPLE.but(tensor_count=(1 << 64) - 1), "tensor count", f"count of {(1 << 64) - 1} tensors"),
    Case("a wrapping tensor count", SAMPLE.but(tensor_count=(1 << 64) // 33 + 1), "tensor count", "but only 976 are"),
    Case("a tensor too many", Gguf(tensors=(floats(),), tensor_count=2), "tensor name", "a name of 0 bytes"),
    Case("2^63 keys", SAMPLE.but(key_count=1 << 63), "metadata count", f"a count of {1 << 63} metadata", b"GGUF", 16),
    Case("2^64-1 keys", SAMPLE.but(key_count=(1 << 64) - 1), "metadata count", "metadata keys needs"),
    Case("more keys than bytes", Gguf(key_count=1), "metadata count", "needs 14 bytes, but only 8 are left"),
    Case("a key too many", SAMPLE.but(key_count=len(SAMPLE.keys) + 1), "tensor name", "a count of [0-9]+ characters"),
    Case("a key too few", SAMPLE.but(key_count=len(SAMPLE.keys) - 1), "tensor 'nested'", "9 dimensions"),
]

KEY_CASES = [
    Case("key of 2^63 bytes", with_key(build.text("k", 1 << 63)), "metadata key 10", f"count of {1 << 63} characters"),
    Case("key to the end", Gguf((build.text("k", 64),)), "metadata key 0", "64 characters needs 64 bytes, but only"),
    Case("empty key", with_key(key("", U8, 1)), "metadata key 10", "a name of 0 bytes"),
    Case("key of 65,536 bytes", with_key(key("k" * 65536, U8, 1)), "metadata key 10", "name of 65536 bytes; .* 65535"),
    Case("key not UTF-8", with_key(key(b"bad\xff", U8, 1)), "metadata key 10", r"bad\\xff' is not UTF", b"bad\xff", -8),
    Case("key with NUL", with_key(key("bad\0key", U8, 1)), "metadata key 10", "control characters"),
    Case("key with a terminal escape", with_key(key("\x1b[2J", U8, 1)), "metadata key 10", "control characters"),
    Case("key twice", with_key(key("llama.flag", BOOL, False)), "metadata 'llama.flag'", "occurs twice"),
    Case("value type 13", with_key(key("odd", 13, b"\0" * 8)), "metadata 'odd'", "value type 13", b"odd", 3),
    Case("value type 2^32-1", with_key(key("odd", (1 << 32) - 1, b"\0")), "metadata 'odd'", "value type 4294967295"),
    Case(
        "string of 2^64-1 bytes",
        with_key(key("s", U64, b"")[:-4] + number(U32, STRING) + build.text("x", (1 << 64) - 1)),
        "metadata 's'", f"a string of {(1 << 64) - 1} bytes",
    ),
    Case(
        "string of 2^63 bytes",
        with_key(build.text("s") + number(U32, STRING) + build.text("x", 1 << 63)),
        "metadata 's'", f"a string of {1 << 63} bytes",
    ),
    Case(
        "string one byte too long",
        Gguf((build.text("s") + number(U32, STRING) + build.text("x" * 11, 12),)).build()[:56],
        "metadata 's'", "needs 20 bytes, but only 19 are left", b"\x0c\0\0\0",
    ),
    Case("bool of 2", with_key(key("b", BOOL, b"\x02")), "metadata 'b'", "boolean must be 0 or 1, not 2"),
    Case("number cut off", Gguf((key("n", U64, 7),)).build()[:40], "metadata 'n'", "needs 8 bytes, but only 3"),
]  # fmt: skip

ARRAY_CASES = [
    Case("the 49-byte file", Gguf((key("a", ARRAY, number(U32, U8) + number(U64, 1 << 62)),)).build()[:49],
         "metadata 'a'", f"a count of {1 << 62} array elements", b"\0\0\0\0\0\0\0\x40"),
    Case("array of 2^64-1 strings", with_key(key("a", ARRAY, build.array(STRING, ["x"], (1 << 64) - 1))),
         "metadata 'a'", "array elements needs"),
    Case("array whose size wraps", with_key(key("a", ARRAY, build.array(U64, [1], 1 << 61))),
         "metadata 'a'", f"needs {1 << 64} bytes"),
    Case("array one element too long", Gguf((key("a", ARRAY, build.array(I32, [1, 2], 3)),)).build()[:57],
         "metadata 'a'", "needs 12 bytes, but only 8"),
    Case("array with a string cut off", Gguf((key("a", ARRAY, build.array(STRING, ["abc", "defg"])),)).build()[:70],
         r"metadata 'a'\[1\]", "a string of 4 bytes"),
    Case("array with a length cut off", Gguf((key("a", ARRAY, build.array(STRING, ["abcdefgh", "i"])),)).build()[:69],
         r"metadata 'a'\[1\]", "a string of 0 bytes with its length needs 8 bytes, but only 4 are left"),
    Case("array whose string is 2^63 long", with_key(key("a", ARRAY, build.array(STRING, []) [:4] + number(U64, 3)
         + build.text("ok") + build.text("x", 1 << 63))), r"metadata 'a'\[1\]", f"a string of {1 << 63} bytes"),
    Case("array of type 99", with_key(key("a", ARRAY, number(U32, 99) + number(U64, 1))),
         "metadata 'a'", "value type 99"),
    Case("bool of 255 in an array", with_key(key("a", ARRAY, number(U32, BOOL) + number(U64, 3) + b"\1\0\xff")),
         "metadata 'a'", "not 255", b"\1\0\xff", 2),
    Case("arrays five deep", with_key(key("a", ARRAY, nested(5) + number(U32, U8) + number(U64, 0))),
         r"metadata 'a'(\[0\]){4}", "nested more than 4 deep"),
    Case("arrays 10,000 deep", with_key(key("a", ARRAY, nested(1) * 10000)),
         r"metadata 'a'(\[0\]){4}", "nested more than 4 deep"),
    Case("2^60 arrays in an array", with_key(key("a", ARRAY, nested(1) + number(U32, ARRAY) + number(U64, 1 << 60))),
         r"metadata 'a'\[0\]", f"a count of {1 << 60} array elements"),
]  # fmt: skip


def empty_strings(count: int) -> bytes:
    return number(U32, STRING) + number(U64, count) + bytes(8 * count)


EMPTY_ARRAY = number(U32, U8) + number(U64, 0)
TINY_KEYS = tuple(key(f"{index}", U8, 1) for index in range(KEYS_LIMIT + 1))
TINY_TENSORS = tuple(floats(f"{index}") for index in range(TENSORS_LIMIT + 1))

# Each cost minutes or gigabytes for every hundred megabytes of its header before there were limits.
COSTLY_CASES = [
    Case("a million arrays in an array", Gguf((key("a", ARRAY, nested(1)[:4] + number(U64, 1 << 20)
         + EMPTY_ARRAY * (1 << 20)),)), "metadata 'a'", "1048576 arrays within arrays; at most 4096"),
    Case("arrays in two arrays", Gguf(tuple(key(name, ARRAY, nested(1)[:4] + number(U64, 2049) + EMPTY_ARRAY * 2049)
         for name in "ab")), "metadata 'b'", "4098 arrays within arrays"),
    Case("a string too many", Gguf((key("a", ARRAY, empty_strings(STRINGS_LIMIT + 1)),)),
         "metadata 'a'", f"{STRINGS_LIMIT + 1} strings in arrays; at most {STRINGS_LIMIT}"),
    Case("strings in two arrays", with_key(*(key(name, ARRAY, empty_strings(STRINGS_LIMIT // 2 + 1)) for name in "ab")),
         "metadata 'b'", "strings in arrays"),
    Case("a bad bool among millions", with_key(key("a", ARRAY, number(U32, BOOL) + number(U64, 20 << 20)
         + bytes(20 << 20)[1:] + b"\7")), "metadata 'a'", "not 7"),
    Case("a text too long", with_key(key("a", STRING, "x" * TEXT_LIMIT)), "metadata 'a'", "bytes of names and strings"),
    Case("texts too long", with_key(*(key(f"{index}", STRING, "x" * (TEXT_LIMIT // 10)) for index in range(10))),
         "metadata '9'", "bytes of names and strings"),
    Case("more keys than allowed", Gguf(TINY_KEYS), "metadata count", f"{KEYS_LIMIT + 1} metadata keys; at most"),
    Case("more tensors than allowed", Gguf(tensors=TINY_TENSORS), "tensor count", f"{TENSORS_LIMIT + 1} tensors; at"),
]  # fmt: skip

ALIGNMENT_CASES = [
    Case(f"alignment {value!r} of type {kind}", aligned_to(kind, value), "metadata 'general.alignment'", reason)
    for kind, value, reason in [
        (U32, 0, "not 0"), (U32, 3, "not 3"), (U32, 4, "not 4"), (U32, 48, "not 48"), (U32, 1 << 31, "not 2147483648"),
        (U32, (1 << 32) - 1, "power of two"), (U64, 1 << 63, "power of two"), (I32, -32, "not -32"),
        (F32, 32.0, r"not 32\.0"), (BOOL, True, "not True"), (STRING, "32", "not '32'"), (ARRAY, (U32, [32]), "32"),
        (STRING, "x" * 100000, "not 'xxx"),
    ]
]  # fmt: skip

TENSOR_CASES = [
    Case("name empty", with_tensor(floats("")), "tensor name", "a name of 0 bytes"),
    Case("name of 65 bytes", with_tensor(floats("n" * 65)), "tensor name", "a name of 65 bytes; between 1 and 64"),
    Case("name not UTF-8", with_tensor(floats(b"\xc3(")), "tensor name", "not UTF-8", b"\xc3(", -8),
    Case("name with a line break", with_tensor(floats("a\nb")), "tensor name", "control characters"),
    Case("tensor twice", with_tensor(floats("output_norm.weight")), "tensor 'output_norm.weight'", "occurs twice"),
    Case("no dimensions", with_tensor(floats(dims=())), "tensor 't'", "0 dimensions; 1 to 4"),
    Case("five dimensions", with_tensor(floats(dims=(8, 1, 1, 1, 1))), "tensor 't'", "5 dimensions"),
    Case("2^32-1 dimensions", with_tensor(floats(dimensions=(1 << 32) - 1)), "tensor 't'", "4294967295 dimensions"),
    Case("empty axis", with_tensor(floats(dims=(8, 0))), "tensor 't'", r"shape \(0, 8\) has an empty axis"),
    Case("axis of 2^63", with_tensor(floats(dims=(1 << 63,))), "tensor 't'", "past the end of the file"),
    Case("shape that wraps to 0", with_tensor(floats(dims=(1 << 32, 1 << 32))), "tensor 't'", "past the end"),
    Case("bytes that wrap to 32", with_tensor(floats(dims=((1 << 62) + 8,))), "tensor 't'", "past the end"),
    Case("four axes of 2^64-1", with_tensor(floats(dims=((1 << 64) - 1,) * 4)), "tensor 't'", "past the end"),
    Case("half a block a row", typed(8, 48), "tensor 't'", "row of 48 values cannot be stored as Q8_0.*32 values"),
    Case("K-block in a short row", typed(12, 32), "tensor 't'", "row of 32 values cannot be stored as Q4_K"),
    Case("removed type", typed(4), "tensor 't'", "unknown block type 4"),
    Case("type 99", typed(99), "tensor 't'", "unknown block type 99 is not supported; supported are F32, F16"),
    Case("type 2^32-1", typed((1 << 32) - 1), "tensor 't'", "unknown block type 4294967295"),
    Case("type without decoder", typed(10), "tensor 't'", "block type Q2_K is not supported; .*MXFP4"),
    Case("integers", typed(26), "tensor 't'", "block type I32 is not supported"),
    Case("offset between", with_tensor(floats(offset=33)), "tensor 't'", "33 is not a multiple of the alignment 32"),
    Case("offset past the end", with_tensor(floats(offset=1 << 40)), "tensor 't'", "past the end of the file"),
    Case("offset that wraps", with_tensor(floats(offset=(1 << 64) - 32)), "tensor 't'", "past the end of the file"),
    Case("same place twice", with_tensor(floats(offset=0)), "tensor '(t|token_embd.weight)'", "overlap those of"),
    Case("one block into another", with_tensor(floats(offset=128)), "tensor 't'", "overlap those of 'token_embd"),
    Case("last byte missing", SAMPLE.but(cut=17), "tensor 'output_norm.weight'", "file is truncated or damaged"),
    Case("all data missing", SAMPLE.header(), "tensor 'token_embd.weight'", "past the end of the file"),
    Case("table cut off", SAMPLE.header()[:-10], "tensor 'output_norm.weight'", "needs 4 bytes, but only 2 are left"),
    Case("table missing", Gguf(SAMPLE.keys, tensor_count=3).build(), "tensor name", "needs|a name of 0 bytes"),
]

CASES = HEADER_CASES + KEY_CASES + ARRAY_CASES + COSTLY_CASES + ALIGNMENT_CASES + TENSOR_CASES


def refusal(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        GgufFile.open(path)
    return caught.value


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_what_the_cases_damage_is_sound(tmp_path: Path) -> None:
    assert len(GgufFile.open(with_tensor(floats()).write(tmp_path / "m.gguf")).tensors) == 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_malformed_file_is_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(case.raw)
    error = refusal(path)
    assert error.path == str(path)
    assert re.fullmatch(case.field, error.field), error.field
    assert re.search(case.reason, error.reason), error.reason
    assert error.offset is not None
    assert 0 <= error.offset <= len(case.raw)
    assert len(str(error)) < 600
    if case.near is not None:
        assert error.offset == case.raw.index(case.near) + case.ahead


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert refusal(tmp_path / "m.gguf").reason == "it is empty"


def test_a_header_has_a_limit(tmp_path: Path) -> None:
    """The bytes are there, in a hole of 300 MiB, and still no list of 200 million numbers is made."""
    path = Gguf((key("a", ARRAY, number(U32, U8) + number(U64, 200 << 20)),)).write(tmp_path / "m.gguf")
    os.truncate(path, 300 << 20)
    tracemalloc.start()
    try:
        assert "past the 64 MiB a header may take" in refusal(path).reason
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def most(*keys: bytes, tensors: tuple[Tensor, ...] = ()) -> bytes:
    return Gguf(keys, tensors).build()


# All that the limits allow: numbers as far as the header goes, and the most of what takes memory beyond its bytes.
DEAREST = {
    "small numbers": lambda: most(key("a", ARRAY, number(U32, U8) + number(U64, 60 << 20) + bytes(60 << 20))),
    "truth values": lambda: most(key("a", ARRAY, number(U32, BOOL) + number(U64, 60 << 20) + bytes(60 << 20))),
    "large numbers": lambda: most(key("a", ARRAY, number(U32, U64) + number(U64, 7 << 20) + bytes(56 << 20))),
    "a bit of everything": lambda: most(
        key("s", ARRAY, empty_strings(STRINGS_LIMIT)),
        key("t", STRING, "\U0001f600" + "x" * (TEXT_LIMIT - (192 << 10))),  # four bytes a character
        key("n", ARRAY, nested(1)[:4] + number(U64, 4096) + EMPTY_ARRAY * 4096),
        key("b", ARRAY, number(U32, BOOL) + number(U64, 40 << 20) + bytes(40 << 20)),
        *TINY_KEYS[: KEYS_LIMIT - 4],
        tensors=TINY_TENSORS[:TENSORS_LIMIT],
    ),
}


@pytest.mark.parametrize("what", DEAREST)
def test_no_header_takes_more_than_64_mib_or_a_second(what: str, tmp_path: Path) -> None:
    """The best processor time of three: that of a person's wait on a quiet machine."""
    path = tmp_path / "m.gguf"
    path.write_bytes(DEAREST[what]())
    seconds = []
    for _ in range(3):
        start = time.process_time()
        GgufFile.open(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    tracemalloc.start()
    try:
        file = GgufFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        assert len(file.metadata) in (1, KEYS_LIMIT)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe", "NUL in its name", "too long a name"])
def test_what_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "NUL in its name":
        path = tmp_path / "m\0.gguf"
    elif kind == "too long a name":
        path = tmp_path / ("m" * 5000)
    expected = {
        "folder": "not a regular file", "pipe": "not a regular file", "missing": "No such file",
        "NUL in its name": "null byte|null character", "too long a name": "too long",
    }  # fmt: skip
    assert re.search(expected[kind], refusal(path).reason)


# Split series


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    """Three files with two tensors each, written by the oracle."""
    return write_series(tmp_path, "m", 1.0)


def write_series(folder: Path, stem: str, value: float, tensors: int = 6) -> list[Path]:
    writer = gguf.GGUFWriter(folder / f"{stem}.gguf", "llama", split_max_tensors=2)
    for index in range(tensors):
        writer.add_tensor(f"t{index}", np.full((2, 4), value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{stem}-*.gguf"))


def shard(number_: int, count: int, total: int, *tensors: str, **extra: int) -> Gguf:
    """One file of a series, by hand."""
    keys = [key("split.no", U16, number_), key("split.count", U16, count), key("split.tensors.count", I32, total)]
    keys += [key(name, U32, value) for name, value in extra.items()]
    return Gguf(tuple(keys), tuple(floats(name) for name in tensors))


def test_a_missing_member_is_named(series: list[Path]) -> None:
    series[1].unlink()
    error = refusal(series[2])
    assert error.path == str(series[1])
    assert error.reason == "file 2 of a series of 3 is missing"
    assert "Download every file" in error.fix


def test_a_damaged_member_is_named(series: list[Path]) -> None:
    os.truncate(series[2], series[2].stat().st_size - 20)
    error = refusal(series[0])
    assert (error.path, error.field) == (str(series[2]), "tensor 't5'")


def test_a_member_in_the_place_of_another_is_refused(series: list[Path]) -> None:
    shutil.copy(series[1], series[2])
    error = refusal(series[0])
    assert (error.path, error.field) == (str(series[2]), "split.no")
    assert "says 1 where its place in the series asks for 2" in error.reason


def test_a_renamed_member_is_refused(series: list[Path]) -> None:
    error = refusal(series[0].rename(series[0].with_name("model.gguf")))
    assert error.field == "split.count"
    assert "one of 3 files where its name says one of 1" in error.reason


def test_a_name_without_its_keys_is_refused(tmp_path: Path) -> None:
    error = refusal(SAMPLE.write(tmp_path / "m-00001-of-00002.gguf"))
    assert "one of 1 files where its name says one of 2" in error.reason


def test_a_member_of_another_series_is_refused(series: list[Path]) -> None:
    (series[0].parent / "other").mkdir()
    shutil.copy(write_series(series[0].parent / "other", "m", 2.0, tensors=5)[1], series[1])
    error = refusal(series[0])
    assert (error.path, error.field) == (str(series[1]), "split.tensors.count")
    assert "different models" in error.reason


@pytest.mark.parametrize(
    ("second", "at", "field", "reason"),
    [
        (shard(1, 2, 2, "t0"), 1, "tensor 't0'", "is in m-00001-of-00002.gguf too"),
        (shard(1, 2, 2, "t1", "t2"), 0, "split.tensors.count", "should hold 2 tensors but has 3"),
        (shard(1, 2, 2), 0, "split.tensors.count", "should hold 2 tensors but has 1"),
        (shard(1, 3, 2, "t1"), 1, "split.count", "says 3 where its place in the series asks for 2"),
        (shard(1, 2, 2, "t1", block_count=3), 1, "block_count", "contradicts m-00001-of-00002.gguf"),
        (SAMPLE, 1, "split.count", "needs a whole number here, not None"),
        (Gguf((key("split.count", F32, 2.0),)), 1, "split.count", r"not 2\.0"),
        (Gguf((key("split.count", I32, -2),)), 1, "split.count", "not -2"),
        (Gguf((key("split.count", BOOL, True),)), 1, "split.count", "not True"),
        (Gguf((key("split.count", U16, 2), key("split.no", STRING, "1"))), 1, "split.no", "not '1'"),
    ],
)
def test_members_must_agree(second: Gguf, at: int, field: str, reason: str, tmp_path: Path) -> None:
    paths = [tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"]
    shard(0, 2, 2, "t0", block_count=2).write(paths[0])
    second.write(paths[1])
    error = refusal(paths[0])
    assert (error.path, error.field) == (str(paths[at]), field)
    assert re.search(reason, error.reason)


@pytest.mark.parametrize("last", [5.0, 7.0, float("nan")])
@pytest.mark.parametrize("wanted", [5.0, float("nan")])
def test_members_must_agree_to_the_last_element(last: float, wanted: float, tmp_path: Path) -> None:
    paths = [tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"]
    for index, (path, value) in enumerate(zip(paths, (wanted, last), strict=True)):
        made = shard(index, 2, 2, f"t{index}")
        made.but(keys=(*made.keys, key("floats", ARRAY, (F32, [0.0] * 1000 + [value])))).write(path)
    if repr(wanted) == repr(last):
        assert len(GgufFile.open(paths[0]).tensors) == 2
        return
    assert refusal(paths[0]).field == "floats"


def test_a_series_of_65535_stops_at_the_first_missing_file(tmp_path: Path) -> None:
    error = refusal(shard(0, 65535, 1, "t0").write(tmp_path / "m-00001-of-65535.gguf"))
    assert error.reason == "file 2 of a series of 65535 is missing"
