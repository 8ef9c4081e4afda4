"""Slots and promotion: each transition of the protocol, with copies and readers that end when the test says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.experts.helpers import DeferredCopies, make_experts
from turbomoe.errors import IntegrityError, SettingsError
from turbomoe.experts.integrity import check_promoter, check_slots
from turbomoe.experts.promotion import ImmediateCopies, Promoter
from turbomoe.experts.residency import Move
from turbomoe.experts.slots import ExpertSlots, SlotState
from turbomoe.notices import StrictError, board

# Layers 0 and 2 (positions 0, 1) share a size class, layer 5 (position 2) has its own.
STORE = make_experts({0: ("F32",) * 3, 2: ("F32",) * 3, 5: ("Q8_0",) * 3}, num_experts=6).store


class Bench:
    """Slots, a promoter and deferred copies; ``check`` after every call."""

    def __init__(self, *quotas: int) -> None:
        self.engine = DeferredCopies()
        self.slots = ExpertSlots(STORE, quotas, "cpu")
        self.promoter = Promoter(self.slots, self.engine)

    def check(self) -> None:
        check_slots(self.slots, compare_bytes=True)
        check_promoter(self.promoter)

    def place(self, *where: tuple[int, int]) -> None:
        """Bring experts in, all the way."""
        self.promoter.apply([Move(position, expert) for position, expert in where])
        self.engine.finish_all()
        self.promoter.advance()
        self.check()

    def state(self, position: int, slot: int) -> SlotState:
        return self.slots.pool(position).state[slot]

    def published(self, position: int, expert: int) -> int:
        return self.slots.located(STORE.layers[position])[expert]


def holds(bench: Bench, position: int, slot: int, expert: int) -> bool:
    layer = STORE.layers[position]
    return torch.equal(bench.slots.blob(layer, slot), STORE.blob(layer, expert))


def test_a_free_slot_is_mapped_only_after_its_copy_and_only_at_a_boundary() -> None:
    bench = Bench(1, 1, 1)
    bench.promoter.apply([Move(0, 3)])
    bench.promoter.advance()
    bench.check()
    assert bench.published(0, 3) == -1 and bench.promoter.in_flight[0, 3]
    bench.engine.finish_all()
    assert bench.published(0, 3) == -1  # the copy has landed, the step has not ended
    bench.promoter.advance()
    bench.check()
    slot = bench.published(0, 3)
    assert slot >= 0 and holds(bench, 0, slot, 3) and not bench.promoter.in_flight.any()
    assert bench.promoter.started.tolist() == [1, 0, 0]


def test_a_swap_unmaps_waits_for_readers_copies_and_maps_in_that_order() -> None:
    bench = Bench(1, 0, 0)
    bench.place((0, 3))
    slot = bench.published(0, 3)
    bench.promoter.apply([Move(0, 4, victim=3)])
    bench.check()
    assert bench.state(0, slot) is SlotState.RETIRING and bench.published(0, 3) == slot
    bench.promoter.advance()  # boundary: unmapped, yet a reader of the last step may still be at work
    bench.check()
    assert bench.published(0, 3) == -1 and bench.published(0, 4) == -1
    assert holds(bench, 0, slot, 3) and not bench.engine.running(copies=True)
    bench.engine.finish_all()
    bench.promoter.advance()
    bench.check()
    assert bench.state(0, slot) is SlotState.COPYING and bench.published(0, 4) == -1
    assert not holds(bench, 0, slot, 3)  # now it may be overwritten
    bench.engine.finish_all()
    bench.promoter.advance()
    bench.check()
    assert bench.published(0, 4) == slot and holds(bench, 0, slot, 4)
    assert bench.promoter.evicted == 1


def test_with_an_immediate_engine_a_swap_takes_two_boundaries() -> None:
    slots = ExpertSlots(STORE, [1, 0, 0], "cpu")
    promoter = Promoter(slots, ImmediateCopies())
    promoter.apply([Move(0, 0)])
    promoter.advance()
    promoter.apply([Move(0, 1, victim=0)])
    promoter.advance()
    assert slots.located(0)[:2] == [-1, -1]
    promoter.advance()
    assert slots.located(0)[:2] == [-1, 0]
    check_slots(slots, compare_bytes=True)


@pytest.mark.parametrize("when", ["refused at start", "failed under way", "swap refused", "swap failed"])
def test_a_failed_copy_gives_its_slot_back(when: str) -> None:
    bench = Bench(1, 0, 0)
    swap = when.startswith("swap")
    if swap:
        bench.place((0, 5))
    before = board.counts["an expert was not copied to the device"]
    bench.engine.refuse = int(when == "refused at start")
    bench.promoter.apply([Move(0, 3, victim=5 if swap else -1)])
    if swap:
        bench.engine.finish_all()
        bench.engine.refuse = int(when == "swap refused")
        bench.promoter.advance()
    for job in bench.engine.running(copies=True):
        job.state = "failed"
    bench.promoter.advance()
    bench.check()
    assert bench.promoter.failed == 1 and not bench.promoter.in_flight.any()
    assert bench.slots.used.tolist() == [0, 0, 0] and bench.published(0, 3) == -1
    assert board.counts["an expert was not copied to the device"] == before + 1
    bench.place((0, 3))  # the slot is as good as new
    assert bench.published(0, 3) >= 0


def test_a_failed_copy_is_an_error_in_strict_mode_and_the_state_stays_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "strict", True)
    bench = Bench(2, 0, 0)
    bench.engine.refuse = 2
    with pytest.raises(StrictError, match="no copy engine"):
        bench.promoter.apply([Move(0, 1), Move(0, 2)])
    bench.check()
    assert bench.promoter.failed == 2
    bench.promoter.advance()  # reported once, not again


def test_cancelling_before_the_copy_frees_the_slot_without_one() -> None:
    bench = Bench(1, 0, 0)
    bench.place((0, 3))
    bench.promoter.apply([Move(0, 4, victim=3)])
    assert bench.promoter.cancel(0, 4)
    assert not bench.promoter.cancel(0, 4)
    bench.check()
    assert bench.promoter.leaving().tolist() == [1, 0, 0]
    bench.engine.finish_all()
    bench.promoter.advance()
    bench.check()
    assert bench.slots.used.tolist() == [0, 0, 0] and bench.promoter.started.tolist() == [1, 0, 0]


def test_cancelling_under_way_keeps_the_slot_until_the_copy_has_ended() -> None:
    bench = Bench(1, 0, 0)
    bench.promoter.apply([Move(0, 4)])
    assert bench.promoter.cancel(0, 4)
    assert not bench.promoter.cancel(0, 4)
    bench.promoter.advance()
    bench.check()
    assert bench.slots.vacant().tolist() == [0, 0, 0]  # something still writes into it
    with pytest.raises(IntegrityError, match="twice"):
        bench.promoter.apply([Move(0, 4)])
    bench.engine.finish_all()
    bench.promoter.advance()
    bench.check()
    assert bench.slots.vacant().tolist() == [1, 0, 0] and bench.published(0, 4) == -1
    assert bench.promoter.cancelled == 1 and not bench.promoter.cancel(0, 0)


def test_impossible_moves_are_refused() -> None:
    bench = Bench(2, 0, 0)
    bench.place((0, 3))
    with pytest.raises(IntegrityError, match="twice"):
        bench.promoter.apply([Move(0, 3)])
    with pytest.raises(IntegrityError, match="no free slot"):
        bench.promoter.apply([Move(1, 0)])
    with pytest.raises(IntegrityError, match="pinned or absent"):
        bench.promoter.apply([Move(0, 4, victim=2)])


def test_a_pinned_expert_cannot_be_retired() -> None:
    bench = Bench(1, 0, 0)
    bench.place((0, 3))
    bench.slots.pin(0, [3])
    bench.slots.pin(0, [3, 1])
    with pytest.raises(IntegrityError, match="pinned"):
        bench.promoter.retire([(0, 3)])
    bench.slots.unpin(0, [3, 1])
    with pytest.raises(IntegrityError, match="pinned"):
        bench.promoter.retire([(0, 3)])
    bench.slots.unpin(0, [3])
    bench.promoter.retire([(0, 3)])
    with pytest.raises(IntegrityError, match="more often"):
        bench.slots.unpin(0, [3])


def test_drain_waits_for_everything() -> None:
    bench = Bench(2, 0, 1)
    bench.place((0, 3), (2, 0))
    bench.promoter.apply([Move(0, 4, victim=3), Move(0, 5)])
    bench.promoter.retire([(2, 0)])
    bench.promoter.drain()
    bench.check()
    assert not bench.engine.running(copies=True) and not bench.engine.running(copies=False)
    assert [e for e in range(6) if bench.published(0, e) >= 0] == [4, 5]
    assert bench.slots.used.tolist() == [2, 0, 0]


# -- quotas ------------------------------------------------------------------------------------------------


def test_quota_moves_between_layers_of_a_class_without_moving_memory() -> None:
    bench = Bench(4, 1, 2)
    address = bench.slots.blob(0, 0).data_ptr(), bench.slots.map.data_ptr(), bench.slots.nbytes
    bench.place((0, 0), (0, 1), (0, 2), (0, 3), (1, 5))
    bench.slots.resize([1, 4, 2])
    assert bench.slots.vacant().tolist() == [0, 0, 2]  # all slots of the class are taken still
    bench.promoter.retire([(0, 0), (0, 1), (0, 2)])
    bench.engine.finish_all()
    bench.promoter.advance()
    bench.check()
    assert bench.slots.vacant().tolist() == [0, 3, 2]
    bench.place((1, 0), (1, 1), (1, 2))
    assert bench.slots.used.tolist() == [1, 4, 0]
    assert address == (bench.slots.blob(0, 0).data_ptr(), bench.slots.map.data_ptr(), bench.slots.nbytes)


def test_layers_share_what_their_class_has_free_without_promising_it_twice() -> None:
    store = make_experts({0: ("F32",) * 3, 1: ("F32",) * 3, 2: ("F32",) * 3}, num_experts=6).store
    slots = ExpertSlots(store, [4, 0, 0], "cpu")
    promoter = Promoter(slots, ImmediateCopies())
    promoter.apply([Move(0, 0), Move(0, 1), Move(0, 2)])
    slots.resize([0, 2, 2])
    assert slots.vacant().tolist() == [0, 1, 0]  # one slot is free, though two layers want two each
    promoter.advance()
    promoter.retire([(0, 0), (0, 1)])
    promoter.advance()
    assert slots.vacant().tolist() == [0, 2, 1]
    promoter.apply([Move(1, 0), Move(1, 1), Move(2, 0)])
    check_slots(slots)


@pytest.mark.parametrize("quotas", [[7, 0, 0], [-1, 0, 0], [0, 0], [0, 0, 0, 0]])
def test_quotas_out_of_range_are_refused(quotas: list[int]) -> None:
    with pytest.raises(SettingsError):
        ExpertSlots(STORE, quotas, "cpu")
    bench = Bench(6, 6, 6)
    with pytest.raises(SettingsError):
        bench.slots.resize(quotas)
    assert bench.slots.quota.tolist() == [6, 6, 6]


def test_quotas_beyond_a_class_are_refused_though_the_total_fits() -> None:
    bench = Bench(2, 2, 4)
    with pytest.raises(SettingsError, match="5 slots"):
        bench.slots.resize([3, 2, 3])
    bench.slots.resize([4, 0, 4])


def test_bytes_are_counted_whole() -> None:
    slots = ExpertSlots(STORE, [2, 1, 3], "cpu")
    big, small = STORE.layout(0).blob_bytes, STORE.layout(5).blob_bytes
    assert slots.nbytes == 3 * big + 3 * small + 3 * 6 * 4
    assert ExpertSlots(STORE, [0, 0, 0], "cpu").nbytes == 3 * 6 * 4


# -- the checks can fail -------------------------------------------------------------------------------------


def corrupt_map(bench: Bench) -> None:
    bench.slots.slot_of[0, 2] = 0


def corrupt_device_map(bench: Bench) -> None:
    bench.slots.map[0, 3] = -1


def corrupt_owner(bench: Bench) -> None:
    bench.slots.pool(0).owner[bench.slots.slot_of[0, 3]] = (0, 2)


def corrupt_state(bench: Bench) -> None:
    bench.slots.pool(0).state[bench.slots.slot_of[0, 3]] = SlotState.RETIRING


def corrupt_free_list(bench: Bench) -> None:
    bench.slots.pool(0).free.append(int(bench.slots.slot_of[0, 3]))


def corrupt_used(bench: Bench) -> None:
    bench.slots.used[1] += 1


def corrupt_pins(bench: Bench) -> None:
    bench.slots.pins[2, 2] = -1


def corrupt_bytes(bench: Bench) -> None:
    bench.slots.blob(0, int(bench.slots.slot_of[0, 3]))[17] ^= 1


def corrupt_flight(bench: Bench) -> None:
    bench.promoter.in_flight[1, 1] = True


def lose_a_transfer(bench: Bench) -> None:
    bench.promoter.apply([Move(0, 4)])
    bench.promoter.transfers.clear()


def lose_a_retirement(bench: Bench) -> None:
    bench.promoter.retire([(0, 3)])
    bench.promoter.retirements.clear()


def promote_what_is_there(bench: Bench) -> None:
    bench.promoter.apply([Move(0, 4)])
    bench.engine.finish_all()
    transfer = bench.promoter.transfers[0]
    bench.slots.make_ready(0, transfer.slot)


DAMAGE = [
    corrupt_map, corrupt_device_map, corrupt_owner, corrupt_state, corrupt_free_list, corrupt_used, corrupt_pins,
    corrupt_bytes, corrupt_flight, lose_a_transfer, lose_a_retirement, promote_what_is_there,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_integrity_checks_notice(damage) -> None:
    bench = Bench(2, 2, 2)
    bench.place((0, 3), (1, 1))
    damage(bench)
    with pytest.raises(IntegrityError, match="inconsistent"):
        bench.check()


def test_two_experts_in_one_slot_are_noticed() -> None:
    bench = Bench(2, 2, 2)
    bench.place((0, 3), (1, 1))
    bench.slots.slot_of[1, 1] = bench.slots.slot_of[0, 3]
    bench.slots.map.copy_(torch.from_numpy(np.ascontiguousarray(bench.slots.slot_of)))
    with pytest.raises(IntegrityError, match="slot map"):
        bench.check()
