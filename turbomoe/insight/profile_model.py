"""Which model a profile or trace belongs to, and the shape of its routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from turbomoe.errors import ModelError
from turbomoe.files.array_file import RecordError

if TYPE_CHECKING:
    from turbomoe.models.base import LoadedModel

MOST_LAYERS, MOST_EXPERTS, MOST_BYTES = 4096, 1 << 14, 1 << 40


@dataclass(frozen=True)
class RoutedModel:
    """A model as its routing sees it. The tuples have one entry per layer with routed experts, in order.

    ``layers`` are decoder layer numbers, ``blob_bytes`` what one expert takes in a slot (it depends on how the
    experts were loaded, and is no part of the identity).
    """

    identity: str
    name: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: int
    blob_bytes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts of the widest layer): the shape of every array by expert."""
        return len(self.layers), max(self.experts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_same(self, identity: str, what: str) -> None:
        """Raise ``RecordError`` unless ``identity`` is this model's."""
        if identity != self.identity:
            why = f"It was taken on {self.name} (identity {self.identity[:12]}), not on this one ({identity[:12]})"
            raise RecordError(f"The {what} belongs to another model", why=why, fix="Take one with turbomoe profile")


def routed_model(model: LoadedModel) -> RoutedModel:
    """The routing shape of a loaded model. Raises ``ModelError`` for a dense one."""
    if model.experts is None:
        raise ModelError(f"{model.name} has no routed experts", why="Every token uses all of its weights")
    layouts = model.experts.store.layouts
    return RoutedModel(
        identity=model.identity,
        name=model.name,
        layers=tuple(layout.layer for layout in layouts),
        experts=tuple(layout.num_experts for layout in layouts),
        top_k=model.experts.top_k,
        blob_bytes=tuple(layout.blob_bytes for layout in layouts),
    )


def read_model(found: Any) -> RoutedModel:
    """The model that a file's header describes; raises ``RecordError`` where it makes no sense."""
    if not isinstance(found, Mapping) or set(found) != {field.name for field in fields(RoutedModel)}:
        raise RecordError("its header does not say which model it is of")
    if not (isinstance(found["identity"], str) and isinstance(found["name"], str)):
        raise RecordError("its model has no name or identity")
    layers = _numbers(found["layers"], 0, MOST_LAYERS)
    experts = _numbers(found["experts"], 1, MOST_EXPERTS)
    sizes = _numbers(found["blob_bytes"], 1, MOST_BYTES)
    (top_k,) = _numbers([found["top_k"]], 1, min(experts, default=1))
    if not 0 < len(layers) <= MOST_LAYERS or not len(layers) == len(set(layers)) == len(experts) == len(sizes):
        raise RecordError("its lists of layers do not agree")
    return RoutedModel(found["identity"], found["name"], layers, experts, top_k, sizes)


def _numbers(found: Any, low: int, high: int) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(value) is int and low <= value <= high for value in found):
        raise RecordError(f"its header has something else than whole numbers from {low} to {high}")
    return tuple(found)
