"""Train the demo model, or with --dense its sister of equal active parameters, within a given time on one GPU.

    python train.py tokens.xz out --minutes 8
    python train.py tokens.xz out-dense --dense --steps N      # N from the first run's log: the same tokens

Writes ``out/``: model-*.safetensors, config.json, log.jsonl (loss curve) and report.json; ``export.py`` does the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import Part, read
from model import DemoModel, Shape
from moe import GROUPED, Product, blocked
from muon import Muon
from routing import Routing, transfer
from safetensors.torch import save_file
from torch import Tensor, nn

STARTED = time.monotonic()
MIX = {"prose": 0.34, "docs": 0.22, "code": 0.22, "multilingual": 0.22}
BALANCE = 0.005
"""Weight of the balance loss: enough that no expert starves, little enough that domains keep their favourites."""
WARMUP, DECAY_FROM, NARROW_FROM = 0.02, 0.45, 0.7
"""Parts of the run: rise of the learning rate, start of its fall, start of rounding the experts to Q4_0."""
SHARD = 15_900_000
TINY = Shape(512, 64, 4, 8, 2, 32, 32, 2, 1, 32, 2, 4, 16, context=128)


@dataclass(frozen=True)
class Plan:
    """How long to train and on how much at a time. ``steps`` 0: as many as fit before ``deadline`` (monotonic s)."""

    deadline: float
    steps: int
    batch: int
    length: int
    rate: float


class Batches:
    """Random windows of the training tokens, every domain with its fixed share of each batch; the same for every
    model trained with this seed.
    """

    def __init__(self, parts: list[Part], plan: Plan, device: torch.device) -> None:
        train = {part.domain: part.tokens for part in parts if part.split == "train"}
        self._tokens = {name: torch.from_numpy(train[name].astype("int32")).to(device) for name in MIX}
        left, self._sizes = plan.batch, {}
        for name in list(MIX)[1:]:
            self._sizes[name] = round(plan.batch * MIX[name])
            left -= self._sizes[name]
        self._sizes[next(iter(MIX))] = left
        self._window = torch.arange(plan.length + 1, device=device)
        self._random = torch.Generator(device).manual_seed(1)

    def next(self) -> tuple[Tensor, Tensor]:
        """(ids, targets), both [batch, length]."""
        rows = []
        for name, size in self._sizes.items():
            tokens = self._tokens[name]
            high = len(tokens) - len(self._window)
            start = torch.randint(high, (size, 1), generator=self._random, device=tokens.device)
            rows.append(tokens[start + self._window])
        both = torch.cat(rows).long()
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def learning_rate(progress: float) -> float:
    """Share of the peak rate: short rise, plateau, straight fall to zero."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return min(1.0, (1 - progress) / (1 - DECAY_FROM))


class Optimisers:
    """Muon for the matrices of the layers, AdamW for embedding, router, norms and the small rest."""

    def __init__(self, model: DemoModel, rate: float) -> None:
        matrices, small, wide = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "conv1d" in name or "in_proj_a" in name or "in_proj_b" in name:
                small.append(parameter)
            elif "embed" in name or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                wide.append(parameter)
            else:
                matrices.append((name, parameter))
        self.rate, self.muon = rate, Muon(matrices)
        fused = next(model.parameters()).is_cuda
        groups = [{"params": wide, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)
        self._parameters = list(model.parameters())

    def step(self, share: float) -> None:
        """Clip, update and clear the gradients; ``share`` of the peak rate."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * share
        self.adam.step()
        self.muon.step(self.rate * share)
        for parameter in self._parameters:
            parameter.grad = None


class Trainer:
    """The loop, its clock and its log."""

    def __init__(self, model: DemoModel, parts: list[Part], plan: Plan, device: torch.device, out: Path) -> None:
        self.model, self.parts, self.plan, self.device, self.out = model, parts, plan, device, out
        self.batches = Batches(parts, plan, device)
        self.optimisers = Optimisers(model, plan.rate)
        self.log = open(out / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (as long as the run)
        self.step, self.clock_start, self.step_start = 0, time.monotonic(), 0

    def precision(self) -> Any:
        """bfloat16 products on a GPU, plain float32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def run(self) -> None:
        """Train until the steps are done or the time is up; evaluate a little on the way."""
        next_check = 0.0
        while (progress := self.progress()) < 1:
            self.model.narrow = progress >= NARROW_FROM
            loss, balance = self.train_step(learning_rate(progress))
            self.step += 1
            if self.step == 20:  # compiling is over: the clock that steers the learning rate starts here
                self.clock_start, self.step_start = self._now(), self.step
            if self.step % 50 == 0:
                self.write(step=self.step, loss=loss.item(), balance=balance.item(), speed=self.speed())
            if progress >= next_check:
                self.write(step=self.step, progress=progress, held=self.glance())
                next_check += 0.08

    def train_step(self, share: float) -> tuple[Tensor, Tensor]:
        """One batch forward, backward and update -> (loss, balance loss) still on the device."""
        ids, targets = self.batches.next()
        with self.precision():
            losses, balance, _ = self.model(ids, targets)
            loss = losses.mean()
            total = loss + BALANCE * balance
        total.backward()
        self.optimisers.step(share)
        return loss.detach(), balance.detach()

    def progress(self) -> float:
        """0 to 1, by steps where their number is given, else by the clock; 1 when the time is up."""
        if self.step % 10 == 0 and self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        if now >= self.plan.deadline:
            return 1.0
        if self.plan.steps:
            return self.step / self.plan.steps
        if self.step < 20:
            return WARMUP * self.step / 20
        return WARMUP + (1 - WARMUP) * (now - self.clock_start) / (self.plan.deadline - self.clock_start)

    def speed(self) -> int:
        """Tokens a second since compiling was over."""
        steps = self.step - self.step_start
        return round(steps * self.plan.batch * self.plan.length / (self._now() - self.clock_start))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def write(self, **row: Any) -> None:
        """One line of the log, also printed."""
        row["seconds"] = round(time.monotonic() - STARTED, 1)
        line = json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
        self.log.write(line + "\n")
        self.log.flush()
        print(line, flush=True)

    def glance(self) -> dict[str, float]:
        """Loss of one batch of every held-out part."""
        held = (part for part in self.parts if part.split == "held")
        return {part.domain: round(self.evaluate(part, most=1)[0], 4) for part in held}

    def evaluate(self, part: Part, most: int = 10**9, routing: Routing | None = None) -> tuple[float, int]:
        """(mean loss, tokens) over whole windows of a part, at most ``most`` batches.

        Gradients stay on, unused: without them a compiled model would be compiled anew.
        """
        batch, length = self.plan.batch, self.plan.length
        windows = torch.from_numpy(part.tokens.astype("int64"))
        count = min((len(windows) - 1) // length, batch * most)
        total = 0.0
        for start in range(0, count, batch):
            used = min(batch, count - start)
            picks = torch.arange(start, start + batch).clamp(max=count - 1)[:, None] * length
            both = windows[picks + torch.arange(length + 1)].to(self.device)
            with self.precision():
                losses, _, routes = self.model(both[:, :-1].contiguous(), both[:, 1:].contiguous())
            total += float(losses.detach()[:used].sum())
            if routing is not None:
                routing.add(routes, batch, used)
        return total / max(1, count), count * length

    def report(self) -> dict[str, Any]:
        """Everything that is measured at the end: losses of every held-out part and text, and the routing."""
        shape, texts, domains = self.model.shape, {}, {}
        for part in self.parts:
            if part.split == "train":
                continue
            routing = Routing.empty(shape.layers, shape.experts) if shape.experts else None
            loss, tokens = self.evaluate(part, routing=routing)
            bits = loss * len(part.tokens) / part.text_bytes / math.log(2)
            texts[f"{part.split}/{part.domain}"] = {
                "tokens": tokens,
                "loss": round(loss, 4),
                "perplexity": round(math.exp(loss), 3),
                "bits_per_byte": round(bits, 4),
            }
            if routing is not None and part.split == "held":
                domains[part.domain] = routing
        report: dict[str, Any] = {"texts": texts}
        if domains:
            whole = Routing.empty(shape.layers, shape.experts)
            for routing in domains.values():
                whole.counts += routing.counts / routing.counts.sum()
            report["load_of_all_domains"] = whole.report()["effective_experts"]
            report["routing"] = {name: routing.report() for name, routing in domains.items()}
            report["transfer"] = transfer(domains)
        return report


def fastest_product(device: torch.device) -> Product:
    """The grouped product where it works and agrees with the plain one, else blocks of rows; says which and why."""
    if device.type != "cuda":
        return blocked(16)
    plain = blocked(128)
    ends = torch.tensor([128, 128, 384, 512], device=device, dtype=torch.int32)
    rows = torch.randn(512, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 96, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for product in (plain, GROUPED):
        try:
            out = product.multiply(rows, weight, ends)
            results.append([out, *torch.autograd.grad(out.square().mean(), (rows, weight))])
        except Exception as error:  # whatever it is, the plain product works
            print(f"the grouped product does not work here ({error}): using blocks of 128 rows", flush=True)
            return plain
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    print(f"grouped product against blocks: relative difference {far:.2g}", flush=True)
    return GROUPED if far < 0.02 else plain


def compiled(trainer: Trainer) -> None:
    """Compile layers and head, or say why not and go on without."""
    model = trainer.model
    parts: list[nn.Module] = [*model.model.layers, model.model.norm]
    for part in parts:
        part.compile(dynamic=False)
    try:
        trainer.train_step(0.0)
    except Exception:  # the plain model trains too, slower
        traceback.print_exc()
        print("compiling failed: training without", flush=True)
        for part in parts:
            part._compiled_call_impl = None
        for parameter in model.parameters():
            parameter.grad = None


def save(model: DemoModel, out: Path) -> None:
    """Write config.json and shards of about ``SHARD`` bytes: matrices in float16, the router and vectors in float32."""
    tensors = {name: _narrowed(name, tensor) for name, tensor in model.state_dict().items()}
    shards: list[dict[str, Tensor]] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        fitting = (shard for shard in shards if tensor.nbytes + sum(t.nbytes for t in shard.values()) <= SHARD)
        if (shard := next(fitting, None)) is None:
            shards.append(shard := {})
        shard[name] = tensor
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(model.shape.config() | {"dtype": "float32"}, indent=1) + "\n")


def _narrowed(name: str, tensor: Tensor) -> Tensor:
    wide = tensor.dim() == 1 or name.endswith("mlp.gate.weight")
    return tensor.detach().to("cpu", torch.float32 if wide else torch.float16).contiguous()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", action="store_true", help="the sister without routed experts")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop training this long after the start")
    parser.add_argument("--steps", type=int, default=0, help="a fixed number of steps instead")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script on a CPU")
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device, parts: list[Part]) -> Trainer:
    """The model and its trainer, compiled where there is a GPU."""
    shape = TINY if options.tiny else Shape()
    shape = replace(shape, vocab_size=max(shape.vocab_size, 1 + max(int(part.tokens.max()) for part in parts)))
    shape = replace(shape, experts=0) if options.dense else shape
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = DemoModel(shape, fastest_product(device)).to(device)
    plan = Plan(STARTED + 60 * options.minutes, options.steps, options.batch, shape.context, options.rate)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, parts, plan, device, options.out)
    if device.type == "cuda":
        compiled(trainer)
    return trainer


def main() -> None:
    """Train, evaluate, save."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = build(options, device, read(options.tokens))
    shape, model = trainer.model.shape, trainer.model
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = shape.layers * max(0, shape.experts - shape.active) * 3 * shape.hidden * shape.expert_width
    trainer.write(shape=shape.as_dict(), parameters=total, active=total - idle, device=str(device))
    trainer.run()
    speed = trainer.speed()
    model.narrow = True
    save(model, options.out)
    seen = trainer.step * trainer.plan.batch * trainer.plan.length
    facts = {"steps": trainer.step, "tokens": seen, "tokens_per_second": speed, "parameters": total}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    facts |= {"active": total - idle, "device": name, "torch": torch.__version__, "shape": shape.as_dict()}
    facts |= {"seconds": round(time.monotonic() - STARTED), "complete": trainer.step >= trainer.plan.steps}
    report = facts | trainer.report()
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
