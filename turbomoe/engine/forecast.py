"""Bytes that an engine will take, told before anything large is allocated."""

from __future__ import annotations

from dataclasses import replace

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.hardware.memory import MemoryUse
from turbomoe.kv.attention import query_block
from turbomoe.kv.cache import KVCache
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.prefill import TILE_PAGES
from turbomoe.models.base import Forecast
from turbomoe.notices import Notice, board

SMALLEST = 512  # tokens: a context below that helps nobody


def settle_context(forecast: Forecast, settings: EngineSettings, *, asked: bool, room: int) -> EngineSettings:
    """``settings`` with the tokens of context that a sequence gets.

    Without a wish (``asked`` False) the default, or the model's own limit where that is less. A size of 0 is the
    model's own limit, halved with a note until it fits the ``room`` in bytes. A wish beyond the limit gets a note.
    """
    trained = forecast.context_length
    if settings.ctx_size == 0:
        return _fitting(forecast, replace(settings, ctx_size=trained), room)
    if settings.ctx_size <= trained:
        return settings
    if not asked:
        return replace(settings, ctx_size=trained)
    what, why = f"a context of {settings.ctx_size} tokens", f"the model was trained for {trained} tokens"
    board.post(Notice(what, why, "answers may degrade beyond them", f"ask for {trained} or fewer"))
    return settings


def _fitting(forecast: Forecast, settings: EngineSettings, room: int) -> EngineSettings:
    size = settings.ctx_size
    while size > SMALLEST and memory_use(forecast, replace(settings, ctx_size=size)).total > room:
        size //= 2
    if size < settings.ctx_size:
        what, why = f"a context of {size} tokens", f"the model's own limit of {settings.ctx_size} does not fit memory"
        board.post(Notice(what, why, avoid="choose --cache-type-k and --cache-type-v with fewer bits"))
    return replace(settings, ctx_size=size)


def memory_use(forecast: Forecast, settings: EngineSettings) -> MemoryUse:
    """Weights, KV memory (exact, by the cache's own arithmetic on a device without storage), workspace, experts."""
    return MemoryUse(
        weights=forecast.weight_bytes,
        kv=kv_bytes(forecast, settings, settings.kv),
        workspace=workspace_bytes(forecast, settings),
        experts=forecast.expert_bytes + slot_bytes(forecast, settings),
    )


def kv_bytes(forecast: Forecast, settings: EngineSettings, kv: KVSettings) -> int:
    """What the memory of all sequences takes when keys and values are stored as ``kv``, recurrent states included."""
    ctx_size = settings.ctx_size or forecast.context_length
    empty = KVCache(forecast.layers, kv, slots=settings.parallel, ctx_size=ctx_size, device="meta")
    return empty.nbytes() + empty.recurrent_nbytes()


def slot_bytes(forecast: Forecast, settings: EngineSettings) -> int:
    """At most what the expert cache takes on top of the experts themselves; ``auto`` takes nothing on a CPU."""
    size = settings.experts.cache
    return min(size, forecast.expert_bytes) if isinstance(size, int) else 0


def workspace_bytes(forecast: Forecast, settings: EngineSettings) -> int:
    """An upper estimate of the largest temporaries of a step: attention scores, FFN activations, logits; float32."""
    config, rows = forecast.config, max(settings.prefill_chunk, settings.parallel)
    block = min(rows, query_block(settings.device.partition(":")[0]))
    keys = TILE_PAGES * PAGE_TOKENS + block + settings.kv.recent
    scores = 3 * config.num_attention_heads * block * keys
    width = getattr(config, "intermediate_size", None) or getattr(config, "moe_intermediate_size", config.hidden_size)
    activations = rows * (4 * width + 8 * config.hidden_size)
    logits = 3 * settings.parallel * config.vocab_size
    return 4 * int(scores + activations + logits)
