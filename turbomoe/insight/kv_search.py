"""Which KV types cost a model no more than a budget: the search over pairs, whoever measures them.

First keys and values alike, down the ladder; then, around the narrowest type that passes, narrower values and
narrower keys. A pair passes when its mean KL is within the budget, and would be if the mean were two standard errors
more: other texts differ at least as much. Of all pairs that this search has tried and that
pass, the one of fewest bits wins. Keys come out more than one bit above values only where narrower keys with values at
least as wide were tried and were over the budget: then it is the keys that cannot be narrowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from turbomoe.kv_types import AUTO

# Widest first. The registry of codecs has more; these are what nobody would want to replace by another at equal bits.
LADDER = ("q8_0", "tcq4", "tcq3", "tcq2.5", "tcq2")
SCALAR = ("q8_0", "tq4", "tq3", "tq2")  # where there is no compiled encoder: by PyTorch a trellis takes far longer
EXACT = "bf16"
ANCHOR = ("q8_0", "q8_0")
BUDGET = 0.02  # nats a token: room for about 3 bits on the models that bear them (docs/kv-quality.md)
OVER_ANCHOR = 1.5
SURE = 2  # standard errors
MOST_PASSES = 3  # of the judge: the ladder, what was given up too early, what lies around the best

Pair = tuple[str, str]


@dataclass(frozen=True)
class Measured:
    """Mean KL of a pair over the first ``tokens`` of ``of`` positions; fewer than all when it was given up.

    ``error`` is the standard error of the mean, by how it differs between stretches of the text. A pair that has
    ``failed`` computed numbers that are not finite behind them: it is over every budget.
    """

    kl: float
    tokens: int
    of: int
    failed: bool = False
    error: float = 0.0

    @property
    def at_least(self) -> float:
        """What the mean over all positions cannot fall below (a KL is never negative)."""
        return inf if self.failed else self.kl * self.tokens / self.of

    def settles(self, limit: float) -> bool:
        """Whether it is known on which side of ``limit`` the mean over all positions lies."""
        return self.failed or self.tokens == self.of or self.at_least > limit

    def passes(self, limit: float) -> bool:
        return not self.failed and self.tokens == self.of and self.kl + SURE * self.error <= limit


# Measures pairs side by side; one whose ``at_least`` passes its limit may be given up.
Judge = Callable[[Mapping[Pair, float]], Mapping[Pair, Measured]]


@dataclass(frozen=True)
class Found:
    """The winner, the budget in force, and what this search has looked at (``pair`` itself is absent for bf16)."""

    pair: Pair
    budget: float
    tried: Mapping[Pair, Measured]


class Search:
    """One search. ``wish`` holds a type or ``auto`` for keys and for values, ``bits`` the rate of every type named.

    ``ladder`` holds the types this model can store, widest first. ``known`` is what was measured before: only what it
    does not settle is measured, and it is added to.
    """

    def __init__(
        self, wish: Pair, ladder: Sequence[str], bits: Mapping[str, float], asked: float | None,
        known: dict[Pair, Measured], judge: Judge,
    ) -> None:  # fmt: skip
        self.wish, self.ladder, self.bits, self.asked = wish, tuple(ladder), bits, asked
        self.known, self._judge = known, judge
        self._tried: dict[Pair, None] = {}

    def run(self) -> Found:
        first = [self._filled(name) for name in self.ladder]
        self._measure_first(first)
        budget = self._budget()
        self._measure(dict.fromkeys(first, budget))
        if self.wish == (AUTO, AUTO):
            base = self._best(budget)[0]
            self._measure(dict.fromkeys(self._around(base), budget))
        return Found(self._best(budget), budget, {pair: self.known[pair] for pair in self._tried})

    def _filled(self, name: str) -> Pair:
        key, value = (name if wish == AUTO else wish for wish in self.wish)
        return key, value

    def _measure_first(self, pairs: list[Pair]) -> None:
        """The budget may hang on q8_0, which is therefore measured to the end.

        The others may be given up at the least that the budget can be; where it turns out larger, they get another go.
        """
        limits = dict.fromkeys(pairs, BUDGET if self.asked is None else self.asked)
        if self.asked is None and ANCHOR[0] in self.ladder:
            limits[ANCHOR] = inf
        self._measure(limits)

    def _budget(self) -> float:
        if self.asked is not None:
            return self.asked
        anchor = self.known.get(ANCHOR)
        return BUDGET if anchor is None or anchor.failed else max(BUDGET, OVER_ANCHOR * anchor.kl)

    def _measure(self, limits: Mapping[Pair, float]) -> None:
        self._tried.update(dict.fromkeys(limits))
        open_ = {p: limit for p, limit in limits.items() if p not in self.known or not self.known[p].settles(limit)}
        if open_:
            self.known.update(self._judge(open_))

    def _around(self, base: str) -> list[Pair]:
        """Narrower values, all the way down, and keys one step narrower, beside the type that passes on both sides."""
        below = self.ladder[self.ladder.index(base) + 1 :] if base in self.ladder else self.ladder
        narrower_keys = [(below[0], base)] if below else []
        return [*((base, value) for value in below), *narrower_keys]

    def _best(self, budget: float) -> Pair:
        """The passing pair of fewest bits, the better one of equals; bf16 where it is left to us and none passes."""
        passing = [pair for pair in self._tried if self._eligible(pair) and self.known[pair].passes(budget)]
        return min(passing, key=lambda pair: (self._rate(pair), self.known[pair].kl), default=self._filled(EXACT))

    def _eligible(self, pair: Pair) -> bool:
        """q8_0 on both sides was measured for the budget's sake where the wish is another."""
        return all(wish in (AUTO, name) for wish, name in zip(self.wish, pair, strict=True))

    def _rate(self, pair: Pair) -> float:
        return self.bits[pair[0]] + self.bits[pair[1]]
