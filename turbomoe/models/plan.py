"""Match every tensor of a file with every weight of a model before a byte is read: all errors come from here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from turbomoe.errors import ModelError
from turbomoe.files.base import ModelSource, TensorInfo
from turbomoe.models.names import Names
from turbomoe.models.placement import Dense, Routed, Skipped, same
from turbomoe.models.shapes import ExpertShape

ROUTED_PARTS = ("gate", "up", "down")


@dataclass
class LoadPlan:
    """What to read and where to put it. ``skipped`` counts (tensors, bytes) by reason."""

    dense: list[tuple[TensorInfo, Dense]] = field(default_factory=list)
    routed: list[tuple[TensorInfo, Routed]] = field(default_factory=list)
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Packed bytes that the plan reads."""
        return sum(info.nbytes for info, _ in [*self.dense, *self.routed])

    def formats(self, layer: int) -> dict[str, str]:
        """Block format of each expert part of ``layer``."""
        return {part: info.format for info, to in self.routed if to.layer == layer for part in to.parts}


def make_plan(
    source: ModelSource, names: Names, shell: nn.Module, routed_layers: Iterable[int], experts: ExpertShape | None
) -> LoadPlan:
    """Plan the loading of ``source`` into ``shell`` (and a store, for the layers in ``routed_layers``).

    ``ModelError`` names a tensor that is unexpected, misshapen, given twice or missing, by its names in the
    file and in the model.
    """
    plan, tied = LoadPlan(), _tied(shell)
    for info in source.tensors.values():
        _sort(plan, info, names.place(info.name), tied, source)
    _check_dense(plan, shell, names, source)
    _check_routed(plan, set(routed_layers), experts, names, source)
    return plan


def _sort(plan: LoadPlan, info: TensorInfo, to: object, tied: bool, source: ModelSource) -> None:
    if tied and isinstance(to, Dense) and to.name == "lm_head.weight":
        to = Skipped("a second copy of the tied embedding")
    if isinstance(to, Dense):
        plan.dense.append((info, to))
    elif isinstance(to, Routed):
        plan.routed.append((info, to))
    elif isinstance(to, Skipped):
        count, nbytes = plan.skipped.get(to.reason, (0, 0))
        plan.skipped[to.reason] = (count + 1, nbytes + info.nbytes)
    else:
        raise _unexpected(info.name, source)


def _tied(shell: nn.Module) -> bool:
    return bool(getattr(shell.config, "tie_word_embeddings", False))


def _check_dense(plan: LoadPlan, shell: nn.Module, names: Names, source: ModelSource) -> None:
    wanted = dict(shell.named_parameters())
    buffers = dict(shell.named_buffers())
    for info, to in plan.dense:
        # A buffer is computed, not stored: only a family's own table (rotary divisors) may replace one.
        allowed = wanted if to.transform is same else wanted | buffers
        if to.name not in allowed:
            raise _unexpected(info.name, source)
        _check_shape(info, to.name, tuple(allowed[to.name].shape), to.transform, source)
    _check_once(Counter(to.name for _, to in plan.dense), source)
    missing = sorted(wanted.keys() - {to.name for _, to in plan.dense})
    if missing:
        raise _missing(missing, names, source)


def _check_shape(
    info: TensorInfo,
    name: str,
    wanted: tuple[int, ...],
    transform: Callable[[torch.Tensor], torch.Tensor],
    source: ModelSource,
) -> None:
    try:
        shape = tuple(transform(torch.empty(info.shape, device="meta")).shape)
    except (RuntimeError, IndexError, ZeroDivisionError):  # a shape that the transform cannot take apart
        shape = ()
    if shape != wanted:
        raise ModelError(
            f"The tensor {info.name} of {source.path} has the shape {info.shape}, which does not fit",
            why=f"It becomes {name} of shape {wanted} in the model",
            fix="The file is damaged or was converted for another program",
        )


def _check_routed(
    plan: LoadPlan, layers: set[int], experts: ExpertShape | None, names: Names, source: ModelSource
) -> None:
    seen: Counter[tuple[int, str, int]] = Counter()
    formats: dict[tuple[int, str], str] = {}
    for info, to in plan.routed:
        if experts is None or to.layer not in layers or (to.expert or 0) >= experts.num_experts:
            raise _unexpected(info.name, source)
        _check_shape(info, _routed_name(to), _routed_shape(to, experts), lambda tensor: tensor, source)
        members = range(experts.num_experts) if to.expert is None else [to.expert]
        for part in to.parts:
            seen.update((to.layer, part, expert) for expert in members)
            if formats.setdefault((to.layer, part), info.format) != info.format:
                raise ModelError(f"{info.name} of {source.path} is {info.format}, unlike its layer's other experts")
    _check_once(Counter({_expert_name(*key): count for key, count in seen.items() if count > 1}), source)
    if experts is not None:
        wanted = ((l, p, e) for l in sorted(layers) for p in ROUTED_PARTS for e in range(experts.num_experts))
        if missing := [_expert_name(*key) for key in wanted if key not in seen]:
            raise _missing(missing, names, source)


def _routed_shape(to: Routed, experts: ExpertShape) -> tuple[int, ...]:
    rows, columns = experts.of(to.parts[0])
    one = (rows * len(to.parts), columns)
    return one if to.expert is not None else (experts.num_experts, *one)


def _routed_name(to: Routed) -> str:
    return f"experts {'+'.join(to.parts)} of layer {to.layer}"


def _expert_name(layer: int, part: str, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def _check_once(counts: Counter[str], source: ModelSource) -> None:
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ModelError(f"{source.path} gives the weight {twice[0]} more than once")


def _unexpected(name: str, source: ModelSource) -> ModelError:
    return ModelError(
        f"The tensor {name} of {source.path} has no place in the model",
        why="Its architecture, as the file describes it, has no such weight",
        fix="The file is damaged, or of a variant that turbomoe does not know",
    )


def _missing(weights: list[str], names: Names, source: ModelSource) -> ModelError:
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    ours, theirs = weights[0], names.file_name(weights[0])
    called = f"{theirs} ({ours} in the model)" if theirs != ours else ours
    return ModelError(
        f"{source.path} lacks weights that the model needs: {called}{more}",
        fix="The file is incomplete: download or convert it again",
    )
