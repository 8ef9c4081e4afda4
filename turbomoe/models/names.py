"""From every tensor name in a model file to its place in the model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
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
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")
_STACKED = re.compile(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(gate_up_proj|down_proj)")
_SINGLE = re.compile(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(\d{1,6})\.(gate|up|down)_proj\.weight")
_HUB_VISION = ("model.visual.", "visual.", "vision_tower.", "model.vision_tower.", "multi_modal_projector.",
               "model.multi_modal_projector.")  # fmt: skip
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))


class Names(ABC):
    """How one model file calls its tensors."""

    @abstractmethod
    def place(self, name: str) -> Placement | None:
        """Where the tensor ``name`` of the file goes; None for a name nobody knows."""

    @abstractmethod
    def file_name(self, weight: str) -> str:
        """What the file should call the model's ``weight`` (for messages)."""


def names_of(source: ModelSource, family: Family, config: PretrainedConfig) -> Names:
    """The naming of ``source``: llama.cpp's by the family's tables, or the hub's."""
    if source.kind == "gguf":
        return GgufNames(family, config, source.metadata.get(f"{family.architecture}.block_count", 0))
    return HubNames()


class GgufNames(Names):
    """llama.cpp's names; of its ``blocks`` those beyond the decoder's layers predict further tokens."""

    def __init__(self, family: Family, config: PretrainedConfig, blocks: int) -> None:
        self._outer, self._table = family.model(config), family.layer(config)
        self._layers, self._blocks = config.num_hidden_layers, blocks

    def place(self, name: str) -> Placement | None:
        if name in self._outer:
            return self._outer[name]
        if name.startswith(("v.", "mm.")):
            return VISION
        match = _BLOCK.fullmatch(name)
        if match is None or int(match[1]) >= self._blocks:
            return None
        if int(match[1]) >= self._layers:
            return PREDICTION
        return _in_layer(self._table, int(match[1]), match[2])

    def file_name(self, weight: str) -> str:
        if match := _SINGLE.fullmatch(weight):
            return f"blk.{match[1]}.ffn_{match[3]}_exps.weight"
        layer = _LAYER.fullmatch(weight)
        table, leaf, prefix = (self._table, layer[2], f"blk.{layer[1]}.") if layer else (self._outer, weight, "")
        found = (name for name, to in table.items() if isinstance(to, Dense) and to.name == leaf)
        return prefix + next(found, leaf)


def _in_layer(table: Mapping[str, Dense | Routed], layer: int, leaf: str) -> Placement | None:
    found = table.get(leaf)
    if isinstance(found, Dense):
        return replace(found, name=f"model.layers.{layer}.{found.name}")
    return replace(found, layer=layer) if found else None


class HubNames(Names):
    """The hub's names, which are transformers' but for experts and for composites' prefixes."""

    def place(self, name: str) -> Placement:
        return place_hub(name)

    def file_name(self, weight: str) -> str:
        return weight


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
