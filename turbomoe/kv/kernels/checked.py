"""A kernel that has to agree with its reference on the first work of every kind that it does in a process.

Compilers and GPUs differ: the same kernel read beyond its data on one release of Triton at one head size. So the first
real call of a kind is computed both ways; a kernel that errs is not used again, and a line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from turbomoe.notices import Notice, board

TOLERANCE = 0.02  # of the norm: several times what half precision does to attention, far below what a wrong index does
Function = Callable[..., torch.Tensor]


class Checked:
    """``kernel`` in place of ``reference``, both pure, once it has passed for ``kind(*args)``."""

    def __init__(self, name: str, kernel: Function, reference: Function, kind: Callable[..., Hashable]) -> None:
        self.name, self.kernel, self.reference, self._kind = name, kernel, reference, kind
        self._passed: dict[Hashable, bool] = {}

    def __call__(self, *args: Any) -> torch.Tensor:
        kind = self._kind(*args)
        if kind not in self._passed:
            return self._first(kind, args)
        return self.kernel(*args) if self._passed[kind] else self.reference(*args)

    def _first(self, kind: Hashable, args: tuple[Any, ...]) -> torch.Tensor:
        """The reference's result; whether the kernel's agrees is remembered."""
        expected = self.reference(*args)
        try:
            why = _difference(self.kernel(*args), expected)
        except Exception as error:  # compilers and drivers raise what they like
            why = failure(error)
        self._passed[kind] = not why
        if why:
            board.post(Notice(f"the GPU kernel for {self.name} is not used", why, "it takes longer"))
        return expected


def failure(error: Exception) -> str:
    """What a compiler or a driver said, in a few words."""
    return f"it failed ({' '.join(str(error).split())[:120] or type(error).__name__})"


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Why ``found`` cannot be trusted; empty when it agrees."""
    if not bool(found.isfinite().all()):
        return "it computed numbers that are not finite"
    off = float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    return "" if off <= TOLERANCE else f"it differs from its reference by {off:.1%}"
