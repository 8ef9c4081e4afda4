"""The training script on a toy: equal to transformers in values and gradients; turbomoe reads what it exports."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from checkpoint import save
from data import Part, read, write
from export import complete_folder, export, pick
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from model import DemoModel
from moe import blocked
from safetensors.torch import load_file
from tokenizer import DOMAINS, END, untrained
from tokenizers.trainers import BpeTrainer
from torch import nn
from train import TINY, build, facts
from transformers import AutoModelForCausalLM

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel

Q4 = Kind.Q4_0
WORDS = "the sea is salt and def read ( file ) : return the old man went down to the sea and die Datei wird gelesen"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer made as the example makes its own."""
    made, path = untrained(), tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS], trainer)
    made.save(str(path))
    return path


@pytest.fixture(scope="module", params=[8, 0], ids=["routed", "dense"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A saved folder of random weights, norms and gates included."""
    torch.manual_seed(0)
    model = DemoModel(replace(TINY, experts=request.param), blocked(16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("trained")
    save(model, folder)
    complete_folder(folder, tokenizer_file)
    return folder


def ours(folder: Path) -> DemoModel:
    """The training model with the folder's weights."""
    fields = json.loads((folder / "config.json").read_text())
    model = DemoModel(replace(TINY, experts=fields.get("num_experts", 0)), blocked(16))
    weights = {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    model.load_state_dict(weights)
    return model.float()


def theirs(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_a_training_step_equals_transformers(trained: Path) -> None:
    model, reference = ours(trained), theirs(trained)
    # Not token 0: it is also the padding, whose embedding gets no gradient from its input in transformers.
    both = torch.randint(1, TINY.vocab_size, (2, TINY.context + 1))
    ids, targets = both[:, :-1], both[:, 1:]
    losses, _, routes = model(ids, targets)
    logits = reference(input_ids=ids, use_cache=False).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)
    assert relative(model.logits(ids), logits) < 1e-5
    assert torch.allclose(losses, wanted.mean(1), rtol=1e-5)
    assert [list(ids.shape) for ids in routes] == [[2 * TINY.context, TINY.active]] * (len(routes))
    losses.mean().backward()
    wanted.mean().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-3, name


def run(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=ids.shape[1], measuring=True)
    return runner.forward([0], ids, Phase.PREFILL, keep=0)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(300, (1, TINY.context))


def test_the_export_in_float32_is_the_same_model(trained: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    export(trained, trained / "tokenizer.json", tmp_path / "m.gguf", lambda name: Kind.F32)
    model = load_model(tmp_path / "m.gguf", EngineSettings(ctx_size=TINY.context, dtype="float32"))
    wanted = theirs(trained)(input_ids=ids).logits
    assert relative(run(model, ids), wanted) < 1e-5
    assert model.tokenizer is not None
    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    for text in (WORDS, "Größe 12\n\n\tx = y  + 'z'", "naïve “quotes”", ""):
        assert model.tokenizer.encode(text) == backend.encode(text).ids


def test_the_folder_itself_is_readable(trained: Path, ids: torch.Tensor) -> None:
    model = load_model(trained, EngineSettings(ctx_size=TINY.context, dtype="float32"))
    assert relative(run(model, ids), theirs(trained)(input_ids=ids).logits) < 1e-5


def test_the_packed_export_holds_what_training_rounded_to(trained: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    path = tmp_path / "m.gguf"
    export(trained, trained / "tokenizer.json", path, lambda name: Q4 if pick(name) == Q4 else Kind.F32)
    model = ours(trained)
    exact = model.logits(ids)
    model.narrow = True
    rounded = model.logits(ids)
    assert relative(run(load_model(path, EngineSettings(ctx_size=TINY.context, dtype="float32")), ids), rounded) < 1e-4
    assert relative(exact, rounded) > 0.1


def test_the_types_of_the_packed_export(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(trained, trained / "tokenizer.json", path)
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}
    narrow = {name for name, kind in kinds.items() if kind == Q4}
    assert narrow and all("ffn_" in name and "shexp" not in name and "inp" not in name for name in narrow)
    assert all(kind == Kind.F32 for name, kind in kinds.items() if "norm" in name or "ffn_gate_inp" in name)
    assert kinds["token_embd.weight"] == kinds["blk.3.attn_q.weight"] == Kind.Q8_0


def parts_of(length: int) -> list[Part]:
    """Parts of the corpus in small numbers, each domain in numbers of its own."""
    random = np.random.default_rng(0)
    parts = []
    for place, domain in enumerate(DOMAINS):
        for split in ("train", "held"):
            tokens = random.integers(64 * place, 64 * place + 64, length).astype(np.uint16)
            parts.append(Part(split, domain, tokens, 3 * length))
    return [*parts, Part("eval", "novel", parts[0].tokens, 3 * length)]


@pytest.mark.parametrize("dense", [False, True])
def test_a_short_run_on_the_cpu_learns_and_reports(tmp_path: Path, dense: bool) -> None:
    options = SimpleNamespace(out=tmp_path, tiny=True, dense=dense, minutes=600.0, steps=4, batch=4, rate=3e-2)
    trainer = build(options, torch.device("cpu"), parts_of(TINY.context * 6))
    trainer.run()
    report = facts(trainer, trainer.speed()) | trainer.evaluation.report()
    assert (report["steps"], report["tokens"], report["complete"]) == (4, 4 * 4 * TINY.context, True)
    assert set(report["texts"]) == {*(f"held/{domain}" for domain in DOMAINS), "eval/novel"}
    assert report["parameters"] - report["active"] == (0 if dense else 4 * 6 * 3 * 64 * 32)
    assert ("routing" in report) == (not dense)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    held = {row["step"]: row["held"] for row in rows if "held" in row}
    assert list(held) == [1, 2, 3, 4]
    assert all(held[4][domain] < held[1][domain] - 0.2 for domain in DOMAINS), held
    assert trainer.model.narrow


def test_every_domain_has_its_share_of_a_batch_and_targets_follow(tmp_path: Path) -> None:
    options = SimpleNamespace(out=tmp_path, tiny=True, dense=True, minutes=5.0, steps=1, batch=50, rate=4e-3)
    batches = build(options, torch.device("cpu"), parts_of(TINY.context * 6)).batches
    ids, targets = batches.next()
    assert ids.shape == targets.shape == (50, TINY.context) and torch.equal(ids[:, 1:], targets[:, :-1])
    assert ids[:, 0].div(64, rounding_mode="floor").bincount().tolist() == [17, 11, 11, 11]
    assert not torch.equal(ids, batches.next()[0])


def test_tokens_survive_their_file_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    path, parts = tmp_path / "tokens.xz", parts_of(50)
    write(parts, path)
    for found, wanted in zip(read(path), parts, strict=True):
        assert (found.split, found.domain, found.text_bytes) == (wanted.split, wanted.domain, wanted.text_bytes)
        assert np.array_equal(found.tokens, wanted.tokens)
    content = lzma.decompress(path.read_bytes())
    path.write_bytes(lzma.compress(content[:-2]))
    with pytest.raises(ValueError, match="449 tokens where 450 were announced"):
        read(path)
