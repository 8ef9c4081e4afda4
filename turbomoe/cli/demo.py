"""``turbomoe demo``: the two ideas on two small real models, with figures that the run itself measures."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from turbomoe.cli.options import add_common
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.models.base import Forecast, LoadedModel

REFERENCE = "demo:smollm2"
QUESTION = "Why is the sky blue? Answer in two sentences."
CONTEXT = 4096
JUDGED_TOKENS = 1024
SINK, RECENT = 4, 32  # exact tokens of the answer


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = "A chat answer with keys and values in 3-bit codes, what the codes cost, and an expert cache at work."
    parser = subparsers.add_parser("demo", help="see the KV codes and the expert cache at work", description=text)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the three parts; with ``--json`` only the figures are printed on standard output."""
    from turbomoe.cli.demo_experts import expert_figures

    out = sys.stderr if args.json else sys.stdout
    coded = codes()
    settings = EngineSettings(ctx_size=CONTEXT, kv=coded[1])
    model = load_demo(settings)
    figures = {"answer": answer(model, settings, out), "kv": kv_figures(model, coded, out)}
    name = model.name
    del model
    experts = expert_figures(out)
    if args.json:
        print(json.dumps({"model": name, **figures, "experts": experts}))
    return 0 if experts["same_tokens"] else 1


def codes() -> list[KVSettings]:
    """4, 3 and 2 bits for keys and values: by trellis; scalar where nothing compiled encodes, which would take long."""
    from turbomoe.native.library import load_core

    kind = "tq" if load_core() is None else "tcq"
    return [KVSettings(f"{kind}{bits}", f"{kind}{bits}") for bits in (4, 3, 2)]


def load_demo(settings: EngineSettings) -> LoadedModel:
    """The demo model, after the memory table."""
    from turbomoe.cli.announce import announce
    from turbomoe.cli.loading import Bar, quiet_transformers

    quiet_transformers()
    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    def before(forecast: Forecast) -> None:
        announce(forecast, settings)

    with Bar("loading") as bar:
        return load_model(resolve(REFERENCE), settings, bar, before=before)


def answer(model: LoadedModel, settings: EngineSettings, out: TextIO) -> dict[str, Any]:
    """Stream a chat answer with 3-bit keys and values; windows so small that most of it is read from codes."""
    from turbomoe.cli.loading import Stopwatch, make_engine, statistics, statistics_line
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.request import SamplingParams

    settings = replace(settings, kv=replace(settings.kv, sink=SINK, recent=RECENT))
    kind = f"{settings.kv.type_k} (3 bits a value)"
    title(f"1. {model.name} answers, keys and values in {kind} but for {SINK} first and {RECENT} last tokens", out)
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


def kv_figures(model: LoadedModel, coded: list[KVSettings], out: TextIO) -> dict[str, Any]:
    """Bytes of a full context in bf16 and in codes, and what the codes change on a novel."""
    from turbomoe.insight.divergence import label_of

    title(f"2. The KV cache of {CONTEXT} tokens, everything counted, and what the codes change", out)
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


def title(text: str, out: TextIO) -> None:
    """One of the demo's headings."""
    print(f"\n{text}\n{'-' * len(text)}", file=out)
