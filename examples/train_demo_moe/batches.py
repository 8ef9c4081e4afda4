"""What each training step reads: random windows, every domain with a fixed share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from data import Part
from torch import Tensor

MIX = {"prose": 0.34, "docs": 0.22, "code": 0.22, "multilingual": 0.22}


@dataclass(frozen=True)
class Plan:
    """How long to train and on how much at a time. ``steps`` 0: as many as fit before ``deadline`` (monotonic s)."""

    deadline: float
    steps: int
    batch: int
    length: int
    rate: float


class Batches:
    """Random windows of the training tokens, every domain with its fixed share of each batch; the same for every
    model trained with this seed.
    """

    def __init__(self, parts: list[Part], plan: Plan, device: torch.device) -> None:
        train = {part.domain: part.tokens for part in parts if part.split == "train"}
        self._tokens = {name: torch.from_numpy(train[name].astype("int32")).to(device) for name in MIX}
        left, self._sizes = plan.batch, {}
        for name in list(MIX)[1:]:
            self._sizes[name] = round(plan.batch * MIX[name])
            left -= self._sizes[name]
        self._sizes[next(iter(MIX))] = left
        self._window = torch.arange(plan.length + 1, device=device)
        self._random = torch.Generator(device).manual_seed(1)

    def next(self) -> tuple[Tensor, Tensor]:
        """(ids, targets), both [batch, length]."""
        rows = []
        for name, size in self._sizes.items():
            tokens = self._tokens[name]
            high = len(tokens) - len(self._window)
            start = torch.randint(high, (size, 1), generator=self._random, device=tokens.device)
            rows.append(tokens[start + self._window])
        both = torch.cat(rows).long()
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()
