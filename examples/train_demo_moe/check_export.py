"""What the export costs: transformers on the trained folder against turbomoe on the GGUF file, on held-out text.

    python check_export.py out demo-moe.gguf tokens.xz --windows 16

For every held-out part and evaluation text, windows of 1,024 tokens: perplexity of both, mean KL divergence in nats a
token, and how often the likeliest token is the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import Part, read
from torch import Tensor, nn

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel

LENGTH = 1024


@dataclass
class Sums:
    """Totals over tokens: losses of both models, divergence, equal first choices."""

    folder: float = 0.0
    gguf: float = 0.0
    divergence: float = 0.0
    same: int = 0
    tokens: int = 0

    def add(self, folder: Tensor, gguf: Tensor, targets: Tensor) -> None:
        """Log-probabilities [tokens, vocabulary] of both models; targets [tokens]."""
        self.folder -= float(folder.gather(1, targets[:, None]).sum())
        self.gguf -= float(gguf.gather(1, targets[:, None]).sum())
        self.divergence += float((folder.exp() * (folder - gguf)).sum())
        self.same += int((folder.argmax(-1) == gguf.argmax(-1)).sum())
        self.tokens += len(targets)

    def row(self) -> dict[str, Any]:
        """Means, rounded."""
        count = max(1, self.tokens)
        return {
            "tokens": self.tokens,
            "folder_perplexity": round(math.exp(self.folder / count), 3),
            "gguf_perplexity": round(math.exp(self.gguf / count), 3),
            "kl": round(self.divergence / count, 5),
            "same_top": round(self.same / count, 4),
        }


def by_transformers(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [1, tokens] -> log-probabilities [tokens, vocabulary], float32."""
    with torch.inference_mode():
        out: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return out.float().log_softmax(-1)


def by_turbomoe(model: LoadedModel, ids: Tensor) -> Tensor:
    """The same through the engine's runner, keys and values exact in float32."""
    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=ids.shape[1], measuring=True)
    logits: Tensor = runner.forward([0], ids, Phase.PREFILL, keep=0)[0].log_softmax(-1)
    return logits


def compare(folder: nn.Module, gguf: LoadedModel, part: Part, windows: int) -> dict[str, Any]:
    """The row of one part."""
    tokens, sums = torch.from_numpy(part.tokens.astype("int64")), Sums()
    for start in range(0, min(windows * LENGTH, len(tokens) - LENGTH), LENGTH):
        ids, targets = tokens[None, start : start + LENGTH], tokens[start + 1 : start + LENGTH + 1]
        sums.add(by_transformers(folder, ids), by_turbomoe(gguf, ids), targets)
    return sums.row()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    folder = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    gguf = load_model(options.gguf, EngineSettings(ctx_size=LENGTH, dtype="float32"))
    rows = {}
    for part in read(options.tokens):
        if part.split != "train":
            name = f"{part.split}/{part.domain}"
            rows[name] = compare(folder, gguf, part, options.windows)
            print(f"{name:28} {rows[name]}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
