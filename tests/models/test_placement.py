"""Transforms undo llama.cpp's, for any shape; names of every kind go where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_models as tiny
from turbomoe.models.names import DERIVED, PREDICTION, VISION, place_hub
from turbomoe.models.placement import (
    Dense,
    Placement,
    Routed,
    as_row,
    chain,
    log_negated,
    minus_one,
    new_axis,
    rope_pairs,
    value_heads,
)

SMALL = st.integers(1, 5)


class Heads:
    """The part of a configuration that the converter looks at."""

    def __init__(self, keys: int, per_key: int, size: int) -> None:
        self.linear_num_key_heads, self.linear_num_value_heads = keys, keys * per_key
        self.linear_value_head_dim, self.linear_key_head_dim = size, 2


@given(heads=SMALL, half=SMALL, columns=st.integers(0, 4))
def test_rope_pairs_undo_the_converter(heads: int, half: int, columns: int) -> None:
    shape = (heads * half * 2, columns) if columns else (heads * half * 2,)
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    stored = array.reshape(heads, 2, half, *shape[1:]).swapaxes(1, 2).reshape(shape)
    assert torch.equal(rope_pairs(heads)(torch.from_numpy(stored.copy())), torch.from_numpy(array))


def test_rope_pairs_by_hand() -> None:
    """One head of four: the file keeps pairs (0, 2), (1, 3) side by side."""
    assert rope_pairs(1)(torch.tensor([0, 2, 1, 3])).tolist() == [0, 1, 2, 3]


@given(keys=SMALL, per_key=SMALL, size=SMALL, columns=SMALL)
def test_value_heads_undo_the_converter(keys: int, per_key: int, size: int, columns: int) -> None:
    config = Heads(keys, per_key, size)
    array = np.random.default_rng(0).standard_normal((keys * per_key * size, columns)).astype(np.float32)
    stored = torch.from_numpy(np.ascontiguousarray(tiny._tile_heads(config, array, size)))
    wanted = torch.from_numpy(array)
    assert torch.equal(value_heads(keys, per_key, size)(stored), wanted)
    assert torch.equal(value_heads(keys, per_key, size, axis=1)(stored.T), wanted.T)
    head = torch.randn(3, columns)
    moved = value_heads(keys, per_key, size, offset=3)(torch.cat([head, stored]))
    assert torch.equal(moved, torch.cat([head, wanted]))


def test_value_heads_by_hand() -> None:
    """Two key heads with two value heads each: v0k0 v0k1 v1k0 v1k1 becomes v0k0 v1k0 v0k1 v1k1."""
    assert value_heads(2, 2, 1)(torch.tensor([0, 1, 2, 3])).tolist() == [0, 2, 1, 3]


def test_small_transforms() -> None:
    x = torch.tensor([-2.0, -0.5])
    assert torch.equal(minus_one(x), torch.tensor([-3.0, -1.5]))
    assert torch.allclose(log_negated(x), torch.tensor([0.6931472, -0.6931472]))
    assert chain(minus_one, new_axis(1), as_row)(x).tolist() == [[-3.0, -1.5]]
    assert new_axis(1)(torch.zeros(3, 4)).shape == (3, 1, 4)


@given(heads=SMALL, half=SMALL, other=SMALL)
def test_transforms_work_without_storage(heads: int, half: int, other: int) -> None:
    meta = torch.empty(heads * half * 2, other, device="meta")
    assert rope_pairs(heads)(meta).shape == meta.shape
    assert value_heads(heads, half, 2)(meta).shape == meta.shape
    assert value_heads(heads, half, 2, axis=1)(meta.T).shape == meta.T.shape


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lm_head.weight", Dense("lm_head.weight")),
        ("model.norm.weight", Dense("model.norm.weight")),
        ("model.language_model.norm.weight", Dense("model.norm.weight")),
        ("language_model.model.norm.weight", Dense("model.norm.weight")),
        ("language_model.lm_head.weight", Dense("lm_head.weight")),
        ("model.language_model.layers.3.mlp.experts.gate_up_proj", Routed(("gate", "up"), 3)),
        ("model.layers.3.mlp.experts.down_proj", Routed(("down",), 3)),
        ("model.layers.30.mlp.experts.511.up_proj.weight", Routed(("up",), 30, 511)),
        ("model.language_model.layers.0.mlp.experts.0.gate_proj.weight", Routed(("gate",), 0, 0)),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", Dense("model.layers.0.mlp.shared_expert.up_proj.weight")),
        ("model.visual.blocks.0.attn.qkv.weight", VISION),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", VISION),
        ("multi_modal_projector.mm_input_projection_weight", VISION),
        ("mtp.layers.0.mlp.experts.0.up_proj.weight", PREDICTION),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", DERIVED),
    ],
)
def test_hub_names(name: str, wanted: Placement) -> None:
    assert place_hub(name) == wanted
