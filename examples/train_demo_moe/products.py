"""The fastest grouped product that works on this device."""

from __future__ import annotations

import torch
from moe import GROUPED, Product, blocked


def fastest_product(device: torch.device) -> Product:
    """The grouped product where it works and agrees with the plain one, else blocks of rows; says which and why."""
    if device.type != "cuda":
        return blocked(16)
    plain = blocked(128)
    ends = torch.tensor([128, 128, 384, 512], device=device, dtype=torch.int32)
    rows = torch.randn(512, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 96, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for product in (plain, GROUPED):
        try:
            out = product.multiply(rows, weight, ends)
            results.append([out, *torch.autograd.grad(out.square().mean(), (rows, weight))])
        except Exception as error:  # whatever it is, the plain product works
            print(f"the grouped product does not work here ({error}): using blocks of 128 rows", flush=True)
            return plain
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    print(f"grouped product against blocks: relative difference {far:.2g}", flush=True)
    return GROUPED if far < 0.02 else plain
