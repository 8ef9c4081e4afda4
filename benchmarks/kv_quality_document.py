"""docs/kv-quality.md out of the stored measurements: no figure of it is written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_quality_words import AUTO, FOOT, HEAD, LONG

from turbomoe.cli.eval import render
from turbomoe.cli.tables import table_lines
from turbomoe.insight.divergence import Divergence

RESULTS = Path(__file__).parent / "results" / "kv_quality"
DOCUMENT = Path(__file__).parent.parent / "docs" / "kv-quality.md"
ORDER = ["smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"]
WINDOWS = "64/256"
WORTH = "What the windows, the means and the key scales are worth (the last row of each type has all of them):"
GOAL = 0.25  # by how much the trellis must beat the scalar codec's mean KL, on the models of ORDER[:2]
SCALAR = {"tcq2": "tq2", "tcq3": "tq3", "tcq4": "tq4"}
Record = Mapping[str, Any]


def load(name: str) -> Record | None:
    """The measurement NAME, or None where it was not made."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["-" * max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(table_lines([heads, rule, *rows]))


def kls(record: Record, group: str) -> dict[str, float]:
    """Mean KL by label."""
    return {row["label"]: row["mean_kl"] for row in record[group]}


def checks() -> list[str]:
    """One line a claim: the trellis beats the scalar codec by ``GOAL``, and auto keeps to its budget."""
    lines = [f"{verdict} {text}" for name in ORDER for verdict, text in _trellis_checks(name)]
    return lines + [line for name in ORDER if (line := _auto_check(name))]


def _trellis_checks(name: str) -> Iterable[tuple[str, str]]:
    record = load(name)
    if record is None:
        return
    found = kls(record, "codecs")
    for trellis, scalar in SCALAR.items():
        ours, theirs = (found.get(f"{codec} {WINDOWS}") for codec in (trellis, scalar))
        if ours is None or theirs is None:
            continue
        saved = 1 - ours / theirs
        verdict = ("holds " if saved >= GOAL else "FAILS ") if name in ORDER[:2] else "      "
        yield (
            verdict,
            f"{name}: {trellis} {ours:.5f}, {scalar} {theirs:.5f}: {saved:.0%} less over {record['tokens']} tokens",
        )


def _auto_check(name: str) -> str:
    record = load(f"auto-{name}")
    if record is None:
        return ""
    choice = record["choice"]
    kept = max(choice["mean_kl"], record["held_out_kl"]) <= choice["budget"]
    held_out = f"held out {record['held_out_kl']:.4f}, budget {choice['budget']:.4f}"
    return f"{'holds ' if kept else 'FAILS '} {name}: auto {choice['type_k']}/{choice['type_v']}, {held_out}"


def compose() -> str:
    """The whole document."""
    records = {name: record for name in ORDER if (record := load(name))}
    parts = [
        HEAD,
        _trellis_section(records),
        *(_model_section(name, record) for name, record in records.items()),
        _before_section(records),
        _missing([name for name in ORDER if name not in records]),
        _auto_section(),
        _long_section(),
        FOOT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"""\
## Not measured

{", ".join(names)}, since these codecs came. `python benchmarks/kv_quality.py measure FILE --name NAME` does it."""


def _stamp(record: Record) -> str:
    versions = [f"{package} {number}" for package, number in record["versions"].items()]
    return ", ".join([record["date"], record["cpu"], *versions])


def _noted(stamp: str, record: Record) -> str:
    """A stamp, and what must be said of a record of which some rows were measured before the others."""
    return f"{stamp} {record['note']}" if "note" in record else stamp


def _trellis_section(records: Mapping[str, Record]) -> str:
    rows = []
    for record in records.values():
        found = kls(record, "codecs")
        for trellis, scalar in SCALAR.items():
            pair = [found.get(f"{codec} {WINDOWS}") for codec in (trellis, scalar)]
            if None not in pair:
                ours, theirs = (float(kl) for kl in pair if kl is not None)
                saved = f"{1 - ours / theirs:.0%}"
                rows.append(
                    [record["model"], str(record["tokens"]), trellis[3:], f"{theirs:.5f}", f"{ours:.5f}", saved]
                )
    return f"""\
## Trellis against scalar codes

Mean KL at equal bits and windows, {WINDOWS}:

{table(["model", "tokens", "bits", "tq (scalar)", "tcq (trellis)", "less by"], rows)}"""


def _model_section(name: str, record: Record) -> str:
    base, codecs, ablation = ([Divergence(**row) for row in record[key]] for key in ("base", "codecs", "ablation"))
    codecs.sort(key=lambda row: -row.bits_per_value)
    compared = [row for row in codecs if row.label in {f"tcq3 {WINDOWS}", f"tcq2 {WINDOWS}"}]
    rows = sorted([*ablation, *compared], key=lambda row: row.label.split()[0])
    parts = [
        f"## {record['model']}",
        f"{record['tokens']} tokens of {record['text']}. {_stamp(record)}; {record['arithmetic']}.",
        render([*base, *codecs]),
        _peer_part(name),
        *([WORTH, render(rows)] if ablation else []),
    ]
    return "\n\n".join(part for part in parts if part)


def _peer_part(name: str) -> str:
    record = load(f"llama.cpp-{name}")
    if record is None:
        return ""
    text = f"llama.cpp's caches on the same tokens, each against its own f16 cache ({_peer_stamp(record)}):"
    return f"{text}\n\n{render([Divergence(**row) for row in record['results']])}"


def _peer_stamp(record: Record) -> str:
    return f"llama-cpp-python {record['llama-cpp-python']}, {record['date']}, {record['cpu']}"


def _before_section(records: Mapping[str, Record]) -> str:
    rows = []
    for name, record in records.items():
        before = load(f"before/{name}")
        if before is None or before["tokens"] != record["tokens"]:
            continue
        then, now = kls(before, "results"), kls(record, "codecs")
        for label in then:
            if label in now and label.startswith(("tq", "K tq")):
                rows.append([record["model"], label, f"{then[label]:.5f}", f"{now[label]:.5f}"])
    if not rows:
        return ""
    return f"""\
## Means that turn and key scales, before and after

The same codecs and tokens, mean KL, with one constant mean a head (2026-11-24) and with what is fitted now:

{table(["model", "KV cache", "constant means", "now"], rows)}"""


def _auto_section() -> str:
    rows, arms = [], []
    for name in ORDER:
        record = load(f"auto-{name}")
        if record is None:
            continue
        choice = record["choice"]
        rows.append(
            [record["model"], choice["type_k"], choice["type_v"], f"{choice['mean_kl']:.4f}",
             f"{record['held_out_kl']:.4f}", f"{choice['budget']:.4f}", f"{choice['q8_0']:.4f}"]
        )  # fmt: skip
        arms += [_tried(record["model"], arm) for arm in choice["tried"]]
    if not rows:
        return ""
    heads = ["model", "keys", "values", "KL", "held-out KL", "budget", "q8_0"]
    return f"""\
{AUTO}

{table(heads, rows)}

Every pair that was tried, keys/values, mean KL up to where it was settled:

{table(["model", "tried"], _joined(arms))}"""


def _tried(model: str, arm: Record) -> tuple[str, str]:
    given_up = "" if arm["tokens"] == arm["of"] else " (given up)"
    if arm.get("failed"):
        given_up = " (not finite)"
    return model, f"{arm['k']}/{arm['v']} {arm['kl']:.4f}{given_up}"


def _joined(arms: Sequence[tuple[str, str]]) -> list[list[str]]:
    models = list(dict.fromkeys(model for model, _ in arms))
    return [[model, ", ".join(text for owner, text in arms if owner == model)] for model in models]


def _long_section() -> str:
    needles = [record for path in sorted(RESULTS.glob("needles-*.json")) if (record := load(path.stem))]
    long = [record for path in sorted(RESULTS.glob("long-*.json")) if (record := load(path.stem))]
    parts = []
    for record in long:
        rows = [Divergence(**row) for row in [*record["base"], *record["codecs"]]]
        stamp = f"{record['tokens']} tokens of {record['text']}. {_stamp(record)}; {record['arithmetic']}."
        parts += [f"### {record['model']}, {record['tokens']} tokens", _noted(stamp, record), render(rows)]
    for record in needles:
        rows = [_needle_row(arm, record["needles"]) for arm in record["arms"]]
        stamp = f"{record['needles']} needles in {record['tokens']} tokens, {record['model']}. {_stamp(record)}."
        heads = ["KV cache", "bits/value", "found", "mean KL", "median KL", "mean KL, second half"]
        parts += [_noted(stamp, record), table(heads, rows)]
    return "\n\n".join([LONG, *parts]) if parts else ""


def _needle_row(arm: Record, needles: int) -> list[str]:
    figures = (arm["mean_kl"], arm["median_kl"], arm["mean_kl_second_half"])
    found = f"{arm['found']} of {needles}"
    return [arm["label"], f"{arm['bits_per_value']:.2f}", found, *(f"{kl:.5f}" for kl in figures)]
