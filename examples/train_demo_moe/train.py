"""Train the demo model, or with --dense its sister of equal active parameters, within a given time on one GPU.

    python train.py tokens.xz out --minutes 8
    python train.py tokens.xz out-dense --dense --steps N      # N from the first run's log: the same tokens

Writes ``out/``: model-*.safetensors, config.json, log.jsonl (loss curve) and report.json; ``export.py`` does the rest.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from batches import Plan
from checkpoint import save
from data import Part, read
from model import DemoModel
from products import fastest_product
from shape import Shape
from torch import nn
from trainer import STARTED, Trainer

TINY = Shape(512, 64, 4, 8, 2, 32, 32, 2, 1, 32, 2, 4, 16, context=128)


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


def size_of(model: DemoModel) -> dict[str, int]:
    """Weights of the model, and those of them that one token uses."""
    shape, total = model.shape, sum(parameter.numel() for parameter in model.parameters())
    idle = shape.layers * max(0, shape.experts - shape.active) * 3 * shape.hidden * shape.expert_width
    return {"parameters": total, "active": total - idle}


def facts(trainer: Trainer, speed: int) -> dict[str, Any]:
    """What was trained, for how long, on what."""
    plan, cuda = trainer.plan, trainer.device.type == "cuda"
    return {
        "steps": trainer.step,
        "tokens": trainer.step * plan.batch * plan.length,
        "tokens_per_second": speed,
        **size_of(trainer.model),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "shape": trainer.model.shape.as_dict(),
        "seconds": round(time.monotonic() - STARTED),
        "complete": trainer.step >= plan.steps,
    }


def main() -> None:
    """Train, evaluate, save."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = build(options, device, read(options.tokens))
    model = trainer.model
    trainer.write(shape=model.shape.as_dict(), **size_of(model), device=str(device))
    trainer.run()
    speed = trainer.speed()
    model.narrow = True
    save(model, options.out)
    report = facts(trainer, speed) | trainer.evaluation.report()
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
