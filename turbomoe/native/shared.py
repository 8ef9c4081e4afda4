"""The process's one worker pool: every model of a process computes on the same threads."""

from __future__ import annotations

from turbomoe.native.kernels import open_pool
from turbomoe.native.pool import WorkerPool
from turbomoe.notices import Notice, board

_opened: list[WorkerPool] = []  # at most one


def opened_pool() -> WorkerPool | None:
    """The process's pool, where one is open already."""
    return _opened[0] if _opened else None


def shared_pool(threads: int = 0) -> WorkerPool | None:
    """The process's pool, opened at the first call with ``threads`` (0: as many as make sense here).

    None while there is no C core (a notice has said so). A later call that asks for another number gets the pool as
    it is and a notice: two pools would take each other's cores.
    """
    if not _opened:
        pool = open_pool(threads)
        if pool is None:
            return None
        _opened.append(pool)
    pool = _opened[0]
    if threads not in (0, pool.threads):
        board.post(
            Notice(
                f"computing with {pool.threads} threads instead of {threads}",
                "another model of this process opened the worker pool first",
                avoid="use the same --threads for all models of a process",
            )
        )
    return pool
