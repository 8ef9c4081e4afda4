"""Qwen3.5 with routed experts, and its dense sister, written for training: same weights, same names, same results as
``transformers``' classes, with a chunked delta rule and grouped expert products that keep a GPU busy.

Only what training needs: no cache, no padding, whole sequences of a multiple of ``CHUNK`` tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from moe import Dispatch, Experts, balance_loss, dispatch
from torch import Tensor, nn

CHUNK = 64
EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. ``experts`` 0 makes the dense sister, with one FFN as wide as all that a token uses."""

    vocab_size: int = 8192
    hidden: int = 256
    layers: int = 8
    experts: int = 64
    active: int = 4
    expert_width: int = 64
    shared_width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    key_heads: int = 2
    value_heads: int = 4
    state_dim: int = 64
    rotated: float = 0.25
    rope_theta: float = 10_000.0
    context: int = 1024

    @property
    def dense_width(self) -> int:
        """Width of the dense FFN with as many weights as a token uses in the routed one."""
        return self.active * self.expert_width + self.shared_width

    def kind(self, layer: int) -> str:
        """Three layers of DeltaNet, then one of attention."""
        return "linear_attention" if (layer + 1) % 4 else "full_attention"

    def config(self) -> dict[str, Any]:
        """The same model as a ``config.json`` for transformers."""
        rotary = int(self.head_dim * self.rotated) // 2
        rope = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.rotated,
            "mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3],
            "mrope_interleaved": True,
        }
        fields: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": EPSILON,
            "tie_word_embeddings": True,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": self.state_dim,
            "linear_value_head_dim": self.state_dim,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "layer_types": [self.kind(layer) for layer in range(self.layers)],
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        return fields | (self._routed_fields() if self.experts else self._dense_fields())

    def _routed_fields(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_5_moe_text",
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "num_experts": self.experts,
            "num_experts_per_tok": self.active,
            "moe_intermediate_size": self.expert_width,
            "shared_expert_intermediate_size": self.shared_width,
        }

    def _dense_fields(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_5_text",
            "architectures": ["Qwen3_5ForCausalLM"],
            "intermediate_size": self.dense_width,
        }

    def as_dict(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


class Norm(nn.Module):
    """Root mean square norm whose weight is zero-centred: x / rms(x) * (1 + w), in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, float32."""
        return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), EPSILON)


class GatedNorm(nn.Module):
    """x / rms(x) * w * silu(gate), over one head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., size] -> float32."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), EPSILON) * F.silu(gate.float())


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
        return -(inverse.mT @ grads[0] @ inverse.mT)


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
    inverse = UnitInverse.apply((weighted @ key.mT * pairwise).tril(-1))
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


class Attention(nn.Module):
    """Causal attention with normalised queries and keys, partial rotation and an output gate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, 2 * self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(self.dim), Norm(self.dim)
        self.rotated, self.theta = int(self.dim * shape.rotated), shape.rope_theta

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, hidden] -> the same shape."""
        query, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.dim)).chunk(2, dim=-1)
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, self.dim))
        value = self.v_proj(x).unflatten(-1, (self.kv_heads, self.dim)).transpose(1, 2)
        query, key = (self._rotate(norm(part)) for norm, part in ((self.q_norm, query), (self.k_norm, key)))
        repeat = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(repeat, dim=1) for part in (key.to(value.dtype), value))
        out = F.scaled_dot_product_attention(query.to(value.dtype), key, value, is_causal=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid())
        return result

    def _rotate(self, x: Tensor) -> Tensor:
        """[batch, time, heads, dim] -> [batch, heads, time, dim] with the first ``rotated`` values turned."""
        x = x.transpose(1, 2)
        half = self.rotated // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * self.theta**-steps
        first, second, rest = x.split([half, half, self.dim - self.rotated], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Router(nn.Module):
    """Scores of all experts; softmax, then the best few, whose weights are scaled to sum to one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.active = shape.active
        self.weight = nn.Parameter(torch.randn(shape.experts, shape.hidden) * 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> (probabilities [tokens, experts], weights and ids [tokens, active])."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.weight).softmax(-1)
        weights, ids = probabilities.topk(self.active, dim=-1)
        return probabilities, weights / weights.sum(-1, keepdim=True), ids


class Routed(nn.Module):
    """Routed experts and one shared expert behind a gate."""

    def __init__(self, shape: Shape, product: Any) -> None:
        super().__init__()
        self.gate = Router(shape)
        self.experts = Experts(shape.experts, shape.hidden, shape.expert_width, product)
        self.shared_expert = SwiGLU(shape.hidden, shape.shared_width)
        self.shared_expert_gate = nn.Linear(shape.hidden, 1, bias=False)

    def forward(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, time, hidden] -> (output, balance loss, expert ids [batch * time, active])."""
        rows = x.flatten(0, 1)
        probabilities, shares, ids = self.gate(rows)
        plan: Dispatch = dispatch(ids, probabilities.shape[-1], self.experts.product.align)
        routed = self.experts(rows, shares, plan, weights)
        shared = self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        return (routed + shared).view(x.shape), balance_loss(probabilities, plan), ids


class Layer(nn.Module):
    """A decoder layer. ``weights`` are the FFN's quantisation-ready matrices, made outside the compiled part."""

    def __init__(self, shape: Shape, index: int, product: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)
        if shape.kind(index) == "linear_attention":
            self.linear_attn = DeltaNet(shape)
        else:
            self.self_attn = Attention(shape)
        self.mlp = Routed(shape, product) if shape.experts else SwiGLU(shape.hidden, shape.dense_width)

    def forward(self, x: Tensor, weights: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [batch, time, hidden] float32 -> (x, balance loss, expert ids); the last two are None when dense."""
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = x + mixer(self.input_layernorm(x))
        inner = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Routed):
            out, balance, ids = self.mlp(inner, weights)
            return x + out, balance, ids
        gate, up, down = weights
        return x + F.linear(F.silu(F.linear(inner, gate)) * F.linear(inner, up), down), None, None


class Head(nn.Module):
    """Final norm and the tied output matrix, straight to the loss of each sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """x [batch, time, hidden], targets [batch, time] -> mean loss of each sequence [batch], float32."""
        logits = self.logits(x, embedding)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    def logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[batch, time, vocabulary]."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight, EPSILON)
        return F.linear(normed, embedding)


class Trunk(nn.Module):
    """Embedding, layers and norm, under the names that transformers uses."""

    def __init__(self, shape: Shape, product: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, index, product) for index in range(shape.layers))
        self.norm = Head(shape.hidden)


class DemoModel(nn.Module):
    """The whole model. ``narrow`` turns on rounding of the FFN's matrices to Q4_0, as the exported file stores them."""

    def __init__(self, shape: Shape, product: Any) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape, product)
        self.narrow = False
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name and "conv1d" not in name and ".gate.weight" not in name:
                scale = (2 * self.shape.layers) ** -0.5 if name.endswith(_TO_RESIDUAL) else 1.0
                parameter.normal_(std=scale * parameter.shape[-1] ** -0.5)

    def hidden(self, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Token ids [batch, time] -> (hidden state, balance losses and expert ids of the layers)."""
        x = self.model.embed_tokens(ids)
        losses, routes = [], []
        for layer in self.model.layers:
            x, balance, chosen = layer(x, self._ffn(layer.mlp))
            losses += [] if balance is None else [balance]
            routes += [] if chosen is None else [chosen]
        return x, losses, routes

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """-> (loss of each sequence [batch], balance loss averaged over layers, expert ids of each layer)."""
        x, losses, routes = self.hidden(ids)
        loss = self.model.norm(x, self.model.embed_tokens.weight, targets)
        return loss, torch.stack(losses).mean() if losses else loss.new_zeros(()), routes

    def logits(self, ids: Tensor) -> Tensor:
        """[batch, time] -> [batch, time, vocabulary]; for tests and samples."""
        return self.model.norm.logits(self.hidden(ids)[0], self.model.embed_tokens.weight)

    def _ffn(self, mlp: Any) -> tuple[Tensor, ...]:
        if isinstance(mlp, Routed):
            names = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
        else:
            names = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        kind = names[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else names[0].dtype
        return tuple((to_q4_0(weight) if self.narrow else weight).to(dtype) for weight in names)


_TO_RESIDUAL = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")


def to_q4_0(weight: Tensor) -> Tensor:
    """Round to what Q4_0 can hold (32 values, one half-precision scale); the gradient passes as if nothing happened."""
    with torch.no_grad():
        blocks = weight.unflatten(-1, (-1, 32))
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale == 0, 0, 1 / scale)
        codes = (blocks * inverse + 8.5).floor().clamp(0, 15) - 8
        change = (codes * scale.half().float()).flatten(-2) - weight
    return weight + change
