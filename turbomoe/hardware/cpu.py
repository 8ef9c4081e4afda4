"""The processor as this process may use it: model, instruction sets, cores after affinity and quota."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from turbomoe.hardware.cgroup import cpu_quota, read_text

# The instruction sets that decide which kernels can run, by the names of /proc/cpuinfo (x86 "flags", Arm "Features").
NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True)
class Cpu:
    """``cores`` counts what the machine has, ``usable`` what affinity and control groups leave, ``quota`` if any."""

    model: str
    features: tuple[str, ...]
    cores: int
    usable: int
    quota: float | None


def describe_cpu(root: Path = Path("/")) -> Cpu:
    """The processor of this machine, and this process's share of it."""
    fields = _cpuinfo(root)
    known = set(fields.get("flags", fields.get("Features", "")).split())
    cores, quota = os.cpu_count() or 1, cpu_quota(root)
    return Cpu(
        model=fields.get("model name", platform.machine()),
        features=tuple(name for name in NOTABLE if name in known),
        cores=cores,
        usable=usable_cores(_allowed(cores), quota),
        quota=quota,
    )


def usable_cores(allowed: int, quota: float | None) -> int:
    """Threads that can run at once: a quota of 1.5 CPUs keeps two threads busy, most of the time."""
    return max(1, min(allowed, math.ceil(quota))) if quota else max(1, allowed)


def _allowed(cores: int) -> int:
    """Cores in this process's affinity mask; all of them where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo."""
    block = read_text(root / "proc/cpuinfo").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
