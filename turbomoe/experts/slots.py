"""Copies of experts on a device: one arena per size class, a quota per layer, and the map that finds them.

A slot belongs to no layer: any layer of its size class may own it, so moving quota between layers moves no
memory. Addresses are stable from construction on. The host table is the truth; the device's map is brought up
to date by ``publish``, between steps only, in place, in the order of the caller's stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from turbomoe.config import require
from turbomoe.errors import IntegrityError
from turbomoe.experts.arena import allocate
from turbomoe.experts.store import ExpertStore


class SlotState(IntEnum):
    """Life of a slot: FREE -> COPYING -> READY -> RETIRING -> FREE, or from RETIRING straight to COPYING."""

    FREE = 0
    COPYING = 1  # owned by the expert whose bytes are arriving; not mapped
    READY = 2  # mapped; its bytes equal the store's
    RETIRING = 3  # unmapped; a reader may still be at work, so not a byte may change


@dataclass
class SlotPool:
    """The slots of one size class. ``owner`` is (layer position, expert), or (-1, -1) for a free slot."""

    arena: torch.Tensor
    state: list[SlotState] = field(init=False)
    owner: list[tuple[int, int]] = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        capacity = len(self.arena)
        self.state = [SlotState.FREE] * capacity
        self.owner = [NOBODY] * capacity
        self.free = list(range(capacity))[::-1]


NOBODY = (-1, -1)


class ExpertSlots:
    """Device copies of some experts. One thread owns every call that changes state.

    Arrays are indexed by layer position in the store, then expert: ``quota`` and ``used`` [layers],
    ``slot_of`` (the host map: slot or -1) and ``pins`` (readers per expert) [layers, experts]. ``map`` is the
    published int32 copy of ``slot_of`` on the device. ``quotas`` fix the capacity of each size class.
    """

    def __init__(self, store: ExpertStore, quotas: Sequence[int], device: torch.device | str) -> None:
        self.store, self.device = store, torch.device(device)
        self._check_range(quotas)
        self.quota = np.array(quotas, dtype=np.int64)
        capacity = self._rows_per_class(self.quota)
        self.pools = {size: SlotPool(allocate(rows, size, self.device)) for size, rows in capacity.items()}
        shape = (len(store.layouts), max(layout.num_experts for layout in store.layouts))
        self.used = np.zeros(shape[0], dtype=np.int64)
        self.slot_of = np.full(shape, -1, dtype=np.int32)
        self.pins = np.zeros(shape, dtype=np.int32)
        self.map = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        self.unpublished: set[tuple[int, int]] = set()  # map entries that the device does not have yet

    # -- what executors read ------------------------------------------------------------------------------

    def located(self, layer: int) -> list[int]:
        """Published slot of every expert of ``layer``, or -1. Waits for the device; for host executors."""
        slots: list[int] = self.map[self.store.positions[layer]].tolist()
        return slots

    def blob(self, layer: int, slot: int) -> torch.Tensor:
        """The bytes of a slot of ``layer``'s size class, uint8 [blob_bytes] on the device: a view."""
        return self.pools[self.store.layout(layer).blob_bytes].arena[slot]

    def pin(self, layer: int, experts: Sequence[int]) -> None:
        """Protect ``experts`` (no duplicates) from eviction until ``unpin``. Pins are counted."""
        self.pins[self.store.positions[layer], experts] += 1

    def unpin(self, layer: int, experts: Sequence[int]) -> None:
        """Undo one ``pin`` of each of ``experts``."""
        self.pins[self.store.positions[layer], experts] -= 1
        if (self.pins[self.store.positions[layer], experts] < 0).any():
            raise IntegrityError(f"An expert of layer {layer} was unpinned more often than pinned")

    # -- transitions, called by promotion -----------------------------------------------------------------

    def pool(self, position: int) -> SlotPool:
        """The pool that serves the layer at ``position``."""
        return self.pools[self.store.layouts[position].blob_bytes]

    def take(self, position: int, expert: int) -> int:
        """FREE -> COPYING for ``expert``: the slot. ``IntegrityError`` if the layer has no vacancy."""
        pool = self.pool(position)
        if not pool.free or self.used[position] >= self.quota[position]:
            raise IntegrityError(f"The layer at position {position} has no free slot for expert {expert}")
        slot = pool.free.pop()
        self._move(position, slot, SlotState.FREE, SlotState.COPYING, (position, expert))
        self.used[position] += 1
        return slot

    def make_ready(self, position: int, slot: int) -> None:
        """COPYING -> READY: the copy has landed; map its expert."""
        owner = self.pool(position).owner[slot]
        self._move(position, slot, SlotState.COPYING, SlotState.READY, owner)
        self._set(owner, slot)

    def retire(self, position: int, expert: int) -> int:
        """READY -> RETIRING: unmap ``expert``, which must not be pinned; the slot keeps its bytes."""
        slot = int(self.slot_of[position, expert])
        if slot < 0 or self.pins[position, expert]:
            raise IntegrityError(f"Expert {expert} at layer position {position} cannot be evicted: pinned or absent")
        self._move(position, slot, SlotState.READY, SlotState.RETIRING, (position, expert))
        self._set((position, expert), -1)
        return slot

    def hand_over(self, position: int, slot: int, expert: int) -> None:
        """RETIRING -> COPYING: the last reader is gone, ``expert`` may overwrite the slot."""
        self._move(position, slot, SlotState.RETIRING, SlotState.COPYING, (position, expert))

    def release(self, position: int, slot: int) -> None:
        """RETIRING or COPYING -> FREE, and nobody reads or writes the slot any more."""
        state = self.pool(position).state[slot]
        if state not in (SlotState.RETIRING, SlotState.COPYING):
            raise IntegrityError(f"Slot {slot} was released while {state.name}")
        self._move(position, slot, state, SlotState.FREE, NOBODY)
        self.pool(position).free.append(slot)
        self.used[position] -= 1

    def publish(self) -> None:
        """Bring the device's map up to date, in place. Between steps only."""
        if not self.unpublished:
            return
        changed = np.array(sorted(self.unpublished), dtype=np.int64)
        slots = torch.from_numpy(self.slot_of[changed[:, 0], changed[:, 1]]).to(self.device)
        where = torch.from_numpy(changed).to(self.device)
        with torch.inference_mode():
            self.map[where[:, 0], where[:, 1]] = slots
        self.unpublished.clear()

    def _move(self, position: int, slot: int, before: SlotState, after: SlotState, owner: tuple[int, int]) -> None:
        pool = self.pool(position)
        if pool.state[slot] is not before:
            raise IntegrityError(
                f"Slot {slot} is {pool.state[slot].name}, not {before.name}, on its way to {after.name}"
            )
        pool.state[slot], pool.owner[slot] = after, owner

    def _set(self, owner: tuple[int, int], slot: int) -> None:
        self.slot_of[owner] = slot
        self.unpublished.add(owner)

    # -- how many ------------------------------------------------------------------------------------------

    def resize(self, quotas: Sequence[int]) -> None:
        """Set the quota of every layer; ``SettingsError`` beyond 0..experts or beyond a size class's capacity.

        Nothing moves here: surplus copies retire at the next step's beginning, new room is filled by residency.
        """
        self._check_range(quotas)
        wanted = np.array(quotas, dtype=np.int64)
        for size, rows in self._rows_per_class(wanted).items():
            capacity = len(self.pools[size].arena)
            require(rows <= capacity, f"{rows} slots of {size} bytes do not fit an arena of {capacity}")
        self.quota = wanted

    def vacant(self) -> npt.NDArray[np.int64]:
        """Slots that each layer may take now, [layers]: within its quota and what its size class has free."""
        left = {size: len(pool.free) for size, pool in self.pools.items()}
        room: npt.NDArray[np.int64] = np.maximum(self.quota - self.used, 0)
        for position, layout in enumerate(self.store.layouts):
            room[position] = min(room[position], left[layout.blob_bytes])
            left[layout.blob_bytes] -= int(room[position])
        return room

    @property
    def nbytes(self) -> int:
        """Bytes on the device: arenas and map."""
        return sum(pool.arena.nbytes for pool in self.pools.values()) + self.map.nbytes

    def _check_range(self, quotas: Sequence[int]) -> None:
        layouts = self.store.layouts
        require(len(quotas) == len(layouts), f"{len(quotas)} quotas were given for {len(layouts)} layers")
        for quota, layout in zip(quotas, layouts, strict=True):
            fits = 0 <= quota <= layout.num_experts
            require(fits, f"Layer {layout.layer} has {layout.num_experts} experts and cannot have {quota} slots")

    def _rows_per_class(self, quotas: Iterable[int]) -> dict[int, int]:
        rows = dict.fromkeys(self.store.size_classes, 0)
        for quota, layout in zip(quotas, self.store.layouts, strict=True):
            rows[layout.blob_bytes] += int(quota)
        return rows
