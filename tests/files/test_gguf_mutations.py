"""The GGUF reader on thousands of damaged files: refused with the one exception type, or accepted and safe.

Mutants depend on their number alone; a failure names it. ``TURBOMOE_FUZZ=200000`` runs as many instead of 2,000.
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.files import gguf_builder as build
from tests.files.gguf_builder import Gguf, Sample, Tensor
from turbomoe.errors import ModelFileError
from turbomoe.files.blocks import FORMATS
from turbomoe.files.gguf import GgufFile
from turbomoe.files.gguf_series import open_series

MUTANTS = int(os.environ.get("TURBOMOE_FUZZ", "2000"))
SERIES_MUTANTS = MUTANTS // 10
CPU_SECONDS = 1.0
RSS_GROWTH = 64 << 20

Mutation = Callable[[bytearray, random.Random], None]


def sources() -> list[bytes]:
    """The sound files that mutants are made of: mixed metadata, every block format, a larger vocabulary."""
    formats = tuple(
        Tensor(f"a.{name}", (2 * block.values, 2), block.type_id, bytes(range(256))[: block.bytes] * 4)
        for name, block in FORMATS.items()
    )
    words = [f"word{index}" for index in range(150)]
    return [Sample().gguf.build(), Gguf(Sample().gguf.keys[:2], formats).build(), Sample(words).gguf.build()]


def flip_bits(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        raw[place(raw, rng)] ^= 1 << rng.randrange(8)


def truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[place(raw, rng) :]


def overwrite_integer(raw: bytearray, rng: random.Random) -> None:
    """Eight bytes become a number that arithmetic is known to trip over."""
    near = rng.choice([0, 1, 1 << 31, 1 << 32, 1 << 60, 1 << 61, 1 << 62, 1 << 63, 1 << 64, len(raw)])
    overwrite(raw, rng, struct.pack("<Q", (near + rng.choice([-32, -1, 0, 0, 1, 32])) % (1 << 64)))


def overwrite_type(raw: bytearray, rng: random.Random) -> None:
    """Four bytes become a plausible type, count of axes or version."""
    overwrite(raw, rng, struct.pack("<I", rng.choice([rng.randrange(45), rng.getrandbits(32)])))


def splice(raw: bytearray, rng: random.Random) -> None:
    """A piece of the file replaces another place, or is pushed in there."""
    start, to = place(raw, rng), place(raw, rng)
    piece = raw[start : start + rng.randint(1, 64)]
    raw[to : to + rng.choice([0, len(piece)])] = piece


def remove(raw: bytearray, rng: random.Random) -> None:
    start = place(raw, rng)
    del raw[start : start + rng.randint(1, 16)]


MUTATIONS: tuple[Mutation, ...] = (flip_bits, truncate, overwrite_integer, overwrite_type, splice, remove)


def place(raw: bytearray, rng: random.Random) -> int:
    """An index into the file, in the header more often than not."""
    return rng.randrange(len(raw) if rng.random() < 0.2 else min(len(raw), 1024)) if raw else 0


def overwrite(raw: bytearray, rng: random.Random, piece: bytes) -> None:
    start = place(raw, rng)
    raw[start : start + len(piece)] = piece


def mutant(number: int, originals: list[bytes]) -> bytes:
    rng = random.Random(f"gguf {number}")
    raw = bytearray(rng.choice(originals))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if raw:
            rng.choice(MUTATIONS)(raw, rng)
    return bytes(raw)


def check_safe(file: GgufFile, paths: list[Path]) -> None:
    """Judge an accepted file by what the oracle knows of sizes, then use all of it."""
    for shard in open_series(paths[0]):
        spans = sorted((entry.start, entry.stop) for entry in shard.header.tensors)
        assert all(0 < start < stop <= shard.path.stat().st_size for start, stop in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    for name, info in file.tensors.items():
        values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[info.format]]
        elements = 1
        for axis in info.shape:
            assert axis > 0
            elements *= axis
        assert info.shape[-1] % values == 0
        assert info.nbytes == elements // values * nbytes == len(file.raw(name))
        numbers = file.load(name)
        assert (numbers.shape, numbers.dtype) == (torch.Size(info.shape), torch.float32)
    repr(file.metadata)
    file.identity()


def peak_memory() -> int:
    """Bytes of the largest resident set since the last ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def cpu_limit() -> Iterator[Callable[[], None]]:
    """A function that gives the next stretch of code ``CPU_SECONDS`` of processor time."""

    def too_slow(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a file took more than {CPU_SECONDS} s")

    before = signal.signal(signal.SIGPROF, too_slow)
    yield lambda: signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS) and None
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def try_open(paths: list[Path], number: int) -> str:
    """``refused`` or ``accepted``; anything else is a failure that names the mutant."""
    try:
        file = GgufFile.open(paths[0])
    except ModelFileError as error:
        assert error.reason and Path(error.path).name in [path.name for path in paths], f"mutant {number}"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"mutant {number} raised {error!r}") from error
    try:
        check_safe(file, paths)
    except BaseException as error:
        raise AssertionError(f"mutant {number} was accepted and is not safe") from error
    return "accepted"


def test_the_mutants_are_made_of_sound_files(tmp_path: Path) -> None:
    for raw in sources():
        (tmp_path / "m.gguf").write_bytes(raw)
        assert try_open([tmp_path / "m.gguf"], -1) == "accepted"


def test_mutants_are_refused_or_safe(tmp_path: Path, cpu_limit: Callable[[], None]) -> None:
    originals, path, outcomes = sources(), tmp_path / "m.gguf", Counter[str]()
    forget_peak()
    before = peak_memory()
    for number in range(MUTANTS):
        path.write_bytes(mutant(number, originals))
        cpu_limit()
        outcomes[try_open([path], number)] += 1
        path.unlink()  # an open mapping must not see the next file's bytes
    assert peak_memory() - before < RSS_GROWTH
    assert outcomes["refused"] > MUTANTS // 4
    assert outcomes["accepted"] > MUTANTS // 20


def test_mutants_in_a_series_are_refused_or_safe(tmp_path: Path, cpu_limit: Callable[[], None]) -> None:
    paths = [tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"]
    sound = [series_member(0).build(), series_member(1).build()]
    outcomes = Counter[str]()
    for number in range(SERIES_MUTANTS):
        for path, raw in zip(paths, sound, strict=True):
            path.unlink(missing_ok=True)
            path.write_bytes(raw)
        paths[number % 2].write_bytes(mutant(number, [sound[number % 2]]))
        cpu_limit()
        outcomes[try_open(paths, number)] += 1
    assert outcomes["refused"] > SERIES_MUTANTS // 4
    assert outcomes["accepted"] > SERIES_MUTANTS // 20


def series_member(number: int) -> Gguf:
    keys = [("split.no", build.U16, number), ("split.count", build.U16, 2), ("split.tensors.count", build.I32, 4)]
    tensors = tuple(Tensor(f"t{number}.{index}", (32, 2), 8, bytes(range(68))) for index in range(2))
    return Gguf(tuple(build.key(*one) for one in keys), tensors)


@settings(max_examples=300)
@given(tail=st.binary(max_size=200), version=st.sampled_from([2, 3]))
def test_any_bytes_after_the_magic_are_refused_or_safe(
    tail: bytes, version: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + tail)
    assert try_open([path], -1) in ("refused", "accepted")
