"""``turbomoe profile``: which experts a model uses on your texts, kept in a file that seeds the cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.prompts import read_text, text_ids
from turbomoe.cli.tables import table_lines
from turbomoe.errors import SettingsError
from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from turbomoe.insight.profile import Profile
    from turbomoe.insight.profile_collect import RoutingProfiler
    from turbomoe.models.base import LoadedModel

LEGEND = (
    "Prefill, decode: tokens counted as prompt, and one by one.",
    "Effective experts: so many equally used ones would be as hard to guess.",
    "5% to 50%: share of the routing on that part of a layer's experts, the hottest (most used) ones.",
    "Reuse 1, 8, 32: share of routed experts that were routed so many tokens ago as well.",
    "By chance: what reuse would be if the order of tokens meant nothing.",
    "Next-gate recall: share of a layer's experts that its gate names one layer too early.",
)
TOKENS = 4096
SEQUENCE = 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = (
        "Count which experts a model uses on texts, by layer and by phase. Each text is cut into sequences; a quarter "
        "of a sequence is its prompt, the rest is decoded token by token, fed with the text's own tokens (the model "
        "draws none). The file seeds a cache (--moe-profile), the trace is what turbomoe simulate replays."
    )
    parser = subparsers.add_parser("profile", help="see which experts a model uses on your texts", description=text)
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", nargs="+", action="extend", required=True, help="UTF-8 texts to run")
    parser.add_argument(
        "--domain", metavar="TAG", default="text", help="a name for what they are (default %(default)s)"
    )
    most = "run the first N tokens of each text (default %(default)s)"
    parser.add_argument("--tokens", type=int, metavar="N", default=TOKENS, help=most)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the profile here")
    parser.add_argument("--add", action="store_true", help="add to the profile in -o; equal tags add up")
    parser.add_argument("--trace", metavar="FILE", help="write the whole routing, step by step, here")
    parser.add_argument("--plots", metavar="FOLDER", help="draw heat map, coverage, reuse and transfer here (PNG)")
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load, run the texts, print the figures, write what was asked for."""
    check(args)
    texts = [read_text(path) for path in args.text]
    args.ctx_size, asked = args.ctx_size or SEQUENCE, bool(args.ctx_size)
    from turbomoe.cli.loading import Bar, load, means
    from turbomoe.config import ExpertSettings
    from turbomoe.insight.profile import Profile
    from turbomoe.insight.profile_run import make_profiler, run_texts

    model, settings = load(args, asked=asked)
    profiler = make_profiler(model, ExpertSettings.half_life, trace=args.trace is not None)
    older = Profile.load(args.output, model.identity) if args.add and Path(args.output).exists() else None
    ids = [tokens_of(model, text, path, args.tokens) for text, path in zip(texts, args.text, strict=True)]
    assert model.experts is not None
    model.experts.observer = profiler
    with Bar("profiling", unit="token") as bar:
        run_texts(model, ids, settings.ctx_size, settings.kv, means(model, settings.kv), bar)
    profile = Profile(profiler.model, ExpertSettings.half_life, {args.domain: profiler.finish()})
    show(profile if older is None else older.merged(profile), profiler, args)
    return 0


def check(args: argparse.Namespace) -> None:
    """Whatever can be refused before minutes of work."""
    from turbomoe.insight.plots import require_matplotlib
    from turbomoe.insight.profile import check_domain

    check_domain(args.domain)
    if args.add and args.output is None:
        raise SettingsError("--add has nothing to add to", fix="Name the profile with -o FILE")
    if args.moe_profile_save:
        raise SettingsError("profile has no use for --moe-profile-save", fix="Name the file with -o FILE")
    if args.tokens < 1 or args.parallel != 1:
        raise SettingsError("profile runs one sequence at a time, of at least one token")
    if args.plots is not None:
        require_matplotlib()


def tokens_of(model: LoadedModel, text: str, path: str, limit: int) -> list[int]:
    """The first ``limit`` tokens of a text, saying so where it has more."""
    ids = text_ids(model, text)
    if len(ids) > limit:
        why = "a profile needs some thousands of tokens, and decoding takes time"
        board.post(Notice(f"{limit} of {len(ids)} tokens of {path} are run", why, avoid="--tokens N", expected=True))
    return ids[:limit]


def show(profile: Profile, profiler: RoutingProfiler, args: argparse.Namespace) -> None:
    """Print the figures, then write profile, trace and plots."""
    from turbomoe.insight.profile_figures import summary

    figures = {name: summary(stats) for name, stats in profile.domains.items()}
    if args.json:
        layers = list(profile.model.layers)
        print(json.dumps({"model": profile.model.name, "layers": layers, "domains": figures}))
    else:
        print(render(figures))
    if args.output is not None:
        profile.save(args.output)
    if profiler.trace is not None:
        profiler.trace.finish(args.domain).save(args.trace)
    if args.plots is not None:
        from turbomoe.insight.plots import profile_plots

        for path in profile_plots(profile, Path(args.plots)):
            print(f"wrote {path}", file=sys.stderr)


def render(figures: dict[str, Any]) -> str:
    """One line a domain, means over layers, readable as a Markdown table; then what the columns mean."""
    heads = [
        "domain", "prefill", "decode", "effective experts", "5%", "10%", "25%", "50%", "reuse 1", "8", "32",
        "by chance", "next-gate recall",
    ]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    for name, of in figures.items():
        covered = [f"{_mean(of['coverage'][share]):.3f}" for share in ("5%", "10%", "25%", "50%")]
        again = [f"{of['reuse'][lag]:.3f}" for lag in ("1", "8", "32")]
        rest = [f"{of['reuse_by_chance']:.3f}", f"{_mean(of['next_gate_recall']):.3f}"]
        tokens = [str(of["tokens"]["prefill"]), str(of["tokens"]["decode"])]
        rows.append([name, *tokens, f"{_mean(of['effective_experts']):.1f}", *covered, *again, *rest])
    return "\n".join([*table_lines(rows), *LEGEND])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
