"""Fast bodies by family. A family without one runs the stock layers; adding one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from turbomoe.kv.shape import LayerShape
from turbomoe.models.fast.base import Body
from turbomoe.models.fast.llama import LlamaBody
from turbomoe.models.fast.qwen35 import Qwen35Body

__all__ = ["BODIES", "Body", "make_body"]

BODIES: dict[str, Callable[[Any, Sequence[LayerShape]], Body]] = {
    "llama": LlamaBody,
    "qwen2": LlamaBody,
    "qwen3": LlamaBody,
    "qwen3moe": LlamaBody,
    "qwen35": Qwen35Body,
    "qwen35moe": Qwen35Body,
}
# Frequencies of these depend on how long the sequence has become, which the stock module handles and ours does not.
_MOVING_ROPE = ("dynamic", "longrope")


def make_body(family: str, shell: Any, shapes: Sequence[LayerShape]) -> Body | None:
    """The fast body of a filled ``shell`` of ``family``; None where the stock layers have to run.

    Call it once a shell, after its weights are final: float projections of one input become views of one matrix.
    """
    build, config = BODIES.get(family), shell.config
    if build is None or config.hidden_act != "silu":
        return None
    if config.rope_parameters["rope_type"] in _MOVING_ROPE:
        return None
    return build(shell, shapes)
