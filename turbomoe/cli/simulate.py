"""``turbomoe simulate``: what cache policies would do with the routing of a trace, without running the model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.cli.options import add_common, add_moe_tuning
from turbomoe.cli.tables import table_lines
from turbomoe.config import ExpertSettings
from turbomoe.errors import SettingsError

if TYPE_CHECKING:
    from turbomoe.insight.simulate import Outcome
    from turbomoe.insight.trace import Trace

LEGEND = (
    "Hit rate: share of routed experts whose copy was in a slot when needed; the rest is computed where it lies.",
    "Slots: copies that a layer has room for. Each line is a policy or a bound: turbomoe simulate --help.",
)
SHARES = (0.125, 0.25, 0.375, 0.5)  # of a layer's experts, where --slots is not given


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = (
        "Replay a trace (turbomoe profile --trace) through cache policies and print hit rates and uploads. lru, lfu, "
        "adaptive (the default of --moe-policy), seeded (the same, from a profile) and static (a profile, never "
        "changed) run the engine's own code with its delays. Bounds: lru-wait loads every miss before it computes, "
        "oracle is the best fixed placement, belady knows the future. A slot has room for one expert's copy, a hit is "
        "a routed expert whose copy was there, an upload (or promotion) copies one into a slot."
    )
    parser = subparsers.add_parser("simulate", help="replay routing through cache policies", description=text)
    parser.add_argument("trace", metavar="TRACE", help="a file of turbomoe profile --trace")
    parser.add_argument("--profile", metavar="FILE", help="a profile of the same model, for seeded and static")
    parser.add_argument("--slots", metavar="N[,N...]", help="slots per layer (default: 1/8 to 1/2 of the experts)")
    parser.add_argument("--policy", metavar="NAME", action="append", help="one of the above; repeatable (default: all)")
    parser.add_argument("--plots", metavar="FOLDER", help="draw hit rate and uploads against slots here (PNG)")
    add_moe_tuning(parser.add_argument_group("adaptive policy"), ExpertSettings())
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Read, replay, print the table."""
    settings = ExpertSettings(hysteresis=args.moe_hysteresis, half_life=args.moe_half_life)
    slots = None if args.slots is None else parse_slots(args.slots)
    from turbomoe.insight.plots import require_matplotlib, simulation_plots
    from turbomoe.insight.profile import Profile
    from turbomoe.insight.simulate import simulate
    from turbomoe.insight.trace import Trace

    if args.plots is not None:
        require_matplotlib()
    trace = Trace.load(args.trace)
    prior = Profile.load(args.profile, trace.model.identity).prior() if args.profile else None
    policies = args.policy or default_policies(prior is not None)
    outcomes = simulate(trace, policies, slots or default_slots(trace), settings, prior)
    title = f"{trace.model.name} on {trace.domain}, {trace.decode_rows} decode tokens"
    if args.json:
        facts = {"model": trace.model.name, "domain": trace.domain, "decode_tokens": trace.decode_rows}
        print(json.dumps({**facts, "results": [outcome.to_json() for outcome in outcomes]}))
    else:
        print(f"{title}, {max(trace.model.experts)} experts in {len(trace.model.layers)} layers", file=sys.stderr)
        print(render(outcomes))
    if args.plots is not None:
        for path in simulation_plots(outcomes, title, Path(args.plots)):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def parse_slots(text: str) -> list[int]:
    """Whole numbers between commas; raises ``SettingsError`` for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise SettingsError(f"{text!r} is no list of slots", fix="Write whole numbers, as in --slots 16,32")
    return sorted({int(part) for part in parts})


def default_slots(trace: Trace) -> list[int]:
    """An eighth to a half of the widest layer's experts."""
    experts = max(trace.model.experts)
    return sorted({max(1, round(share * experts)) for share in SHARES})


def default_policies(profile: bool) -> list[str]:
    """All that can run with what was given."""
    from turbomoe.insight.simulate import BOUNDS, ENGINE_POLICIES, NEEDS_PROFILE

    return [name for name in ENGINE_POLICIES + BOUNDS if profile or name not in NEEDS_PROFILE]


def render(outcomes: list[Outcome]) -> str:
    """One line a policy: hit rate and uploads per layer and token at each number of slots, once warm; a legend."""
    from turbomoe.insight.simulate import WARM_TOKENS

    slots = list(dict.fromkeys(outcome.slots for outcome in outcomes))
    rows = [["policy", *(f"{count} slots" for count in slots)], ["---"] * (len(slots) + 1)]
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        rows.append([policy, *(_cell(outcome) for outcome in outcomes if outcome.policy == policy)])
    after = f", after the first {WARM_TOKENS} tokens" if outcomes[0].steady_hit_rate is not None else ""
    return "\n".join([*table_lines(rows), f"Hit rate / experts copied per layer and token in decode{after}.", *LEGEND])


def _cell(outcome: Outcome) -> str:
    if outcome.steady_hit_rate is None:
        return f"{outcome.hit_rate:.3f} / {outcome.uploads:.3f}"
    return f"{outcome.steady_hit_rate:.3f} / {outcome.steady_uploads:.3f}"
