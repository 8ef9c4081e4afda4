"""Key and value means: one constant per model, layer, KV head and channel, calibrated once and kept beside the model.

Some models add a large constant vector to their keys (the k_proj bias of Qwen2 and Qwen2.5); at 3 bits it drowns
everything else. Subtracting a fixed mean before encoding removes it, and softmax does not notice. The digest of the
means is part of every saved cache, because codes written with one set of means are noise under another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from turbomoe.errors import IntegrityError, TurbomoeError
from turbomoe.files.atomic import write_bytes

FORMAT, VERSION = "turbomoe-kv-means", "1"
LARGEST_FILE = 1 << 28  # 1,024 layers of 64 heads of 512 values, twice, take half of it


class MeansError(TurbomoeError):
    """Means that cannot be used: a damaged file, another model's, or numbers that are not finite."""


@dataclass(frozen=True)
class KVMeans:
    """Means of one model. ``keys`` and ``values`` map a layer to float32 [kv_heads, head_dim]; do not write to them.

    ``identity`` is the model's (``ModelSource.identity``). Raises ``MeansError`` for arrays that do not fit together.
    """

    keys: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]
    identity: str

    def __post_init__(self) -> None:
        if self.keys.keys() != self.values.keys():
            raise MeansError("KV means must cover the same layers for keys and for values")
        for layer in self.keys:
            _check_layer(layer, self.keys[layer], self.values[layer])

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
            means = cls(_side(tensors, "key"), _side(tensors, "value"), identity)
        except OSError as error:
            raise MeansError(f"Cannot read the KV means in {name}: {error.strerror or error}") from error
        except (SafetensorError, ValueError, KeyError, MeansError) as error:
            raise _refusal(name, error) from error
        if means.digest != metadata.get("digest"):
            raise _refusal(name, "the contents do not match their checksum")
        return means

    def _tensors(self) -> dict[str, torch.Tensor]:
        sides = (("key", self.keys), ("value", self.values))
        return {f"{side}.{layer}": mean.cpu().contiguous() for side, means in sides for layer, mean in means.items()}


class MeanAccumulator:
    """Sums keys and values over calibration tokens, in float64, layer by layer."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Count the tokens of ``keys`` and ``values`` [..., kv_heads, tokens, head_dim], post-RoPE, any float type."""
        if keys.shape != values.shape:
            raise IntegrityError(f"Keys {tuple(keys.shape)} and values {tuple(values.shape)} of layer {layer} differ")
        sums = _token_sum(keys), _token_sum(values)
        if layer in self._sums:
            if self._sums[layer][0].shape != sums[0].shape:
                raise IntegrityError(f"Layer {layer} changed its number or size of heads while its means were taken")
            sums = self._sums[layer][0] + sums[0], self._sums[layer][1] + sums[1]
        self._sums[layer] = sums
        self._tokens[layer] = self._tokens.get(layer, 0) + keys.numel() // sums[0].numel()

    def finish(self, identity: str) -> KVMeans:
        """The means of what was added, as float32 on the CPU. Raises ``MeansError`` if that was nothing."""
        if not self._tokens or min(self._tokens.values()) == 0:
            raise MeansError("KV means cannot be taken", why="no tokens were counted")
        means = {
            layer: [(total / self._tokens[layer]).to("cpu", torch.float32) for total in sums]
            for layer, sums in self._sums.items()
        }
        keys, values = ({layer: pair[side] for layer, pair in means.items()} for side in (0, 1))
        return KVMeans(keys, values, identity)


def _token_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum [..., kv_heads, tokens, head_dim] over everything but heads and channels: float64 [kv_heads, head_dim]."""
    return x.double().sum(-2).reshape(-1, x.shape[-3], x.shape[-1]).sum(0)


def _check_layer(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    both = (keys, values)
    if layer < 0 or any(mean.dtype != torch.float32 or mean.dim() != 2 or mean.numel() == 0 for mean in both):
        raise MeansError(f"The KV means of layer {layer} are not float32 arrays [kv_heads, head_dim]")
    if keys.shape != values.shape:
        raise MeansError(f"The key and value means of layer {layer} differ in shape")
    if not all(bool(torch.isfinite(mean).all()) for mean in both):
        raise MeansError(f"The KV means of layer {layer} are not finite numbers")


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
    if metadata.get("version") != VERSION:
        raise MeansError(f"It has version {metadata.get('version')!r}, and this turbomoe reads {VERSION!r}")
    if metadata.get("identity") != identity:
        raise MeansError("It belongs to another model")


def _side(tensors: Mapping[str, torch.Tensor], side: str) -> dict[int, torch.Tensor]:
    names = [name for name in tensors if name.startswith(f"{side}.")]
    return {int(name.removeprefix(f"{side}.")): tensors[name] for name in names}


def _refusal(path: str, reason: Exception | str) -> MeansError:
    what = reason.what if isinstance(reason, MeansError) else str(reason)
    return MeansError(f"Cannot use the KV means in {path}: {what}", fix="Delete the file, and means are taken again")
