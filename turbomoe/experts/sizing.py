"""From ``--moe-cache`` to slots per layer. Whenever the answer is "no cache", it says why."""

from __future__ import annotations

import torch

from turbomoe.config import ExpertSettings, require
from turbomoe.experts.arena import TAIL
from turbomoe.experts.base import ExpertLayout
from turbomoe.experts.store import ExpertStore
from turbomoe.notices import Notice, board

OFF = "the expert cache stays off"


def slot_floor(layout: ExpertLayout, top_k: int) -> int:
    """Fewest slots worth having: below twice the experts of one token, a cache mostly replaces what it needs next."""
    return min(layout.num_experts, max(2 * top_k, 8))


def equal_quotas(store: ExpertStore, nbytes: int, top_k: int) -> list[int] | None:
    """Equally many slots for each layer within ``nbytes`` of arenas; None if that is below a layer's floor."""
    budget = nbytes - TAIL * len(store.size_classes)
    quota = max(budget, 0) // sum(layout.blob_bytes for layout in store.layouts)
    quotas = [min(quota, layout.num_experts) for layout in store.layouts]
    enough = all(quota >= slot_floor(layout, top_k) for quota, layout in zip(quotas, store.layouts, strict=True))
    return quotas if enough else None


def smallest_size(store: ExpertStore, top_k: int) -> int:
    """Bytes of arenas from which ``equal_quotas`` gives every layer its floor."""
    floor = max(slot_floor(layout, top_k) for layout in store.layouts)
    return floor * sum(layout.blob_bytes for layout in store.layouts) + TAIL * len(store.size_classes)


def cache_quotas(store: ExpertStore, settings: ExpertSettings, device: torch.device, top_k: int) -> list[int] | None:
    """Slots per layer that the settings ask for on ``device``, or None after a notice that says why there are none."""
    if settings.cache == "auto":
        board.post(_not_automatic(device))
        return None
    assert isinstance(settings.cache, int)
    require(settings.cache >= 0, f"--moe-cache must not be negative, not {settings.cache}")
    quotas = equal_quotas(store, settings.cache, top_k)
    if quotas is None:
        board.post(_too_small(store, settings.cache, top_k))
    return quotas


def _not_automatic(device: torch.device) -> Notice:
    if device.type == "cpu":
        return Notice(OFF, "there is no GPU, and copies in RAM of what lies in RAM would gain nothing")
    why = "its size cannot be chosen automatically yet"
    return Notice(OFF, why, "all routed experts are computed from RAM", "give a size, such as --moe-cache 8G")


def _too_small(store: ExpertStore, nbytes: int, top_k: int) -> Notice:
    need = smallest_size(store, top_k)
    why = f"{nbytes} bytes are fewer than {need}, which hold {max(2 * top_k, 8)} experts of each layer (or all it has)"
    return Notice(OFF, why, "all routed experts are computed from RAM", f"give --moe-cache at least {need}")
