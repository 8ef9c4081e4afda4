"""What this process may really use: memory and CPU limits of its control groups, version 1 and 2.

Source: the kernel's cgroup-v1 and cgroup-v2 documents and proc(5). Every function reads below ``root``, so a
test can lay out a machine in a folder. A file that is missing, unreadable or odd means "no limit here".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 where version 2 writes "max"
V2_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")


@dataclass(frozen=True)
class MemoryLimit:
    """One limit that holds for this process: ``used`` leaves out file pages that the kernel can drop at once."""

    source: str  # the file that sets it
    limit: int  # bytes
    used: int  # bytes

    @property
    def headroom(self) -> int:
        return max(self.limit - self.used, 0)


def read_text(path: Path) -> str:
    """Text of a small kernel file, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def whole_number(text: str) -> int | None:
    """A kernel's decimal number (64 bits have at most 20 digits), or None for anything else."""
    return int(text) if text.isdecimal() and len(text) <= 20 else None


def read_table(path: Path) -> dict[str, int]:
    """``name value`` lines (``memory.stat``, ``/proc/meminfo``) as a dictionary; other lines are skipped."""
    rows = (line.replace(":", " ").split() for line in read_text(path).splitlines())
    pairs = ((row[0], whole_number(row[1])) for row in rows if len(row) >= 2)
    return {name: number for name, number in pairs if number is not None}


def read_limit(path: Path) -> int | None:
    """A limit in bytes, or None for ``max``, for a number that means none, and for a file that is not there."""
    value = whole_number(read_text(path).strip())
    return None if value is None or value >= UNLIMITED else value


def _ancestors(mount: Path, group: str) -> Iterator[Path]:
    """Folders of a group and of everything above it; a container often sees only its own root, which comes last."""
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every control group that holds this process, innermost first."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        if number == "0" and not names:
            yield from ((2, folder) for mount in V2_MOUNTS for folder in _ancestors(root / mount, group))
        elif controller in names.split(","):
            yield from ((1, folder) for folder in _ancestors(root / "sys/fs/cgroup" / controller, group))


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Every memory limit on this process, ``memory.high`` included: beyond it the kernel throttles to a crawl."""
    found: dict[str, MemoryLimit] = {}
    for version, folder in groups(root, "memory"):
        for limit in _v2_memory(folder) if version == 2 else _v1_memory(folder):
            found.setdefault(limit.source, limit)
    return list(found.values())


def _v2_memory(folder: Path) -> Iterator[MemoryLimit]:
    used = read_limit(folder / "memory.current") or 0
    idle = read_table(folder / "memory.stat").get("inactive_file", 0)
    for name in ("memory.max", "memory.high"):
        if (limit := read_limit(folder / name)) is not None:
            yield MemoryLimit(str(folder / name), limit, max(used - idle, 0))


def _v1_memory(folder: Path) -> Iterator[MemoryLimit]:
    stat = read_table(folder / "memory.stat")
    used = read_limit(folder / "memory.usage_in_bytes") or 0
    idle = stat.get("total_inactive_file", 0)
    # Limits of groups above this one are not visible in a container; the kernel sums them up here.
    inherited = stat.get("hierarchical_memory_limit", UNLIMITED)
    limit = min(read_limit(folder / "memory.limit_in_bytes") or inherited, inherited)
    if limit < UNLIMITED:
        yield MemoryLimit(str(folder / "memory.limit_in_bytes"), limit, max(used - idle, 0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the tightest control group grants, or None without a quota."""
    shares = [_cpu_share(version, folder) for version, folder in groups(root, "cpu")]
    return min((share for share in shares if share), default=None)


def _cpu_share(version: int, folder: Path) -> float | None:
    if version == 2:
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    granted, per = whole_number(quota), whole_number(period)
    return granted / per if granted and per else None
