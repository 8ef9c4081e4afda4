"""What it costs to encode keys and values on the CPU: a vector, a second, and the share of a decode step.

    python benchmarks/kv_encode.py [MODEL.gguf] [--threads 2] [--rounds 7] [--tokens 1024]
    python benchmarks/kv_encode.py --cuda

First the ceiling: the additions, products and comparisons of a trellis search, and how many one core does a second in
a product of matrices. Then every codec on one core, on Gaussian vectors that are rotated already, 64 in a call;
trellises in PyTorch too. With a model: decode steps of all threads after ``--tokens`` tokens, types interleaved, and
the part of them that goes into encoding what leaves the exact window. The last line is JSON. With ``--cuda`` instead
what ``kv_encode_gpu.py`` says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

DIMS = (64, 128, 256)
BATCH = 64
STEPS = 24  # decode steps of a round
STEP_TYPES = ("bf16", "tq3", "tcq2", "tcq2.5", "tcq3", "tcq4")


def best_of(rounds: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest round: others compute on this machine, too."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def operations(name: str, dim: int) -> int:
    """Float operations to search the best path of a vector: for each state of each step, a subtraction, a product and
    an addition a value, and a comparison. Twice: once around the boundary, once for the path."""
    from turbomoe.kv.trellis_codebook import TRELLISES
    from turbomoe.kv.trellis_search import HALF_SPAN

    trellis = TRELLISES[name]
    return (dim // trellis.values + 2 * HALF_SPAN) * trellis.states * (3 * trellis.values + 1)


def float_rate(rounds: int) -> float:
    """Float operations a second of one core in a product of matrices that stay in its caches; an FMA counts as two."""
    import torch

    a = torch.randn(256, 256)
    return 2 * 256**3 / best_of(100 * rounds, lambda: a @ a)


def measure_codecs(rounds: int, rate: float) -> list[dict[str, Any]]:
    """A row for each codec, head size and place of computation."""
    import torch

    from turbomoe.kv.codecs import CODECS, make_codec

    rows = []
    for name in CODECS:
        for dim in DIMS:
            codec, x = make_codec(name, dim), torch.randn(BATCH, dim)
            places = {"": codec.encode}
            if plain := getattr(codec, "encode_plainly", None):
                places = {"core": codec.encode, "PyTorch": plain}
            for place, encode in places.items():
                often = 1 if place == "PyTorch" else 20
                seconds = best_of(often * rounds, lambda encode=encode, x=x: encode(x)) / BATCH
                row = {"codec": name, "dim": dim, "place": place, "us": 1e6 * seconds, "values_per_s": dim / seconds}
                if place:
                    row["share"] = operations(name, dim) / rate / seconds
                rows.append(row)
                print(line_of(row), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    share = f"{100 * row['share']:5.1f} % of the ceiling" if "share" in row else ""
    return (f"{row['codec']:7} {row['dim']:4} {row['place']:8} {row['us']:9.3f} us a vector "
            f"{row['values_per_s'] / 1e6:9.2f} M values/s  {share}")  # fmt: skip


class Arm:
    """One KV type: a runner that has read its prompt, and the seconds of its decode steps and of encoding in them."""

    def __init__(self, model: Any, kv_type: str, tokens: int, room: int) -> None:
        import torch

        from turbomoe.config import KVSettings
        from turbomoe.engine.runner import ModelRunner
        from turbomoe.experts.base import Phase

        self.kv_type, self.decode, self.steps, self.encoding = kv_type, Phase.DECODE, [], []
        self.runner = ModelRunner(model, KVSettings(kv_type, kv_type, means=False), slots=1, ctx_size=tokens + room)
        ids = torch.arange(tokens).remainder(997)[None] + 5
        for part in ids.split(512, 1):
            self.runner.forward([0], part, Phase.PREFILL, keep=1)

    def round(self) -> None:
        """``STEPS`` steps; what they take, and what of it encodes what leaves the rings, which a CPU does at once."""
        import torch

        from turbomoe.kv.aside import Aside

        original, spent = Aside.run, 0.0

        def timed(aside: Aside, works: Any) -> None:
            nonlocal spent
            start = time.perf_counter()
            original(aside, works)
            spent += time.perf_counter() - start

        Aside.run = timed  # type: ignore[method-assign]
        try:
            for _ in range(STEPS):
                before, start = spent, time.perf_counter()
                self.runner.forward([0], torch.tensor([[11]]), self.decode, keep=1)
                self.steps.append(time.perf_counter() - start)
                self.encoding.append(spent - before)
        finally:
            Aside.run = original  # type: ignore[method-assign]


def measure_steps(model_path: Path, tokens: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Decode steps with each type, interleaved."""
    import torch

    from turbomoe.config import EngineSettings
    from turbomoe.models import load_model

    torch.set_num_threads(threads)
    model = load_model(model_path, EngineSettings(threads=threads))
    arms = [Arm(model, kv_type, tokens, STEPS * (rounds + 1)) for kv_type in STEP_TYPES]
    for index in range(rounds + 1):
        for arm in arms:
            arm.round()
            if index == 0:
                arm.steps.clear()
                arm.encoding.clear()
    rows = []
    for arm in arms:
        step, encoding = statistics.median(arm.steps), statistics.median(arm.encoding)
        rows.append({"type": arm.kv_type, "step_ms": 1e3 * step, "best_step_ms": 1e3 * min(arm.steps),
                     "encode_ms": 1e3 * encoding, "share": encoding / step})  # fmt: skip
        print(f"{arm.kv_type:7} {1e3 * step:8.2f} ms a step (best {1e3 * min(arm.steps):.2f}), encoding "
              f"{1e3 * encoding:6.3f} ms: {100 * encoding / step:4.1f} %")  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cuda", action="store_true", help="the trellis codecs on this GPU")
    args = parser.parse_args()
    if args.cuda:
        return subprocess.call([sys.executable, str(Path(__file__).with_name("kv_encode_gpu.py"))])
    import torch

    from turbomoe.native.library import load_core

    torch.set_num_threads(1)
    core, rate, load = load_core(), float_rate(args.rounds), os.getloadavg()[0]
    level = core.level if core else "none"
    print(f"{rate / 1e9:.0f} G float operations/s on one core; kernels: {level}; load average {load:.1f}")
    for name in ("tcq2", "tcq2.5", "tcq3", "tcq4"):
        floors = ", ".join(f"{1e6 * operations(name, dim) / rate:.2f} us at {dim}" for dim in DIMS)
        print(f"{name:7} at least {floors}")
    facts = {"threads": args.threads, "level": level, "load_average": load, "float_operations_per_s": rate,
             "codecs": measure_codecs(args.rounds, rate)}  # fmt: skip
    if args.model:
        print(f"{args.model.name} after {args.tokens} tokens:")
        steps = measure_steps(args.model, args.tokens, args.rounds, args.threads)
        facts |= {"model": args.model.name, "tokens": args.tokens, "steps": steps}
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
