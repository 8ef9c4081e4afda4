"""The frequencies are those by which the stock models turn their keys, in every family and with every scaling."""

import pytest
import torch

from tests.tiny_models import FAMILIES, LLAMA3_ROPE, tiny_model, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.kv.shape import AttentionShape
from turbomoe.kv.turns import angles, turn
from turbomoe.models import load_model
from turbomoe.upstream.rotary import rotary_frequencies

POSITION = 300


def key_at(model, layer: int, position: int) -> torch.Tensor:
    """The key [kv_heads, dim] of ``layer`` at ``position`` behind tokens that are all the same.

    What attends to equal values is equal everywhere, so only the angle differs. Recurrent layers count tokens: such a
    model gets its first token, of which it may only believe that it stands there.
    """
    runner, seen = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=POSITION + 8), []
    runner.memory.observer = lambda at, q, k, v, scale: seen.append(k[0, :, -1]) if at == layer else None
    if runner.memory.recurrent:
        runner.memory.reserve(0, position)
        runner.memory.host_lengths[0] = position
        runner.memory.lengths[0] = position
    count = 1 if runner.memory.recurrent else position + 1
    runner.forward([0], torch.full((1, count), 5), Phase.PREFILL)
    return seen[0].float()


@pytest.mark.parametrize("family,changes", [*((f, {}) for f in FAMILIES), ("llama", {"rope_parameters": LLAMA3_ROPE})])
def test_a_key_at_a_position_is_the_key_at_the_start_turned(family, changes, tmp_path):
    """In the first layer with full attention; Gemma's stands behind five that slide."""
    model = load_model(write_gguf(tiny_model(family, **changes), tmp_path / "model.gguf"), EngineSettings())
    layer = next(s.layer for s in model.layers if isinstance(s, AttentionShape) and not s.window)
    frequencies = rotary_frequencies(model.shell)
    assert frequencies is not None
    start, there = key_at(model, layer, 0), key_at(model, layer, POSITION)
    assert not torch.allclose(start, there, atol=1e-2)
    torch.testing.assert_close(turn(start, angles(frequencies, torch.tensor([POSITION]))), there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", {"full_attention": "dynamic"}])
def test_frequencies_that_change_with_the_length_are_not_followed(kind):
    class Shell:
        class model:
            class rotary_emb:
                rope_type, inv_freq = kind, torch.ones(3)

    assert rotary_frequencies(Shell) is None
    assert rotary_frequencies(object()).shape == (0,)
