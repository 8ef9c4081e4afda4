"""The sampling parameters that a model's makers recommend, out of its files."""

from __future__ import annotations

import math
from typing import Any

from turbomoe.files.base import ModelSource

# Our names (those of generation_config.json) and GGUF's.
_GGUF_NAMES = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def sampling_defaults(source: ModelSource) -> dict[str, Any]:
    """Recommended ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``: those that the file gives.

    Values that are not finite numbers are left out: a recommendation is not worth refusing a model for.
    """
    if source.kind == "gguf":
        found = {ours: source.metadata.get(f"general.sampling.{theirs}") for ours, theirs in _GGUF_NAMES.items()}
    else:
        generation = source.metadata.get("generation_config", {})
        found = {ours: generation.get(ours) for ours in _GGUF_NAMES}
        if generation.get("do_sample") is False:
            found["temperature"] = 0.0
    return {key: number for key, value in found.items() if (number := _number(value)) is not None}


def _number(value: Any) -> int | float | None:
    """A finite number or None. GGUF keeps float32: what was written as 0.6 must not be shown as 0.6000000238."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) else value
