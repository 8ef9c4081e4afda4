"""Bytes that an engine will take, told before anything large is allocated."""

from __future__ import annotations

from turbomoe.config import EngineSettings
from turbomoe.hardware.memory import MemoryUse
from turbomoe.kv.attention import QUERY_BLOCK, TILE_PAGES
from turbomoe.kv.cache import KVCache
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.models.base import Forecast
from turbomoe.notices import Notice, board


def context_size(settings: EngineSettings, trained: int) -> int:
    """Tokens of context a sequence gets; a note when that is more than the model was trained for."""
    asked = settings.ctx_size or trained
    if asked > trained:
        why = f"the model was trained for {trained} tokens"
        board.post(Notice(f"a context of {asked} tokens", why, "answers may degrade", "use a smaller --ctx-size"))
    return asked


def memory_use(forecast: Forecast, settings: EngineSettings) -> MemoryUse:
    """Weights, KV memory (exact, by the cache's own arithmetic on a device without storage), workspace, experts."""
    ctx_size = settings.ctx_size or forecast.context_length
    empty = KVCache(forecast.layers, settings.kv, slots=settings.parallel, ctx_size=ctx_size, device="meta")
    return MemoryUse(
        weights=forecast.weight_bytes,
        kv=empty.nbytes() + empty.recurrent_nbytes(),
        workspace=workspace_bytes(forecast, settings),
        experts=forecast.expert_bytes,
    )


def workspace_bytes(forecast: Forecast, settings: EngineSettings) -> int:
    """An upper estimate of the largest temporaries of a step: attention scores, FFN activations, logits; float32."""
    config, rows = forecast.config, max(settings.prefill_chunk, settings.parallel)
    keys = TILE_PAGES * PAGE_TOKENS + min(rows, QUERY_BLOCK) + settings.kv.recent
    scores = 3 * config.num_attention_heads * min(rows, QUERY_BLOCK) * keys
    width = getattr(config, "intermediate_size", None) or getattr(config, "moe_intermediate_size", config.hidden_size)
    activations = rows * (4 * width + 8 * config.hidden_size)
    logits = 3 * settings.parallel * config.vocab_size
    return 4 * int(scores + activations + logits)
