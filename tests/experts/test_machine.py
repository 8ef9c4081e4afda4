"""A state machine over the expert cache: whatever happens in whatever order, results and invariants hold.

Copies leave junk in their slot until they end, so an expert that is read too early or overwritten too soon
shows in the results and in the bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.experts.helpers import DeferredCopies, make_experts, random_work
from turbomoe.config import ExpertSettings
from turbomoe.experts.base import ExpertWork, Phase
from turbomoe.experts.cache import ExpertCache
from turbomoe.experts.promotion import ImmediateCopies
from turbomoe.experts.reference import ReferenceExecutor
from turbomoe.experts.residency import Move
from turbomoe.experts.slots import SlotState

E, K, H = 8, 2, 32
LARGE, SMALL = ("F32",) * 3, ("Q8_0", "Q4_0", "F16")
STORE = make_experts({0: LARGE, 1: SMALL, 3: LARGE, 4: SMALL, 7: LARGE}, num_experts=E, hidden=H, width=32).store
POSITIONS = range(len(STORE.layers))
CAPACITY = (3, 2, 2, 4, 1)  # quotas at the start; positions 0, 2, 4 and 1, 3 share a class
BUDGET = 2 * STORE.layout(0).blob_bytes

position = st.sampled_from(POSITIONS)
expert = st.integers(0, E - 1)
pick = st.integers(0, 1000)


def all_resident() -> ReferenceExecutor:
    """Every expert in a slot: the result that placement must not change."""
    frozen = ExpertSettings(cache=0, policy="frozen")
    cache = ExpertCache(STORE, frozen, [E] * len(POSITIONS), torch.device("cpu"), K, ImmediateCopies())
    cache.begin_step(Phase.DECODE)
    assert (cache.slots.slot_of >= 0).all()
    return ReferenceExecutor(STORE, cache.slots)


ALL_RESIDENT = all_resident()


class CacheMachine(RuleBasedStateMachine):
    """The cache, its executor, copies under way, and what must not be forgotten."""

    @initialize(swaps=st.integers(1, 3), sightings=st.integers(1, 2), hysteresis=st.sampled_from([1.0, 1.3]), warm=pick)
    def build(self, swaps: int, sightings: int, hysteresis: float, warm: int) -> None:
        wanted = ExpertSettings(
            cache=0, half_life=4, min_sightings=sightings, hysteresis=hysteresis,
            swaps_per_layer_step=swaps, bytes_per_step=BUDGET,
        )  # fmt: skip
        self.engine = DeferredCopies()
        self.cache = ExpertCache(STORE, wanted, CAPACITY, torch.device("cpu"), K, self.engine)
        self.slots, self.promoter = self.cache.slots, self.cache.promoter
        self.executor = ReferenceExecutor(STORE, self.slots)
        self.nbytes = self.slots.nbytes
        self.in_step = False
        self.ran: set[int] = set()
        self.routed: set[tuple[int, int]] = set()  # in the step that runs or has just ended
        self.open: ExpertWork | None = None
        self.pins: list[tuple[int, list[int], list[int]]] = []  # position, experts, those resident when pinned
        if warm:  # most runs start from a full cache: what is interesting are swaps
            self.promoter.apply(self.cache.policy.fill(self.cache.residents()))
            self.promoter.drain()
        self.seen_map = self.slots.map.clone()

    # -- steps ---------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.in_step)
    @rule(phase=st.sampled_from(Phase))
    def begin(self, phase: Phase) -> None:
        self.cache.begin_step(phase)
        self.in_step, self.ran, self.routed = True, set(), set()
        self.seen_map = self.slots.map.clone()

    @precondition(lambda self: self.in_step and self.open is None and len(self.ran) < len(POSITIONS))
    @rule(which=pick, rows=st.integers(1, 4), seed=st.integers(0, 40))
    def route(self, which: int, rows: int, seed: int) -> None:
        left = sorted(set(POSITIONS) - self.ran)
        at = left[which % len(left)]
        hidden, ids, weights = random_work(rows, E, K, H, seed)
        out = torch.full_like(hidden, float("nan"))
        self.open = ExpertWork(STORE.layers[at], Phase.DECODE, hidden, ids, weights, out)
        self.executor.submit(self.open)
        found = self.slots.map[at, ids.reshape(-1)].tolist()
        self.engine.read({self.slots.blob(STORE.layers[at], slot).data_ptr() for slot in found if slot >= 0})
        self.cache.record(STORE.layers[at], ids)
        self.ran.add(at)
        self.routed |= {(at, e) for e in ids.reshape(-1).tolist()}
        assert all(self.slots.pins[at, e] > 0 for e in ids.reshape(-1).tolist())

    @precondition(lambda self: self.open is not None)
    @rule()
    def wait(self) -> None:
        assert self.open is not None
        self.executor.wait()
        expected = torch.empty_like(self.open.out)
        work = self.open
        ALL_RESIDENT.submit(ExpertWork(work.layer, work.phase, work.hidden, work.ids, work.weights, expected))
        ALL_RESIDENT.wait()
        assert torch.equal(work.out, expected)
        self.open = None

    @precondition(lambda self: self.in_step)
    @rule()
    def end(self) -> None:
        needed = [where for where in self.routed if self.slots.slot_of[where] >= 0]
        flying = self.promoter.in_flight.copy()
        self.cache.end_step()
        self.in_step = False
        assert all(self.slots.slot_of[where] >= 0 for where in needed)
        new = (self.promoter.in_flight & ~flying).sum(axis=1)
        assert sum(int(n) * layout.blob_bytes for n, layout in zip(new, STORE.layouts, strict=True)) <= BUDGET

    @precondition(lambda self: not self.in_step)
    @rule()
    def end_prompt(self) -> None:
        self.cache.end_prompt()

    @precondition(lambda self: not self.in_step and self.open is None)
    @rule(seeds=st.lists(st.integers(0, 7), min_size=1, max_size=4), rows=st.integers(1, 2), lands=st.booleans())
    def decode(self, seeds: list[int], rows: int, lands: bool) -> None:
        """Whole decode steps, with copies and readers ending between them or not."""
        for seed in seeds:
            self.begin(Phase.DECODE)
            for _ in POSITIONS:
                self.route(0, rows, seed)
                self.wait()
            self.end()
            if lands:
                self.engine.finish_all()
            self.check_all()

    # -- what others do ------------------------------------------------------------------------------------

    @rule(at=position, experts=st.lists(expert, min_size=1, max_size=3, unique=True))
    def pin(self, at: int, experts: list[int]) -> None:
        self.slots.pin(STORE.layers[at], experts)
        self.pins.append((at, experts, [e for e in experts if self.slots.slot_of[at, e] >= 0]))

    @precondition(lambda self: self.pins)
    @rule(which=pick)
    def unpin(self, which: int) -> None:
        at, experts, _ = self.pins.pop(which % len(self.pins))
        self.slots.unpin(STORE.layers[at], experts)

    @rule(at=position, which=expert)
    def cancel(self, at: int, which: int) -> None:
        flying = [int(e) for e in np.flatnonzero(self.promoter.in_flight[at])]
        target = flying[which % len(flying)] if flying else which
        assert self.promoter.cancel(at, target) <= bool(flying)

    @precondition(lambda self: not self.in_step)
    @rule(at=position, which=pick, over=pick)
    def promote(self, at: int, which: int, over: int) -> None:
        state = self.cache.residents()
        outside = np.flatnonzero(~state.resident[at] & ~state.in_flight[at])
        victims = [e for e in np.flatnonzero(state.resident[at] & ~state.pinned[at]) if (at, e) not in self.routed]
        if len(outside) == 0 or not (state.vacant[at] or victims):
            return
        victim = int(victims[over % len(victims)]) if victims and (over % 2 or not state.vacant[at]) else -1
        self.promoter.apply([Move(at, int(outside[which % len(outside)]), victim)])

    @precondition(lambda self: not self.in_step)
    @rule(at=position, which=pick)
    def give_up(self, at: int, which: int) -> None:
        state = self.cache.residents()
        victims = np.flatnonzero(state.resident[at] & ~state.pinned[at])
        if len(victims):
            self.promoter.retire([(at, int(victims[which % len(victims)]))])

    @rule(wanted=st.tuples(*[st.integers(0, 5)] * len(CAPACITY)))
    def resize(self, wanted: tuple[int, ...]) -> None:
        left = [sum(CAPACITY[0::2]), sum(CAPACITY[1::2])]
        quotas = []
        for at, quota in enumerate(wanted):
            quotas.append(min(quota, left[at % 2]))
            left[at % 2] -= quotas[-1]
        self.cache.resize(quotas)

    # -- copies and readers, in any order ------------------------------------------------------------------

    @precondition(lambda self: self.engine.running(copies=True))
    @rule(which=pick)
    def land(self, which: int) -> None:
        running = self.engine.running(copies=True)
        self.engine.finish(running[which % len(running)])

    @precondition(lambda self: self.engine.running(copies=False))
    @rule(which=pick)
    def last_reader_leaves(self, which: int) -> None:
        running = self.engine.running(copies=False)
        self.engine.finish(running[which % len(running)])

    @precondition(lambda self: self.engine.running(copies=True))
    @rule(which=pick)
    def fail(self, which: int) -> None:
        running = self.engine.running(copies=True)
        running[which % len(running)].state = "failed"

    @precondition(lambda self: self.engine.running(copies=False))
    @rule()
    def refuse(self) -> None:
        self.engine.refuse = 1

    # -- what always holds ---------------------------------------------------------------------------------

    def check_all(self) -> None:
        self.sound()
        self.map_changes_between_steps_only()
        self.published_slots_are_distinct_and_hold_their_expert()
        self.a_slot_keeps_its_bytes_until_its_last_reader_has_left()
        self.nobody_writes_where_another_reads_or_writes()
        self.pinned_residents_stay()

    @invariant()
    def sound(self) -> None:
        self.cache.check_integrity()  # bytes are compared below
        assert self.slots.nbytes == self.nbytes

    @invariant()
    def map_changes_between_steps_only(self) -> None:
        if self.in_step:
            assert torch.equal(self.slots.map, self.seen_map)

    @invariant()
    def published_slots_are_distinct_and_hold_their_expert(self) -> None:
        taken = set()
        for at, e in (self.slots.map >= 0).nonzero().tolist():
            slot, layer = int(self.slots.map[at, e]), STORE.layers[at]
            assert torch.equal(self.slots.blob(layer, slot), STORE.blob(layer, e))
            taken.add(self.slots.blob(layer, slot).data_ptr())
        assert len(taken) == int((self.slots.map >= 0).sum())

    @invariant()
    def a_slot_keeps_its_bytes_until_its_last_reader_has_left(self) -> None:
        for pool in self.slots.pools.values():
            for slot, state in enumerate(pool.state):
                if state is SlotState.RETIRING:
                    at, e = pool.owner[slot]
                    assert torch.equal(pool.arena[slot], STORE.blob(STORE.layers[at], e))

    @invariant()
    def nobody_writes_where_another_reads_or_writes(self) -> None:
        assert not self.engine.overrun
        written = [job.dst.data_ptr() for job in self.engine.running(copies=True) if job.dst is not None]
        assert len(set(written)) == len(written)

    @invariant()
    def pinned_residents_stay(self) -> None:
        for at, _, resident in self.pins:
            assert all(self.slots.slot_of[at, e] >= 0 for e in resident)

    def teardown(self) -> None:
        """Everything comes to rest: no pins, nothing in flight, every layer within its quota."""
        if not hasattr(self, "cache"):
            return
        if self.open is not None:
            self.wait()
        while self.pins:
            self.unpin(0)
        assert not self.slots.pins.any()
        self.cache.begin_step(Phase.DECODE)
        self.promoter.drain()
        self.cache.begin_step(Phase.DECODE)  # what landed just now may exceed a quota that shrank meanwhile
        self.promoter.drain()
        assert not self.promoter.in_flight.any() and not self.promoter.transfers and not self.promoter.retirements
        assert (self.slots.used <= self.slots.quota).all()
        assert (self.slots.used == (self.slots.slot_of >= 0).sum(axis=1)).all()
        self.cache.check_integrity(compare_bytes=True)


CacheMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCache = CacheMachine.TestCase
