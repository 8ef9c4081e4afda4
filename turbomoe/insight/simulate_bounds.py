"""What no cache in the background can do: wait for its copies, or know the future.

``lru-wait`` is LRU as engines run it that load a miss before they compute it: every miss is an upload, usable at once.
``oracle`` is the best placement that never changes. ``belady`` keeps what is needed soonest and lets pass what is
needed later than all of that (Belady's MIN with bypass); at the start and after each prompt it may place anything. No
policy hits more often with as many slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from turbomoe.experts.base import Phase
from turbomoe.experts.residency import count_ids
from turbomoe.insight.simulate import Outcome, Tally
from turbomoe.insight.trace import END_PROMPT, Step, Trace

NEVER = np.int64(1 << 31)

Ints = npt.NDArray[np.int64]


def bound(name: str, trace: Trace, slots: Sequence[int]) -> list[Outcome]:
    """The outcomes of one bound, one for each of ``slots``."""
    return BOUNDS[name](trace, slots).outcomes(name, slots, len(trace.model.layers))


def lru_wait(trace: Trace, slots: Sequence[int]) -> Tally:
    """LRU for all sizes at once: an expert is there if fewer than ``slots`` others were used since."""
    layers, width = trace.model.shape
    last, tally, clock = np.full((layers, width), -1, dtype=np.int64), Tally.empty(len(slots)), 0
    where, sizes = np.arange(layers)[:, None, None], np.array(slots)
    present = np.zeros((len(slots), layers, width), dtype=bool)
    for step in trace.steps():
        moments = np.broadcast_to(clock + np.arange(step.ids[0].size).reshape(step.ids[0].shape), step.ids.shape)
        clock += step.ids[0].size
        if step.phase is Phase.DECODE:
            hits = _hits(present, step)
            tally.hits.append(hits)
            _note(tally, step, int((step.ids >= 0).sum()) - hits)
        real = step.ids >= 0
        np.maximum.at(last, (np.broadcast_to(where, step.ids.shape)[real], step.ids[real]), moments[real])
        if step.phase is Phase.DECODE or step.after == END_PROMPT:
            oldest = np.sort(last, axis=1)[:, np.maximum(width - sizes, 0)].T
            now = (last >= oldest[:, :, None]) & (last >= 0)
            if step.phase is Phase.PREFILL:
                tally.prompt_uploads += (now & ~present).sum(axis=(1, 2))
            present = now
    return tally


def oracle(trace: Trace, slots: Sequence[int]) -> Tally:
    """The experts that this trace's decode steps use most, for all of the trace."""
    layers, width = trace.model.shape
    counts, tally = np.zeros((layers, width)), Tally.empty(len(slots))
    for step in _decode(trace):
        counts += count_ids(step.ids, width)
    rank = np.argsort(np.argsort(-counts, axis=1, kind="stable"), axis=1)
    present = (rank < np.array(slots)[:, None, None]) & (counts > 0)
    tally.prompt_uploads += present.sum(axis=(1, 2))
    for step in _decode(trace):
        tally.hits.append(_hits(present, step))
        _note(tally, step, np.zeros(len(slots), dtype=np.int64))
    return tally


def belady(trace: Trace, slots: Sequence[int]) -> Tally:
    """Keep what is needed soonest. Steps are moments: rows of one step are served by one placement."""
    layers, width = trace.model.shape
    due, after = _next_uses(trace)
    tally = Tally.empty(len(slots))
    present = np.zeros((len(slots), layers, width), dtype=bool)
    where, done, fresh = np.arange(layers)[:, None, None], 0, True
    for step in trace.steps():
        if step.phase is Phase.DECODE:
            if fresh:
                present, uploads = _soonest(present, np.ones_like(present), due, slots)
                tally.prompt_uploads += uploads
            fresh = step.after == END_PROMPT
            tally.hits.append(_hits(present, step))
            rows = step.ids.shape[1]
            routed = count_ids(step.ids, width) > 0
            real = step.ids >= 0
            due[np.broadcast_to(where, step.ids.shape)[real], step.ids[real]] = after[:, done : done + rows][real]
            done += rows
            present, uploads = _soonest(present, present | routed, due, slots)
            _note(tally, step, uploads)
        fresh |= step.after == END_PROMPT
    return tally


def _soonest(
    present: npt.NDArray[np.bool_], candidates: npt.NDArray[np.bool_], due: Ints, slots: Sequence[int]
) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Of the ``candidates`` [arms, layers, experts] those due soonest, as many as there are slots; uploads [arms]."""
    width = due.shape[1]
    order = (due * 2 + ~present) * width + np.arange(width)  # equally soon: rather stay than come
    order[~candidates | (due >= NEVER)] = NEVER * 4 * width
    kept = np.empty_like(present)
    for arm, count in enumerate(slots):
        border = np.partition(order[arm], min(count, width) - 1, axis=1)[:, min(count, width) - 1, None]
        kept[arm] = (order[arm] <= border) & (order[arm] < NEVER * 4 * width)
    return kept, (kept & ~present).sum(axis=(1, 2))


def _next_uses(trace: Trace) -> tuple[Ints, Ints]:
    """Decode steps of the first use of each expert [layers, experts], and of the next one after each use
    [layers, decode rows, k]; NEVER if there is none.
    """
    layers, width = trace.model.shape
    steps = list(_decode(trace))
    ids = np.concatenate([step.ids for step in steps], axis=1).astype(np.int64)
    moment = np.repeat(np.arange(len(steps)), [step.ids.shape[1] for step in steps])[:, None]
    expert = np.arange(layers)[:, None, None] * width + np.maximum(ids, 0)
    key = np.where(ids >= 0, expert * len(steps) + moment, layers * width * len(steps))
    uses, back = np.unique(key, return_inverse=True)
    whose, when = np.divmod(uses, len(steps))
    follows = np.append(whose[1:] == whose[:-1], False)
    later = np.where(follows, np.append(when[1:], 0), NEVER)
    first = np.full(layers * width + 1, NEVER)
    first[whose[::-1]] = when[::-1]
    return first[:-1].reshape(layers, width), later[back].reshape(ids.shape)


def _decode(trace: Trace) -> Iterator[Step]:
    return (step for step in trace.steps() if step.phase is Phase.DECODE)


def _hits(present: npt.NDArray[np.bool_], step: Step) -> Ints:
    """Hits of each arm: present [arms, layers, experts]."""
    found = present[:, np.arange(present.shape[1])[:, None, None], step.ids] & (step.ids >= 0)
    hits: Ints = found.sum(axis=(1, 2, 3), dtype=np.int64)
    return hits


def _note(tally: Tally, step: Step, uploads: Ints) -> None:
    tally.rows.append(step.ids.shape[1])
    tally.routed.append(int((step.ids >= 0).sum()))
    tally.uploads.append(uploads)


BOUNDS: dict[str, Callable[[Trace, Sequence[int]], Tally]] = {
    "lru-wait": lru_wait,
    "oracle": oracle,
    "belady": belady,
}
