"""Real files: our loading against transformers' own loading of the same file, and how long ours takes."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

from tests import real_models
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.models import LoadedModel, load_model
from turbomoe.models.split import split_dense

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    "property of some one or other of their daughters."
)


def load(path: Path, attention: str = "eager") -> LoadedModel:
    return load_model(path, EngineSettings(dtype="float32"), attention=attention)


def ids_of(model: LoadedModel) -> torch.Tensor:
    assert model.tokenizer is not None
    return torch.tensor([model.tokenizer.encode(TEXT)])


@torch.no_grad()
def logits(shell: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = shell(input_ids=ids, use_cache=False).logits
    return found


def theirs(path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """transformers' own reading of the file: an independent dequantiser, name table and set of transforms."""
    from transformers import AutoModelForCausalLM

    # It asks for accelerate before reading any GGUF, and does not use it without a device map.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    # It opens the file and builds the same name table again and again: half of its time, and no part of the oracle.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def compare(path: Path, layers: int, parameters: int, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    ours = load(path)
    assert len(ours.layers) == layers
    assert sum(parameter.numel() for parameter in ours.shell.parameters()) == parameters
    ids = ids_of(ours)[:, :64]
    assert ids.shape[1] == 64
    wanted = logits(theirs(path, monkeypatch), ids)
    for found in (logits(ours.shell, ids), served(path, ids)):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    return ours


def served(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens as the engine computes them: our attention over our cache, in a long and a short pass."""
    runner = ModelRunner(load(path, "turbomoe"), KVSettings("f32", "f32"), slots=1, ctx_size=128)
    return torch.cat([runner.forward([0], part, Phase.PREFILL, keep=0) for part in ids.split(40, dim=1)], dim=1)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_models.smollm2()


def test_smollm2_equals_transformers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = compare(smollm2, 30, 134_515_008, monkeypatch)
    assert ours.context_length == 8192
    assert ours.weight_bytes == 4 * 134_515_008


def test_smollm2_opens_within_three_seconds(smollm2: Path) -> None:
    """After imports and with a warm file, on one thread. Processor time: on a quiet machine that is the time a
    person waits, and on a busy one it does not measure the neighbours."""
    load(smollm2)
    start = time.process_time()
    load(smollm2)
    assert time.process_time() - start <= 3.0


def test_smollm2_split_into_experts_equals_itself(smollm2: Path) -> None:
    model = load(smollm2)
    ids = ids_of(model)[:, :32]
    wanted = logits(model.shell, ids)
    split = split_dense(model, 8, ExpertSettings())
    assert split.experts is not None and split.experts.store.nbytes == 30 * 3 * 1536 * 576 * 4
    found = logits(split.shell, ids)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.slow
def test_gemma3_270m_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = compare(real_models.gemma3_270m(), 18, 268_098_176, monkeypatch)
    assert [getattr(layer, "window", None) for layer in ours.layers] == ([512] * 5 + [0]) * 3


@pytest.mark.slow
def test_qwen25_coder_05b_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(real_models.qwen25_coder_05b(), 24, 630_167_424, monkeypatch)
