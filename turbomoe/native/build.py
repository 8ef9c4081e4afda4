"""Builds the C core of a source checkout, where it is not current: ``python -m turbomoe.native.build``.

Every instruction set is compiled in and chosen at run time, so that the library runs on any processor of its
architecture. The flags here and in ``CMakeLists.txt`` (for wheels) are the same.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turbomoe.config import state_dir
from turbomoe.errors import TurbomoeError

SOURCE_DIR = Path(__file__).parent / "src"
LIBRARY_NAME = "libturbomoe_core.so"
# No contraction: a product that is rounded before it is added must round the same way at every level.
# Nobody reads floating-point exceptions: without them comparisons vectorise.
MATHS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=gnu11", "-O3", *MATHS, "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wshadow"]
LEVEL_FLAGS = {
    "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ],
}


class BuildError(TurbomoeError):
    """The C core could not be built."""


def sources() -> list[Path]:
    """The C files for this machine: instruction sets of other architectures are left out."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return sorted(p for p in SOURCE_DIR.glob("*.c") if x86 or p.stem not in LEVEL_FLAGS)


def build_id() -> str:
    """Hex hash of everything that goes into the library: sources, headers and flags."""
    digest = hashlib.sha256(repr((FLAGS, LEVEL_FLAGS)).encode())
    for path in sorted(SOURCE_DIR.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """``$CC``, or the first of cc, gcc, clang on the path. ``BuildError`` if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError(
        "No C compiler was found",
        why="the C core for experts on the CPU is built on this machine",
        fix="install gcc or clang (Debian and Ubuntu: apt install gcc), or set CC",
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError("The C core does not build", why=f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _compile(compiler: list[str], source: Path, folder: Path, extra: Sequence[str]) -> Path:
    target = folder / f"{source.stem}.o"
    flags = [*FLAGS, *LEVEL_FLAGS.get(source.stem, []), f'-DTM_BUILD_ID="{build_id()}"', *extra]
    _run([*compiler, *flags, "-c", str(source), "-o", str(target)])
    return target


def build(target: Path, extra: Sequence[str] = ()) -> Path:
    """Build the library at ``target`` (written whole or not at all) and return it. ``BuildError`` says what failed.

    ``extra`` flags come after all others: ``-Werror`` where we develop, sanitizers in tests.
    """
    compiler = find_compiler().split()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as name:
        folder = Path(name)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(compiler, s, folder, extra), sources()))
        library = folder / LIBRARY_NAME
        _run([*compiler, "-shared", "-pthread", *extra, *map(str, objects), "-o", str(library)])
        library.replace(target)
    return target


def default_target() -> Path:
    """Beside the package where that can be written, else in the state folder, under the hash of the sources."""
    here = Path(__file__).parent
    return (here if os.access(here, os.W_OK) else state_dir() / "native" / build_id()) / LIBRARY_NAME


def is_current(library: Path) -> bool:
    """Was this file built from the sources as they are? True where no sources are installed."""
    return library.exists() and (not SOURCE_DIR.exists() or build_id().encode() in library.read_bytes())


def ensure_built(target: Path | None = None, extra: Sequence[str] = ()) -> Path:
    """The library at ``target``, built unless it is current. One process builds, others wait for it."""
    target = target or default_target()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        return target if is_current(target) else build(target, extra)
    finally:
        os.close(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m turbomoe.native.build", description=__doc__)
    parser.add_argument("--output", type=Path, help="build it there, whether or not one is current")
    parser.add_argument("flags", nargs="*", help="further compiler flags, after --")
    args = parser.parse_args()
    try:
        print(build(args.output, args.flags) if args.output else ensure_built(extra=args.flags))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
