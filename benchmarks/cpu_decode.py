"""Decode and prefill on the CPU: packed and float32 weights here, llama.cpp beside them, interleaved in one run.

    python benchmarks/cpu_decode.py MODEL.gguf [--threads 2] [--rounds 5] [--arms packed,float32,xllamacpp,llama-cpp]
        [--python xllamacpp=/other/venv/bin/python]

Every arm is a process that loads the model once and then waits. A round lets each arm in turn read the same 512 tokens
and write 64 more, greedily; nobody computes while another is measured. Peers are optional: PyPI ``xllamacpp`` (an AVX2
build) and ``llama-cpp-python`` (built natively from its sdist). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT, ANSWER = 512, 64
ARMS = ("packed", "float32", "xllamacpp", "llama-cpp")
Result = dict[str, float]  # prefill_s and decode_s of PROMPT and ANSWER - 1 tokens
Run = Callable[[], Result]


def prompt_ids(model: Path) -> list[int]:
    """The first ids of a novel, the same for every arm."""
    from turbomoe.files import open_model
    from turbomoe.files.tokenizer import build_backend
    from turbomoe.files.vocabulary import read_vocabulary
    from turbomoe.insight.texts import judgement_text

    source = open_model(model)
    backend = build_backend(read_vocabulary(source.metadata, source.path))
    return list(backend.encode(judgement_text()[: 16 * PROMPT]).ids[:PROMPT])


# -- arms: each returns a function that does one round, and the bytes of its weights if it knows them -------------


def ours(dtype: str, model: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """This package, through its engine."""
    import torch

    from turbomoe.config import EngineSettings
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request
    from turbomoe.models import load_model

    torch.set_num_threads(threads)
    settings = EngineSettings(ctx_size=2048, dtype=dtype, threads=threads, prefill_chunk=PROMPT)
    imported = _import_everything(model, settings)
    loaded = load_model(model, settings)
    engine = Engine(loaded, settings)
    facts = {"weight_bytes": loaded.weight_bytes, "kv_bytes": engine.runner.memory.nbytes(), "imported": imported,
             "file_bytes": model.stat().st_size}  # fmt: skip

    ids = tuple(prompt_ids(model))

    def run() -> Result:
        _forget(engine)
        request = Request(ids, max_tokens=ANSWER, ignore_eos=True)
        start = time.perf_counter()
        times = [time.perf_counter() for event in engine.stream(request) if event.token is not None]
        return {"prefill_s": times[0] - start, "decode_s": times[-1] - times[0]}

    return run, facts


def _import_everything(model: Path, settings: Any) -> int:
    """Run a toy of the same family, so that what is imported late is there; bytes of the process after that."""
    from tests.tiny_models import FAMILIES, q8_0, tiny_model, write_gguf
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request
    from turbomoe.files import open_model
    from turbomoe.models import load_model

    family = open_model(model).metadata["general.architecture"]
    if family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            toy = load_model(write_gguf(tiny_model(family), Path(folder) / "toy.gguf", pick=q8_0), settings)
            list(Engine(toy, settings).stream(Request((1, 2, 3), max_tokens=3, ignore_eos=True)))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return _memory("VmRSS")


def _forget(engine: Any) -> None:
    """Nothing of the last round may be reused."""
    for slot in list(engine.slots._idle):
        engine.slots.forget(slot)


def xllamacpp(model: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """llama.cpp's server in the process, as PyPI ``xllamacpp`` ships it."""
    import xllamacpp as peer

    params = peer.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cache_prompt = str(model), 2048, 1, False
    params.n_batch = params.n_ubatch = PROMPT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.verbosity = 0, 0
    server = peer.Server(params)
    request = {
        "prompt": prompt_ids(model),
        "n_predict": ANSWER,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def run() -> Result:
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        timings = answer["timings"]
        assert timings["prompt_n"] == PROMPT and timings["predicted_n"] == ANSWER, timings
        # Its decode clock starts at the first token that it decodes and counts all of them.
        decode = timings["predicted_ms"] / 1e3 * (ANSWER - 1) / ANSWER
        return {"prefill_s": timings["prompt_ms"] / 1e3, "decode_s": decode}

    return run, {}


def llama_cpp(model: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """llama.cpp through ``llama-cpp-python``."""
    from llama_cpp import Llama

    peer = Llama(str(model), n_ctx=2048, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads,
                 n_threads_batch=threads, verbose=False)  # fmt: skip
    ids = prompt_ids(model)

    def run() -> Result:
        peer.reset()
        start = time.perf_counter()
        peer.eval(ids)
        token, middle = peer.sample(temp=0), time.perf_counter()
        for _ in range(ANSWER - 1):
            peer.eval([token])
            token = peer.sample(temp=0)
        return {"prefill_s": middle - start, "decode_s": time.perf_counter() - middle}

    return run, {}


MAKE: dict[str, Callable[[Path, int], tuple[Run, dict[str, Any]]]] = {
    "packed": lambda model, threads: ours("auto", model, threads),
    "float32": lambda model, threads: ours("float32", model, threads),
    "xllamacpp": xllamacpp,
    "llama-cpp": llama_cpp,
}


def _memory(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def worker(arm: str, model: Path, threads: int) -> None:
    """The process of one arm: a line in, one round, a line of JSON out. Libraries that print do it elsewhere."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run, facts = MAKE[arm](model, threads)
    print(json.dumps(facts | {"peak": _memory("VmHWM")}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run() | {"peak": _memory("VmHWM")}), file=out, flush=True)


# -- the parent ------------------------------------------------------------------------------------------------


class Arm:
    """A worker process and what it has measured."""

    def __init__(self, name: str, python: str, args: argparse.Namespace) -> None:
        self.name, self.rounds, self.peak = name, [], 0
        command = [python, __file__, str(args.model), "--worker", name, "--threads", str(args.threads)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(args.threads),
        }
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=environment)  # fmt: skip
        first = self.process.stdout.readline()  # type: ignore[union-attr]
        self.facts: dict[str, Any] | None = json.loads(first) if first else None

    rounds: list[Result]

    def run(self, keep: bool) -> None:
        """One round; ``keep`` False for warming up."""
        self.process.stdin.write("go\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        result = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        self.peak = int(result.pop("peak"))
        if keep:
            self.rounds.append(result)

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(30)

    def rate(self, key: str) -> list[float]:
        """Tokens a second, round by round."""
        count = PROMPT if key == "prefill_s" else ANSWER - 1
        return [count / result[key] for result in self.rounds]


def read_bandwidth(threads: int) -> float:
    """Bytes a second that the worker pool reads from memory far larger than the caches; 0 without the core."""
    import torch

    from turbomoe.native.shared import shared_pool

    pool = shared_pool(threads)
    if pool is None:
        return 0.0
    memory = torch.ones(1 << 29, dtype=torch.uint8)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        pool.core.read(pool.handle, memory.data_ptr(), memory.numel())
        best = max(best, memory.numel() / (time.perf_counter() - start))
    return best


def start_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms that start; a line for each that does not."""
    pythons = dict(pair.split("=", 1) for pair in args.python)
    found = []
    for name in args.arms.split(","):
        arm = Arm(name, pythons.get(name, sys.executable), args)
        if arm.facts is None:
            print(f"{name}: left out, its worker did not start (is the package installed?)")
        else:
            found.append(arm)
    return found


def beyond(row: dict[str, Any]) -> str:
    """What an arm of ours takes beyond imports and KV cache."""
    if "imported" not in row:
        return ""
    more = row["peak_bytes"] - row["imported"] - row["kv_bytes"]
    return f" ({more / 2**20:.0f} beyond imports and KV, {more / row['file_bytes']:.2f} x the file)"


def report(arms: list[Arm], ceiling: float) -> list[dict[str, Any]]:
    """Print medians, spreads and ratios to the first arm; return them."""
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "peak_bytes": arm.peak, **(arm.facts or {})}
        for key, label in (("decode_s", "decode"), ("prefill_s", "prefill")):
            rates, base = arm.rate(key), arms[0].rate(key)
            row[f"{label}_tokens_per_s"] = statistics.median(rates)
            row[f"{label}_best"] = max(rates)
            row[f"first_arm_over_this_{label}"] = statistics.median(a / b for a, b in zip(base, rates, strict=True))
        rows.append(row)
        share = f"{100 * row['decode_tokens_per_s'] / ceiling:4.0f} % of the ceiling" if ceiling else ""
        print(
            f"{arm.name:10} decode {row['decode_tokens_per_s']:7.1f} tokens/s (best {row['decode_best']:.1f}; "
            f"{arms[0].name} is {row['first_arm_over_this_decode']:.2f} x) {share}  "
            f"prefill {row['prefill_tokens_per_s']:7.1f} (best {row['prefill_best']:.1f}; "
            f"{row['first_arm_over_this_prefill']:.2f} x)  peak {arm.peak / 2**20:.0f} MiB{beyond(row)}"
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--python", action="append", default=[], metavar="ARM=PATH", help="another interpreter")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model, args.threads)
        return 0
    sys.path.insert(0, str(ROOT))
    bandwidth, arms = read_bandwidth(args.threads), start_arms(args)
    if not arms:
        return 1
    weights = int((arms[0].facts or {}).get("weight_bytes", args.model.stat().st_size))
    ceiling = bandwidth / weights
    load = os.getloadavg()[0]
    print(f"{weights / 2**20:.0f} MiB of weights at {bandwidth / 1e9:.1f} GB/s with {args.threads} threads: "
          f"at most {ceiling:.0f} tokens/s; load average {load:.1f}")  # fmt: skip
    for index in range(args.rounds + 1):
        for arm in arms:
            arm.run(keep=index > 0)
    rows = report(arms, ceiling)
    for arm in arms:
        arm.close()
    facts = {"model": args.model.name, "threads": args.threads, "rounds": args.rounds, "load_average": load}
    print(json.dumps(facts | {"read_bytes_per_s": bandwidth, "ceiling_tokens_per_s": ceiling, "arms": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
