"""What each decoder layer remembers, and what its routed experts look like, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbomoe.errors import ModelError
from turbomoe.kv.shape import AttentionShape, LayerShape, RecurrentShape
from turbomoe.models.header import MAX_CONTEXT

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' names for the activations that the expert kernels know.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of one model: gate and up are (width, hidden), down is (hidden, width)."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    activation: str

    def of(self, part: str) -> tuple[int, int]:
        """Shape of one part of one expert."""
        return (self.hidden, self.width) if part == "down" else (self.width, self.hidden)


def layer_shapes(config: PretrainedConfig) -> tuple[LayerShape, ...]:
    """The shape of every decoder layer's memory, in layer order. ``ModelError`` for an unknown layer type."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [_only_kind(config)] * count
    if len(kinds) != count:
        raise ModelError(f"The configuration names {len(kinds)} layer types for {count} layers")
    return tuple(_layer_shape(config, layer, kind) for layer, kind in enumerate(kinds))


def _only_kind(config: PretrainedConfig) -> str:
    """The kind of layer where a configuration does not list them: a class that knows windows slides in all."""
    slides = hasattr(type(config), "sliding_window") and config.sliding_window is not None
    return "sliding_attention" if slides else "full_attention"


def _layer_shape(config: PretrainedConfig, layer: int, kind: str) -> LayerShape:
    if kind == "linear_attention":
        return _recurrent(config, layer)
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelError(f"Layer {layer} is of a type that turbomoe does not know: {kind!r}")
    return AttentionShape(
        layer=layer,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        window=_window(config, layer) if kind == "sliding_attention" else 0,
    )


def _window(config: PretrainedConfig, layer: int) -> int:
    """Tokens that a sliding layer sees, checked where it is used: in a model without such layers it means nothing."""
    found = config.sliding_window
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MAX_CONTEXT:
        raise ModelError(
            f"sliding_window must be an integer between 1 and {MAX_CONTEXT}, not {str(found)[:40]}",
            why=f"Layer {layer} slides",
        )
    return found


def _recurrent(config: PretrainedConfig, layer: int) -> RecurrentShape:
    """The convolution runs over queries, keys and values side by side; the state is one matrix a value head."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * keys * key_dim + values * value_dim
    return RecurrentShape(layer, (channels, config.linear_conv_kernel_dim), (values, key_dim, value_dim))


def expert_shape(config: PretrainedConfig) -> ExpertShape:
    """The routed experts of a mixture-of-experts configuration. ``ModelError`` for an unsupported activation."""
    activation = expert_activation(config)
    if config.num_experts_per_tok > config.num_experts:
        raise ModelError(f"A token cannot use {config.num_experts_per_tok} of {config.num_experts} experts")
    width = config.moe_intermediate_size
    return ExpertShape(config.num_experts, config.num_experts_per_tok, config.hidden_size, width, activation)


def expert_activation(config: PretrainedConfig) -> str:
    """The expert room's name for the activation of ``config``'s gated FFNs. ``ModelError`` for one it lacks."""
    wanted = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if wanted not in _ACTIVATIONS:
        known = " and ".join(_ACTIVATIONS)
        raise ModelError(f"Experts with the activation {wanted!r} are not supported", why=f"{known} are")
    return _ACTIVATIONS[wanted]
