"""Codes that are made late, as on a GPU's second stream: nobody may see the difference."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from turbomoe.config import KVSettings
from turbomoe.kv import snapshot
from turbomoe.kv.aside import Aside, Work
from turbomoe.kv.cache import KVCache
from turbomoe.kv.means import KVMeans
from turbomoe.kv.shape import AttentionShape

LAYERS, HEADS, KV_HEADS, DIM, SLOTS = 2, 4, 2, 64, 3


class Late(Aside):
    """Does nothing before it is settled."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waiting: list[Work] = []
        self.done = 0

    def run(self, works: Sequence[Work]) -> None:
        self.waiting += works

    def settle(self) -> None:
        self.done += len(self.waiting)
        for work in self.waiting:
            work()
        self.waiting.clear()


class Never(Late):
    """As if nobody settled."""

    def settle(self) -> None:
        return


def cache_of(type_k: str, type_v: str) -> KVCache:
    shapes = [AttentionShape(i, HEADS, KV_HEADS, DIM) for i in range(LAYERS)]
    g = torch.Generator().manual_seed(1)
    means = [{i: torch.randn(KV_HEADS, DIM, generator=g) for i in range(LAYERS)} for _ in range(2)]
    scales = {i: torch.rand(KV_HEADS, DIM, generator=g) + 0.5 for i in range(LAYERS)}
    table = KVMeans(means[0], means[1], "test", scales, 0.8 ** torch.arange(DIM // 2))
    return KVCache(shapes, KVSettings(type_k, type_v, 4, 16), slots=SLOTS, ctx_size=400, means=table)


def play(cache: KVCache, seed: int) -> list[torch.Tensor]:
    """What comes of a hundred random steps, chunks, releases, snapshots and moves between slots."""
    rng, g, seen = random.Random(seed), torch.Generator().manual_seed(seed), []

    def step(slots: list[int], count: int) -> None:
        cache.begin(slots, count)
        for layer in range(LAYERS):
            q = torch.randn(len(slots), HEADS, count, DIM, generator=g)
            k, v = torch.randn(2, len(slots), KV_HEADS, count, DIM, generator=g)
            seen.append(cache.attend(layer, q, k, v, DIM**-0.5))
        cache.commit()

    def read(slot: int) -> dict[str, torch.Tensor]:
        return {part.name: part.read().clone() for part in snapshot.parts(cache, slot, cache.host_lengths[slot])}

    for _ in range(100):
        slots, slot = rng.sample(range(SLOTS), rng.randint(1, SLOTS)), rng.randrange(SLOTS)
        what = rng.choices(("step", "chunk", "release", "read", "move"), (12, 2, 1, 2, 1))[0]
        if max(cache.host_lengths) > 330 or what == "release":
            cache.release(max(range(SLOTS), key=cache.host_lengths.__getitem__) if what != "release" else slot)
        elif what == "step":
            step(slots, 1)
        elif what == "chunk":
            step(slots[:1], rng.randint(2, 60))
        elif cache.host_lengths[slot]:
            held, length = read(slot), cache.host_lengths[slot]
            seen += held.values()
            if what == "move":
                snapshot.restore(cache, (slot + 1) % SLOTS, length, held.__getitem__)
    step(list(range(SLOTS)), 1)
    for slot in range(SLOTS):
        cache.release(slot)
    cache.aside.settle()
    # Pages that were given back are wiped: nothing may come into them later.
    return seen + [plane.clone() for pair in cache.attention.values() for side in pair for plane in side.planes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("types", [("tq3", "tq2"), ("tcq2", "q8_0"), ("f16", "tcq2.5"), ("f32", "tq2")], ids=str)
def test_codes_made_late_are_not_missed(types: tuple[str, str], seed: int) -> None:
    at_once, late = cache_of(*types), cache_of(*types)
    late.aside = aside = Late()
    expected, found = play(at_once, seed), play(late, seed)
    assert aside.done > 50
    assert len(expected) == len(found) and all(map(torch.equal, expected, found))


def test_codes_that_are_never_made_are_missed() -> None:
    expected, cache = play(cache_of("tq3", "tq3"), 0), cache_of("tq3", "tq3")
    cache.aside = Never()
    assert not all(map(torch.equal, expected, play(cache, 0)))
