"""Does llama.cpp read the exported file, and does it choose the tokens that turbomoe would choose?

    pip install xllamacpp
    python check_llama_cpp.py demo-moe.gguf

llama.cpp continues each prompt greedily through the HTTP server that ``xllamacpp`` starts on loopback; turbomoe then
runs over prompt and continuation. Printed: places where its own first choice is another token, with the gap between
the two in nats, and the mean difference of the log-probabilities of the chosen tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

PROMPTS = (
    "The old man went down to the sea",
    "It is a truth universally",
    'def read_file(path):\n    """',
    "static int ext4_",
    "The kernel reads the file",
    "SYNOPSIS\n\n",
    "Die Datei wird",
    "Le système de fichiers",
    "В этом разделе",
    "func (s *Server) ",
)
TOKENS, CONTEXT = 64, 512


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp made of one prompt: tokens of the prompt, tokens chosen and their log-probabilities."""

    prompt: list[int]
    chosen: list[int]
    logs: list[float]


def by_llama_cpp(path: Path) -> Iterator[Continuation]:
    """The continuation of every prompt."""
    import xllamacpp  # type: ignore[import-not-found,unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), CONTEXT, 1, False
    server = xllamacpp.Server(params)
    for prompt in PROMPTS:
        ids = _ask(server, "tokenize", content=prompt, add_special=True)["tokens"]
        body = {"temperature": 0, "top_k": 1, "n_probs": 1, "return_tokens": True, "cache_prompt": False}
        answer = _ask(server, "completion", prompt=prompt, n_predict=TOKENS, **body)
        logs = [row["logprob"] for row in answer["completion_probabilities"]]
        yield Continuation(ids, answer["tokens"], logs)


def _ask(server: Any, verb: str, **body: Any) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server.listening_address}/{verb}", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def judge(model: LoadedModel, prompt: str, other: Continuation) -> dict[str, Any]:
    """turbomoe's opinion of one continuation."""
    assert model.tokenizer is not None
    same_prompt = encode_text(model.tokenizer, prompt) == other.prompt
    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=CONTEXT, measuring=True)
    ids = torch.tensor([[*other.prompt, *other.chosen]])
    logits = runner.forward([0], ids, Phase.PREFILL, keep=0)[0]
    logs = logits.log_softmax(-1)[len(other.prompt) - 1 : -1]
    chosen = logs.gather(1, torch.tensor(other.chosen)[:, None])[:, 0]
    gaps = logs.max(-1).values - chosen
    far = (chosen - torch.tensor(other.logs)).abs()
    elsewhere = {place: round(gap, 4) for place, gap in enumerate(gaps.tolist()) if gap > 0}
    return {
        "prompt": prompt,
        "same_prompt_tokens": same_prompt,
        "tokens": len(other.chosen),
        "elsewhere": elsewhere,
        "mean_difference": round(float(far.mean()), 5),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf
    model = load_model(path, EngineSettings(ctx_size=CONTEXT, dtype="float32"))
    rows = []
    for prompt, other in zip(PROMPTS, by_llama_cpp(path), strict=True):
        rows.append(judge(model, prompt, other))
        print(rows[-1], flush=True)
    tokens, elsewhere = (sum(row["tokens"] for row in rows), sum(len(row["elsewhere"]) for row in rows))
    difference = sum(row["mean_difference"] for row in rows) / len(rows)
    print(json.dumps({"tokens": tokens, "same_choice": tokens - elsewhere, "mean_difference": round(difference, 5)}))


if __name__ == "__main__":
    main()
