"""What ``auto`` chooses for real models, and whether that keeps to the budget on text that the check has not seen."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest

from tests.real_models import gemma3_270m, qwen25_coder_05b, smollm2
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.insight.kv_auto import resolve_kv_types
from turbomoe.insight.kv_check import TOKENS, check_ids, first_judged, measure
from turbomoe.insight.kv_search import LADDER
from turbomoe.insight.texts import judgement_text
from turbomoe.kv.codecs import make_codec
from turbomoe.models import load_model
from turbomoe.upstream.prompts import encode_text

AUTO = KVSettings("auto", "auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locate", "keys"),
    [(smollm2, LADDER[1:]), (gemma3_270m, LADDER[1:]), (qwen25_coder_05b, LADDER)],
    ids=["smollm2", "gemma3", "qwen2.5"],
)
def test_the_choice_keeps_to_its_budget_on_other_text(
    locate: Callable[[], Path], keys: tuple[str, ...], state_home: Path
) -> None:
    """Held-out tokens: the first chapters, where the check reads the last pages. Run with -s to see the figures."""
    model = load_model(locate(), EngineSettings(kv=AUTO))
    settings = resolve_kv_types(model, EngineSettings(kv=AUTO))
    choice, pair = settings.kv_choice, (settings.kv.type_k, settings.kv.type_v)
    assert choice is not None and choice.budget is not None and choice.mean_kl is not None
    ids = encode_text(model.tokenizer, judgement_text())[:TOKENS]
    assert not set(zip(*(ids[n:] for n in range(12)), strict=False)) & set(
        zip(*(check_ids(model, AUTO)[n:] for n in range(12)), strict=False)
    ), "no twelve tokens in a row are in both"
    held_out = measure(model, AUTO, means_for(model, settings.kv), ids, {pair: inf})[pair]
    print(f"\n{model.name}: {choice.line()}; held out {held_out.kl:.4f} over {held_out.tokens} positions")
    for arm in choice.tried:
        print("   ", *(f"{name} {value}" for name, value in arm.items()))
    assert held_out.tokens == TOKENS - first_judged(AUTO)
    assert choice.mean_kl <= choice.budget and held_out.kl <= choice.budget
    assert settings.kv.type_k in keys
    size = next(shape.head_dim for shape in model.layers if not getattr(shape, "window", 1))
    spent = sum(make_codec(name, size).bits_per_value for name in pair)
    assert spent < 2 * make_codec("q8_0", size).bits_per_value, "every one of them bears less than 8 bits somewhere"
