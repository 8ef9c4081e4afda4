"""``turbomoe eval``: what a KV setting costs in fidelity, on a text of your own."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.prompts import read_text, text_ids
from turbomoe.cli.tables import table_lines
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.errors import RequestError, SettingsError
from turbomoe.kv_types import AUTO
from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from turbomoe.hardware.memory import MemoryUse
    from turbomoe.insight.divergence import Divergence
    from turbomoe.models.base import Forecast, LoadedModel

TOKENS = 2048
_SPEC = re.compile(r"([a-z0-9_.]+)(?:/([a-z0-9_.]+))?(?:@(\d{1,7})\+(\d{1,7}))?(-means)?")
SPEC_HELP = "K[/V][@SINK+RECENT][-means], as in tq3, tq3/tq2, tq4@128+1024 or tq3@0+0-means; repeatable"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = (
        "Perplexity of a model on a text, and for each KV setting the KL divergence from the bf16 cache (nats per "
        "token) and how often the likeliest token stays the same, beside the noise floor of rounding alone."
    )
    parser = subparsers.add_parser("eval", help="measure what a KV setting costs in fidelity", description=text)
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to judge on (default: chapters of Moby-Dick)")
    most = f"use the first N tokens (default {TOKENS}, or the model's own limit if that is less)"
    parser.add_argument("--tokens", type=int, metavar="N", help=most)
    parser.add_argument(
        "--kv", action="append", metavar="SPEC", help=f"a setting to judge instead of -ctk/-ctv: {SPEC_HELP}"
    )
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load, compare, print the table."""
    from turbomoe.insight.texts import NAME, judgement_text

    _check(args)
    text, name = (read_text(args.text), args.text) if args.text else (judgement_text(), NAME)
    specs = [parse_spec(spec) for spec in args.kv or ()]
    if specs:  # nothing is asked of -ctk and -ctv, so nothing is chosen for them
        args.cache_type_k = args.cache_type_v = "bf16"
    args.ctx_size = args.tokens or TOKENS
    from turbomoe.cli.loading import Bar, load, means
    from turbomoe.insight.divergence import compare, comparison_use

    def use(forecast: Forecast, settings: EngineSettings) -> MemoryUse:
        return comparison_use(forecast, settings, judged_settings(specs, settings.kv))

    model, settings = load(args, use, asked=args.tokens is not None)
    judged = judged_settings(specs, settings.kv)
    ids = tokens_of(model, text, name, settings.ctx_size)
    if args.tokens is not None and len(ids) < args.tokens:
        board.post(Notice(f"{len(ids)} tokens are judged, not {args.tokens}", f"{name} has no more", expected=True))
    exact = note_exact(settings, judged, len(ids))
    for kv in judged:
        means(model, kv)
    with Bar("judging", unit="token") as bar:
        verdicts = compare(model, ids, judged, bar)
    if args.json:
        chosen = {} if settings.kv_choice is None else {"kv_auto": settings.kv_choice.to_json()}
        unseen = {"no_position_saw_codes": exact} if exact else {}
        results = [verdict.to_json() for verdict in verdicts]
        print(json.dumps({"model": model.name, "text": name, "results": results, **chosen, **unseen}))
    else:
        print(f"{model.name}, {len(ids)} tokens of {name}", file=sys.stderr)
        print(render(verdicts))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.tokens is not None and args.tokens < 2:
        raise SettingsError("--tokens must be at least 2")
    if args.ctx_size is not None or args.parallel != 1:
        raise SettingsError("eval has no use for --ctx-size and --parallel", fix="Say --tokens N for a longer context")


def judged_settings(specs: list[KVSettings], kv: KVSettings) -> list[KVSettings]:
    """The settings that --kv names, else the run's own; none beside the reference for plain bf16."""
    from turbomoe.insight.divergence import REFERENCE

    if specs:
        return specs
    return [kv] if (kv.type_k, kv.type_v) != (REFERENCE.type_k, REFERENCE.type_v) else []


def note_exact(settings: EngineSettings, judged: list[KVSettings], tokens: int) -> list[str]:
    """Say so where a judgement over ``tokens`` tokens tells nothing: every position lies in the exact windows.

    Returns the names of these settings.
    """
    from turbomoe.insight.divergence import label_of
    from turbomoe.insight.kv_check import first_judged
    from turbomoe.kv.cache import EXACT_TYPES

    coded = [kv for kv in judged if {kv.type_k, kv.type_v} - EXACT_TYPES.keys()]
    named = {label_of(kv): kv for kv in coded}
    if settings.kv_choice is not None and not coded:  # auto saw it too, and took bf16
        named = {AUTO: settings.kv}
    exact = {name: kv for name, kv in named.items() if tokens <= first_judged(kv)}
    for name, kv in exact.items():
        why = f"the first {kv.sink} and the last {kv.recent} tokens stay exact, and {tokens} tokens are judged"
        avoid = f"judge more than {first_judged(kv)} tokens (--tokens N, or a longer --text)"
        board.post(Notice(f"no position saw codes under {name}", why, avoid=avoid))
    return list(exact)


def tokens_of(model: LoadedModel, text: str, name: str, limit: int) -> list[int]:
    """The first ``limit`` tokens of ``text``, or all that it has; an error when those are not two."""
    ids = text_ids(model, text)[:limit]
    if len(ids) < 2:
        raise RequestError(f"{name} is too short to judge on", fix="Give at least two tokens of text")
    return ids


def parse_spec(spec: str) -> KVSettings:
    """Settings from a short description; raises ``SettingsError`` for one that cannot be read."""
    match = _SPEC.fullmatch(spec.lower())
    if match is None:
        raise SettingsError(f"{spec!r} is not a KV setting", fix=f"Write {SPEC_HELP}")
    key, value, sink, recent, no_means = match.groups()
    if AUTO in (key, value):
        raise SettingsError(
            "--kv judges types that it names, not auto", fix="Leave --kv out to judge what auto chooses"
        )
    default = KVSettings()
    windows = (default.sink, default.recent) if sink is None else (int(sink), int(recent))
    return KVSettings(key, value or key, *windows, means=no_means is None)


def render(verdicts: list[Divergence]) -> str:
    """One aligned line a setting, readable as a Markdown table."""
    heads = ["KV cache", "bits/value", "perplexity", "mean KL", "median KL", "99.9% KL", "same top"]
    rows = [
        [v.label, f"{v.bits_per_value:.2f}", f"{v.perplexity:.3f}", *map(_kl, (v.mean_kl, v.median_kl, v.kl_99_9)),
         f"{100 * v.same_top:.2f}%"]
        for v in verdicts
    ]  # fmt: skip
    rule = ["-" * max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(table_lines([heads, rule, *rows]))


def _kl(value: float) -> str:
    return f"{value:.5f}" if value < 10 else f"{value:.2f}"
