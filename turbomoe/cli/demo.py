"""``turbomoe demo``: the two ideas on a small real model, with figures that the run itself measures."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from turbomoe.cli.options import add_common
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.experts.cache import ExpertCache
    from turbomoe.models.base import Forecast, LoadedModel

REFERENCE = "demo:smollm2"
QUESTION = "Why is the sky blue? Answer in two sentences."
CODES = KVSettings("tq3", "tq3")
CONTEXT = 4096
JUDGED_TOKENS = 1024
EXPERTS, SLOTS, ANSWER = 8, 4, 24


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = "A chat answer with keys and values in 3-bit codes, what the codes cost, and an expert cache at work."
    parser = subparsers.add_parser("demo", help="see the KV codes and the expert cache at work", description=text)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the three parts; with ``--json`` only the figures are printed on standard output."""
    out = sys.stderr if args.json else sys.stdout
    settings = EngineSettings(ctx_size=CONTEXT, kv=CODES)
    model = load_demo(settings)
    figures = {"answer": answer(model, settings, out), "kv": kv_figures(model, out)}
    name = model.name
    del model
    # Experts are cut out of float32 weights: columns of a packed matrix cannot be cut everywhere.
    experts = expert_figures(load_demo(replace(settings, dtype="float32")), out)
    if args.json:
        print(json.dumps({"model": name, **figures, "experts": experts}))
    return 0 if experts["same_tokens"] else 1


def load_demo(settings: EngineSettings) -> LoadedModel:
    """The demo model, after the memory table."""
    from turbomoe.cli.loading import Bar, announce, quiet_transformers

    quiet_transformers()
    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    def before(forecast: Forecast) -> None:
        announce(forecast, settings)

    with Bar("loading") as bar:
        return load_model(resolve(REFERENCE), settings, bar, before=before)


def answer(model: LoadedModel, settings: EngineSettings, out: TextIO) -> dict[str, Any]:
    """Stream a chat answer with 3-bit keys and values."""
    from turbomoe.cli.loading import Stopwatch, make_engine, statistics, statistics_line
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.request import SamplingParams

    _title(f"1. {model.name} answers, keys and values in 3-bit codes", out)
    conversation = Conversation(make_engine(model, settings))
    print(f"> {QUESTION}", file=out, flush=True)
    watch, text, finish = Stopwatch(), "", ""
    for event in conversation.ask(QUESTION, SamplingParams(), max_tokens=96):
        if event.token is not None:
            watch.tick()
        text += event.text
        finish = event.finish.value if event.finish else finish
        print(event.text, end="", flush=True, file=out)
    figures = statistics(conversation.engine, conversation.usage, watch)
    print(f"\n{statistics_line(figures, finish)}", file=out)
    return {"text": text, "finish": finish, **figures}


def kv_figures(model: LoadedModel, out: TextIO) -> dict[str, Any]:
    """Bytes of a full context in bf16 and in codes, and what the codes change on a novel."""
    from turbomoe.insight.divergence import label_of

    _title(f"2. The KV cache of {CONTEXT} tokens, everything counted, and what the codes change", out)
    coded = [KVSettings("tq4", "tq4"), CODES, KVSettings("tq2", "tq2")]
    sizes = {label_of(kv): _kv_size(model, kv) for kv in [KVSettings(), *coded]}
    for label, size in sizes.items():
        share = size["bytes"] / sizes["bf16"]["bytes"]
        print(
            f"{label:12} {format_bytes(size['bytes']):>10} {size['bits_per_value']:6.2f} bits/value {share:5.0%}",
            file=out,
        )
    return {"context": CONTEXT, "sizes": sizes, "quality": _quality(model, coded, out)}


def _kv_size(model: LoadedModel, kv: KVSettings) -> dict[str, Any]:
    from turbomoe.kv.cache import KVCache

    cache = KVCache(model.layers, kv, slots=1, ctx_size=CONTEXT, device="meta")
    return {"bytes": cache.nbytes(), "bits_per_value": round(cache.bits_per_value(), 3)}


def _quality(model: LoadedModel, coded: list[KVSettings], out: TextIO) -> list[dict[str, Any]]:
    from turbomoe.cli.eval import render, tokens_of
    from turbomoe.cli.loading import Bar
    from turbomoe.insight.divergence import compare
    from turbomoe.insight.texts import NAME, judgement_text

    print(f"\nAgainst the bf16 cache, {JUDGED_TOKENS} tokens of {NAME}", file=out, flush=True)
    print("(KL in nats per token; the exact windows are a large part of so few tokens):", file=out, flush=True)
    ids = tokens_of(model, judgement_text(), NAME, JUDGED_TOKENS)
    with Bar("judging", unit="token") as bar:
        verdicts = compare(model, ids, coded, bar)
    print(render(verdicts), file=out, flush=True)
    return [verdict.to_json() for verdict in verdicts]


def expert_figures(model: LoadedModel, out: TextIO) -> dict[str, Any]:
    """The model split into experts: the same greedy tokens without the cache and with half the experts in slots."""
    from turbomoe.experts.base import Phase
    from turbomoe.models.split import split_dense

    _title(f"3. The same model, each FFN split into {EXPERTS} experts that are all active", out)
    dense = _greedy(model)
    split = split_dense(model, EXPERTS, ExpertSettings())
    plain = _greedy(split)
    cache = _use_cache(split)
    cached = _greedy(split)
    assert split.experts is not None
    split.experts.check_integrity(compare_bytes=True)
    counters, store = cache.counters, split.experts.store
    facts = {
        f"experts in RAM: {format_bytes(store.nbytes)} in {len(store.layouts)} layers": "complete",
        f"slots for {SLOTS} of {EXPERTS} experts a layer; hit rate in decode": f"{counters.hit_rate(Phase.DECODE):.2f}",
        f"{ANSWER} greedy tokens with the cache equal those without": "yes" if cached == plain else "NO",
        "tokens of the split model equal the dense model's": "yes" if plain == dense else "no",
    }
    for what, found in facts.items():
        print(f"{what}: {found}", file=out)
    return {"same_tokens": cached == plain, "same_as_dense": plain == dense, "counters": counters.to_json()}


def _use_cache(split: LoadedModel) -> ExpertCache:
    """Let the model's experts run through a cache with ``SLOTS`` slots a layer."""
    from turbomoe.experts.module import StoreExperts
    from turbomoe.experts.runtime import ExpertRuntime
    from turbomoe.models import bind

    assert split.experts is not None
    store = split.experts.store
    runtime = ExpertRuntime(store, ExpertSettings(cache=store.nbytes + (1 << 20)), top_k=EXPERTS)
    bind((m for m in split.shell.modules() if isinstance(m, StoreExperts)), runtime)
    split.experts = runtime
    runtime.resize(SLOTS)
    assert runtime.cache is not None
    return runtime.cache


def _greedy(model: LoadedModel) -> list[int]:
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request
    from turbomoe.upstream.prompts import encode_text

    assert model.tokenizer is not None
    engine = Engine(model, EngineSettings(ctx_size=256))
    request = Request(tuple(encode_text(model.tokenizer, "The sea is")), max_tokens=ANSWER, ignore_eos=True)
    return [event.token for event in engine.stream(request) if event.token is not None]


def _title(text: str, out: TextIO) -> None:
    print(f"\n{text}\n{'-' * len(text)}", file=out)
