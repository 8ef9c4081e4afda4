"""Gated DeltaNet for training: a chunked delta rule that keeps a GPU busy, over whole sequences of a multiple of
``CHUNK`` tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from norms import GatedNorm
from shape import Shape
from torch import Tensor, nn

CHUNK = 64


class Convolution(nn.Module):
    """Depthwise causal convolution over time followed by SiLU: four shifted products, which a compiler can fuse."""

    def __init__(self, channels: int, taps: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, taps) * taps**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, channels] -> the same shape."""
        taps, time = self.weight.shape[-1], x.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        total = sum(padded[:, tap : tap + time] * self.weight[:, 0, tap] for tap in range(taps))
        return F.silu(torch.as_tensor(total))


class UnitInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A [..., n, n], n a power of two. Backward is -T' dT T'.

    Inverses of diagonal blocks are joined in pairs, [[X, 0], [-Y A X, Y]], until one block is left. Powers of A would
    take as many products, and lose all digits where keys repeat.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        """The inverse, float32."""
        size = lower.shape[-1]
        place = torch.arange(size, device=lower.device)
        inverse = torch.eye(size, dtype=lower.dtype, device=lower.device)
        block = 1
        while block < size:
            row, column = place[:, None] // block, place // block
            corner = lower * ((row % 2 == 1) & (column == row - 1))
            inverse = inverse - (corner if block == 1 else inverse @ corner @ inverse)
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of the strictly lower part; the caller's mask removes the rest."""
        (inverse,) = ctx.saved_tensors
        gradient: Tensor = inverse.mT @ grads[0] @ inverse.mT
        return -gradient


def delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule over whole sequences, in chunks (Yang, Kautz, Hatamizadeh 2024).

    query, key, value [batch, heads, time, dim] float32, keys and queries of length one; decay (log, <= 0) and beta
    [batch, heads, time]. Returns [batch, heads, time, dim]. With the state S carried over, one chunk is
    S' = M S + B, with M and B known beforehand for all chunks at once: only that product is sequential.
    """
    batch, heads, time, dim = value.shape
    chunks = time // CHUNK
    query, key, value = (x.reshape(batch * heads, chunks, CHUNK, -1) for x in (query, key, value))
    sums = decay.reshape(batch * heads, chunks, CHUNK).cumsum(-1)
    beta = beta.reshape(batch * heads, chunks, CHUNK, 1)
    growth = sums.exp().unsqueeze(-1)
    total = sums[..., -1, None, None]
    mask = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).tril()
    pairwise = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~mask, float("-inf")).exp()

    weighted = key * beta
    inverse: Tensor = UnitInverse.apply((weighted @ key.mT * pairwise).tril(-1))  # type: ignore[no-untyped-call]
    fresh = inverse @ (value * beta)
    known = inverse @ (weighted * growth)
    late = key * (total - sums.unsqueeze(-1)).exp()

    identity = torch.eye(key.shape[-1], device=value.device)
    keep = total.exp() * identity - late.mT @ known
    states = _states(keep, late.mT @ fresh)
    new = fresh - known @ states
    out = (query * growth) @ states + (query @ key.mT * pairwise) @ new
    return out.reshape(batch, heads, time, dim)


def _states(keep: Tensor, add: Tensor) -> Tensor:
    """The state before each chunk: S[c+1] = keep[c] S[c] + add[c], S[0] = 0; [n, chunks, keys, values]."""
    state = torch.zeros_like(add[:, 0])
    states = [state]
    for chunk in range(add.shape[1] - 1):
        state = torch.baddbmm(add[:, chunk], keep[:, chunk], state)
        states.append(state)
    return torch.stack(states, 1)


class DeltaNet(nn.Module):
    """Gated DeltaNet: short convolution, delta rule with one state a value head, gated norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.key_heads, self.value_heads, self.dim = shape.key_heads, shape.value_heads, shape.state_dim
        keys, values = self.key_heads * self.dim, self.value_heads * self.dim
        self.in_proj_qkv = nn.Linear(shape.hidden, 2 * keys + values, bias=False)
        self.in_proj_z = nn.Linear(shape.hidden, values, bias=False)
        self.in_proj_b = nn.Linear(shape.hidden, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(shape.hidden, self.value_heads, bias=False)
        self.conv1d = Convolution(2 * keys + values)
        steps = torch.exp(torch.empty(self.value_heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus(dt_bias) = steps
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 16).log())
        self.norm = GatedNorm(self.dim)
        self.out_proj = nn.Linear(values, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, hidden] -> the same shape."""
        mixed = self.conv1d(self.in_proj_qkv(x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        query, key, value = mixed.split([self.key_heads, self.key_heads, self.value_heads], dim=1)
        beta = self.in_proj_b(x).sigmoid().transpose(1, 2)
        raw = self.in_proj_a(x).float() + self.dt_bias
        decay = -self.A_log.exp() * torch.logaddexp(raw, torch.zeros_like(raw))  # softplus
        with torch.autocast(x.device.type, enabled=False):
            query, key = (self._unit(part) for part in (query, key))
            out = delta_rule(query * self.dim**-0.5, key, value.float(), decay.transpose(1, 2), beta.float())
        out = out.transpose(1, 2)
        gated = self.norm(out, self.in_proj_z(x).view(out.shape))
        result: Tensor = self.out_proj(gated.flatten(2))
        return result

    def _unit(self, x: Tensor) -> Tensor:
        x = x.float()
        unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return unit.repeat_interleave(self.value_heads // self.key_heads, dim=1)
