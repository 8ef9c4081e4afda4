"""Shares, entropies and curves from a profile's sums. Decode counts where there are any, else those of prefill."""

from __future__ import annotations

from typing import Any

import numpy as np

from turbomoe.insight.profile import Floats, Ints, Profile, RoutingStats

COVERAGE_SHARES = (0.05, 0.10, 0.25, 0.50)
SHOWN_LAGS = (1, 2, 4, 8, 16, 32)


def counts_of(stats: RoutingStats) -> Ints:
    """Routed pairs by layer and expert, int64 [layers, experts]."""
    decode: Ints = stats.counts[1]
    return decode if decode.any() else stats.counts[0]


def hottest(share: float, experts: int) -> int:
    """How many experts are ``share`` of ``experts``: rounded, at least one."""
    return max(1, round(share * experts))


def coverage(counts: Ints, ranked_by: Ints, experts: int) -> Floats:
    """Share of ``counts`` [layers, E] that falls on the ``experts`` that ``ranked_by`` counts most often: [layers]."""
    order = np.argsort(-ranked_by, axis=1, kind="stable")[:, :experts]
    return _ratio(np.take_along_axis(counts, order, axis=1).sum(axis=1), counts.sum(axis=1))


def effective_experts(counts: Ints) -> Floats:
    """exp(entropy) of each layer's routing: how many equally used experts would be as hard to guess, [layers]."""
    p = _ratio(counts, counts.sum(axis=1, keepdims=True))
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(np.exp(-(p * logs).sum(axis=1)))


def reuse(stats: RoutingStats) -> Floats:
    """Share of routed experts that the decode step 1..32 before had routed too, over all layers: [32]."""
    return _ratio(stats.reuse_hits.sum(axis=0), stats.reuse_pairs.sum(axis=0))


def chance_reuse(stats: RoutingStats) -> float:
    """What ``reuse`` would be if every token drew its experts anew with the same frequencies."""
    used = stats.counts[1] / max(int(stats.tokens[1]), 1)
    return float(_ratio((used * used).sum(), used.sum()))


def recall(stats: RoutingStats) -> Floats:
    """Share of a layer's experts that its gate names from the input of the layer before, in decode: [layers]."""
    row = 1 if stats.recall_pairs[1].any() else 0
    return _ratio(stats.recall_hits[row], stats.recall_pairs[row])


def transfer(profile: Profile, share: float) -> Floats:
    """[from, to]: share of domain ``to``'s routing on the hottest ``share`` of experts of ``from``, over layers."""
    counts = [counts_of(stats) for stats in profile.domains.values()]
    top = hottest(share, profile.model.shape[1])
    return np.array([[coverage(b, a, top).mean() for b in counts] for a in counts])


def summary(stats: RoutingStats) -> dict[str, Any]:
    """The figures of one domain, ready for JSON; lists are by layer."""
    counts = counts_of(stats)
    width = counts.shape[1]
    pairs = stats.counts.sum(axis=2)
    return {
        "tokens": {"prefill": int(stats.tokens[0]), "decode": int(stats.tokens[1])},
        "effective_experts": _rounded(effective_experts(counts)),
        "coverage": {
            f"{share:.0%}": _rounded(coverage(counts, counts, hottest(share, width))) for share in COVERAGE_SHARES
        },
        "reuse": {str(lag): round(float(reuse(stats)[lag - 1]), 4) for lag in SHOWN_LAGS},
        "reuse_by_chance": round(chance_reuse(stats), 4),
        "next_gate_recall": _rounded(recall(stats))[1:],
        "largest_gate_mass": _rounded(_ratio(stats.mass.sum(axis=0).max(axis=1), stats.mass.sum(axis=(0, 2)))),
        "routed_pairs": {"prefill": int(pairs[0].sum()), "decode": int(pairs[1].sum())},
    }


def _ratio(part: Any, whole: Any) -> Floats:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    shape = np.broadcast_shapes(part.shape, whole.shape)
    ratio: Floats = np.divide(part, whole, out=np.zeros(shape), where=np.broadcast_to(whole > 0, shape))
    return ratio


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 4) for value in values]
