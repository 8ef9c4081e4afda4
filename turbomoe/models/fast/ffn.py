"""The FFNs of the bodies. Routed experts are computed through the same module as in stock layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from turbomoe.models.fast.ops import Joined, Op, single


def make_ffn(mlp: Any) -> Op:
    """The FFN of a stock module, [N, hidden] to a fresh [N, hidden]: gated, routed, or routed with a shared expert."""
    if hasattr(mlp, "gate_proj"):
        return gated_ffn(mlp)
    if hasattr(mlp, "shared_expert"):
        return shared_ffn(mlp)
    if hasattr(mlp, "gate"):
        return routed_ffn(mlp, normalised=bool(mlp.gate.norm_topk_prob))
    forward: Op = mlp.forward  # a dense model that was split into experts
    return forward


def gated_ffn(mlp: Any) -> Op:
    """``down(silu(gate(x)) * up(x))``."""
    joined, down = Joined([mlp.gate_proj, mlp.up_proj]), single(mlp.down_proj)

    def run(x: torch.Tensor) -> torch.Tensor:
        gate, up = joined.apart(x)
        return down(F.silu(gate).mul_(up))

    return run


def routed_ffn(block: Any, *, normalised: bool) -> Op:
    """Router and routed experts.

    ``normalised``: the weights of a token's experts sum to one, so their softmax needs no other expert's logit.
    """
    weight, top_k, experts = block.gate.weight.detach(), int(block.gate.top_k), block.experts.forward

    def run(x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, weight).float()
        if normalised:
            best, ids = logits.topk(top_k, -1)
            weights = best.softmax(-1)
        else:
            weights, ids = logits.softmax(-1).topk(top_k, -1)
        out: torch.Tensor = experts(x, ids, weights.to(x.dtype))
        return out

    return run


def shared_ffn(block: Any) -> Op:
    """Routed experts and the gated shared one of Qwen3.5."""
    routed, shared = routed_ffn(block, normalised=True), block.shared_expert
    joined, down = Joined([shared.gate_proj, shared.up_proj, block.shared_expert_gate]), single(shared.down_proj)

    def run(x: torch.Tensor) -> torch.Tensor:
        gate, up, share = joined.apart(x)
        return routed(x).addcmul_(share.sigmoid(), down(F.silu(gate).mul_(up)))

    return run
