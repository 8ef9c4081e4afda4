"""Qwen3.5 with routed experts, and its dense sister, written for training: same weights, same names, same results as
``transformers``' classes. Only what training needs: no cache, no padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from attention import Attention
from deltanet import DeltaNet
from feedforward import Routed, SwiGLU, to_q4_0
from norms import Norm
from shape import EPSILON, Shape
from torch import Tensor, nn

_TO_RESIDUAL = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")


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
            names: tuple[Tensor, ...] = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
        else:
            names = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        kind = names[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else names[0].dtype
        return tuple((to_q4_0(weight) if self.narrow else weight).to(dtype) for weight in names)
