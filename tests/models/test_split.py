"""A dense model split into experts computes the same function: the oracle for the expert path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models as tiny
from turbomoe.config import EngineSettings, ExpertSettings
from turbomoe.errors import ModelError
from turbomoe.models import LoadedModel, load_model
from turbomoe.models.split import AllExperts, split_dense

DENSE = [family for family in tiny.FAMILIES if family not in tiny.ROUTED_FAMILIES]


def load(model: tiny.PreTrainedModel, folder: Path, dtype: str = "float32") -> LoadedModel:
    path = tiny.write_gguf(model, folder / "model.gguf")
    return load_model(path, EngineSettings(dtype=dtype), attention="eager")


@pytest.mark.parametrize("experts", [1, 2, 8, 96])
@pytest.mark.parametrize("family", DENSE)
def test_split_equals_dense(family: str, experts: int, tmp_path: Path) -> None:
    model, ids = tiny.tiny_model(family), tiny.tokens(batch=2)
    wanted = tiny.logits(model, ids)
    split = split_dense(load(model, tmp_path), experts, ExpertSettings())
    assert (tiny.logits(split.shell, ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_split_in_bfloat16_stays_within_its_rounding(tmp_path: Path) -> None:
    model, ids = tiny.tiny_model("llama"), tiny.tokens()
    wanted = tiny.logits(model, ids)
    loaded = load(model, tmp_path, "bfloat16")
    dense = (tiny.logits(loaded.shell, ids) - wanted).abs().max()
    split = (tiny.logits(split_dense(loaded, 4, ExpertSettings()).shell, ids) - wanted).abs().max()
    assert split < 2 * dense


def test_bytes_move_from_the_shell_to_the_store(tmp_path: Path) -> None:
    dense = load(tiny.tiny_model("qwen3"), tmp_path)
    weights = {name: parameter.clone() for name, parameter in dense.shell.named_parameters()}
    ffn = 3 * 64 * 96 * 4 * 3  # three matrices in three layers
    split = split_dense(dense, 4, ExpertSettings())
    assert split.weight_bytes == dense.weight_bytes - ffn
    assert split.experts is not None and split.experts.store.nbytes == ffn
    assert not any(".mlp." in name for name, _ in split.shell.named_parameters())
    parts = split.experts.store.parts(2, 3)
    down = parts["down"].view(torch.float32).view(64, 24)
    assert torch.equal(down, weights["model.layers.2.mlp.down_proj.weight"][:, 72:])
    up = parts["up"].view(torch.float32).view(24, 64)
    assert torch.equal(up, weights["model.layers.2.mlp.up_proj.weight"][72:])


def test_a_split_model_has_a_name_and_an_identity_of_its_own(tmp_path: Path) -> None:
    dense = load(tiny.tiny_model("llama"), tmp_path)
    split = split_dense(dense, 4, ExpertSettings())
    assert "split into 4 experts" in split.name
    assert split.identity != dense.identity and len(split.identity) == 64


@pytest.mark.parametrize("experts", [0, -1, 5, 97])
def test_width_must_be_divisible(experts: int, tmp_path: Path) -> None:
    dense = load(tiny.tiny_model("llama"), tmp_path)
    with pytest.raises(ModelError, match="width is 96"):
        split_dense(dense, experts, ExpertSettings())


def test_models_without_a_plain_dense_ffn_are_refused(tmp_path: Path) -> None:
    for number, model in enumerate((tiny.tiny_model("qwen3moe"), tiny.tiny_model("llama", mlp_bias=True))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ModelError, match="no dense gated FFN"):
            split_dense(load(model, folder), 4, ExpertSettings())


def test_every_expert_is_asked_with_weight_one() -> None:
    block, seen = AllExperts(0, 3), []

    def spy(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), weights.tolist()))
        return rows

    block.experts.forward = spy  # type: ignore[method-assign, assignment]
    assert block(torch.zeros(2, 1, 5)).shape == (2, 1, 5)
    assert seen == [([[0, 1, 2]] * 2, [[1.0] * 3] * 2)]
