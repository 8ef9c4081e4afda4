"""The demo's third part: an expert cache at work on a model with real routing, prose first, then code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from turbomoe.cli.demo import title
from turbomoe.config import EngineSettings, ExpertSettings
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.models.base import LoadedModel

REFERENCE = "demo:moe"
SHARE = 4  # one slot for this many experts
CONTEXT, ANSWER = 512, 96
ROOM = 1 << 25  # more than all experts take; ``resize`` then says how many slots there are
PROMPTS = {
    "prose": "Elizabeth was at a loss to know what her sister could mean by it, and she walked out into the garden to "
    "think of it alone. Her mother had said nothing, and the gentleman himself",
    "code": 'def read_lines(path):\n    """Return the lines of a file."""\n    with open(path) as file:\n'
    "        return file.readlines()\n\n\ndef count_words(path):\n",
}


def expert_figures(out: TextIO) -> dict[str, Any]:
    """The same tokens with the cache off and on, and the share of expert calls that slots could answer."""
    plain, cached = _load("off"), _load(ROOM)
    assert cached.experts is not None
    store = cached.experts.store
    experts, layers = store.layouts[0].num_experts, len(store.layouts)
    slots = experts // SHARE
    cached.experts.resize(slots)
    title(f"3. {plain.name}: {layers} layers of {experts} experts, {cached.experts.top_k} for each token", out)
    print(
        f"All experts lie in RAM ({format_bytes(store.nbytes)}); {slots} slots a layer hold copies of hot ones.",
        file=out,
    )
    print(f"Sampled answers of {ANSWER} tokens, one after the other through the same cache:\n", file=out)
    print(f"{'prompt':8}{'same tokens':>12}{'hits, prompt':>14}{'hits, answer':>14}{'uploads':>9}", file=out)
    rows = {domain: _row(domain, plain, cached, out) for domain in PROMPTS}
    cached.experts.check_integrity(compare_bytes=True)
    same = all(row["same_tokens"] for row in rows.values())
    return {"model": plain.name, "slots": slots, "of": experts, "same_tokens": same, "prompts": rows}


def _load(cache: str | int) -> LoadedModel:
    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    settings = EngineSettings(ctx_size=CONTEXT, experts=ExpertSettings(cache=cache))
    return load_model(resolve(REFERENCE), settings)


def _row(domain: str, plain: LoadedModel, cached: LoadedModel, out: TextIO) -> dict[str, Any]:
    """Answer one prompt twice; print and return what the cache did in between."""
    wanted, before = _tokens(plain, domain), _phases(cached)
    found, after = _tokens(cached, domain), _phases(cached)
    did = {phase: {name: after[phase][name] - before[phase][name] for name in after[phase]} for phase in after}
    rates = {phase: counts["hits"] / max(1, counts["hits"] + counts["misses"]) for phase, counts in did.items()}
    row = {
        "same_tokens": found == wanted,
        "tokens": len(found),
        "hit_rate_prompt": round(rates["prefill"], 4),
        "hit_rate_answer": round(rates["decode"], 4),
        "uploads": sum(counts["uploads"] for counts in did.values()),
    }
    shares = f"{rates['prefill']:14.0%}{rates['decode']:14.0%}{row['uploads']:9}"
    print(f"{domain:8}{'yes' if row['same_tokens'] else 'NO':>12}{shares}", file=out, flush=True)
    return row


def _phases(model: LoadedModel) -> dict[str, dict[str, Any]]:
    assert model.experts is not None and model.experts.cache is not None
    return model.experts.cache.counters.to_json()


def _tokens(model: LoadedModel, domain: str) -> list[int]:
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request, SamplingParams
    from turbomoe.upstream.prompts import encode_text

    assert model.tokenizer is not None
    prompt = tuple(encode_text(model.tokenizer, PROMPTS[domain]))
    sampling = SamplingParams(temperature=0.8, seed=1)  # greedy, so small a model goes round in circles
    request = Request(prompt, max_tokens=ANSWER, sampling=sampling, ignore_eos=True)
    events = Engine(model, EngineSettings(ctx_size=CONTEXT)).stream(request)
    return [event.token for event in events if event.token is not None]
