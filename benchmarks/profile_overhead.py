"""What it costs a decode step to be profiled, with and without a trace.

    python benchmarks/profile_overhead.py [-m demo:moe] [--steps 1024]

Four arms take turns, step by step, in one sequence: nobody listens (twice: the A/A difference is the noise), the
profiler, the profiler with a trace. Times are CPU time of this process with one thread of work, so that other processes
disturb less; the sums of a block fall into the step that completes it and are counted. Ceiling first: what the copies
alone must take, measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.files.reference import resolve
from turbomoe.insight.profile_run import make_profiler
from turbomoe.insight.texts import judgement_text
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

ARMS = ("off", "off again", "profile", "profile and trace")
PROMPT, SEQUENCE = 64, 576


def copy_seconds(model: LoadedModel) -> float:
    """CPU seconds of the two small copies a layer that the profiler cannot do without, per decode step."""
    assert model.experts is not None
    ids, weights = torch.zeros(1, model.experts.top_k, dtype=torch.int64), torch.zeros(1, model.experts.top_k)
    start = time.process_time()
    for _ in range(20_000):
        ids.clone()
        weights.clone()
    return (time.process_time() - start) / 20_000 * len(model.experts.store.layouts)


def measure(model: LoadedModel, tokens: list[int], steps: int) -> dict[str, float]:
    """Mean CPU seconds of a decode step by arm."""
    assert model.experts is not None
    observers = [None, None, *(make_profiler(model, ExpertSettings.half_life, trace=trace) for trace in (False, True))]
    runner = ModelRunner(model, KVSettings(), slots=1, ctx_size=SEQUENCE)
    spent, done, dice = [0.0] * len(ARMS), 0, random.Random(0)
    while done < steps * len(ARMS):
        model.experts.observer = None
        runner.memory.release(0)
        runner.forward([0], torch.tensor([tokens[:PROMPT]]), Phase.PREFILL)
        for at in range(PROMPT, SEQUENCE, len(ARMS)):
            for offset, arm in enumerate(dice.sample(range(len(ARMS)), len(ARMS))):
                model.experts.observer = observers[arm]
                token = torch.tensor([[tokens[at + offset]]])
                start = time.process_time()
                runner.forward([0], token, Phase.DECODE)
                spent[arm] += time.process_time() - start
                done += 1
    return {name: seconds * len(ARMS) / done for name, seconds in zip(ARMS, spent, strict=True)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo:moe")
    parser.add_argument("--steps", type=int, default=1024, help="decode steps of each arm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(resolve(args.model), EngineSettings(threads=1))
    floor = copy_seconds(model)
    print(f"ceiling: the copies of a step alone take {floor * 1e6:.1f} us")
    mean = measure(model, encode_text(model.tokenizer, judgement_text()), args.steps)
    base = (mean["off"] + mean["off again"]) / 2
    noise = abs(mean["off again"] - mean["off"]) / base
    for name, seconds in mean.items():
        print(f"{name:18} {seconds * 1e3:8.3f} ms a step {(seconds / base - 1) * 100:+6.2f}%")
    print(f"A/A difference {noise:.2%}")
    figures = {name: round(seconds * 1e6, 2) for name, seconds in mean.items()}
    extra = {name: round((mean[name] - base) * 1e6, 2) for name in ARMS[2:]}
    print(json.dumps({"model": model.name, "steps": args.steps, "us": figures, "extra_us": extra, "aa": noise,
                      "copies_us": round(floor * 1e6, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
