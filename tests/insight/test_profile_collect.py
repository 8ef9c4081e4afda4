"""What the profiler sums up, against counting by hand, sighting by sighting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.insight.routing import dice_trace, make_trace, model
from turbomoe.errors import IntegrityError
from turbomoe.experts.base import Phase
from turbomoe.insight.profile import LAGS, RoutingStats
from turbomoe.insight.profile_collect import BLOCK, SAMPLE, RoutingProfiler
from turbomoe.insight.trace import DROP_PROMPT, END_PROMPT, Trace, TraceRecorder

OF = model(2, 8, 2)
HIDDEN = 6
GATES = [torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(2)]
HALF_LIFE = 5.0


def make(trace: bool = True, gates: object = GATES) -> RoutingProfiler:
    return RoutingProfiler(OF, gates, HALF_LIFE, TraceRecorder(OF) if trace else None)  # type: ignore[arg-type]


def inputs(ids: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router of a layer saw and how it weighed its choice: for ids [rows, k]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(ids.shape, generator=generator)
    return torch.randn(len(ids), HIDDEN, generator=generator), weights.half().float()


def run(profiler: RoutingProfiler, trace: Trace) -> None:
    for number, step in enumerate(trace.steps()):
        profiler.begin_step(step.phase)
        for layer in range(len(OF.layers)):
            hidden, weights = inputs(step.ids[layer], number * 7 + layer)
            profiler.record(layer, hidden, torch.from_numpy(step.ids[layer]).long(), weights)
        profiler.end_step()
        if step.after == END_PROMPT:
            profiler.end_prompt()
        elif step.after == DROP_PROMPT:
            profiler.drop_prompt()


def by_hand(trace: Trace) -> RoutingStats:
    """The same sums with loops over tokens, layers and experts."""
    stats, past, in_block, phase = RoutingStats.zeros(*OF.shape), [], 0, Phase.PREFILL
    for number, step in enumerate(trace.steps()):
        row = 0 if step.phase is Phase.PREFILL else 1
        in_block = 0 if step.phase is not phase or in_block >= BLOCK or row == 0 else in_block
        phase = step.phase
        stats.tokens[row] += step.ids.shape[1]
        if row == 1:
            stats.recent *= 0.5 ** (1 / HALF_LIFE)
        for layer, rows in enumerate(step.ids):
            weights = inputs(rows, number * 7 + layer)[1]
            for picked, scale in zip(rows.tolist(), weights.tolist(), strict=True):
                for expert, weight in zip(picked, scale, strict=True):
                    stats.counts[row, layer, expert] += 1
                    stats.mass[row, layer, expert] += weight * (row == 0 or in_block % SAMPLE == 0)
                    stats.recent[layer, expert] += row
                    for lag in range(1, min(LAGS, len(past)) + 1):
                        if row == 1:
                            stats.reuse_pairs[layer, lag - 1] += 1
                            stats.reuse_hits[layer, lag - 1] += expert in past[-lag][layer]
            if layer and (row == 0 or in_block % SAMPLE == 0):
                scores = inputs(step.ids[layer - 1], number * 7 + layer - 1)[0] @ GATES[layer].T
                for picked, guess in zip(rows.tolist(), scores.argsort(descending=True)[:, :2].tolist(), strict=True):
                    stats.recall_pairs[row, layer] += len(picked)
                    stats.recall_hits[row, layer] += len(set(picked) & set(guess))
        past = [*past, [set(rows.reshape(-1).tolist()) for rows in step.ids]] if row == 1 else []
        in_block = 0 if step.after else in_block + 1
    return stats


def same(a: RoutingStats, b: RoutingStats) -> None:
    for name, array in a.arrays().items():
        assert np.allclose(array, b.arrays()[name], rtol=1e-6), name


@given(st.integers(1, 200), st.integers(0, 10_000), st.integers(1, 3), st.booleans())
@settings(max_examples=25)
def test_sums_are_those_of_counting_by_hand(steps: int, seed: int, rows: int, prompts: bool) -> None:
    trace = dice_trace(OF, steps, seed, rows=rows, prompts=prompts)
    profiler = make()
    run(profiler, trace)
    same(profiler.finish(), by_hand(trace))
    assert profiler.trace is not None
    found = profiler.trace.finish("dice")
    for name in ("ids", "rows", "phases", "after"):
        assert np.array_equal(getattr(found, name), getattr(trace, name)), name


def test_the_trace_keeps_the_weights_in_half_precision() -> None:
    trace, profiler = dice_trace(OF, 30, 3, rows=2), make()
    run(profiler, trace)
    profiler.finish()
    assert profiler.trace is not None
    expected = [
        np.stack([inputs(step.ids[layer], n * 7 + layer)[1].numpy() for layer in range(2)], axis=1)
        for n, step in enumerate(trace.steps())
    ]
    assert np.array_equal(profiler.trace.finish("x").weights, np.concatenate(expected).astype(np.float16))


@pytest.mark.parametrize("broken_at", [0, 1, 2])
@pytest.mark.parametrize("phase", Phase)
def test_a_pass_that_breaks_off_leaves_no_trace(broken_at: int, phase: Phase) -> None:
    trace, profiler, plain = dice_trace(OF, 40, 1), make(), make()
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for number, step in enumerate(trace.steps()):
        if number % 3 == 0:
            profiler.begin_step(phase)
            for layer in range(broken_at):
                profiler.record(layer, torch.ones(3, HIDDEN), ids, torch.ones(3, 2))
        for into in (profiler, plain):
            run(into, make_trace(OF, [(step.phase, step.ids.transpose(1, 0, 2), step.after)]))
    one, other = profiler.finish().arrays(), plain.finish().arrays()
    # A broken pass of the other phase ends the block, and with it shifts which steps are sampled.
    for name in ("tokens", "counts", "recent", *(["mass", "recall_pairs"] if phase is Phase.DECODE else [])):
        assert np.allclose(one[name], other[name]), name


def test_passes_outside_steps_leave_no_trace() -> None:
    profiler = make()
    profiler.record(0, torch.ones(1, HIDDEN), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    assert not profiler.finish().counts.any()


def test_a_pass_without_all_layers_is_a_defect() -> None:
    profiler = make()
    profiler.begin_step(Phase.DECODE)
    profiler.record(0, torch.ones(1, HIDDEN), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(IntegrityError, match="every layer"):
        profiler.end_step()


def test_what_it_was_shown_may_be_overwritten() -> None:
    """Serving paths keep their buffers: nothing may depend on them after the call."""
    profiler, ids = make(), torch.zeros(1, 2, dtype=torch.int64)
    hidden, weights = torch.ones(1, HIDDEN), torch.ones(1, 2)
    for expert in (3, 6):
        profiler.begin_step(Phase.DECODE)
        for layer in range(2):
            ids[0, 0], ids[0, 1] = expert, 5
            weights.fill_(1)
            profiler.record(layer, hidden, ids, weights)
            ids.fill_(0), weights.fill_(9), hidden.fill_(torch.nan)
        profiler.end_step()
    stats = profiler.finish()
    assert stats.counts[1].tolist() == [[0, 0, 0, 1, 0, 2, 1, 0]] * 2
    assert stats.mass[1].sum() == 4  # of the first step alone, one in eight


@pytest.mark.parametrize("gates", [[None, None], [None, GATES[1]], [GATES[0], None]])
def test_recall_is_left_out_where_there_is_no_gate(gates: list[torch.Tensor | None]) -> None:
    profiler = make(gates=gates)
    run(profiler, dice_trace(OF, 20, 0))
    pairs = profiler.finish().recall_pairs
    assert pairs[:, 0].sum() == 0 and bool(pairs[:, 1].sum()) == (gates[1] is not None)


def test_a_gate_that_sees_what_decides_recalls_everything() -> None:
    """Layer 1 routed by its own gate on layer 0's input: recall 1. By chance it would be 1/4."""
    profiler = make()
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(9))
    ids = (hidden @ GATES[1].T).topk(2).indices
    profiler.begin_step(Phase.PREFILL)
    for layer in range(2):
        profiler.record(layer, hidden, ids, torch.ones(50, 2))
    profiler.end_step()
    stats = profiler.finish()
    assert stats.recall_hits[0].tolist() == stats.recall_pairs[0].tolist() == [0, 100]


def test_decoder_layers_are_found_by_their_number() -> None:
    profiler = RoutingProfiler(replace(OF, layers=(3, 9)), GATES, HALF_LIFE)
    profiler.begin_step(Phase.DECODE)
    for layer, expert in ((9, 1), (3, 2)):
        profiler.record(layer, torch.ones(1, HIDDEN), torch.tensor([[expert, 0]]), torch.ones(1, 2))
    profiler.end_step()
    counts = profiler.finish().counts[1]
    assert counts[0, 2] == counts[1, 1] == 1 and counts.sum() == 4
