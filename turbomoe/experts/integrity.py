"""The invariants of slots and promotion, checked from outside: for tests, debugging and doubt."""

from __future__ import annotations

import numpy as np
import torch

from turbomoe.errors import IntegrityError
from turbomoe.experts.promotion import Promoter
from turbomoe.experts.slots import NOBODY, ExpertSlots, SlotPool, SlotState


def check_slots(slots: ExpertSlots, compare_bytes: bool = False) -> None:
    """Raise ``IntegrityError`` unless states, owners, counts and maps agree (and READY bytes equal the store's)."""
    used = np.zeros_like(slots.used)
    mapped = np.full_like(slots.slot_of, -1)
    for pool in slots.pools.values():
        _demand(sorted(pool.free) == _slots_in(pool, SlotState.FREE), "the free list and the slot states disagree")
        for slot, (state, owner) in enumerate(zip(pool.state, pool.owner, strict=True)):
            _demand((state is SlotState.FREE) == (owner == NOBODY), f"slot {slot} is {state.name} of {owner}")
            if owner == NOBODY:
                continue
            _demand(slots.pool(owner[0]) is pool, f"slot {slot} has an owner of another size class")
            used[owner[0]] += 1
            if state is SlotState.READY:
                _demand(mapped[owner] < 0, f"expert {owner} is READY in two slots")
                mapped[owner] = slot
    _demand(np.array_equal(used, slots.used), "the count of used slots is wrong")
    _demand(np.array_equal(mapped, slots.slot_of), "the slot map and the READY slots disagree")
    _demand(bool((slots.pins >= 0).all()), "a pin count is negative")
    _check_published(slots)
    if compare_bytes:
        _check_bytes(slots)


def check_promoter(promoter: Promoter) -> None:
    """Raise ``IntegrityError`` unless moves under way and slot states match one to one."""
    copying = [(t.position, t.slot, t.expert) for t in promoter.transfers]
    retiring = [(r.position, r.slot) for r in promoter.retirements]
    coming = [(t.position, t.expert) for t in promoter.transfers]
    coming += [(r.position, r.successor) for r in promoter.retirements if r.successor >= 0]
    owned = _owned(promoter.slots, SlotState.COPYING)
    _demand(sorted(copying) == sorted(owned), "copies under way and COPYING slots disagree")
    owned = _owned(promoter.slots, SlotState.RETIRING)
    _demand(sorted(retiring) == sorted((p, s) for p, s, _ in owned), "retirements and RETIRING slots disagree")
    flagged = [(int(p), int(e)) for p, e in np.argwhere(promoter.in_flight)]
    _demand(sorted(coming) == flagged, "experts in flight and moves under way disagree")
    mapped = promoter.slots.slot_of >= 0
    _demand(not (promoter.in_flight & mapped).any(), "an expert that has a slot is on its way into another")


def _check_published(slots: ExpertSlots) -> None:
    expected = slots.map.cpu().numpy().copy()
    for owner in slots.unpublished:
        expected[owner] = slots.slot_of[owner]
    _demand(np.array_equal(expected, slots.slot_of), "the device's map is not the published host map")


def _check_bytes(slots: ExpertSlots) -> None:
    for position, expert in np.argwhere(slots.slot_of >= 0):
        layer = slots.store.layers[position]
        copy = slots.blob(layer, int(slots.slot_of[position, expert])).cpu()
        same = torch.equal(copy, slots.store.blob(layer, int(expert)))
        _demand(same, f"the copy of layer {layer}, expert {expert} differs from the store")


def _slots_in(pool: SlotPool, wanted: SlotState) -> list[int]:
    return [slot for slot, state in enumerate(pool.state) if state is wanted]


def _owned(slots: ExpertSlots, state: SlotState) -> list[tuple[int, int, int]]:
    return [
        (owner[0], slot, owner[1])
        for pool in slots.pools.values()
        for slot, owner in enumerate(pool.owner)
        if pool.state[slot] is state
    ]


def _demand(ok: bool, broken: str) -> None:
    if not ok:
        raise IntegrityError(f"The expert cache is inconsistent: {broken}")
