"""The training loop, its clock and its log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from batches import Batches, Plan
from data import Part
from evaluation import Evaluation, precision
from model import DemoModel
from optimisers import WARMUP, Optimisers, learning_rate
from torch import Tensor

STARTED = time.monotonic()
BALANCE = 0.005
"""Weight of the balance loss: enough that no expert starves, little enough that domains keep their favourites."""
NARROW_FROM = 0.7
"""Part of the run from which the experts are rounded to Q4_0."""


class Trainer:
    """The loop, its clock and its log."""

    def __init__(self, model: DemoModel, parts: list[Part], plan: Plan, device: torch.device, out: Path) -> None:
        self.model, self.plan, self.device = model, plan, device
        self.batches = Batches(parts, plan, device)
        self.evaluation = Evaluation(model, parts, plan, device)
        self.optimisers = Optimisers(model, plan.rate)
        self.log = open(out / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (as long as the run)
        self.step, self.clock_start, self.step_start = 0, time.monotonic(), 0

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
                self.write(step=self.step, progress=progress, held=self.evaluation.glance())
                next_check += 0.08

    def train_step(self, share: float) -> tuple[Tensor, Tensor]:
        """One batch forward, backward and update -> (loss, balance loss) still on the device."""
        ids, targets = self.batches.next()
        with precision(self.device):
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
