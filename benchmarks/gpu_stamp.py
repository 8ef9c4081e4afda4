"""Where and when a GPU benchmark ran: what every stored result says of itself."""

from __future__ import annotations

import datetime

import torch


def stamp() -> dict[str, str]:
    """Device, versions and date."""
    import triton  # here, since documents are written on machines without it

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
