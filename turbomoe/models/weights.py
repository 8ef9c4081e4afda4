"""Carry out a load plan: dense weights tensor by tensor into the shell, expert bytes as they are into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from turbomoe.errors import ModelError
from turbomoe.experts.base import ExpertLayout
from turbomoe.files.base import ModelSource, TensorInfo
from turbomoe.models.packing import Packing, swap_packed
from turbomoe.models.placement import Dense, Routed, same
from turbomoe.models.plan import ROUTED_PARTS, LoadPlan
from turbomoe.models.shapes import ExpertShape
from turbomoe.native.layout import FORMATS as PLANAR
from turbomoe.native.packed import PackedMatrix
from turbomoe.native.pool import WorkerPool
from turbomoe.notices import Notice, board

Progress = Callable[[int, int], None]
FillExpert = Callable[[int, int, str, torch.Tensor], None]


@dataclass
class Meter:
    """Counts packed bytes read and tells ``report`` (done, total) after each tensor."""

    total: int
    report: Progress | None
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.report is not None:
            self.report(self.done, self.total)


def fill_shell(
    plan: LoadPlan, source: ModelSource, shell: nn.Module, dtype: torch.dtype, device: torch.device, meter: Meter
) -> None:
    """Give every planned parameter of ``shell`` its values in ``dtype`` on ``device``; buffers keep their dtype."""
    for info, to in plan.dense:
        _assign(shell, to.name, _dense(source, info, to, dtype), device)
        source.release(info.name)
        meter.add(info.nbytes)


def fill_packed(
    plan: LoadPlan,
    source: ModelSource,
    shell: nn.Module,
    packing: Mapping[str, Packing],
    pool: WorkerPool,
    meter: Meter,
) -> None:
    """Fill a shell on the CPU, in float32 but for the weights of ``packing``, whose layers become packed ones."""
    matrices = {}
    for info, to in plan.dense:
        if to.name in packing:
            matrices[to.name] = _packed(source, info, packing[to.name], pool)
        else:
            _assign(shell, to.name, _dense(source, info, to, torch.float32), torch.device("cpu"))
        source.release(info.name)
        meter.add(info.nbytes)
    swap_packed(shell, matrices, packing, pool)


def _packed(source: ModelSource, info: TensorInfo, packing: Packing, pool: WorkerPool) -> PackedMatrix:
    try:
        return packing.pack(source.raw(info.name), pool)
    except ModelError as error:  # the packer knows neither name nor file
        raise ModelError(f"{info.name} of {source.path} cannot be packed", why=str(error)) from error


def _dense(source: ModelSource, info: TensorInfo, to: Dense, dtype: torch.dtype) -> torch.Tensor:
    if to.transform is same:
        return source.load(info.name, dtype)
    return to.transform(source.load(info.name, torch.float32)).to(dtype).contiguous()


def _assign(shell: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = shell.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor.to(device, module.get_buffer(leaf).dtype)
    else:
        setattr(module, leaf, nn.Parameter(tensor.to(device), requires_grad=False))


def fill_experts(plan: LoadPlan, source: ModelSource, experts: ExpertShape, fill: FillExpert, meter: Meter) -> None:
    """Hand every expert's packed bytes to ``fill(layer, expert, part, raw)``, cut from the file's mapping."""
    for info, to in plan.routed:
        members = range(experts.num_experts) if to.expert is None else range(to.expert, to.expert + 1)
        _fill_tensor(source.raw(info.name), to, members, fill)
        source.release(info.name)
        meter.add(info.nbytes)


def _fill_tensor(raw: torch.Tensor, to: Routed, members: range, fill: FillExpert) -> None:
    """Rows are whole runs of blocks, so equal shares of rows are equal shares of bytes."""
    shares = raw.view(len(members), len(to.parts), -1)
    for row, expert in enumerate(members):
        for column, part in enumerate(to.parts):
            fill(to.layer, expert, part, shares[row, column])


def expert_layouts(plan: LoadPlan, experts: ExpertShape, layers: list[int], *, planar: bool) -> list[ExpertLayout]:
    """The layout of each routed layer; block formats may differ from layer to layer and from part to part.

    ``planar`` asks for planes, which all layers get or none.
    """
    from turbomoe.experts.store import make_layout

    formats = {layer: plan.formats(layer) for layer in layers}
    planar = planar and all(_fits_planes(layer, formats[layer]) for layer in layers)

    def layout(layer: int) -> ExpertLayout:
        parts = [(part, experts.of(part), formats[layer][part]) for part in ROUTED_PARTS]
        sizes = experts.num_experts, experts.hidden, experts.width
        return make_layout(layer, *sizes, experts.activation, parts, planar=planar)

    return [layout(layer) for layer in layers]


def _fits_planes(layer: int, formats: dict[str, str]) -> bool:
    """Whether the C core computes experts of these formats: it wants gate and up both quantised or both floats."""
    gate, up = PLANAR[formats["gate"]], PLANAR[formats["up"]]
    if gate.is_float == up.is_float:
        return True
    why = f"in layer {layer} gates are {gate.name} and ups {up.name}, which the C core does not compute together"
    board.post(Notice("experts on the CPU run in plain PyTorch", why, "tens of times slower than the compiled core"))
    return False
