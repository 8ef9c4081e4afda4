"""Sizes of the demo model and of its dense sister, and their ``config.json`` for transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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
