"""What a caller asks of the engine, and what comes back while it works."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from turbomoe.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0.0:  # below a thousandth, logits divided by it overflow
            _within("temperature", self.temperature, 0.001, 100.0)
        _within("top_k", self.top_k, 0, 1 << 24)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _within("seed", self.seed, 0, (1 << 63) - 1)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} must be between {low} and {high}, not {value}")


@dataclass(frozen=True)
class Request:
    """A prompt in tokens and what to do with it. ``max_tokens`` 0 means: until the context is full."""

    prompt: tuple[int, ...]
    max_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("The prompt is empty", fix="Give at least one token")
        _within("max_tokens", self.max_tokens, 0, 1 << 24)
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise RequestError(
                f"Give at most {MAX_STOP_STRINGS} stop strings of 1 to {MAX_STOP_LENGTH} characters each"
            )


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens
    CONTEXT = "context"  # the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Event:
    """News of one request. ``text`` is final; ``token`` is None in the last event of a stopped or cancelled one.

    ``error`` is what ended it when ``finish`` is ``ERROR``.
    """

    request_id: int
    text: str = ""
    token: int | None = None
    finish: Finish | None = None
    error: Exception | None = None


@dataclass
class Usage:
    """Token counts of one request; ``reused`` prompt tokens were found in the cache and cost no prefill."""

    prompt: int = 0
    reused: int = 0
    generated: int = 0
