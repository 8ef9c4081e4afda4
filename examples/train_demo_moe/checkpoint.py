"""The trained folder: config.json and small safetensors shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import DemoModel
from safetensors.torch import save_file
from torch import Tensor

SHARD = 15_900_000


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
