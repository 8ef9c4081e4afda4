"""Runs texts through a model and profiles its routing: a prompt in prefill, then the text's own tokens one by one.

Decode is teacher-forced: each step is fed the next token of the text, not a token that the model drew. So two runs
give the same profile, and it belongs to the text and not to what a small model makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from turbomoe.config import KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.errors import RequestError
from turbomoe.experts.base import Phase
from turbomoe.experts.module import StoreExperts
from turbomoe.insight.profile_collect import RoutingProfiler
from turbomoe.insight.profile_model import routed_model
from turbomoe.insight.trace import TraceRecorder
from turbomoe.kv.means import KVMeans
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.routers import gate_weights

PROMPT_SHARE = 4  # one token in four of a sequence is its prompt
SHORTEST = 16  # a sequence below this many tokens tells nothing about reuse

Progress = Callable[[int, int], None]


def make_profiler(model: LoadedModel, half_life: float, trace: bool = False) -> RoutingProfiler:
    """A profiler for ``model``; set it as ``model.experts.observer``. Raises ``ModelError`` for a dense model."""
    shape = routed_model(model)
    by_layer = {module.layer: module for module in model.shell.modules() if isinstance(module, StoreExperts)}
    gates = gate_weights(model.shell, [by_layer[layer] for layer in shape.layers])
    return RoutingProfiler(shape, gates, half_life, TraceRecorder(shape) if trace else None)


def sequences(ids: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """``ids`` cut into sequences of ``length`` tokens; a short rest is left out."""
    for start in range(0, len(ids), length):
        part = ids[start : start + length]
        if len(part) >= SHORTEST:
            yield part


def run_texts(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    ctx_size: int,
    kv: KVSettings,
    means: KVMeans | None = None,
    progress: Progress | None = None,
) -> int:
    """Run tokenised ``texts`` through ``model`` in sequences of ``ctx_size`` tokens; tokens run.

    Whoever observes ``model.experts`` sees prefill, the prompt's end, and decode steps of one row. Raises
    ``RequestError`` if there is nothing to run.
    """
    parts = [part for ids in texts for part in sequences(ids, ctx_size)]
    total, done = sum(map(len, parts)), 0
    if not parts:
        raise RequestError("The texts are too short to profile on", fix=f"Give at least {SHORTEST} tokens")
    runner = ModelRunner(model, kv, slots=1, ctx_size=ctx_size, means=means)
    for part in parts:
        for count in _run_one(model, runner, part):
            done += count
            if progress is not None:
                progress(done, total)
    return total


def _run_one(model: LoadedModel, runner: ModelRunner, ids: Sequence[int]) -> Iterator[int]:
    """One sequence; yields the tokens of each pass. The slot is empty again at the end."""
    assert model.experts is not None
    prompt = max(1, len(ids) // PROMPT_SHARE)
    runner.forward([0], torch.tensor([ids[:prompt]]), Phase.PREFILL)
    model.experts.end_prompt()
    yield prompt
    for token in ids[prompt:]:
        runner.forward([0], torch.tensor([[token]]), Phase.DECODE)
        yield 1
    runner.memory.release(0)
