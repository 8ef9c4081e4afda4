"""The two optimisers and the course of the learning rate."""

from __future__ import annotations

import torch
from model import DemoModel
from muon import Muon
from torch import nn

WARMUP, DECAY_FROM = 0.02, 0.45
"""Parts of the run: rise of the learning rate, start of its fall."""


def learning_rate(progress: float) -> float:
    """Share of the peak rate: short rise, plateau, straight fall to zero."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return min(1.0, (1 - progress) / (1 - DECAY_FROM))


class Optimisers:
    """Muon for the matrices of the layers, AdamW for embedding, router, norms and the small rest."""

    def __init__(self, model: DemoModel, rate: float) -> None:
        matrices, small, wide = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "conv1d" in name or "in_proj_a" in name or "in_proj_b" in name:
                small.append(parameter)
            elif "embed" in name or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                wide.append(parameter)
            else:
                matrices.append((name, parameter))
        self.rate, self.muon = rate, Muon(matrices)
        fused = next(model.parameters()).is_cuda
        groups = [{"params": wide, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)
        self._parameters = list(model.parameters())

    def step(self, share: float) -> None:
        """Clip, update and clear the gradients; ``share`` of the peak rate."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * share
        self.adam.step()
        self.muon.step(self.rate * share)
        for parameter in self._parameters:
            parameter.grad = None
