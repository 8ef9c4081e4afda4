"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024): one token by the recurrence, many by its chunked form.

State S [K, V] of a value head: S <- exp(g) S, then S += k (beta (v - k S)); the output is q S. q and k have unit
length, q is divided by sqrt(K). Chunked: with c the running sum of g in a chunk, the corrections u of its tokens solve
a unit triangular system, (1 + strictly lower part of beta (k k') exp(c_i - c_j)) u = beta (v - exp(c) k S).
All of it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from turbomoe.kv.cache import KVCache
from turbomoe.kv.recurrent import RecurrentState
from turbomoe.kv.shape import RecurrentShape
from turbomoe.models.fast.ops import Joined, RMSNorm, single

CHUNK = 64
L2_EPS = 1e-6


class DeltaNet:
    """The mixer of one linear-attention layer over its recurrent state in the memory."""

    def __init__(self, module: Any, shape: RecurrentShape) -> None:
        self.layer, self.channels = shape.layer, shape.conv[0]
        self.value_heads, self.key_dim, self.value_dim = shape.state
        self.key_heads = (self.channels // self.key_dim - self.value_heads * self.value_dim // self.key_dim) // 2
        self.project = Joined([module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a])
        self.out = single(module.out_proj)
        self.kernel = module.conv1d.weight.detach()  # [channels, 1, kernel]
        self.taps = self.kernel[:, 0]
        self.rate = -module.A_log.detach().float().exp()
        self.bias = module.dt_bias.detach().float()
        self.norm = RMSNorm(module.norm.weight.float(), float(module.layer_norm_epsilon))
        self._eps = torch.full((1,), L2_EPS, device=self.rate.device)
        # Queries carry the 1/sqrt(K); keys are left at unit length.
        self._lengths = torch.tensor([self.key_dim**-0.5, 1.0], device=self.rate.device)[:, None, None]

    def __call__(self, x: torch.Tensor, batch: int, memory: KVCache) -> torch.Tensor:
        """x [B * S, hidden], normed -> [B * S, hidden]."""
        mixed, z, b, a = self.project.apart(x)
        beta = b.float().sigmoid().unflatten(0, (batch, -1))
        decay = (F.softplus(a.float() + self.bias) * self.rate).unflatten(0, (batch, -1))
        y = self._mix(mixed.unflatten(0, (batch, -1)), beta, decay, memory)
        gate = F.silu(z.float()).view(-1, self.value_dim)
        y = self.norm(y.reshape(-1, self.value_dim)).mul_(gate)
        return self.out(y.view(len(x), -1).to(x.dtype))

    def _mix(self, mixed: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor, memory: KVCache) -> torch.Tensor:
        """mixed [B, S, channels], beta and log decay [B, S, value_heads] -> float32 [B, S, value_heads, value_dim]."""
        assert memory.step is not None
        states, step = memory.recurrent[self.layer], memory.step
        conv, state = _rows(states, step.lone, step.slots)
        mixed = (self._convolve_one if step.count == 1 else self._convolve)(mixed, conv)
        qk, value = mixed.float().split_with_sizes((self.channels - self.value_heads * self.value_dim,
                                                    self.value_heads * self.value_dim), -1)  # fmt: skip
        qk = self._unit_length(qk.unflatten(-1, (2, self.key_heads, self.key_dim)))
        value = value.unflatten(-1, (self.value_heads, self.value_dim))
        y = (_recur if step.count == 1 else _chunked)(qk, value, beta, decay, state)
        if step.lone is None:
            states.write(step.slots, conv, state)
        return y

    def _convolve_one(self, new: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
        """Causal convolution of one token: new [B, 1, channels]; conv [B, channels, kernel] moves on in place."""
        window = torch.cat((conv[..., 1:], new.transpose(1, 2)), -1)
        conv.copy_(window)
        return F.silu((window * self.taps).sum(-1)).unsqueeze(1)

    def _convolve(self, new: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
        window = torch.cat((conv[..., 1:], new.transpose(1, 2)), -1)
        conv.copy_(window[..., -conv.shape[-1] :])
        return F.silu(F.conv1d(window, self.kernel, groups=self.channels)).transpose(1, 2)

    def _unit_length(self, qk: torch.Tensor) -> torch.Tensor:
        """[B, S, 2, key_heads, K]: queries and keys of unit length, queries scaled too."""
        norm = torch.linalg.vector_norm(qk, 2, -1, True)
        scale = torch.addcmul(self._eps, norm, norm).rsqrt_().mul_(self._lengths)
        return qk * scale


def _rows(states: RecurrentState, lone: int | None, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's rows of conv and state: of a lone sequence the stored ones, else copies to be written back."""
    if lone is None:
        return states.read(slots)
    return states.conv[lone : lone + 1], states.state[lone : lone + 1]


def _recur(
    qk: torch.Tensor, value: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token: qk [B, 1, 2, key_heads, K], value [B, 1, heads, V]; ``state`` [B, heads, K, V] moves on in place."""
    batch, heads, key_dim, value_dim = state.shape
    qk = qk[:, 0].transpose(1, 2).unsqueeze(2)  # [B, key_heads, 1, 2, K], each shared by heads / key_heads heads
    qk = qk.expand(-1, -1, heads // qk.shape[1], -1, -1).reshape(-1, 2, key_dim)
    flat = state.view(-1, key_dim, value_dim).mul_(decay.exp_().view(-1, 1, 1))
    # q (S + k u) = q S + (q k) u: queries and keys read the state in one pass.
    read = torch.bmm(qk, flat)
    q, k = qk.split_with_sizes((1, 1), 1)
    u = (value.reshape(-1, 1, value_dim) - read[:, 1:]).mul_(beta.view(-1, 1, 1))
    flat.baddbmm_(k.transpose(1, 2), u)
    return torch.addcmul(read[:, :1], (q * k).sum(-1, keepdim=True), u).view(batch, 1, heads, value_dim)


def _chunked(
    qk: torch.Tensor, value: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """Many tokens: qk [B, S, 2, key_heads, K], the rest as in ``_recur``."""
    count, heads = value.shape[1:3]
    size = min(CHUNK, count)
    qk = qk.repeat_interleave(heads // qk.shape[3], 3)
    q, k, v, b = (_chunks(x, size) for x in (qk[:, :, 0], qk[:, :, 1], value, beta[..., None]))
    c = _chunks(decay[..., None], size).cumsum(3)  # [B, heads, chunks, size, 1]
    pair = (c - c.transpose(-1, -2)).tril_().exp_().tril_()
    grown = c.exp()
    rhs = torch.cat((v, k * grown), -1).mul_(b)
    solved = torch.linalg.solve_triangular((k @ k.mT).mul_(pair).mul_(b), rhs, upper=False, unitriangular=True)
    fresh, reads = solved.split_with_sizes((v.shape[-1], k.shape[-1]), -1)
    inside, q = (q @ k.mT).mul_(pair), q * grown
    last = c[..., -1:, :]
    writes, shrink = (k * (last - c).exp_()).mT, last.exp()
    out = torch.empty_like(v)
    for i in range(v.shape[2]):
        u = fresh[:, :, i] - reads[:, :, i] @ state
        out[:, :, i] = (q[:, :, i] @ state).add_(inside[:, :, i] @ u)
        state.mul_(shrink[:, :, i]).add_(writes[:, :, i] @ u)
    return out.flatten(2, 3)[:, :, :count].transpose(1, 2)


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, S, heads, n] -> [B, heads, chunks, size, n], filled up with zeros, which leave the state alone."""
    missing = -x.shape[1] % size
    chunks: torch.Tensor = F.pad(x.transpose(1, 2), (0, 0, 0, missing)).unflatten(2, (-1, size))
    return chunks
