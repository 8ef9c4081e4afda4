"""GGUF metadata read with suspicion: every value has a type, a range and an error that names its key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from turbomoe.errors import ModelError
from turbomoe.files.base import ModelSource

MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_WIDTH = 1 << 20
MAX_EXPERTS = 1 << 14
MAX_CONTEXT = 1 << 30


class GgufHeader:
    """The metadata of one GGUF model. Keys are given without the architecture prefix."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.architecture = str(source.metadata.get("general.architecture", ""))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.source.metadata

    def has_tensor(self, name: str) -> bool:
        return name in self.source.tensors

    def integer(self, key: str, *, low: int = 1, high: int = MAX_WIDTH, default: int | None = None) -> int:
        """The integer under ``key``; without one, ``default``, or an error if that is None too."""
        return self._whole(key, "it", self._get(key, default), low, high)

    def integers(self, key: str, *, most: int, low: int = 1, high: int = MAX_WIDTH) -> list[int]:
        """The array of at most ``most`` integers under ``key``."""
        items = self.items(key, most=most)
        return [self._whole(key, f"element {index}", item, low, high) for index, item in enumerate(items)]

    def number(self, key: str, *, default: float | None = None) -> float:
        """The positive finite number under ``key``."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, f"it must be a number, not {_show(value)}")
        if not (math.isfinite(value) and value > 0):
            raise self.wrong(key, f"it must be positive and finite, not {value}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """The truth value under ``key``."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"it must be true or false, not {_show(value)}")
        return value

    def is_array(self, key: str) -> bool:
        value = self.source.metadata.get(f"{self.architecture}.{key}")
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)

    def items(self, key: str, *, length: int | None = None, most: int = MAX_WIDTH) -> list[Any]:
        """The array under ``key`` as a list, of ``length`` elements if that is given, and of ``most`` at most."""
        value = self._get(key, None)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise self.wrong(key, f"it must be an array, not {_show(value)}")
        if length is not None and len(value) != length:
            raise self.wrong(key, f"it must have {length} elements, not {len(value)}")
        if len(value) > most:
            raise self.wrong(key, f"it must have at most {most} elements, not {len(value)}")
        return list(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"it must be a string, not {_show(value)}")
        return value

    def token_id(self, name: str) -> int | None:
        """A special token's id from ``tokenizer.ggml.<name>_token_id``, None where the file has none."""
        value = self.source.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < self.vocab_size else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: what the weights say, not what the tokenizer claims."""
        info = self.source.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise ModelError("The tensor token_embd.weight is missing or not a matrix", why=f"File {self.source.path}")
        return info.shape[0]

    def wrong(self, key: str, why: str) -> ModelError:
        """An error about the value under ``key``, ready to be raised."""
        return ModelError(f"The metadata key {self.architecture}.{key} of {self.source.path} cannot be used", why=why)

    def _whole(self, key: str, what: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, f"{what} must be an integer, not {_show(value)}")
        if not low <= value <= high:
            raise self.wrong(key, f"{what} must be between {low} and {high}, not {value}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.source.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"The metadata key {self.architecture}.{key} is missing from {self.source.path}",
                why=f"A {self.architecture} model cannot be built without it",
                fix="Convert the model again with a current converter",
            )
        return value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
