"""The front door: sizes and notices, off is off, steps and prompts, counters, equality of cache on and off."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts.helpers import DeferredCopies, make_experts, random_work
from turbomoe.config import ExpertSettings
from turbomoe.errors import IntegrityError, SettingsError
from turbomoe.experts.arena import TAIL
from turbomoe.experts.base import Phase
from turbomoe.experts.module import StoreExperts
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.notices import StrictError, board

MIXED = make_experts(
    {0: ("Q4_0", "Q4_0", "Q8_0"), 1: ("F32",) * 3, 2: ("Q4_0", "Q4_0", "Q8_0"), 6: ("Q5_1", "F16", "BF16")},
    num_experts=16,
)
STORE, LAYERS, E, K, H = MIXED.store, MIXED.store.layers, 16, 2, 32
COLUMN = sum(layout.blob_bytes for layout in STORE.layouts)  # one slot in every layer
TAILS = TAIL * len(STORE.size_classes)
OFF = "the expert cache stays off"


def runtime(slots: int = 8, engine: DeferredCopies | None = None, **wanted) -> ExpertRuntime:
    return ExpertRuntime(STORE, ExpertSettings(cache=slots * COLUMN + TAILS, **wanted), "cpu", K, engine)


def forward(to: ExpertRuntime, rows: int, seed: int, phase: Phase | None = Phase.DECODE) -> torch.Tensor:
    """One step of all layers; [layers, rows, hidden]."""
    if phase:
        to.begin_step(phase)
    out = torch.stack([to.run(layer, *random_work(rows, E, K, H, seed * 31 + layer)) for layer in LAYERS])
    if phase:
        to.end_step()
    return out


OFF_RUNTIME = ExpertRuntime(STORE, ExpertSettings(), "cpu", K)


# -- off is off ----------------------------------------------------------------------------------------------

CACHE_MODULES = ("slots", "residency", "promotion", "integrity", "cache", "counters", "routing", "sizing")
PROBE = """
import sys, torch
from turbomoe.config import ExpertSettings
from turbomoe.experts.base import Phase
from turbomoe.experts.module import StoreExperts
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.experts.store import StoreBuilder, make_layout
parts = [("gate", (4, 4), "F32"), ("up", (4, 4), "F32"), ("down", (4, 4), "F32")]
builder = StoreBuilder([make_layout(0, 1, 4, 4, "silu", parts)])
for name, _, _ in parts:
    builder.fill(0, 0, name, torch.ones(16).view(torch.uint8))
runtime = ExpertRuntime(builder.finish(), ExpertSettings(cache=CACHE), "cpu", 1)
module = StoreExperts(0)
module.bind(runtime)
runtime.begin_step(Phase.PREFILL)
module(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
runtime.end_step(); runtime.end_prompt(); runtime.check_integrity(); runtime.describe()
print(runtime.cache, *sorted(m for m in sys.modules if m.startswith("turbomoe.experts.")))
"""


@pytest.mark.parametrize(("cache", "loaded"), [("'off'", False), ("1 << 20", True)])
def test_off_imports_nothing_of_the_cache(cache: str, loaded: bool) -> None:
    command = [sys.executable, "-c", PROBE.replace("CACHE", cache)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("None ") == (not loaded)
    for name in CACHE_MODULES:
        assert (f"turbomoe.experts.{name}" in said.split()) == loaded, name


def test_off_holds_the_store_and_nothing_else() -> None:
    fresh = ExpertRuntime(STORE, ExpertSettings(), "cpu", K)
    assert fresh.nbytes == {"cpu": STORE.nbytes}
    assert fresh.describe()["cache"] == "off"
    with pytest.raises(SettingsError, match="no expert cache"):
        fresh.resize(4)


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 1, COLUMN - 1])
@pytest.mark.parametrize("slots", [8, 9, 15, 16])
def test_a_size_gives_equal_slots_that_fit_into_it(slots: int, extra: int) -> None:
    size = slots * COLUMN + TAILS + extra
    made = ExpertRuntime(STORE, ExpertSettings(cache=size), "cpu", K)
    assert made.cache and made.cache.slots.quota.tolist() == [slots] * len(LAYERS)
    arenas = made.cache.slots.nbytes - made.cache.slots.map.nbytes
    assert arenas + TAILS <= size < arenas + TAILS + COLUMN


def test_more_than_everything_is_everything() -> None:
    made = runtime(slots=1000)
    assert made.cache and made.cache.slots.quota.tolist() == [E] * len(LAYERS)


@pytest.mark.parametrize("size", [0, 1, 8 * COLUMN + TAILS - 1])
def test_a_size_below_the_floor_is_off_and_says_what_it_takes(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = board.counts[OFF]
    assert ExpertRuntime(STORE, ExpertSettings(cache=size), "cpu", K).cache is None
    assert board.counts[OFF] == before + 1
    said = capsys.readouterr().err
    assert f"at least {8 * COLUMN + TAILS}" in said and str(size) in said


@pytest.mark.parametrize(("top_k", "floor"), [(2, 8), (4, 8), (5, 10), (8, 16), (10, 16)])
def test_the_floor_is_twice_top_k_but_eight_at_least_and_all_at_most(top_k: int, floor: int) -> None:
    for slots, on in ((floor - 1, False), (floor, True)):
        settings = ExpertSettings(cache=slots * COLUMN + TAILS)
        assert (ExpertRuntime(STORE, settings, "cpu", top_k).cache is not None) == on


def test_auto_without_a_gpu_is_off_and_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "_printed", set())
    assert ExpertRuntime(STORE, ExpertSettings(cache="auto"), "cpu", K).cache is None
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setattr(board, "strict", True)
    with pytest.raises(StrictError, match="expert cache"):
        ExpertRuntime(STORE, ExpertSettings(cache="auto"), "cpu", K)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="negative"):
        ExpertRuntime(STORE, ExpertSettings(cache=-1), "cpu", K)


# -- the same tokens -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(Phase), st.integers(1, 40)), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=25)
def test_cache_on_equals_cache_off_bit_for_bit_across_promotions(steps: list[tuple[Phase, int]], seed: int) -> None:
    on = runtime(min_sightings=1, hysteresis=1.0, swaps_per_layer_step=3)
    for i, (phase, rows) in enumerate(steps):
        assert torch.equal(forward(on, rows, seed + i, phase), forward(OFF_RUNTIME, rows, seed + i, phase))
        if phase is Phase.PREFILL:
            on.end_prompt()
        on.check_integrity(compare_bytes=True)


def test_a_long_run_hits_swaps_and_stays_equal() -> None:
    on = runtime(min_sightings=1, hysteresis=1.0)
    for i in range(40):
        assert torch.equal(forward(on, 1, i), forward(OFF_RUNTIME, 1, i))
    assert on.cache
    facts = on.describe()["cache"]
    assert facts["evicted"] > 20 and facts["phases"]["decode"]["hits"] > 50
    assert facts["slots_used"] == [8] * 4


def test_frozen_is_complete_before_the_first_step_and_never_changes() -> None:
    on = runtime(policy="frozen", bytes_per_step=1)
    prior = np.zeros((len(LAYERS), E))
    prior[:, 5:13] = 1 + np.arange(8)
    on.seed_prior(prior)
    assert on.cache
    for i in range(6):
        assert torch.equal(forward(on, 3, i), forward(OFF_RUNTIME, 3, i))
        on.check_integrity(compare_bytes=True)
        assert ((on.cache.slots.slot_of >= 0) == (prior > 0)).all()
    placed = on.cache.slots.slot_of.copy()
    forward(on, 40, 9, Phase.PREFILL)
    on.end_prompt()
    forward(on, 1, 10)
    assert np.array_equal(on.cache.slots.slot_of, placed)
    assert on.describe()["cache"]["phases"]["decode"]["uploads"] == 8 * len(LAYERS)


def test_frozen_follows_a_resize_at_once_and_waits_for_its_copies() -> None:
    on = runtime(policy="frozen", engine=DeferredCopies())
    forward(on, 1, 0)
    assert on.cache and (on.cache.slots.slot_of >= 0).sum(axis=1).tolist() == [8] * 4
    on.resize([4, 8, 12, 8])
    forward(on, 1, 1)
    assert (on.cache.slots.slot_of >= 0).sum(axis=1).tolist() == [4, 8, 12, 8]
    on.check_integrity(compare_bytes=True)


def test_hits_are_read_from_their_slots_and_misses_from_the_store() -> None:
    on = runtime(policy="frozen")  # experts 0..7 of every layer, in slots 0..7 of its class or further ones
    forward(on, 1, 0)
    assert on.cache and (on.cache.slots.slot_of == 0).sum() == len(STORE.size_classes)
    for pool in on.cache.slots.pools.values():
        pool.arena.zero_()  # an expert of zero bytes gives zeros, in every format
    hidden, one = torch.randn(1, H), torch.ones(1, 1)
    for layer in LAYERS:
        for expert in range(E):
            ids = torch.tensor([[expert]])
            found = on.run(layer, hidden, ids, one)
            truth = OFF_RUNTIME.run(layer, hidden, ids, one)
            assert truth.any() and torch.equal(found, truth if expert >= 8 else torch.zeros(1, H))


# -- steps and prompts -------------------------------------------------------------------------------------------


def test_prefill_leaves_the_decode_set_alone_and_its_end_seeds() -> None:
    on = runtime()
    assert on.cache
    for i in range(12):
        forward(on, 1, i % 3)
    placed, scores = on.cache.slots.slot_of.copy(), on.cache.policy.scores.copy()
    for i in range(5):
        forward(on, 40, 50 + i, Phase.PREFILL)
        assert np.array_equal(on.cache.slots.slot_of, placed)
        assert np.array_equal(on.cache.policy.scores, scores)
    on.end_prompt()
    assert (on.cache.policy.scores > scores).any()


def test_the_end_of_the_first_prompt_fills_the_cache() -> None:
    on = runtime()
    forward(on, 40, 0, Phase.PREFILL)
    assert on.cache and not on.cache.slots.used.any()
    on.end_prompt()
    forward(on, 1, 1)
    assert (on.cache.slots.slot_of >= 0).sum(axis=1).tolist() == [8] * 4
    facts = on.describe()["cache"]["phases"]
    assert facts["prefill"]["uploads"] == 32 and facts["prefill"]["upload_bytes"] == 8 * COLUMN
    assert facts["prefill"]["hits"] == 0 and facts["prefill"]["misses"] == 40 * K * len(LAYERS)
    decode = facts["decode"]
    assert decode["hits"] + decode["misses"] == K * len(LAYERS) and decode["hits"] > 0


def test_a_prompt_that_was_given_up_seeds_nothing() -> None:
    on, control = runtime(), runtime()
    forward(on, 40, 3, Phase.PREFILL)
    on.drop_prompt()
    for each in (on, control):
        forward(each, 5, 4, Phase.PREFILL)
        each.end_prompt()
    assert on.cache and control.cache
    assert np.array_equal(on.cache.policy.scores, control.cache.policy.scores) and on.cache.policy.scores.any()
    assert on.cache.policy.sightings.sum() == 5 * K * len(LAYERS)
    on.drop_prompt()  # nothing is under way
    assert np.array_equal(on.cache.policy.scores, control.cache.policy.scores)
    OFF_RUNTIME.drop_prompt()


def test_counters_count_pairs_per_layer_and_phase() -> None:
    on = runtime(policy="frozen")  # experts 0..7 of every layer
    assert on.cache
    hidden, ids, weights = torch.ones(3, H), torch.tensor([[0, 7], [8, 1], [15, 9]]), torch.ones(3, 2)
    on.begin_step(Phase.DECODE)
    on.run(2, hidden, ids, weights)
    on.end_step()
    on.begin_step(Phase.PREFILL)
    on.run(6, hidden[:1], ids[:1], weights[:1])
    on.end_step()
    prefill, decode = 0, 1
    assert on.cache.counters.hits[decode].tolist() == [0, 0, 3, 0]
    assert on.cache.counters.misses[decode].tolist() == [0, 0, 3, 0]
    assert on.cache.counters.hits[prefill].tolist() == [0, 0, 0, 2]
    assert on.cache.counters.hit_rate(Phase.DECODE) == 0.5 and on.cache.counters.hit_rate(Phase.PREFILL) == 1.0


def test_a_pass_outside_a_step_is_computed_and_leaves_no_trace() -> None:
    on = runtime()
    assert torch.equal(forward(on, 4, 3, phase=None), forward(OFF_RUNTIME, 4, 3, phase=None))
    assert on.cache and not on.cache.policy.scores.any() and not on.cache.counters.misses.any()


def test_a_step_that_broke_off_is_forgotten_by_the_next() -> None:
    on = runtime()
    on.begin_step(Phase.DECODE)
    on.run(0, *random_work(1, E, K, H, 1))
    with pytest.raises(IntegrityError):
        on.run(1, torch.zeros(1, 3), torch.zeros(1, K, dtype=torch.int64), torch.ones(1, K))
    forward(on, 1, 2)
    assert on.cache and on.cache.counters.misses.sum() == K * len(LAYERS)
    assert not on.cache.slots.pins.any()


@pytest.mark.parametrize("where", ["pin", "located", "blob", "unpin"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", [Phase.DECODE, None])
def test_an_interrupt_within_expert_work_blocks_nothing_after_it(
    where: str, failure: type[BaseException], phase: Phase | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = runtime()
    assert on.cache
    forward(on, 40, 0, Phase.PREFILL)
    on.end_prompt()
    forward(on, 1, 1)

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        slots = on.cache.slots
        unpin = slots.unpin
        patch.setattr(slots, where, fail if where != "unpin" else lambda *args: (unpin(*args), fail()))
        with pytest.raises(failure):
            forward(on, 8, 2, phase)
    assert not on.cache.slots.pins.any()
    for seed in range(3, 6):
        assert torch.equal(forward(on, 2, seed), forward(OFF_RUNTIME, 2, seed))
    on.check_integrity(compare_bytes=True)


def test_what_is_computed_is_pinned_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    on = runtime()
    assert on.cache
    slots, seen = on.cache.slots, []
    located = slots.located

    def watched(layer: int) -> list[int]:
        seen.append(np.flatnonzero(slots.pins[STORE.positions[layer]]).tolist())
        return located(layer)

    monkeypatch.setattr(slots, "located", watched)
    hidden, ids, weights = random_work(3, E, K, H, 1)
    on.run(2, hidden, ids, weights)
    assert seen == [sorted(set(ids.reshape(-1).tolist()))]
    assert not slots.pins.any()


# -- outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_a_decode_step_writes_to_the_same_place_for_the_same_rows(inference: bool) -> None:
    on, places = ExpertRuntime(STORE, ExpertSettings(), "cpu", K), {}
    for rows in (3, 1, 4, 2, 7, 64, 3, 1, 4, 2, 7):
        on.begin_step(Phase.DECODE)
        with torch.inference_mode(inference):
            for layer in LAYERS:
                out = on.run(layer, *random_work(rows, E, K, H, rows))
                assert out.shape == (rows, H) and out.is_contiguous() and not out.is_inference()
                assert places.setdefault((layer, rows), out.data_ptr()) == out.data_ptr()
        on.end_step()
    assert len({places[layer, 4] for layer in LAYERS}) == len(LAYERS)
    assert on.nbytes["cpu"] - STORE.nbytes - 64 * K * H * 4 == len(LAYERS) * (1 + 2 + 4 + 8 + 64) * H * 4


def test_an_output_lasts_until_its_layer_runs_again_and_may_be_written_to() -> None:
    on = ExpertRuntime(STORE, ExpertSettings(), "cpu", K)
    on.begin_step(Phase.DECODE)
    work = {layer: random_work(2, E, K, H, layer) for layer in LAYERS}
    held = {layer: on.run(layer, *work[layer]) for layer in LAYERS}
    for layer in LAYERS:
        assert torch.equal(held[layer], OFF_RUNTIME.run(layer, *work[layer]))
        held[layer] += 1
    assert torch.equal(on.run(0, *work[0]), OFF_RUNTIME.run(0, *work[0]))
    on.end_step()


@pytest.mark.parametrize("phase", [Phase.PREFILL, None])
def test_outside_decode_steps_outputs_are_fresh(phase: Phase | None) -> None:
    on = ExpertRuntime(STORE, ExpertSettings(), "cpu", K)
    forward(on, 2, 0, Phase.DECODE)
    before = on.nbytes["cpu"]
    if phase:
        on.begin_step(phase)
    one, other = (on.run(0, *random_work(2, E, K, H, seed)) for seed in (1, 2))
    assert one.data_ptr() != other.data_ptr() and not torch.equal(one, other)
    assert on.nbytes["cpu"] == before


def test_steps_must_begin_and_end() -> None:
    on = runtime()
    with pytest.raises(IntegrityError, match="had not begun"):
        on.end_step()
    on.begin_step(Phase.DECODE)
    with pytest.raises(IntegrityError, match="within"):
        on.end_prompt()
    work = random_work(1, E, K, H, 1)
    on.run(0, *work)
    with pytest.raises(IntegrityError, match="twice"):
        on.run(0, *work)
    with pytest.raises(IntegrityError, match="routed to 3"):
        on.run(1, *random_work(1, E, 3, H, 1))


def test_an_empty_step_is_a_step() -> None:
    on = runtime()
    for phase in Phase:
        on.begin_step(phase)
        on.end_step()
    on.begin_step(Phase.DECODE)
    on.run(0, torch.empty(0, H), torch.empty(0, K, dtype=torch.int64), torch.empty(0, K))
    on.end_step()
    assert on.cache and on.cache.counters.misses.sum() == 0


def test_the_log_takes_longer_steps_and_layers_of_unequal_rows() -> None:
    on = runtime()
    on.begin_step(Phase.DECODE)
    for rows, layer in zip((1, 40, 3), LAYERS, strict=False):
        on.run(layer, *random_work(rows, E, K, H, rows))
    on.end_step()
    assert on.cache and on.cache.counters.misses[1].tolist() == [2, 80, 6, 0]


# -- quotas and facts ----------------------------------------------------------------------------------------------


def test_resize_takes_effect_at_the_next_step_and_keeps_the_best() -> None:
    on = runtime()
    assert on.cache
    forward(on, 40, 0, Phase.PREFILL)
    on.end_prompt()
    forward(on, 1, 1)
    on.resize(3)
    assert on.cache.slots.used.tolist() == [8] * 4
    kept = np.where(on.cache.slots.slot_of >= 0, on.cache.policy.scores, -1)
    best = np.sort(np.argsort(-kept, axis=1)[:, :3], axis=1)
    on.begin_step(Phase.DECODE)
    assert on.cache.slots.used.tolist() == [3] * 4
    assert [np.flatnonzero(row >= 0).tolist() for row in on.cache.slots.slot_of] == best.tolist()
    on.end_step()
    on.resize(0)
    assert torch.equal(forward(on, 2, 7), forward(OFF_RUNTIME, 2, 7))
    assert on.cache.slots.used.tolist() == [0] * 4
    on.resize([16, 8, 0, 8])
    for i in range(30):
        forward(on, 1, i)
    assert on.cache.slots.used.tolist() == [16, 8, 0, 8]
    on.check_integrity(compare_bytes=True)
    with pytest.raises(SettingsError):
        on.resize([16, 9, 0, 8])


def test_a_shrunk_layer_is_not_shrunk_again_while_readers_linger() -> None:
    engine = DeferredCopies()
    on = runtime(engine=engine)
    assert on.cache
    forward(on, 40, 0, Phase.PREFILL)
    on.end_prompt()
    engine.finish_all()
    on.begin_step(Phase.PREFILL)
    assert on.cache.slots.used.tolist() == [8] * 4
    on.resize(3)
    for _ in range(3):
        on.begin_step(Phase.PREFILL)
        assert (on.cache.slots.slot_of >= 0).sum(axis=1).tolist() == [3] * 4
        assert on.cache.slots.used.tolist() == [8] * 4
    engine.finish_all()
    on.begin_step(Phase.PREFILL)
    assert on.cache.slots.used.tolist() == [3] * 4
    on.check_integrity(compare_bytes=True)


def test_facts_are_json_and_bytes_are_whole() -> None:
    on = runtime()
    forward(on, 2, 0)
    assert on.cache
    facts = json.loads(json.dumps(on.describe()))
    assert facts["cache"]["slots_per_layer"] == [8] * 4 and facts["layers"] == 4
    routing = len(LAYERS) * 2 * K * 4
    terms = 2 * K * H * 4
    outputs = len(LAYERS) * 2 * H * 4
    assert facts["bytes"] == {"cpu": STORE.nbytes + terms + outputs + on.cache.slots.nbytes + routing}
    assert on.cache.slots.nbytes == 8 * COLUMN + len(LAYERS) * E * 4


def test_the_module_has_no_parameters_and_needs_a_runtime() -> None:
    module = StoreExperts(2)
    assert not list(module.parameters()) and not list(module.buffers()) and not module.state_dict()
    hidden, ids, weights = random_work(5, E, K, H, 3)
    with pytest.raises(IntegrityError, match="layer 2"):
        module(hidden, ids, weights)
    module.bind(OFF_RUNTIME)
    assert torch.equal(module(hidden, ids, weights), OFF_RUNTIME.run(2, hidden, ids, weights))
