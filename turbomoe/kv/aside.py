"""Work that a step does not wait for: beside it on a GPU; at once on a CPU, whose threads the step needs anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Work = Callable[[], None]


class Aside:
    """A second stream of a GPU. Whoever reads or overwrites what the work writes settles first.

    A step's work joins the first stream at the next step only: a graph that holds ``KVCache.begin`` must settle too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._held: list[Sequence[Work]] = []

    def run(self, works: Sequence[Work]) -> None:
        """Do these after all that has been asked of the device so far. What they read stays alive with them."""
        if not works:
            return
        if self._device.type != "cuda":
            for work in works:
                work()
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._held.append(works)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for work in works:
                work()

    def settle(self) -> None:
        """What is asked of the device from now on comes after all work, so memory that it read may serve others."""
        if self._stream is None or not self._held:
            return
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._held.clear()
