"""The figures of the model card: tables from the reports and the manifest as Markdown, the loss curves as a picture.

    pip install matplotlib
    python card.py results loss.png

``results`` holds MANIFEST.tsv of the corpus, and report.json and log.jsonl of both runs in ``moe`` and ``dense``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = Sequence[object]
SMOOTHED = 5
"""Training losses are drawn as means of this many neighbours."""


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table; columns of numbers to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    columns = zip(*body, strict=True)
    rules = ["---:" if all(re.fullmatch(r"[-+\d.,%]*", cell) for cell in column) else "---" for column in columns]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, rules, *body])


def sources(manifest: Path) -> str:
    """What the corpus is made of; one row for all languages of the domain multilingual."""
    rows = [line.split("\t") for line in manifest.read_text("utf-8").splitlines()]
    single = [row for row in rows if row[0] != "multilingual"]
    several = [row for row in rows if row[0] == "multilingual"]
    lines = [[domain, name, f"{int(size) / 1e6:.1f}", licence] for domain, name, size, _, licence, _ in single]
    total = sum(int(row[2]) for row in several) / 1e6
    lines.append(["multilingual", " ".join(row[1] for row in several), f"{total:.1f}", several[0][4]])
    return table(["domain", "source", "MB", "licence"], lines)


def perplexities(moe: dict[str, Any], dense: dict[str, Any]) -> str:
    """Held-out perplexity of both models, and by how much the first is lower."""
    rows = []
    for name, text in moe["texts"].items():
        one, other = text["perplexity"], dense["texts"][name]["perplexity"]
        rows.append([name, f"{text['tokens']:,}", f"{one:.2f}", f"{other:.2f}", f"{100 * (one / other - 1):+.1f}%"])
    return table(["text", "tokens", "routed", "dense", "difference"], rows)


def routing(moe: dict[str, Any]) -> str:
    """Effective experts of each layer, coverage and reuse, by domain."""
    layers = len(moe["load_of_all_domains"])
    head = ["domain", *(f"layer {layer}" for layer in range(layers)), "top 25%", "lag 1", "lag 8"]
    rows: list[Row] = []
    for domain, found in moe["routing"].items():
        shares = [found["top_quarter"], *found["reuse"].values()]
        rows.append([domain, *found["effective_experts"], *(f"{share:.3f}" for share in shares)])
    return table(head, [*rows, ["all, evenly mixed", *moe["load_of_all_domains"], "", "", ""]])


def transfer(moe: dict[str, Any]) -> str:
    """What the busiest quarter of one domain covers of another."""
    rows = [[source, *(f"{share:.3f}" for share in row.values())] for source, row in moe["transfer"].items()]
    return table(["busiest in \\ measured on", *moe["transfer"]], rows)


def curve(log: Path) -> tuple[list[float], list[float], list[float], list[dict[str, float]]]:
    """(million tokens, training loss, million tokens, held-out losses) of a log."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    report = json.loads((log.parent / "report.json").read_text("utf-8"))
    per_step = report["tokens"] / report["steps"] / 1e6
    training = [(row["step"] * per_step, row["loss"]) for row in rows if "loss" in row]
    held = [(row["step"] * per_step, row["held"]) for row in rows if "held" in row]
    losses = [loss for _, loss in training]
    means = [_mean(losses[max(0, at - SMOOTHED + 1) : at + 1]) for at in range(len(losses))]
    return [at for at, _ in training], means, [at for at, _ in held], [losses for _, losses in held]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(moe: Path, dense: Path, target: Path) -> None:
    """Training loss of both models on the left, held-out loss of each domain on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for folder, label, dash in ((moe, "routed", "-"), (dense, "dense", "--")):
        at, losses, held_at, held = curve(folder / "log.jsonl")
        left.plot(at, losses, dash, color="black", label=label)
        for place, domain in enumerate(held[0]):
            name = domain if dash == "-" else None
            right.plot(held_at, [row[domain] for row in held], dash, color=f"C{place}", label=name)
    left.set_title(f"training batches, mean of {SMOOTHED} logged steps")
    right.set_title("held-out batches (dashed: dense)")
    for axes in (left, right):
        axes.set(xlabel="million tokens seen", ylim=(1.4, 5))
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("loss in nats a token")
    figure.savefig(target, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    folders = (options.results / "moe", options.results / "dense")
    moe, dense = (json.loads((folder / "report.json").read_text("utf-8")) for folder in folders)
    tables = [sources(options.results / "MANIFEST.tsv"), perplexities(moe, dense), routing(moe), transfer(moe)]
    print("\n\n".join(tables))
    plot(*folders, options.picture)


if __name__ == "__main__":
    main()
