"""The worker pool of the C core, and how many threads it should have."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from turbomoe.native.library import Core, NativeError
from turbomoe.notices import Notice, board

HOT_US = 2000  # workers spin so long after the last work: longer than the gap between two layers of one token


def _quota_cores() -> float:
    """CPU time that this process's cgroup may use, in cores; infinity where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return limit / int((folder / "cpu.cfs_period_us").read_text()) if limit > 0 else float("inf")
    except (OSError, ValueError):
        return float("inf")


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, capped by its cgroup's quota."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota_cores())))


def default_threads() -> int:
    """All usable cores but one, which is left to Python and the system; both of two, since who waits works too."""
    cores = usable_cores()
    return cores if cores <= 2 else cores - 1


class WorkerPool:
    """Threads of the C core. ``threads`` counts the caller, who works while it waits; 0 means ``default_threads()``."""

    def __init__(self, core: Core, threads: int = 0, hot_us: int = HOT_US) -> None:
        self.core, self.threads = core, threads or default_threads()
        handle = core.pool_new(self.threads, hot_us)
        if not handle:
            raise NativeError(
                f"A pool of {self.threads} threads could not be made", why="out of memory or out of range"
            )
        self.handle: int = handle
        self.close = weakref.finalize(self, core.pool_free, handle)
        self._report_missing(core.pool_helpers(handle) + 1)

    def _report_missing(self, running: int) -> None:
        if running == self.threads:
            return
        board.post(
            Notice(
                f"the worker pool has {running} threads instead of {self.threads}",
                "the system refused to start more",
                cost="slower experts on the CPU",
                avoid="raise the limit on processes (ulimit -u, or the container's pids limit)",
            )
        )
