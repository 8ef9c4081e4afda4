"""What each KV setting costs in fidelity on real models: measures, stores, checks, and writes docs/kv-quality.md.

    python benchmarks/kv_quality.py measure demo:smollm2 --name smollm2    # one JSON file per model in results/
    python benchmarks/kv_quality.py measure FILE --name long-NAME --tokens 16384 --arms long
    python benchmarks/kv_quality.py auto demo:smollm2 --name smollm2       # what auto chooses, and on text it never saw
    python benchmarks/kv_quality.py check                                  # trellis against scalar codes, by the files
    python benchmarks/kv_quality.py write                                  # docs/kv-quality.md from those files

The ceiling of this measurement is the noise floor: an exact float32 cache against the bf16 reference. Weights and
activations are float32 unless ``--packed``; ``auto`` runs as ``turbomoe run`` does.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from kv_quality_document import DOCUMENT, RESULTS, checks, compose, load

from turbomoe.cli.eval import parse_spec, render
from turbomoe.cli.loading import Bar, quiet_transformers
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.files.reference import resolve
from turbomoe.insight.divergence import compare, label_of
from turbomoe.insight.texts import NAME, judgement_text
from turbomoe.kv.means import KVMeans

LEVELS = ["tcq4", "tq4", "tcq3", "tq3", "tcq2", "tq2"]
REST = ["q8_0", "tcq2.5"]
MIXED = ["q8_0/tcq2", "tcq3/tcq2.5", "tcq3/tcq2", "tq3/tq2", "tcq2.5/tcq2"]
ABLATION = [f"{codec}{rest}" for codec in ("tcq3", "tcq2") for rest in ("@0+0", "@128+1024", "-means")]
UNSCALED = ["tcq3", "tcq2"]  # with the means, without the key scales
LONG = ["q8_0", "tcq3", "tq3", "tcq3/tcq2.5", "tcq2.5", "tcq2"]
ARMS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "all": ([*LEVELS, *REST, *MIXED], ABLATION, UNSCALED),
    "levels": (LEVELS, [], []),
    "rest": (REST, [], []),
    "mixed": (MIXED, [], []),
    "ablation": ([], ABLATION, UNSCALED),
    "long": (LONG, [], []),
}

CONDITIONS = ("identity", "means", "text", "tokens", "arithmetic", "cpu", "versions")
Row = dict[str, Any]


def measure(reference: str, name: str, tokens: int, arms: str, packed: bool) -> None:
    """Judge every setting on one model and store the verdicts with date, hardware and versions.

    Rows that an earlier run under the same conditions left in the file stay, so that arms may be measured in parts.
    """
    quiet_transformers()
    from turbomoe.engine.calibrate import means_for
    from turbomoe.models import load_model
    from turbomoe.upstream.prompts import encode_text

    model = load_model(resolve(reference), EngineSettings(ctx_size=tokens, dtype="auto" if packed else "float32"))
    ids = encode_text(model.tokenizer, judgement_text())[:tokens]
    codecs, ablation, unscaled = ARMS[arms]
    means, stamp = means_for(model, parse_spec("tcq2")), circumstances()
    assert means is not None
    with Bar("judging", unit="token") as bar:
        specs = [parse_spec(spec) for spec in [*codecs, *ablation]]
        verdicts = compare(model, ids, specs, bar, unscaled_arms(unscaled, means))
    print(render(verdicts))
    record = {
        "model": model.name,
        "identity": model.identity,
        "means": means.digest,
        "text": NAME,
        "tokens": len(ids),
        "arithmetic": "packed weights, activations in 8 bits" if packed else "weights and activations in float32",
        **stamp,
    }
    groups = {"base": 2, "codecs": len(codecs), "ablation": len(ablation) + len(unscaled)}
    rows = iter([verdict.to_json() for verdict in verdicts])
    measured = {group: list(itertools.islice(rows, size)) for group, size in groups.items()}
    store(name, record | merged(name, record, measured))
    print(json.dumps(record))


def measure_auto(reference: str, name: str) -> None:
    """Let ``auto`` choose, then measure its choice on the text's beginning; the check reads its end."""
    quiet_transformers()
    from turbomoe.engine.calibrate import means_for
    from turbomoe.insight.kv_auto import resolve_kv_types
    from turbomoe.insight.kv_check import TOKENS
    from turbomoe.insight.kv_check import measure as judge
    from turbomoe.models import load_model
    from turbomoe.upstream.prompts import encode_text

    asked = EngineSettings(kv=KVSettings("auto", "auto"))
    model = load_model(resolve(reference), asked)
    settings = resolve_kv_types(model, asked)
    choice, pair = settings.kv_choice, (settings.kv.type_k, settings.kv.type_v)
    assert choice is not None
    ids = encode_text(model.tokenizer, judgement_text())[:TOKENS]
    held_out = judge(model, asked.kv, means_for(model, settings.kv), ids, {pair: inf})[pair]
    record = {
        "model": model.name,
        "identity": model.identity,
        **circumstances(),
        "choice": choice.to_json(),
        "line": choice.line(),
        "held_out_kl": held_out.kl,
        "held_out_tokens": held_out.tokens,
    }
    store(f"auto-{name}", record)
    print(json.dumps(record))


def merged(name: str, record: dict[str, object], measured: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of each group, with those of the file before them where it was measured under the same conditions."""
    known = load(name)
    if known is None or any(known[key] != record[key] for key in CONDITIONS):
        return measured
    return {
        group: [*(row for row in known[group] if row["label"] not in {new["label"] for new in rows}), *rows]
        for group, rows in measured.items()
    }


def unscaled_arms(specs: list[str], means: KVMeans) -> dict[str, tuple[KVSettings, KVMeans]]:
    """The arms whose keys are centred and not scaled, by label."""
    settings = [parse_spec(spec) for spec in specs]
    return {f"{label_of(kv)} no scales": (kv, replace(means, scales={})) for kv in settings}


def circumstances() -> dict[str, object]:
    """When, on what and with what."""
    packages = {package: version(package) for package in ("torch", "transformers")}
    return {"date": datetime.date.today().isoformat(), "cpu": _cpu(), "versions": packages}


def store(name: str, record: dict[str, object]) -> None:
    """Keep a measurement as results/kv_quality/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("measure")
    one.add_argument("reference")
    one.add_argument("--name", required=True)
    one.add_argument("--tokens", type=int, default=4096)
    one.add_argument("--arms", choices=ARMS, default="all")
    one.add_argument("--packed", action="store_true", help="the arithmetic of turbomoe run: faster, with more noise")
    auto = verbs.add_parser("auto")
    auto.add_argument("reference")
    auto.add_argument("--name", required=True)
    verbs.add_parser("check")
    verbs.add_parser("write")
    args = parser.parse_args()
    if args.verb == "measure":
        measure(args.reference, args.name, args.tokens, args.arms, args.packed)
    elif args.verb == "auto":
        measure_auto(args.reference, args.name)
    elif args.verb == "check":
        print("\n".join(checks()))
    else:
        DOCUMENT.write_text(compose())


if __name__ == "__main__":
    main()
