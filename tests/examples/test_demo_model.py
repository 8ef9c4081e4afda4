"""The model in the package: what it is, and that it has learnt what its card says."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from card import perplexities, routing, sources, transfer
from routing import Routing
from routing import transfer as measure_transfer

from tests.examples.conftest import EXAMPLE
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.files.demo import locate_demo
from turbomoe.insight.texts import judgement_text
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

RESULTS = {name: json.loads((EXAMPLE / "results" / name / "report.json").read_text()) for name in ("moe", "dense")}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(locate_demo("moe"), EngineSettings(ctx_size=1024))


def test_it_is_the_model_that_the_report_describes(model: LoadedModel) -> None:
    shape, config = RESULTS["moe"]["shape"], model.config
    assert (model.family, model.context_length) == ("qwen35moe", shape["context"])
    sizes = (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok, config.hidden_size)
    assert sizes == (shape["layers"], shape["experts"], shape["active"], shape["hidden"]) == (8, 64, 4, 256)
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert model.stop_ids == {0}


def run(model: LoadedModel, text: str, tokens: int) -> tuple[float, Routing]:
    """(perplexity, routing) of the first ``tokens`` tokens of a text."""
    assert model.tokenizer is not None and model.experts is not None
    ids = torch.tensor([encode_text(model.tokenizer, text)[: tokens + 1]])
    routes: dict[int, torch.Tensor] = {}
    real = model.experts.run

    def noting(layer: int, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routes[layer] = chosen.clone()
        return real(layer, hidden, chosen, weights)

    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=1024, measuring=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.experts, "run", noting)
        logits = runner.forward([0], ids[:, :-1], Phase.PREFILL, keep=0)[0]
    found = Routing.empty(layers=8, experts=64)
    found.add([routes[layer].long() for layer in sorted(routes)], batch=1, used=1)
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp()), found


def test_perplexity_and_routing_are_the_reported_ones(model: LoadedModel) -> None:
    reported = RESULTS["moe"]
    texts = {"prose": judgement_text(), "code": inspect.getsource(argparse.ArgumentParser)[4000:]}
    found = {domain: run(model, text, 768) for domain, text in texts.items()}
    novel = reported["texts"]["eval/novel-moby-dick"]["perplexity"]
    assert 0.7 * novel < found["prose"][0] < 1.3 * novel  # other chapters than the report's whole book
    assert found["code"][0] < 12
    routings = {domain: counted for domain, (_, counted) in found.items()}
    for domain, counted in routings.items():
        assert int(counted.counts.sum()) == 8 * 4 * 768
        assert all(12 < experts < 60 for experts in counted.report()["effective_experts"]), domain
    moved = measure_transfer(routings)
    assert moved["prose"]["prose"] > 0.5 and moved["code"]["code"] > 0.55
    assert moved["prose"]["code"] < 0.25 and moved["code"]["prose"] < 0.25, "chance is a quarter"


def test_routing_is_neither_uniform_nor_collapsed() -> None:
    report = RESULTS["moe"]
    assert min(report["load_of_all_domains"]) > 48, "every expert is used by some domain"
    for domain, found in report["routing"].items():
        assert all(16 < experts < 60 for experts in found["effective_experts"]), domain
        assert found["top_quarter"] > 0.4 > 0.25 > found["reuse"]["8"] > 4 / 64


def test_it_beats_its_dense_sister_on_every_text_by_more_than_three_percent() -> None:
    moe, dense = RESULTS["moe"], RESULTS["dense"]
    assert moe["tokens"] == dense["tokens"] and moe["active"] == pytest.approx(dense["active"], rel=0.03)
    for name, text in moe["texts"].items():
        assert text["perplexity"] < 0.97 * dense["texts"][name]["perplexity"], name


MANIFEST = EXAMPLE / "results" / "MANIFEST.tsv"
TABLES = {
    "sources": sources(MANIFEST),
    "perplexities": perplexities(*RESULTS.values()),
    "routing": routing(RESULTS["moe"]),
    "transfer": transfer(RESULTS["moe"]),
}


@pytest.mark.parametrize("figures", TABLES.values(), ids=TABLES)
def test_the_cards_tables_are_the_reports(figures: str) -> None:
    assert figures in (EXAMPLE / "MODEL_CARD.md").read_text("utf-8"), "run: python card.py"


def test_the_card_and_the_readme_have_no_dead_links() -> None:
    for page in (EXAMPLE / "MODEL_CARD.md", EXAMPLE / "README.md"):
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
        assert targets and not [target for target in targets if not Path(page.parent / target).exists()]
