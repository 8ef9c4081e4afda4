"""From every tensor name in a model file to its place in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from turbomoe.files.base import ModelSource
from turbomoe.models.family import Family
from turbomoe.models.placement import Dense, Placement, Routed, Skipped

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VISION = Skipped("vision")
PREDICTION = Skipped("multi-token prediction")
DERIVED = Skipped("derived values")
Place = Callable[[str], Placement | None]

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_STACKED = re.compile(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(gate_up_proj|down_proj)")
_SINGLE = re.compile(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(\d{1,6})\.(gate|up|down)_proj\.weight")
_HUB_VISION = ("model.visual.", "visual.", "vision_tower.", "model.vision_tower.", "multi_modal_projector.",
               "model.multi_modal_projector.")  # fmt: skip
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))


def placer(source: ModelSource, family: Family, config: PretrainedConfig) -> Place:
    """A function from a tensor name of ``source`` to its placement, or None for a name nobody knows."""
    if source.kind == "gguf":
        return _gguf_placer(source, family, config)
    return place_hub


def _gguf_placer(source: ModelSource, family: Family, config: PretrainedConfig) -> Place:
    outer, table = family.model(config), family.layer(config)
    layers = config.num_hidden_layers
    blocks = source.metadata.get(f"{family.architecture}.block_count", layers)

    def place(name: str) -> Placement | None:
        if name in outer:
            return outer[name]
        if name.startswith(("v.", "mm.")):
            return VISION
        match = _BLOCK.fullmatch(name)
        if match is None or int(match[1]) >= blocks:
            return None
        if int(match[1]) >= layers:
            return PREDICTION
        return _in_layer(table, int(match[1]), match[2])

    return place


def _in_layer(table: Mapping[str, Dense | Routed], layer: int, leaf: str) -> Placement | None:
    found = table.get(leaf)
    if isinstance(found, Dense):
        return replace(found, name=f"model.layers.{layer}.{found.name}")
    return replace(found, layer=layer) if found else None


def place_hub(name: str) -> Placement:
    """Place a tensor named as on the hub; composites keep their text model under a longer prefix."""
    if name.startswith(_HUB_VISION):
        return VISION
    if name.startswith("mtp."):
        return PREDICTION
    if name.endswith("rotary_emb.inv_freq"):
        return DERIVED
    return _place_text(_text_name(name))


def _text_name(name: str) -> str:
    for prefix, plain in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _place_text(name: str) -> Placement:
    if match := _STACKED.fullmatch(name):
        parts = ("gate", "up") if match[2] == "gate_up_proj" else ("down",)
        return Routed(parts, int(match[1]))
    if match := _SINGLE.fullmatch(name):
        return Routed((match[3],), int(match[1]), int(match[2]))
    return Dense(name)
