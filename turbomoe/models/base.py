"""The contract between a model and the engine: one forward call, and the facts the engine needs beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from turbomoe.kv.shape import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from turbomoe.experts.runtime import ExpertRuntime
    from turbomoe.models.fast.base import Body


@dataclass(frozen=True)
class Forecast:
    """What a model will take, known before its weights are read: bytes of dense weights and of packed experts.

    ``identity`` is that of the ``LoadedModel`` to come.
    """

    weight_bytes: int
    expert_bytes: int
    layers: tuple[LayerShape, ...]
    context_length: int
    config: PretrainedConfig
    identity: str = ""


@dataclass
class LoadedModel:
    """A runnable model: a stock transformers shell with its weights in place.

    ``shell`` is in evaluation mode and holds no routed experts (they are in ``experts``). ``layers`` tells what
    each decoder layer remembers. ``sampling`` holds the model's own defaults (temperature, top_k, top_p...).
    ``tokenizer`` is None for a file that holds none. ``body`` runs the decoder layers in place of the shell's own;
    None leaves them to the shell. ``weight_bytes`` counts the shell; experts count themselves.
    """

    name: str
    family: str
    shell: nn.Module
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    layers: tuple[LayerShape, ...]
    identity: str
    context_length: int
    dtype: torch.dtype
    weight_bytes: int
    stop_ids: frozenset[int]
    sampling: dict[str, Any] = field(default_factory=dict)
    experts: ExpertRuntime | None = None
    body: Body | None = None
