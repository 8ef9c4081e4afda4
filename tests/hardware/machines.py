"""Machines laid out in a folder: just enough of /proc and /sys/fs/cgroup for ``root=``."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712  # what version 1 writes when there is no limit


def write(root: Path, path: str, text: object) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{text}\n")


def meminfo(root: Path, total: int, available: int) -> None:
    lines = f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\nHugePages_Total: 0"
    write(root, "proc/meminfo", lines)


def join_v2(root: Path, group: str) -> None:
    """This process is in ``group`` of a version 2 hierarchy."""
    write(root, "proc/self/cgroup", f"0::{group}")


def v2_group(root: Path, group: str, *, used: int = 0, idle: int = 0, **files: object) -> None:
    """A version 2 group; ``max=``, ``high=`` are written as memory.max and memory.high."""
    folder = f"sys/fs/cgroup{group.rstrip('/')}"
    write(root, f"{folder}/memory.current", used)
    write(root, f"{folder}/memory.stat", f"anon {used - idle}\ninactive_file {idle}\nactive_file 0")
    for name, value in files.items():
        write(root, f"{folder}/memory.{name}", value)


def join_v1(root: Path, group: str, controllers: str = "memory") -> None:
    """This process is in ``group`` of a version 1 hierarchy, beside an unrelated one."""
    write(root, "proc/self/cgroup", f"5:pids:/elsewhere\n4:{controllers}:{group}")


def v1_group(root: Path, group: str, limit: int, *, used: int = 0, idle: int = 0, inherited: int = NO_LIMIT_V1) -> None:
    folder = f"sys/fs/cgroup/memory{group.rstrip('/')}"
    write(root, f"{folder}/memory.limit_in_bytes", limit)
    write(root, f"{folder}/memory.usage_in_bytes", used)
    stat = f"inactive_file 1\ntotal_inactive_file {idle}\nhierarchical_memory_limit {inherited}"
    write(root, f"{folder}/memory.stat", stat)
