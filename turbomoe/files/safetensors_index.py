"""Which files of a safetensors folder hold the weights: one ``model.safetensors``, or the shards an index names."""

from __future__ import annotations

from pathlib import Path

from turbomoe.errors import ModelFileError
from turbomoe.files import PICKLE_SUFFIXES
from turbomoe.files.json_file import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLE = "it holds weights only as pickle files ({}), which can run code when read, so turbomoe never reads them"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index declares it; every file name is a plain one inside the folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(path, "it must be an object of tensor names and file names", field="weight_map")
    for tensor, name in weight_map.items():
        if not is_shard_name(name):
            reason = f"the file of tensor {tensor!r} must be a plain .safetensors name in the same folder, not {name!r}"
            raise ModelFileError(path, reason, field="weight_map")
    return weight_map


def is_shard_name(name: object) -> bool:
    """Whether ``name`` is a file name that cannot lead out of its folder."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or len(name) > 255:
        return False
    return name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")


def find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of ``folder`` in a fixed order, and the index (empty for a single file)."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if not (folder / INDEX).is_file():
        raise ModelFileError(folder, _why_no_weights(folder))
    index = read_index(folder / INDEX)
    shards = [folder / name for name in sorted(set(index.values()))]
    for shard in shards:
        if not shard.is_file():
            fix = "Copy or download the missing file"
            raise ModelFileError(folder / INDEX, f"the shard {shard.name} is missing", field="weight_map", fix=fix)
    return shards, index


def _why_no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"it has neither {SINGLE} nor {INDEX}, only {_some(others)}"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"it has no safetensors, but GGUF: give the path of one file ({_some(ggufs)})"
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return _PICKLE.format(_some(pickles))
    return f"it has neither {SINGLE} nor {INDEX}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
