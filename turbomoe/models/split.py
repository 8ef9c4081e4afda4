"""Turn a dense model into a mixture of experts that computes the same function.

A gated FFN is a sum over its inner units, so any partition of the units is a set of experts whose outputs add up
to the dense output when all are active with weight 1. The result differs from the dense model by rounding alone
(the sum over experts has another order), which makes it an oracle for the whole expert path.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from turbomoe.config import ExpertSettings
from turbomoe.errors import ModelError
from turbomoe.experts.base import ExpertLayout
from turbomoe.experts.module import StoreExperts
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.experts.store import StoreBuilder, make_layout
from turbomoe.models.base import LoadedModel
from turbomoe.models.fast import make_body
from turbomoe.models.shapes import expert_activation

_FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DENSE_FFN = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


class AllExperts(nn.Module):
    """An FFN whose experts are all active with weight 1: hidden [..., H] -> [..., H]."""

    def __init__(self, layer: int, num_experts: int) -> None:
        super().__init__()
        self.experts = StoreExperts(layer)
        self.num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum of all experts' outputs."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = torch.arange(self.num_experts, device=rows.device).expand(len(rows), -1).contiguous()
        weights = torch.ones(ids.shape, dtype=rows.dtype, device=rows.device)
        out: torch.Tensor = self.experts(rows, ids, weights)
        return out.view(hidden_states.shape)


def split_dense(model: LoadedModel, num_experts: int, settings: ExpertSettings) -> LoadedModel:
    """``model`` with every dense FFN cut into ``num_experts`` experts of equal width, held by an expert store.

    The shell is changed in place, its dense FFN weights are freed. Raises ``ModelError`` if the model has no
    dense gated FFN without biases, or its width is not a multiple of ``num_experts``.
    """
    found = _dense_ffns(model.shell)
    _check(model, found, num_experts)
    layouts = [_layout(model, ffn, layer, num_experts) for layer, (_, ffn) in found.items()]
    builder, modules = StoreBuilder(layouts), []
    for layer, (name, ffn) in found.items():
        for expert, part, weight in _slices(ffn, num_experts):
            builder.fill(layer, expert, part, weight.view(torch.uint8).reshape(-1))
        modules.append(AllExperts(layer, num_experts))
        model.shell.set_submodule(name, modules[-1])
    device = next(model.shell.parameters()).device
    runtime = ExpertRuntime(builder.finish(), settings, device, num_experts)
    for module in modules:
        module.experts.bind(runtime)
    return _renamed(model, num_experts, runtime)


def _dense_ffns(shell: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Dense gated FFNs by layer, with their names."""
    return {
        int(match[1]): (name, module)
        for name, module in shell.named_modules()
        if (match := _DENSE_FFN.search(name)) and isinstance(getattr(module, "gate_proj", None), nn.Linear)
    }


def _check(model: LoadedModel, found: dict[int, tuple[str, nn.Module]], num_experts: int) -> None:
    if not found or any(name.endswith(".bias") for _, ffn in found.values() for name, _ in ffn.named_parameters()):
        raise ModelError(f"{model.name} has no dense gated FFN without biases to split into experts")
    for layer, (_, ffn) in found.items():
        width = ffn.get_parameter("down_proj.weight").shape[1]
        if num_experts < 1 or width % num_experts:
            raise ModelError(
                f"The FFN of layer {layer} cannot be split into {num_experts} experts",
                why=f"Its width is {width}",
                fix="Choose a divisor of the width",
            )


def _layout(model: LoadedModel, ffn: nn.Module, layer: int, num_experts: int) -> ExpertLayout:
    hidden, inner = ffn.get_parameter("down_proj.weight").shape
    width, kind = inner // num_experts, _FORMATS[model.dtype]
    parts = [("gate", (width, hidden), kind), ("up", (width, hidden), kind), ("down", (hidden, width), kind)]
    return make_layout(layer, num_experts, hidden, width, expert_activation(model.config), parts)


def _slices(ffn: nn.Module, num_experts: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(expert, part, weight): inner units are rows of gate and up and columns of down."""
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        weight = ffn.get_parameter(f"{part}_proj.weight").detach().cpu()
        for expert, piece in enumerate(weight.chunk(num_experts, dim=axis)):
            yield expert, part, piece.contiguous()


def _renamed(model: LoadedModel, num_experts: int, runtime: ExpertRuntime) -> LoadedModel:
    body, model.body = model.body, None  # it holds the dense weights that the shell has given up
    identity = hashlib.sha256(f"{model.identity} split into {num_experts} experts".encode()).hexdigest()
    return replace(
        model,
        name=f"{model.name} split into {num_experts} experts",
        identity=identity,
        weight_bytes=sum(parameter.nbytes for parameter in model.shell.parameters()),
        experts=runtime,
        body=None if body is None else make_body(model.family, model.shell, model.layers),
    )
