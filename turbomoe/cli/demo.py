"""``turbomoe demo``: the two ideas on a small real model, with figures that the run itself measures."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbomoe.cli.options import add_common
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings

if TYPE_CHECKING:
    from turbomoe.models.base import LoadedModel

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
    from turbomoe.cli.loading import Bar, announce, quiet_transformers

    quiet_transformers()
    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    settings = EngineSettings(ctx_size=CONTEXT, kv=CODES)
    path = resolve(REFERENCE)
    with Bar("loading") as bar:
        model = load_model(path, settings, bar, before=lambda forecast: announce(forecast, settings))
    figures = {"answer": answer(model, settings, out), "kv": kv_figures(model, out)}
    name = model.name
    del model
    # Experts are cut out of float32 weights: columns of a packed matrix cannot be cut everywhere.
    experts = expert_figures(load_model(path, replace(settings, dtype="float32")), out)
    if args.json:
        print(json.dumps({"model": name, **figures, "experts": experts}))
    return 0 if experts["same_tokens"] else 1


def answer(model: LoadedModel, settings: EngineSettings, out: Any) -> dict[str, Any]:
    """Stream a chat answer with 3-bit keys and values."""
    from turbomoe.cli.loading import Stopwatch, make_engine, statistics, statistics_line
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.request import SamplingParams

    _title(f"1. {model.name} answers, keys and values in 3-bit codes", out)
    print(f"> {QUESTION}", file=out)
    conversation, watch, text = Conversation(make_engine(model, settings)), Stopwatch(), ""
    for event in conversation.ask(QUESTION, SamplingParams(), max_tokens=96):
        watch.tick()
        text += event.text
        print(event.text, end="", flush=True, file=out)
    figures = statistics(conversation.engine, conversation.usage, watch)
    print(f"\n{statistics_line(figures)}", file=out)
    return {"text": text, **figures}


def kv_figures(model: LoadedModel, out: Any) -> list[dict[str, Any]]:
    """Bytes of a full context in bf16 and in codes, and what the codes change on a novel."""
    from turbomoe.cli.eval import render
    from turbomoe.cli.loading import Bar
    from turbomoe.insight.divergence import compare, label_of
    from turbomoe.insight.texts import NAME, judgement_text
    from turbomoe.kv.cache import KVCache
    from turbomoe.units import format_bytes
    from turbomoe.upstream.prompts import encode_text

    assert model.tokenizer is not None
    _title(f"2. The KV cache of {CONTEXT} tokens, everything counted, and what the codes change", out)
    settings = [KVSettings(), KVSettings("tq4", "tq4"), CODES, KVSettings("tq2", "tq2")]
    sizes = {}
    for kv in settings:
        cache = KVCache(model.layers, kv, slots=1, ctx_size=CONTEXT, device="meta")
        sizes[label_of(kv)] = cache.nbytes()
        print(
            f"{label_of(kv):14} {format_bytes(cache.nbytes()):>10}  {cache.bits_per_value():5.2f} bits/value", file=out
        )
    print(
        f"\nAgainst the bf16 cache, {JUDGED_TOKENS} tokens of {NAME} (nats; windows are a large part of so few):",
        file=out,
    )
    ids = encode_text(model.tokenizer, judgement_text())[:JUDGED_TOKENS]
    with Bar("judging", unit="token") as bar:
        verdicts = compare(model, ids, settings[1:], bar)
    print(render(verdicts), file=out)
    return [{**v.to_json(), f"bytes_at_{CONTEXT}": sizes.get(v.label)} for v in verdicts]


def expert_figures(model: LoadedModel, out: Any) -> dict[str, Any]:
    """The model split into experts: the same greedy tokens without the cache, with it, and with half the slots."""
    from turbomoe.experts.base import Phase
    from turbomoe.experts.module import StoreExperts
    from turbomoe.experts.runtime import ExpertRuntime
    from turbomoe.models import bind
    from turbomoe.models.split import split_dense
    from turbomoe.units import format_bytes

    _title(f"3. The same model, each FFN split into {EXPERTS} experts that are all active", out)
    dense = _greedy(model)
    split = split_dense(model, EXPERTS, ExpertSettings())
    plain = _greedy(split)
    assert split.experts is not None
    store = split.experts.store
    settings = ExpertSettings(cache=store.nbytes + (1 << 20))
    runtime = ExpertRuntime(store, settings, top_k=EXPERTS)
    bind((m for m in split.shell.modules() if isinstance(m, StoreExperts)), runtime)
    split.experts = runtime
    runtime.resize(SLOTS)
    cached = _greedy(split)
    runtime.check_integrity(compare_bytes=True)
    assert runtime.cache is not None
    counters = runtime.cache.counters
    print(f"experts in RAM: {format_bytes(store.nbytes)} in {len(store.layouts)} layers, complete", file=out)
    print(
        f"cache: {SLOTS} of {EXPERTS} experts a layer; decode hit rate {counters.hit_rate(Phase.DECODE):.2f}", file=out
    )
    same = cached == plain
    print(f"tokens with the cache equal those without: {'yes' if same else 'NO'}", file=out)
    print(f"tokens of the split model equal the dense model's: {'yes' if plain == dense else 'no'}", file=out)
    return {"same_tokens": same, "same_as_dense": plain == dense, "counters": counters.to_json()}


def _greedy(model: LoadedModel) -> list[int]:
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request
    from turbomoe.upstream.prompts import encode_text

    assert model.tokenizer is not None
    engine = Engine(model, EngineSettings(ctx_size=256))
    request = Request(tuple(encode_text(model.tokenizer, "The sea is")), max_tokens=ANSWER, ignore_eos=True)
    return [event.token for event in engine.stream(request) if event.token is not None]


def _title(text: str, out: Any) -> None:
    print(f"\n{text}\n{'-' * len(text)}", file=out)
