"""The seams themselves: what transformers hands to our attention, and what it does with our cache."""

import pytest
import torch
from transformers import AttentionInterface

from tests.tiny_models import FAMILIES, tiny_model, tokens
from turbomoe.config import KVSettings
from turbomoe.errors import ModelError
from turbomoe.kv.cache import KVCache
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.shapes import layer_shapes
from turbomoe.upstream.attention import ATTENTION, FreshKV, StepView, attention, register
from turbomoe.upstream.forward import forward


@pytest.fixture(autouse=True)
def registered():
    register()


def memory_for(model, slots: int = 2) -> KVCache:
    return KVCache(layer_shapes(model.config), KVSettings("f32", "f32"), slots=slots, ctx_size=64)


def ours(family: str):
    model = tiny_model(family)
    model.set_attn_implementation(ATTENTION)
    return model


def test_registering_twice_is_fine_and_touches_nobody_else():
    before = set(AttentionInterface().valid_keys())
    assert register() == register() == ATTENTION
    assert set(AttentionInterface().valid_keys()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_our_attention_gets_what_our_cache_returned_and_never_a_mask(family, monkeypatch):
    model, seen = ours(family), []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, key, attention_mask, query.shape, kwargs.get("scaling")))
        return attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(ATTENTION, spy)
    memory = memory_for(model)
    memory.begin([1], 7)
    with torch.no_grad():
        forward(model, tokens(7), memory, keep=1)
    full = [shape.layer for shape in memory.shapes if isinstance(shape, AttentionShape)]
    assert [layer for layer, *_ in seen] == full
    for layer, key, mask, query_shape, scaling in seen:
        assert isinstance(key, FreshKV) and key.layer == layer
        assert mask is None
        assert query_shape[0] == 1 and query_shape[2] == 7
        assert scaling is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_limits_the_logits(family):
    model, memory = ours(family), None
    for keep, rows in ((1, 1), (3, 3), (0, 9)):
        memory = memory_for(model)
        memory.begin([0], 9)
        with torch.no_grad():
            assert forward(model, tokens(9), memory, keep).shape[:2] == (1, rows)


@pytest.mark.parametrize("family", ["qwen35", "qwen35moe"])
def test_recurrent_states_of_other_slots_stay_as_they_are(family):
    model = ours(family)
    memory = memory_for(model, slots=3)
    for slot in (0, 2):
        memory.begin([slot], 5)
        with torch.no_grad():
            forward(model, tokens(5, seed=slot), memory, keep=1)
        memory.commit()
    before = {i: (s.conv[0].clone(), s.state[0].clone()) for i, s in memory.recurrent.items()}
    memory.begin([2], 3)
    with torch.no_grad():
        forward(model, tokens(3, seed=9), memory, keep=1)
    memory.commit()
    for i, (conv, state) in before.items():
        assert torch.equal(memory.recurrent[i].conv[0], conv) and torch.equal(memory.recurrent[i].state[0], state)
        assert conv.abs().sum() > 0 and state.abs().sum() > 0
        assert memory.recurrent[i].conv[1].abs().sum() == 0


def test_the_view_tells_lengths_as_a_cache_does():
    model = ours("llama")
    memory = memory_for(model)
    memory.begin([0], 6)
    assert StepView(memory).get_seq_length() == 0
    memory.commit()
    memory.begin([0], 2)
    view = StepView(memory)
    assert view.get_seq_length() == 6
    assert view.layers[0].get_mask_sizes(2) == (8, 0)
    assert view.layers[0].get_max_length() == 64


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_we_cannot_compute_is_refused(extra):
    with pytest.raises(ModelError, match="soft-capping or sinks"):
        attention(None, torch.zeros(1, 4, 1, 16), None, None, None, **extra)
