"""Key and value means and key scales: fitted once for a model (``fit.py``) and kept beside it.

Some models add a large constant vector to their keys (the k_proj bias of Qwen2 and Qwen2.5), and a few channels of
keys are far larger than the rest while queries have next to nothing there; at 3 bits they drown everything else.
Subtracting a mean that turns with the position (``turns.py``) and dividing each channel by a scale removes both;
reading adds the mean's score and multiplies the query by the scales. The digest is part of every saved cache, because
codes written with one set of means are noise under another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from turbomoe.errors import TurbomoeError
from turbomoe.files.atomic import write_bytes

FORMAT, VERSION = "turbomoe-kv-means", "2"
LARGEST_FILE = 1 << 28  # 512 layers of 64 heads of 512 values, three times, take three quarters of it
LEAST_SCALE = 1e-4  # beyond it and its inverse no fit goes


class MeansError(TurbomoeError):
    """Means that cannot be used: a damaged file, another model's, or numbers that are not finite."""


class OlderMeansError(MeansError):
    """Means that an older version fitted: nothing is wrong with them, and they are fitted anew."""


@dataclass(frozen=True)
class KVMeans:
    """Means of one model. Mappings go from a layer to float32 [kv_heads, head_dim]; do not write to them.

    keys          the mean of a page's keys, as it is where the page begins at position 0
    values        the mean of values
    identity      the model's (``ModelSource.identity``)
    scales        what keys are divided by and queries multiplied with; empty for ones
    frequencies   float32 [r], radians a token by which channels i and i + r of keys turn; empty where none do

    Raises ``MeansError`` for arrays that do not fit together.
    """

    keys: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]
    identity: str
    scales: Mapping[int, torch.Tensor] = field(default_factory=dict)
    frequencies: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        if self.keys.keys() != self.values.keys():
            raise MeansError("KV means must cover the same layers for keys and for values")
        if self.scales and self.scales.keys() != self.keys.keys():
            raise MeansError("KV scales must cover the layers that the means cover")
        for layer in self.keys:
            _check_layer(layer, self.keys[layer], self.values[layer], self.scales.get(layer))
        _check_frequencies(self.frequencies, min((mean.shape[1] for mean in self.keys.values()), default=0))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the identity, the layers, the shapes and the little-endian float32 values."""
        hasher = hashlib.sha256(f"{FORMAT}/{VERSION}\n{self.identity}\n".encode())
        for name, mean in sorted(self._tensors().items()):
            hasher.update(f"{name} {tuple(mean.shape)}\n".encode())
            hasher.update(mean.numpy().astype("<f4").tobytes())
        return hasher.hexdigest()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the means to ``path`` as safetensors, whole or not at all. Raises ``files.atomic.WriteError``."""
        metadata = {"format": FORMAT, "version": VERSION, "identity": self.identity, "digest": self.digest}
        write_bytes(path, save(self._tensors(), metadata))

    @classmethod
    def load(cls, path: str | PathLike[str], identity: str) -> KVMeans:
        """Read the means of the model ``identity``.

        Raises ``MeansError`` for a missing, foreign, damaged or newer file, and for the means of another model.
        """
        name = fspath(path)
        try:
            _check_size(name)
            metadata, tensors = _read(name)
            _check_metadata(metadata, identity)
            turning = tensors.pop("frequencies")
            key, value, scale = (_side(tensors, name) for name in ("key", "value", "scale"))
            means = cls(key, value, identity, scale, turning)
        except OSError as error:
            raise MeansError(f"Cannot read the KV means in {name}: {error.strerror or error}") from error
        except (SafetensorError, ValueError, KeyError, MeansError) as error:
            raise _refusal(name, error) from error
        if means.digest != metadata.get("digest"):
            raise _refusal(name, "the contents do not match their checksum")
        return means

    def _tensors(self) -> dict[str, torch.Tensor]:
        sides = (("key", self.keys), ("value", self.values), ("scale", self.scales))
        found = {f"{side}.{layer}": mean.cpu().contiguous() for side, means in sides for layer, mean in means.items()}
        return found | {"frequencies": self.frequencies.cpu().contiguous()}


def _check_layer(layer: int, keys: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None) -> None:
    found = (keys, values, *(() if scales is None else (scales,)))
    if layer < 0 or any(x.dtype != torch.float32 or x.dim() != 2 or x.numel() == 0 for x in found):
        raise MeansError(f"The KV means of layer {layer} are not float32 arrays [kv_heads, head_dim]")
    if any(x.shape != keys.shape for x in found):
        raise MeansError(f"The key and value means of layer {layer} differ in shape")
    if not all(bool(torch.isfinite(x).all()) for x in found):
        raise MeansError(f"The KV means of layer {layer} are not finite numbers")
    if scales is not None and not bool(((scales >= LEAST_SCALE) & (scales <= 1 / LEAST_SCALE)).all()):
        raise MeansError(f"The key scales of layer {layer} are not between {LEAST_SCALE} and {1 / LEAST_SCALE:.0f}")


def _check_frequencies(frequencies: torch.Tensor, head_dim: int) -> None:
    if frequencies.dtype != torch.float32 or frequencies.dim() != 1 or 2 * len(frequencies) > head_dim:
        raise MeansError("The rotary frequencies are not a float32 array of at most half as many values as a head")
    if not bool(torch.isfinite(frequencies).all()):
        raise MeansError("The rotary frequencies are not finite numbers")


def _check_size(path: str) -> None:
    if not Path(path).is_file():  # reading a pipe would wait forever
        raise MeansError("It is not there" if not Path(path).exists() else "It is not a regular file")
    size = Path(path).stat().st_size
    if size > LARGEST_FILE:
        raise MeansError(f"It is {size} bytes long, more than any means")


def _read(path: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check_metadata(metadata: Mapping[str, str], identity: str) -> None:
    if metadata.get("format") != FORMAT:
        raise MeansError("This is not a file of KV means")
    if (version := metadata.get("version", "")) != VERSION:
        older = version.isascii() and version.isdigit() and len(version) < 9 and int(version) < int(VERSION)
        kind = OlderMeansError if older else MeansError
        raise kind(f"It has version {metadata.get('version')!r}, and this turbomoe reads {VERSION!r}")
    if metadata.get("identity") != identity:
        raise MeansError("It belongs to another model")


def _side(tensors: Mapping[str, torch.Tensor], side: str) -> dict[int, torch.Tensor]:
    names = [name for name in tensors if name.startswith(f"{side}.")]
    return {int(name.removeprefix(f"{side}.")): tensors[name] for name in names}


def _refusal(path: str, reason: Exception | str) -> MeansError:
    what = reason.what if isinstance(reason, MeansError) else str(reason)
    kind = OlderMeansError if isinstance(reason, OlderMeansError) else MeansError
    return kind(f"Cannot use the KV means in {path}: {what}", fix="Delete the file, and means are taken again")
