"""Sessions under kill -9, and at their full size: whole or not at all, exact, and not twice in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.real_models import smollm2
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.engine.engine import Engine
from turbomoe.engine.request import Request
from turbomoe.engine.session import load_session, save_session
from turbomoe.insight.texts import judgement_text
from turbomoe.models import load_model

ROOT = Path(__file__).parents[2]
KILLED = """
    import json, os, random, signal, sys, time
    from tests.engine.scripted import scripted_model
    from turbomoe.config import EngineSettings, KVSettings
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Request
    from turbomoe.engine.session import load_session, save_session

    path, kills = sys.argv[1], 20
    folder, dice = os.path.dirname(path), random.Random(7)
    settings = EngineSettings(ctx_size=8192, parallel=2, prefill_chunk=4096, kv=KVSettings("tq3", "tq3"))

    def remembering(length):
        engine = Engine(scripted_model(), settings)
        list(engine.stream(Request(tuple(range(length)), max_tokens=1)))
        return engine

    engines = {length: remembering(length) for length in (500, 8000)}
    reader = Engine(scripted_model(), settings)

    def save_forever():
        while True:
            for engine in engines.values():
                save_session(engine, next(s for s in (0, 1) if engine.slots.known(s)), path)

    orphans, found, left = 0, set(), []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            save_forever()
        while not os.path.exists(path):
            time.sleep(0.001)
        time.sleep(dice.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        orphans += len(os.listdir(folder)) - 1
        load_session(reader, 0, path)
        ids = reader.slots.known(0)
        found.add(len(ids) if ids == list(range(len(ids))) else -1)
        save_session(engines[500], next(s for s in (0, 1) if engines[500].slots.known(s)), path)
        left += [name for name in os.listdir(folder) if name != os.path.basename(path)]
    print(json.dumps([orphans, sorted(found), left]))
"""


def run(script: str, *arguments: object) -> str:
    """The output of a program of its own, which sees this checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_twenty_kills_and_always_a_whole_session(tmp_path: Path) -> None:
    orphans, found, left = json.loads(run(KILLED, tmp_path / "s"))
    assert found == [500, 8000]  # the old one or the new one
    assert orphans >= 4  # the kills really fell into the middle of saves
    assert left == []  # and what they left was swept away by the next save


def drawn(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], int]:
    request = engine.submit(Request(tuple(prompt), count, ignore_eos=True))
    tokens: list[int] = []
    while not engine.idle:
        tokens += [event.token for event in engine.step() if event.token is not None]
    return tokens, engine.usage[request].reused


@pytest.mark.slow
def test_eight_thousand_tokens_survive_a_kill_and_go_on_the_same(tmp_path: Path) -> None:
    """SmolLM2, its cache in 3 bits: saved, killed while saving again, restored, and 64 greedy tokens compared."""
    kv = KVSettings("tq3", "tq3")
    model = load_model(smollm2(), EngineSettings(kv=kv))
    means, path = means_for(model, kv), tmp_path / "s"
    assert model.tokenizer is not None and means is not None
    prompt = model.tokenizer(judgement_text())["input_ids"][:8000]
    settings = EngineSettings(ctx_size=8192, kv=kv)
    whole, _ = drawn(Engine(model, settings, means), prompt, 65)

    engine = Engine(model, settings, means)
    first, _ = drawn(engine, prompt, 1)
    save_session(engine, 0, path)
    orphans = 0
    for wait in (0.02, 0.05, 0.1, 0.15, 0.2):
        child = os.fork()
        if child == 0:
            while True:
                save_session(engine, 0, path)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        orphans += len(os.listdir(tmp_path)) - 1
    assert orphans > 0

    restored = Engine(model, EngineSettings(ctx_size=8192, parallel=2, kv=kv), means)
    load_session(restored, 1, path)
    rest, reused = drawn(restored, [*prompt, *first], 64)
    assert reused == 8000
    assert [*first, *rest] == whole


MEMORY = """
    import json, os, sys, torch
    from turbomoe.config import KVSettings
    from turbomoe.kv.cache import KVCache
    from turbomoe.kv.shape import AttentionShape
    from turbomoe.kv.snapshot import parts, restore
    from turbomoe.engine.session_arrays import numpy_type, to_numpy, to_tensor
    from turbomoe.files.array_file import LateArray, open_arrays, save_arrays

    def anonymous():
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def peak():
        import threading
        top, done = [0], threading.Event()
        def watch():
            while not done.wait(0.002):
                top[0] = max(top[0], anonymous())
        thread = threading.Thread(target=watch)
        thread.start()
        return top, lambda: (done.set(), thread.join())

    path = sys.argv[1]
    shapes = [AttentionShape(layer, 8, 2, 128) for layer in range(32)]
    cache = KVCache(shapes, KVSettings("bf16", "q8_0"), slots=1, ctx_size=16384)
    cache.reserve(0, 16384)
    for pair in cache.attention.values():
        for side in pair:
            for plane in side.planes:
                plane.fill_(1)
    cache.host_lengths[0] = 16384
    before = anonymous()
    top, stop = peak()
    save_arrays(path, "turbomoe-session", 1, {}, {
        part.name: LateArray(numpy_type(part.dtype), part.shape, lambda part=part: to_numpy(part.read()))
        for part in parts(cache, 0, 16384)
    })
    stop()
    saving = top[0] - before
    dtypes = {part.name: part.dtype for part in parts(cache, 0, 16384)}
    before = anonymous()
    top, stop = peak()
    with open_arrays(path, "turbomoe-session", 1, 1 << 40) as file:
        restore(cache, 0, 16384, lambda name: to_tensor(file.read(name), dtypes[name]))
    stop()
    print(json.dumps([os.path.getsize(path), saving, top[0] - before]))
"""


@pytest.mark.slow
def test_saving_and_loading_take_the_memory_of_a_few_layers(tmp_path: Path) -> None:
    """Of 32 layers: the largest array is a fiftieth of the file, and a handful of its copies are alive at a time."""
    size, saving, loading = json.loads(run(MEMORY, tmp_path / "s"))
    assert size > 300 << 20
    assert saving < size / 4 and loading < size / 4, (size, saving, loading)
