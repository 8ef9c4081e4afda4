"""What cache policies do with the demo model's real routing: measures, stores, writes the tables of docs/experts.md.

    python benchmarks/expert_policies.py record traces     # routing of prose and code, into a folder (some minutes)
    python benchmarks/expert_policies.py measure traces    # replays it and stores the figures
    python benchmarks/expert_policies.py speed traces      # how long a million layer-tokens take; stored beside them
    python benchmarks/expert_policies.py write             # the tables of docs/experts.md from the figures

Profiles are of the beginning of a text, traces of what follows, so that no profile has seen what it is judged on.
The ceiling of a hit rate is Belady's, which knows the future: it is printed first.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from turbomoe.cli.loading import Bar, quiet_transformers
from turbomoe.cli.profile import LEGEND, render
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.experts.residency import count_ids
from turbomoe.files.reference import resolve
from turbomoe.insight.profile import Profile
from turbomoe.insight.profile_figures import summary
from turbomoe.insight.profile_model import RoutedModel
from turbomoe.insight.simulate import BOUNDS, ENGINE_POLICIES, Outcome, replay, simulate
from turbomoe.insight.texts import judgement_text
from turbomoe.insight.trace import Trace

RESULTS = Path(__file__).parent / "results" / "expert_policies.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "experts.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->"
TEXTS = {"prose": judgement_text, "code": lambda: inspect.getsource(argparse)}
SLOTS = (8, 16, 24, 32)
SEQUENCE, PROFILED, TRACED = 1024, 2048, 4096
WINDOWS = {"1-64": (0, 64), "65-256": (64, 256), "257 on": (256, None)}
TUNINGS = ((1.3, 32.0), (1.5, 32.0), (2.0, 32.0), (1.3, 64.0), (1.5, 64.0), (1.5, 128.0))
MILLION = 1_000_000


def record(reference: str, folder: Path) -> None:
    """Run each text; its whole trace and profile go into ``folder``."""
    quiet_transformers()
    from turbomoe.insight.profile_run import make_profiler, run_texts
    from turbomoe.models import load_model
    from turbomoe.upstream.prompts import encode_text

    model = load_model(resolve(reference), EngineSettings())
    assert model.experts is not None
    for name, text in TEXTS.items():
        profiler = make_profiler(model, ExpertSettings.half_life, trace=True)
        model.experts.observer = profiler
        with Bar(name, unit="token") as bar:
            ids = encode_text(model.tokenizer, text())[: PROFILED + TRACED]
            run_texts(model, [ids], SEQUENCE, KVSettings(), progress=bar)
        Profile(profiler.model, ExpertSettings.half_life, {name: profiler.finish()}).save(folder / f"{name}.profile")
        assert profiler.trace is not None
        profiler.trace.finish(name).save(folder / f"{name}.trace")


def read(folder: Path) -> tuple[dict[str, Trace], dict[str, np.ndarray], dict[str, Any]]:
    """Of each text: the trace of what follows the profiled beginning, that beginning's prior, figures of all."""
    traces, priors, figures = {}, {}, {}
    for name in TEXTS:
        whole = Trace.load(folder / f"{name}.trace")
        first = int(np.searchsorted(np.cumsum(whole.rows), PROFILED, side="right"))
        priors[name] = sum(count_ids(step.ids, whole.model.shape[1]) for step in part(whole, 0, first).steps())
        traces[name] = part(whole, first, None)
        profile = Profile.load(folder / f"{name}.profile", whole.model.identity)
        figures[name] = summary(profile.domains[name])
    return traces, priors, figures


def part(trace: Trace, start: int, end: int | None) -> Trace:
    """Some of the steps of a trace."""
    rows = slice(int(trace.rows[:start].sum()), int(trace.rows[:end].sum()))
    steps = {name: getattr(trace, name)[start:end] for name in ("rows", "phases", "after")}
    return replace(trace, ids=trace.ids[rows], weights=trace.weights[rows], **steps)


def cold(trace: Trace) -> Trace:
    """The decode steps alone: a cache that starts empty, without a prompt."""
    steps = trace.phases == 1
    rows = np.repeat(steps, trace.rows)
    fields = {"rows": trace.rows[steps], "phases": trace.phases[steps], "after": np.zeros(steps.sum(), np.uint8)}
    return replace(trace, ids=trace.ids[rows], weights=trace.weights[rows], **fields)


def joined(parts: Sequence[Trace], domain: str) -> Trace:
    """Traces one after another."""
    names = ("ids", "weights", "rows", "phases", "after")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], domain=domain, **arrays)


def hit_rates(
    trace: Trace, settings: ExpertSettings, prior: np.ndarray | None, windows: dict[str, tuple[int, int | None]]
) -> dict[str, list[float]]:
    """Hit rate of the adaptive policy in windows of decode tokens (one row a step), at each of ``SLOTS``."""
    tally = replay(trace, settings, SLOTS, prior)
    hits, routed = np.array(tally.hits), np.array(tally.routed)
    return {
        name: [round(float(rate), 4) for rate in hits[start:end].sum(axis=0) / routed[start:end].sum()]
        for name, (start, end) in windows.items()
    }


def seeding(traces: dict[str, Trace], priors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each text with no profile, its own and the other's; with its prompts and without."""
    return [
        {"run": run, "prompts": prompts, "profile": of or "none", "hit_rates": hit_rates(
            trace if prompts else cold(trace), ExpertSettings(), priors[of] if of else None, WINDOWS)}
        for run, trace in traces.items() for prompts in (True, False) for of in (None, *priors)
    ]  # fmt: skip


def frozen(traces: dict[str, Trace], priors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each text on a placement that is frozen from a profile, its own and the other's."""
    return [
        {"run": run, "profile": of, "results": _json(simulate(trace, ["static"], SLOTS, ExpertSettings(), prior))}
        for run, trace in traces.items() for of, prior in priors.items()
    ]  # fmt: skip


def tunings(traces: dict[str, Trace]) -> list[dict[str, Any]]:
    """Hysteresis and half-life: hits and uploads in the steady state, and hits after a switch of domain."""
    switch = cold(joined([traces["prose"], traces["code"]], "prose, then code"))
    at = int((traces["prose"].phases == 1).sum())
    after = {"switch 1-64": (at, at + 64), "switch 65-256": (at + 64, at + 256)}
    made = []
    for hysteresis, half_life in TUNINGS:
        settings = ExpertSettings(hysteresis=hysteresis, half_life=half_life)
        steady = {name: _json(simulate(trace, ["adaptive"], SLOTS, settings)) for name, trace in traces.items()}
        rates = hit_rates(switch, settings, None, after)
        made.append({"hysteresis": hysteresis, "half_life": half_life, "steady": steady, "switch": rates})
    return made


def _json(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [outcome.to_json() for outcome in outcomes]


def repeated(trace: Trace) -> Trace:
    """The trace over and over, to a million layer-tokens."""
    layer_tokens = len(trace.model.layers) * len(trace.ids)
    return joined([trace] * -(-MILLION // layer_tokens), f"{trace.domain}, repeated")


def synthetic(layers: int = 48, experts: int = 128, top_k: int = 8) -> Trace:
    """A million layer-tokens of dice with Zipf favourites, in the shape of Qwen3-30B-A3B."""
    rng, tokens = np.random.default_rng(0), MILLION // layers
    taste = -np.log(np.argsort(rng.random((layers, experts)), axis=1) + 2.0).astype(np.float32)
    ids = np.empty((tokens, layers, top_k), dtype=np.uint16)
    for token in range(tokens):
        noisy = taste + rng.gumbel(size=taste.shape).astype(np.float32)
        ids[token] = np.argpartition(-noisy, top_k, axis=1)[:, :top_k]
    model = RoutedModel("0" * 64, "dice", tuple(range(layers)), (experts,) * layers, top_k, (2_650_000,) * layers)
    ones, zeros = np.ones(tokens, np.uint8), np.zeros(tokens, np.uint8)
    return Trace(model, "dice", ids, np.full(ids.shape, 1 / top_k, np.float16), ones.astype(np.int32), ones, zeros)


def speed(traces: dict[str, Trace]) -> list[dict[str, Any]]:
    """CPU seconds of one thread to replay a million layer-tokens, by policy: at one size, and at four at once."""
    made = []
    for shape, trace in (("demo model's, repeated", repeated(traces["code"])), ("48 layers of 128, dice", synthetic())):
        width = max(trace.model.experts)
        four = [width // 8, width // 4, width * 3 // 8, width // 2]
        for policy in ("lru", "lfu", "adaptive", *BOUNDS):
            spent = []
            for slots in ([width // 4], four):
                start = time.thread_time()
                simulate(trace, [policy], slots, ExpertSettings())
                spent.append(round(time.thread_time() - start, 1))
            made.append({"shape": shape, "policy": policy, "one_size_s": spent[0], "four_sizes_s": spent[1]})
            print(made[-1], flush=True)
    return made


def measure(folder: Path) -> None:
    """Replay, print the ceiling, store."""
    traces, priors, domains = read(folder)
    outcomes = {
        name: _json(simulate(trace, ENGINE_POLICIES + BOUNDS, SLOTS, ExpertSettings(), priors[name]))
        for name, trace in traces.items()
    }
    for name, found in outcomes.items():
        ceiling = [o["steady_hit_rate"] for o in found if o["policy"] == "belady"]
        print(f"ceiling on {name}: {', '.join(f'{rate:.3f}' for rate in ceiling)} at {SLOTS} slots")
    store(
        model=traces["prose"].model.name,
        date=datetime.date.today().isoformat(),
        versions={package: version(package) for package in ("torch", "transformers", "numpy")},
        tokens={"profile": PROFILED, "trace": TRACED, "sequence": SEQUENCE},
        slots=SLOTS,
        domains=domains,
        policies=outcomes,
        seeding=seeding(traces, priors),
        frozen=frozen(traces, priors),
        tunings=tunings(traces),
    )


def store(**figures: Any) -> None:
    """Put figures beside those that are stored, and print all of them as the last line."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in (stored | figures).items())
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(stored | figures))


# -- tables --------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def tables(figures: dict[str, Any]) -> Iterator[str]:
    """The sections of the document that hold numbers."""
    slots = [f"{count} slots" for count in figures["slots"]]
    size = figures["tokens"]
    yield (
        f"{figures['model']}, {figures['date']}: 8 layers of 64 experts, 4 routed. Prose is Moby-Dick, code is\n"
        f"CPython 3.11's `argparse`. Profiles are of the first {size['profile']} tokens of each, traces of the next "
        f"{size['trace']},\nin sequences of {size['sequence']}, of which a quarter is a prompt. Hit rates and uploads "
        "are of decode, after the\nfirst 256 tokens unless said.\n"
    )
    yield "### The routing\n"
    yield render(figures["domains"]).replace(f"\n{LEGEND[0]}", f"\n\n{LEGEND[0]}") + "\n"
    for name, found in figures["policies"].items():
        yield f"### Policies on {name}: hit rate / experts copied per layer and token\n"
        names = dict.fromkeys(o["policy"] for o in found)
        rows = [
            [
                policy,
                *(f"{o['steady_hit_rate']:.3f} / {o['steady_uploads']:.3f}" for o in found if o["policy"] == policy),
            ]
            for policy in names
        ]
        yield table(["policy", *slots], rows)
    yield "### A profile of one text, another text run\n"
    yield "Points of hit rate that the profile adds to the adaptive policy (8 / 16 / 24 / 32 slots).\n"
    yield table(["run", "profile of", "start", *(f"tokens {name}" for name in WINDOWS)], list(_seeding_rows(figures)))
    yield "### A placement frozen from a profile: hit rate\n"
    fixed = [
        [f["run"], f["profile"], *(f"{o['steady_hit_rate']:.3f}" for o in f["results"])] for f in figures["frozen"]
    ]
    yield table(["run", "profile of", *slots], fixed)
    yield "### Hysteresis and half-life\n"
    yield "Steady hit rate / share of the uploads of `lru-wait`, and the hit rate in the first 64 tokens after prose "
    yield "turns into code (no prompt in between), at 16 and at 32 slots.\n"
    yield table(
        ["hysteresis", "half-life", "prose, 16", "prose, 32", "code, 16", "code, 32", "switch, 16", "switch, 32"],
        list(_tuning_rows(figures)),
    )
    yield "### Speed of the simulator\n"
    yield "CPU seconds of one thread for a million layer-tokens.\n"
    spent = [[s["shape"], s["policy"], str(s["one_size_s"]), str(s["four_sizes_s"])] for s in figures["speed"]]
    yield table(["routing", "policy", "one size", "four sizes"], spent)


def _seeding_rows(figures: dict[str, Any]) -> Iterator[list[str]]:
    plain = {(s["run"], s["prompts"]): s["hit_rates"] for s in figures["seeding"] if s["profile"] == "none"}
    for of in figures["seeding"]:
        if of["profile"] == "none":
            continue
        base = plain[of["run"], of["prompts"]]
        gains = [
            " / ".join(f"{100 * (b - a):+.1f}" for a, b in zip(base[name], of["hit_rates"][name], strict=True))
            for name in WINDOWS
        ]
        yield [of["run"], of["profile"], "a prompt" if of["prompts"] else "cold", *gains]


def _tuning_rows(figures: dict[str, Any]) -> Iterator[list[str]]:
    rivals = {
        name: [o["steady_uploads"] for o in found if o["policy"] == "lru-wait"]
        for name, found in figures["policies"].items()
    }
    for tuning in figures["tunings"]:
        cells = [
            f"{found[at]['steady_hit_rate']:.3f} / {found[at]['steady_uploads'] / rivals[name][at]:.2f}"
            for name, found in tuning["steady"].items() for at in (1, 3)
        ]  # fmt: skip
        switch = [f"{tuning['switch']['switch 1-64'][at]:.3f}" for at in (1, 3)]
        yield [str(tuning["hysteresis"]), f"{tuning['half_life']:.0f}", *cells, *switch]


def write() -> None:
    """Put the tables between the two marks of the document."""
    body = "\n".join(tables(json.loads(RESULTS.read_text())))
    document = DOCUMENT.read_text()
    head, rest = document.split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{re.sub(' +$', '', body, flags=re.MULTILINE)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "measure", "speed", "write"))
    parser.add_argument("folder", nargs="?", default="traces", type=Path)
    parser.add_argument("-m", "--model", default="demo:moe")
    args = parser.parse_args()
    if args.what == "record":
        record(args.model, args.folder)
    elif args.what == "measure":
        measure(args.folder)
    elif args.what == "speed":
        store(speed=speed(read(args.folder)[0]))
    else:
        write()


if __name__ == "__main__":
    main()
