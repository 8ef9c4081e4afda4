"""What is told before loading: the size of the context that is settled on, and every byte of what will run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.engine.forecast import SMALLEST, kv_bytes, memory_use, settle_context
from turbomoe.kv.cache import KVCache
from turbomoe.kv.shape import AttentionShape, RecurrentShape
from turbomoe.models.base import Forecast
from turbomoe.notices import StrictError, board

LAYERS = (AttentionShape(0, 4, 2, 64), RecurrentShape(1, (128, 4), (2, 32, 32)))
TRAINED = 1 << 15
FORECAST = Forecast(
    weight_bytes=1 << 20, expert_bytes=1 << 22, layers=LAYERS, context_length=TRAINED, config=LlamaConfig()
)
PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def fresh_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "strict", False)
    monkeypatch.setattr(board, "counts", type(board.counts)())


def settle(ctx_size: int, *, asked: bool = True, room: int = PLENTY, trained: int = TRAINED) -> int:
    forecast = replace(FORECAST, context_length=trained)
    return settle_context(forecast, EngineSettings(ctx_size=ctx_size), asked=asked, room=room).ctx_size


def test_a_wish_within_the_limit_is_granted() -> None:
    assert (settle(1), settle(TRAINED), settle(4096, asked=False)) == (1, TRAINED, 4096)
    assert not board.counts


def test_nobody_s_wish_is_cut_to_the_limit_without_a_word() -> None:
    assert settle(4096, asked=False, trained=512) == 512
    assert not board.counts


def test_a_wish_beyond_the_limit_is_granted_with_a_note() -> None:
    assert settle(TRAINED + 1) == TRAINED + 1
    assert list(board.counts) == [f"a context of {TRAINED + 1} tokens"]


def test_zero_is_the_limit_and_shrinks_only_as_far_as_it_must() -> None:
    assert settle(0) == TRAINED and not board.counts
    room = memory_use(FORECAST, EngineSettings(ctx_size=TRAINED // 4)).total
    assert settle(0, room=room) == TRAINED // 4
    assert settle(0, room=room - 1) == TRAINED // 8
    assert len(board.counts) == 2


def test_zero_never_shrinks_to_nothing_and_strictly_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle(0, room=0) == SMALLEST
    monkeypatch.setattr(board, "strict", True)
    with pytest.raises(StrictError, match="does not fit memory"):
        settle(0, room=0)


@pytest.mark.parametrize("kv", [KVSettings(), KVSettings("tq3", "tq2"), KVSettings("q8_0", "bf16", 0, 0)])
@pytest.mark.parametrize("parallel", [1, 3])
def test_the_kv_part_is_what_the_cache_allocates(kv: KVSettings, parallel: int) -> None:
    settings = EngineSettings(ctx_size=1000, parallel=parallel, kv=kv)
    cache = KVCache(LAYERS, kv, slots=parallel, ctx_size=1000)
    assert kv_bytes(FORECAST, settings, kv) == cache.nbytes() + cache.recurrent_nbytes()
    assert memory_use(FORECAST, settings).kv == kv_bytes(FORECAST, settings, kv)


@pytest.mark.parametrize(("cache", "slots"), [("off", 0), ("auto", 0), (1 << 20, 1 << 20), (1 << 30, 1 << 22)])
def test_slots_come_on_top_of_the_experts(cache: str | int, slots: int) -> None:
    use = memory_use(FORECAST, EngineSettings(experts=ExpertSettings(cache=cache)))
    assert (use.weights, use.experts) == (1 << 20, (1 << 22) + slots)


def test_the_workspace_grows_with_what_runs_at_once() -> None:
    small, large = (memory_use(FORECAST, EngineSettings(prefill_chunk=n)).workspace for n in (64, 512))
    assert 0 < small < large
