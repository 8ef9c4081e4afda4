"""Stores of random experts in any block format, a float64 oracle over them, and a copy engine that tests drive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch

from turbomoe.experts.base import ExpertLayout
from turbomoe.experts.store import ExpertStore, StoreBuilder, make_layout
from turbomoe.files.blocks import FORMATS, packed_bytes
from turbomoe.native.pool import WorkerPool

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where the float16 scales of a block lie, so that random bytes become sane numbers.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_raw(fmt: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Packed bytes of a random tensor of moderate values."""
    generator = torch.Generator().manual_seed(seed)
    if fmt in FLOATS:
        values = torch.randn(tuple(shape), generator=generator) * 0.2
        return values.to(FLOATS[fmt]).reshape(-1).view(torch.uint8)
    raw = torch.randint(0, 256, (packed_bytes(fmt, shape),), generator=generator, dtype=torch.uint8)
    blocks = raw.view(-1, FORMATS[fmt].bytes)
    if fmt == "MXFP4":
        blocks[:, 0] = torch.randint(122, 126, (len(blocks),), generator=generator, dtype=torch.uint8)
    for at in SCALES.get(fmt, ()):
        scale = (torch.rand(len(blocks), 1, generator=generator) * 0.01 + 0.001).to(torch.float16)
        blocks[:, at : at + 2] = scale.view(torch.uint8)
    return raw


def oracle_values(raw: torch.Tensor, fmt: str, shape: Sequence[int]) -> np.ndarray:
    """Float64 values of packed bytes by the ``gguf`` package."""
    numbers = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[fmt])
    return np.asarray(numbers, dtype=np.float64).reshape(tuple(shape))


@dataclass
class Experts:
    """A store and what went into it: ``raw[layer, expert][part]``."""

    store: ExpertStore
    raw: dict[tuple[int, int], dict[str, torch.Tensor]]

    def oracle(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
        """``sum_k weights * expert(hidden)`` row by row in float64."""
        layout = self.store.layout(layer)
        out = np.zeros(tuple(hidden.shape))
        for row, (picked, scale) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            for expert, weight in zip(picked, scale, strict=True):
                out[row] += weight * oracle_expert(layout, self.raw[layer, expert], hidden[row].double().numpy())
        return out


def oracle_expert(layout: ExpertLayout, raw: Mapping[str, torch.Tensor], x: np.ndarray) -> np.ndarray:
    """One expert on one row, in float64."""
    part = {p.name: oracle_values(raw[p.name], p.format, p.shape) for p in layout.parts}
    gate = part["gate"] @ x + part.get("gate_bias", 0.0)
    up = part["up"] @ x + part.get("up_bias", 0.0)
    act = gate / (1 + np.exp(-gate)) if layout.activation == "silu" else gelu_tanh(gate)
    return part["down"] @ (act * up) + part.get("down_bias", 0.0)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def make_experts(
    formats: Mapping[int, Sequence[str]],
    *,
    num_experts: int = 8,
    hidden: int = 32,
    width: int = 64,
    activation: str = "silu",
    biases: bool = False,
    seed: int = 0,
    planar: bool = False,
    pool: WorkerPool | None = None,
) -> Experts:
    """A store with layers ``formats`` = {layer: (gate, up, down) formats}, filled with random experts."""
    layouts = []
    for layer, (gate, up, down) in formats.items():
        parts: list[tuple[str, tuple[int, ...], str]] = [
            ("gate", (width, hidden), gate), ("up", (width, hidden), up), ("down", (hidden, width), down),
        ]  # fmt: skip
        if biases:
            parts += [("gate_bias", (width,), "F32"), ("up_bias", (width,), "F32"), ("down_bias", (hidden,), "F32")]
        layouts.append(make_layout(layer, num_experts, hidden, width, activation, parts, planar=planar))
    builder, raw = StoreBuilder(layouts, pool), {}
    for layout in layouts:
        for expert in range(num_experts):
            raw[layout.layer, expert] = made = {}
            for i, part in enumerate(layout.parts):
                key = ((seed * 131 + layout.layer) * 131 + expert) * 131 + i
                made[part.name] = random_raw(part.format, part.shape, key)
                builder.fill(layout.layer, expert, part.name, made[part.name])
    return Experts(builder.finish(), raw)


def random_work(
    rows: int, num_experts: int, top_k: int, hidden: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids without duplicates, and normalised weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(rows, num_experts, generator=generator)
    weights, ids = torch.softmax(4 * logits, dim=-1).topk(top_k, dim=-1)
    return torch.randn(rows, hidden, generator=generator), ids, weights / weights.sum(-1, keepdim=True)


@dataclass
class Job:
    """A copy, a fence or a read under way. ``state`` is running, done or failed."""

    dst: torch.Tensor | None = None
    src: torch.Tensor | None = None
    state: str = "running"
    covers: list[Job] = field(default_factory=list)  # a fence: the reads that must end before it
    slots: set[int] = field(default_factory=set)  # a read: addresses


@dataclass
class DeferredCopies:
    """Copies, reads and fences that end when the test says so. A copy under way leaves junk in its slot."""

    jobs: list[Job] = field(default_factory=list)
    reads: list[Job] = field(default_factory=list)
    refuse: int = 0  # how many of the next starts raise
    overrun: list[int] = field(default_factory=list)  # addresses that were overwritten under a reader

    def start(self, dst: torch.Tensor, src: torch.Tensor) -> Job:
        if self.refuse:
            self.refuse -= 1
            raise RuntimeError("no copy engine")
        if any(read.state == "running" and dst.data_ptr() in read.slots for read in self.reads):
            self.overrun.append(dst.data_ptr())
        dst.fill_(0xA5)
        self.jobs.append(Job(dst, src))
        return self.jobs[-1]

    def read(self, slots: set[int]) -> None:
        """A kernel starts to read the slots at these addresses; it ends with the first fence behind it."""
        self.reads.append(Job(slots=slots))

    def fence(self) -> Job:
        self.jobs.append(Job(covers=[read for read in self.reads if read.state == "running"]))
        return self.jobs[-1]

    def done(self, token: object) -> bool:
        assert isinstance(token, Job)
        if token.state == "failed":
            raise RuntimeError("the link went down")
        return token.state == "done"

    def wait(self, token: object) -> None:
        assert isinstance(token, Job)
        if token.state == "running":
            self.finish(token)

    def running(self, copies: bool) -> list[Job]:
        """Copies, or else fences, that have not ended."""
        return [job for job in self.jobs if job.state == "running" and (job.dst is not None) == copies]

    def finish(self, job: Job) -> None:
        """End a copy or fence well."""
        if job.dst is not None and job.src is not None:
            job.dst.copy_(job.src)
        for ended in (job, *job.covers):
            ended.state = "done"

    def finish_all(self) -> None:
        for job in self.jobs:
            if job.state == "running":
                self.finish(job)
