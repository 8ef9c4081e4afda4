"""Who computes on the CPU's cores: PyTorch's threads or the C core's workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from turbomoe.models.packed import PackedLinear


def uses_workers(shell: nn.Module) -> bool:
    """Whether some of the model's layers are computed by the C core's workers."""
    return any(isinstance(module, PackedLinear) and module.pool is not None for module in shell.modules())


@contextmanager
def one_torch_thread(wanted: bool) -> Iterator[None]:
    """PyTorch on one thread while this lasts, if ``wanted``.

    In decoding the workers stay hot between layers. A second PyTorch thread would have to wait for a core of theirs,
    and what is left for it is small: SmolLM2 on two cores takes 18 ms a token with two threads, 11 with one.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
