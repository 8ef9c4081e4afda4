"""Stock transformers models without weights: configuration, meta-device shell, expert swap.

Nothing here reads a file. A shell has every parameter on the meta device and every buffer (rotary
frequencies, embedding scales) real, so that whoever fills the parameters has a complete model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from turbomoe.errors import ModelError
from turbomoe.upstream.versions import check_transformers, installed_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?experts$")


def make_config(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The text configuration that ``fields`` (``model_type`` and its own keys) describe.

    Raises ``ModelError`` when transformers refuses a value, quoting its reason.
    """
    from transformers import AutoConfig

    check_transformers()
    values = {key: value for key, value in fields.items() if key != "model_type"}
    try:
        config: PretrainedConfig = AutoConfig.for_model(fields["model_type"], **values)
    # A configuration runs its own validators, each with exceptions of its own: all mean the same here.
    except Exception as error:
        raise ModelError("The model's configuration is not valid", why=_one_line(error)) from error
    return config


def build_shell(config: PretrainedConfig, *, attention: str, dtype: torch.dtype) -> nn.Module:
    """The causal language model of ``config`` in evaluation mode: parameters on meta, buffers real, weights tied.

    ``attention`` is a name that ``attn_implementation`` accepts (``eager``, ``sdpa``, or one registered by us).
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            shell: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except Exception as error:  # shapes that contradict each other show up in any constructor
        raise ModelError("The model cannot be built from its configuration", why=_one_line(error)) from error
    _fill_buffers(shell)
    return shell.eval().requires_grad_(False)


def swap_experts(shell: nn.Module, make: Callable[[int], nn.Module]) -> dict[int, nn.Module]:
    """Replace every routed-experts module by ``make(layer)``; returns the replacements by layer.

    A routed-experts module is called ``experts``, sits in a numbered layer and owns a ``down_proj``: true of
    every mixture-of-experts family in transformers 5, whatever its class is called.
    """
    found = {
        name: int(match.group(1))
        for name, module in shell.named_modules()
        if (match := _EXPERTS.search(name)) and hasattr(module, "down_proj")
    }
    made = {layer: make(layer) for layer in found.values()}
    for name, layer in found.items():
        shell.set_submodule(name, made[layer])
    return made


def tie_embeddings(shell: nn.Module) -> None:
    """Let the output projection use the input embedding's very tensor."""
    shell.get_output_embeddings().weight = shell.get_input_embeddings().weight  # type: ignore[operator]


def on_meta(shell: nn.Module) -> list[str]:
    """Names of parameters and buffers that still have no storage."""
    named = [*shell.named_parameters(), *shell.named_buffers()]
    return [name for name, tensor in named if tensor.is_meta]


def _fill_buffers(shell: nn.Module) -> None:
    """Give the buffers real values by the model's own initialisation, as ``from_pretrained`` does."""
    for prefix, module in shell.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            meta = module.get_buffer(name)
            # NaN first: a buffer that a new release no longer initialises must not pass for a value.
            module._buffers[name] = torch.full(meta.shape, torch.nan, dtype=meta.dtype, device="cpu")
        if names:
            shell._init_weights(module)  # type: ignore[operator]
        for name in names:
            _require_finite(f"{prefix}.{name}", module.get_buffer(name))


def _require_finite(name: str, buffer: torch.Tensor) -> None:
    if not bool(buffer.isfinite().all()):
        raise ModelError(
            f"transformers {installed_transformers()} left the buffer {name} without a value",
            fix="Use another release within the supported range and report this",
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
