"""How much memory each device has left, and the table that says before loading what a run will take of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbomoe.errors import OutOfMemoryError, TurbomoeError
from turbomoe.hardware.cgroup import memory_limits, read_table
from turbomoe.units import format_bytes

PARTS = ("weights", "kv", "workspace", "experts")
# What a person can lower when a part is the largest one.
REMEDIES = {
    "weights": "choose a smaller model or a smaller quantisation of this one",
    "kv": "lower --ctx-size or --parallel, or choose --cache-type-k and --cache-type-v with fewer bits",
    "workspace": "lower --ctx-size or --parallel",
    "experts": "lower --moe-cache, or choose a smaller quantisation of this model",
}


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device in bytes. ``available`` respects every limit; ``note`` says which one binds, if any."""

    device: str  # "cpu", "cuda:0"
    total: int
    available: int
    note: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a run is going to take on one device, on top of what is taken already."""

    weights: int = 0
    kv: int = 0
    workspace: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace + self.experts


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table."""

    memory: DeviceMemory
    use: MemoryUse

    @property
    def free(self) -> int:
        """Bytes left once everything is loaded; negative when it does not fit."""
        return self.memory.available - self.use.total


def ram(root: Path = Path("/")) -> DeviceMemory:
    """System memory: the kernel's own estimate of what is available, capped by every control group's headroom."""
    table = read_table(root / "proc/meminfo")
    if "MemTotal" not in table:
        raise TurbomoeError(
            "Cannot tell how much memory this machine has",
            why="/proc/meminfo is missing or unreadable",
            fix="Run turbomoe on Linux (WSL2 and containers count)",
        )
    total = table["MemTotal"] << 10
    available = table.get("MemAvailable", table.get("MemFree", 0)) << 10
    tightest = min(memory_limits(root), key=lambda limit: limit.headroom, default=None)
    if tightest is None or tightest.headroom >= available:
        return DeviceMemory("cpu", total, available)
    note = f"limited to {format_bytes(tightest.limit)} by {tightest.source}"
    return DeviceMemory("cpu", min(total, tightest.limit), tightest.headroom, note)


def gpus() -> list[DeviceMemory]:
    """Every CUDA device that torch can use; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(DeviceMemory(f"cuda:{index}", total, free, torch.cuda.get_device_name(index)))
    return found


def devices(root: Path = Path("/")) -> list[DeviceMemory]:
    """System memory first, then every GPU."""
    return [ram(root), *gpus()]


@dataclass(frozen=True)
class MemoryTable:
    """What a run takes on each device and what it leaves."""

    rows: tuple[MemoryRow, ...]

    def render(self) -> str:
        """Aligned text, one line a device; notes follow below."""
        heads = ("device", *PARTS, "total", "available", "free")
        cells = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
        lines = [_align(line, widths) for line in cells]
        return "\n".join(lines + [f"{row.memory.device}: {row.memory.note}" for row in self.rows if row.memory.note])

    def to_json(self) -> list[dict[str, Any]]:
        """One object a device, all sizes in bytes."""
        return [{**asdict(row.memory), **asdict(row.use), "free": row.free} for row in self.rows]

    def check_fits(self) -> None:
        """Raise ``OutOfMemoryError`` with the numbers of the first device that is too small, and what to lower."""
        for row in self.rows:
            if row.free < 0:
                raise _too_large(row)


def memory_table(use: Mapping[str, MemoryUse], found: list[DeviceMemory] | None = None) -> MemoryTable:
    """Table of ``use`` by device name on the devices ``found`` (default: of this machine).

    Raises ``OutOfMemoryError`` when ``use`` names a device that is not there.
    """
    found = devices() if found is None else found
    if absent := set(use) - {memory.device for memory in found}:
        names = ", ".join(memory.device for memory in found)
        raise OutOfMemoryError(
            f"There is no device {min(absent)}", why=f"torch finds {names}", fix="See turbomoe doctor"
        )
    return MemoryTable(tuple(MemoryRow(memory, use.get(memory.device, MemoryUse())) for memory in found))


def _cells(row: MemoryRow) -> tuple[str, ...]:
    sizes = [getattr(row.use, part) for part in PARTS]
    return (row.memory.device, *map(format_bytes, [*sizes, row.use.total, row.memory.available, row.free]))


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
    """First column to the left, numbers to the right."""
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)])


def _too_large(row: MemoryRow) -> OutOfMemoryError:
    sizes = {part: getattr(row.use, part) for part in PARTS}
    largest = max(PARTS, key=lambda part: sizes[part])
    taken = ", ".join(f"{part} {format_bytes(size)}" for part, size in sizes.items() if size)
    note = f", {row.memory.note}" if row.memory.note else ""
    needed, free = format_bytes(row.use.total), format_bytes(row.memory.available)
    return OutOfMemoryError(
        f"This run needs {needed} on {row.memory.device} and {free} are available{note}",
        why=f"It would take {taken}",
        fix=f"The largest part is {largest}: {REMEDIES[largest]}",
    )
