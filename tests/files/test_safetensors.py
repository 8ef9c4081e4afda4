"""Safetensors folders: what they hold, and how the broken ones are refused."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from turbomoe.errors import ModelError, ModelFileError
from turbomoe.files import open_model
from turbomoe.files.json_file import JsonFolder, read_json_object
from turbomoe.files.safetensors import SafetensorsFolder
from turbomoe.files.safetensors_index import is_shard_name

INDEX = "model.safetensors.index.json"
TENSORS = {
    "embed": torch.arange(12, dtype=torch.float32).reshape(4, 3) / 7,
    "norm": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
    "scale": torch.tensor(3.5, dtype=torch.float16),
    "empty": torch.zeros(0, 5),
    "head": torch.linspace(-1, 1, 40).reshape(5, 2, 4).half(),
}


def write_model(folder: Path, shards: int = 1, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {name: names[place % shards] for place, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name, home in weight_map.items() if home == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", shards=3)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, shards: int) -> None:
    source = open_model(write_model(tmp_path, shards))
    assert isinstance(source, SafetensorsFolder)
    assert source.kind == "safetensors" and len(source.paths) == shards
    assert set(source.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        info, packed = source.tensors[name], source.raw(name)
        assert info.shape == tuple(expected.shape)
        assert info.nbytes == packed.numel() == expected.numel() * expected.element_size()
        assert info.format == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[expected.dtype]
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        assert bytes(packed.tolist()) == bytes(expected.reshape(-1).view(torch.uint8).tolist())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(source.load(name, dtype), expected.to(dtype))


def test_loaded_tensors_belong_to_the_caller_and_raw_ones_are_views(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path))
    source.load("embed").zero_()
    assert torch.equal(source.load("embed"), TENSORS["embed"])
    assert source.raw("embed").data_ptr() == source.raw("embed").data_ptr()


def test_views_outlive_the_source(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path))
    view = source.raw("head")
    source.close()
    source.close()
    assert torch.equal(view.view(torch.float16).reshape(5, 2, 4), TENSORS["head"])
    with pytest.raises(ModelFileError, match="closed"):
        source.raw("head")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        open_model(write_model(tmp_path)).load("nowhere")


def test_many_threads_may_read(sharded: Path) -> None:
    source = open_model(sharded)
    names = list(TENSORS) * 40
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(source.load, names))
    assert all(torch.equal(tensor, TENSORS[name].float()) for name, tensor in zip(names, loaded, strict=True))


def test_metadata_is_read_by_stem_and_only_when_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    (tmp_path / "chat_template.jinja").write_text("{{ grüße }}", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("not JSON")
    (tmp_path / "evil.py").write_text("raise SystemExit")
    metadata = open_model(tmp_path).metadata
    assert set(metadata) == {"config", "generation_config", "chat_template", "tokenizer"}
    assert metadata["config"] == {"model_type": "llama"}
    assert metadata["config"] is metadata["config"]
    assert metadata["generation_config"]["temperature"] == 0.7
    assert metadata["chat_template"] == "{{ grüße }}"
    with pytest.raises(ModelFileError, match="not JSON"):
        metadata["tokenizer"]


def test_identity_tells_models_apart_and_copies_not(tmp_path: Path) -> None:
    big = {"w": torch.randn(400, 500), "v": torch.randn(300)}
    first = open_model(write_model(tmp_path / "a", tensors=big)).identity()
    assert len(first) == 64
    assert open_model(write_model(tmp_path / "b", tensors=big)).identity() == first
    tuned = {"w": big["w"] * 1.001, "v": big["v"]}  # same names, shapes, header and size
    assert open_model(write_model(tmp_path / "c", tensors=tuned)).identity() != first
    renamed = {"u": big["w"], "v": big["v"]}
    assert open_model(write_model(tmp_path / "d", tensors=renamed)).identity() != first
    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen3"}')
    assert open_model(tmp_path / "b").identity() != first


def test_links_are_followed(tmp_path: Path) -> None:
    """Folders of the hub's cache hold links into a folder of blobs."""
    write_model(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert torch.equal(open_model(tmp_path / "snapshot").load("embed"), TENSORS["embed"])


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), "not JSON"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "at byte 7.*not UTF-8"),
    "config is nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read"),
    "config has a huge number": (
        lambda f: (f / "config.json").write_text('{"a":' + "1" * 9999 + "}"),
        "cannot be read",
    ),
    "config is a folder": (lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], "no config.json"),
    "a shard is missing": (lambda f: second(f).unlink(), "shard model-00002-of-00003.safetensors is missing"),
    "a shard is a folder": (lambda f: [second(f).unlink(), second(f).mkdir()], "is missing"),
    "a shard is empty": (lambda f: second(f).write_bytes(b""), "model-00002-of-00003"),
    "a shard is cut": (lambda f: second(f).write_bytes(second(f).read_bytes()[:-1]), "model-00002-of-00003"),
    "a shard is text": (lambda f: second(f).write_text("version https://git-lfs"), "model-00002-of-00003"),
    "tensor in no shard": (lambda f: edit_index(f, ghost=second(f).name), "no shard holds the tensor 'ghost'"),
    "tensor in two shards": (lambda f: save_file({"embed": torch.ones(1)}, second(f)), "another shard holds it too"),
    "foreign format": (lambda f: save_file({"ids": torch.arange(3)}, second(f)), "format I64 is not supported"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "index with empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map"),
    "index with a list as map": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "weight_map"),
    "index with a number": (lambda f: edit_index(f, embed=3), "plain .safetensors name"),
    "index leads out": (lambda f: edit_index(f, embed="../other.safetensors"), "plain .safetensors name"),
    "index is absolute": (lambda f: edit_index(f, embed="/etc/other.safetensors"), "plain .safetensors name"),
    "index with a NUL": (lambda f: edit_index(f, embed="a\0.safetensors"), "plain .safetensors name"),
    "index names a pickle": (lambda f: edit_index(f, embed="model.bin"), "plain .safetensors name"),
    "no index": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor .* only model-00001"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_with_the_reason(sharded: Path, case: str) -> None:
    breaking, reason = BROKEN[case]
    breaking(sharded)
    with pytest.raises(ModelFileError, match=reason) as caught:
        open_model(sharded)
    assert str(sharded) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["pytorch_model.bin"], r"only as pickle files \(pytorch_model.bin\).* never reads them"),
        (["a.gguf", "b.gguf"], r"but GGUF: give the path of one file \(a.gguf, b.gguf\)"),
        (["README.md"], "neither model.safetensors nor"),
        ([], "neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors_say_what_they_have(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in [*files, "config.json"]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelFileError, match=reason):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "give the folder that also holds its config.json"),
        ("pytorch_model.bin", b"PK\3\4", "pickle files can run code"),
        ("model.gguf", b"GGU", "does not start with the GGUF magic"),
        ("model.gguf", b"", "does not start with the GGUF magic"),
        ("note.txt", b"hello there", "does not start with the GGUF magic"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=reason):
        open_model(tmp_path / name)


@pytest.mark.parametrize("path", ["nowhere.gguf", "n" * 300, "nul\0byte", "pipe", "loop"])
def test_paths_that_cannot_be_read_are_one_error(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelFileError):
        open_model(tmp_path / path)


def test_a_gguf_file_is_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError) as caught:
        open_model(tmp_path / "model.bin")
    assert "pickle" not in str(caught.value)


def mutate(data: bytes, rng: random.Random) -> bytes:
    header = 8 + struct.unpack("<Q", data[:8])[0]
    place = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 2:
            return struct.pack("<Q", rng.getrandbits(rng.randrange(1, 65))) + data[8:]
        case 3:
            place = rng.randrange(8, header)
            return data[:place] + bytes([rng.choice(b'0123456789"[]{},:-.eFB')]) + data[place + 1 :]
        case _:
            other = rng.randrange(len(data))
            return data[:place] + data[other : other + rng.randrange(30)] + data[place:]


def test_mutated_files_are_refused_or_safe(tmp_path: Path) -> None:
    """Whatever a file says, it opens with every tensor inside it, or ``ModelFileError`` says why not."""
    path = write_model(tmp_path) / "model.safetensors"
    original, rng = path.read_bytes(), random.Random(11)
    refused = opened = 0
    for _ in range(int(os.environ.get("TURBOMOE_FUZZ", "1000"))):
        path.write_bytes(mutate(original, rng))
        try:
            source = SafetensorsFolder.open(tmp_path)
        except ModelFileError:
            refused += 1
            continue
        opened += 1
        assert sum(info.nbytes for info in source.tensors.values()) <= path.stat().st_size
        for name, info in source.tensors.items():
            assert source.raw(name).numel() == info.nbytes
            assert source.load(name).shape == info.shape
        assert len(source.identity()) == 64
    assert refused > 500 and opened > 50


@given(st.text("ab./\\:-\0\n ~é", max_size=12).map(lambda text: text + ".safetensors"))
def test_accepted_shard_names_never_leave_the_folder(name: str) -> None:
    if is_shard_name(name):
        assert Path("/models/it", name).parent == Path("/models/it")
        assert os.path.normpath(os.path.join("/models/it", name)) == f"/models/it/{name}"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_json_is_an_object_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_text(json.dumps(value))
    if isinstance(value, dict):
        assert read_json_object(path) == value
        return
    with pytest.raises(ModelFileError):
        read_json_object(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_json_object(path), dict)
    except ModelFileError as error:
        assert str(path) in str(error)


def test_json_has_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    size = path.stat().st_size
    assert read_json_object(path, limit=size)
    with pytest.raises(ModelFileError, match=f"larger than {size - 1} bytes"):
        read_json_object(path, limit=size - 1)


def test_a_json_folder_lists_only_what_exists(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    folder = JsonFolder(tmp_path, ("a.json", "b.json"))
    assert list(folder) == ["a"] and len(folder) == 1
    with pytest.raises(KeyError):
        folder["b"]
