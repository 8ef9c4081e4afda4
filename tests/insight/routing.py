"""Traces made by hand or by dice, and the real expert cache driven by them: the oracle of the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from tests.experts.helpers import make_experts
from turbomoe.config import ExpertSettings
from turbomoe.experts.base import Phase
from turbomoe.experts.cache import ExpertCache
from turbomoe.experts.promotion import ImmediateCopies
from turbomoe.experts.store import ExpertStore
from turbomoe.insight.profile_model import RoutedModel
from turbomoe.insight.trace import DROP_PROMPT, END_PROMPT, NONE, NOTHING, PHASES, Trace


@cache
def store(layers: int, experts: int) -> ExpertStore:
    return make_experts(dict.fromkeys(range(layers), ("F32",) * 3), num_experts=experts, hidden=4, width=4).store


def model(layers: int = 2, experts: int = 8, top_k: int = 2, identity: str = "a" * 64) -> RoutedModel:
    sizes = tuple(layout.blob_bytes for layout in store(layers, experts).layouts)
    return RoutedModel(identity, "dice", tuple(range(layers)), (experts,) * layers, top_k, sizes)


def make_trace(of: RoutedModel, steps: Sequence[tuple[Phase, np.ndarray, int]], domain: str = "dice") -> Trace:
    """``steps`` of (phase, ids [rows, layers, k] with -1 for none, what came after)."""
    ids = [step[1] for step in steps] or [np.empty((0, len(of.layers), of.top_k), dtype=np.int64)]
    packed = np.concatenate([np.where(part < 0, NONE, part) for part in ids]).astype(np.uint16)
    return Trace(
        of, domain, packed, np.full(packed.shape, 0.5, np.float16),
        np.array([len(step[1]) for step in steps], np.int32),
        np.array([PHASES.index(step[0]) for step in steps], np.uint8),
        np.array([step[2] for step in steps], np.uint8),
    )  # fmt: skip


def dice_trace(of: RoutedModel, steps: int, seed: int, *, rows: int = 1, prompts: bool = True) -> Trace:
    """Routing with favourites that change now and then; prefill chunks and prompts' ends in between."""
    rng = np.random.default_rng(seed)
    made, taste = [], rng.random((len(of.layers), of.shape[1])) * 3
    for _ in range(steps):
        if rng.random() < 0.03:
            taste = rng.random(taste.shape) * 3
        prefill = prompts and rng.random() < 0.15
        count = int(rng.integers(1, 12)) if prefill else int(rng.integers(1, rows + 1))
        noise = rng.gumbel(size=(count, *taste.shape))
        ids = np.argsort(-(taste + noise), axis=-1)[..., : of.top_k]
        after = int(rng.choice([NOTHING, END_PROMPT, DROP_PROMPT], p=[0.3, 0.6, 0.1])) if prefill else NOTHING
        made.append((Phase.PREFILL if prefill else Phase.DECODE, ids, after))
    return make_trace(of, made)


def decode_trace(of: RoutedModel, ids: np.ndarray) -> Trace:
    """One row a step: ids [steps, layers, k]."""
    return make_trace(of, [(Phase.DECODE, part[None], NOTHING) for part in ids])


def run_cache(trace: Trace, settings: ExpertSettings, slots: int, prior: np.ndarray | None = None) -> ExpertCache:
    """The engine's own cache, slots and promotion, fed with the trace."""
    held = store(len(trace.model.layers), trace.model.shape[1])
    cpu = torch.device("cpu")
    made = ExpertCache(held, settings, [slots] * len(held.layouts), cpu, trace.model.top_k, ImmediateCopies())
    if prior is not None:
        made.policy.seed_prior(prior)
    for step in trace.steps():
        made.begin_step(step.phase)
        for layer in held.layers:
            made.record(layer, torch.from_numpy(step.ids[layer]))
        made.end_step()
        if step.after == END_PROMPT:
            made.end_prompt()
        elif step.after == DROP_PROMPT:
            made.policy.drop_prompt()
        made.check_integrity()
    return made
