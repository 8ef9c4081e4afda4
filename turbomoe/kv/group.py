"""Keys or values of all layers that are alike: one allocation, and one encoding a decode step for all of them."""

from __future__ import annotations

import torch

from turbomoe.kv.aside import Work
from turbomoe.kv.base import Codec
from turbomoe.kv.layer import Side, Step, place, turned
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.shape import AttentionShape
from turbomoe.kv.turns import turn


class SideGroup:
    """Keys or values of all layers of one shape: one allocation, and a ``Side`` for each layer.

    A decode step takes one token out of every ring. Those of all layers are encoded in one call, when the step begins:
    nobody looks at their codes before the next step, and in a small model 60 calls a token cost as much as the model.
    """

    def __init__(
        self, shape: AttentionShape, layers: int, codec: Codec | None, windows: tuple[int, int], slots: int, pages: int,
        exact_dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.codec, self.rotated = codec, codec is not None and codec.rotated
        heads, dim = shape.kv_heads, shape.head_dim
        sinks, self.rings = (
            torch.zeros(layers, slots, heads, size, dim, dtype=exact_dtype, device=device) for size in windows
        )
        self.planes = tuple(
            torch.zeros(layers, pages, heads, PAGE_TOKENS, plane.width, dtype=plane.dtype, device=device)
            for plane in (codec.planes if codec else ())
        )
        self.sides = [
            Side(codec, sinks[i], self.rings[i], tuple(plane[i] for plane in self.planes)) for i in range(layers)
        ]
        self._means: torch.Tensor | None = None
        self._inverses: torch.Tensor | None = None

    def set_transform(
        self, means: list[torch.Tensor], scales: list[torch.Tensor] | None = None, turns: torch.Tensor | None = None
    ) -> None:
        """What is taken off in each layer before coding: see ``Side``. ``turns`` is that of all layers."""
        for i, side in enumerate(self.sides):
            side.set_transform(means[i], scales[i] if scales else None, turns)
        self._means = torch.stack(means)[:, None]
        self._inverses = 1 / torch.stack(scales)[:, None] if scales else None

    def leaving(self, step: Step) -> list[Work]:
        """What is left to do for the token that a step of one token a sequence pushes out of the rings: to encode it.

        It is copied out here, before it is overwritten; the work may be done at any time before the next step.
        """
        side = self.sides[0]
        behind = side.recent + side.sink
        if self.codec is None or side.recent == 0 or step.reach - 1 < behind:
            return []
        page, row = step.once(("place", behind), lambda: place(step, behind))
        x = self._leaving(step, side.recent).to(torch.float32, copy=True)
        mean = self._means
        if mean is not None and side.turns is not None:
            mean = turn(mean, turned(step, side))
        return [lambda: self._encode(x, mean, page, row)]

    def _encode(
        self, x: torch.Tensor, mean: torch.Tensor | None, page: int | torch.Tensor, row: int | torch.Tensor
    ) -> None:  # fmt: skip
        """x [layers, B, kv_heads, head_dim] into the pages."""
        assert self.codec is not None
        x = x if mean is None else x - mean
        x = x if self._inverses is None else x * self._inverses
        coded = self.codec.encode(self.sides[0].rotate(x) if self.rotated else x)
        for plane, codes in zip(self.planes, coded, strict=True):
            if isinstance(page, int):
                plane[:, page, :, row] = codes[:, 0]
            else:
                plane[:, page[:, 0], :, row[:, 0]] = codes.transpose(0, 1)  # type: ignore[index]

    def _leaving(self, step: Step, recent: int) -> torch.Tensor:
        """[layers, B, kv_heads, head_dim]"""
        if step.lone is not None:
            return self.rings[:, step.lone, :, step.floor % recent].unsqueeze(1)
        return self.rings[:, step.slots, :, step.starts.remainder(recent)].transpose(0, 1)
