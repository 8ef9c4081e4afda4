"""llama.cpp's own quantised KV caches on the text of kv_quality.py: each against its own f16 cache, stored as JSON.

    pip install --target DIR --no-deps --no-binary llama-cpp-python llama-cpp-python    # built for this machine
    pip install --target DIR --no-deps diskcache jinja2 typing_extensions
    PYTHONPATH=DIR python benchmarks/kv_peers.py demo:smollm2 --name smollm2

Its weights and activations are packed, ours in kv_quality.py are float32: that cancels only in so far as both arms of a
comparison share it. What does not cancel is the noise floor, here its bf16 cache against its f16 cache (an f32 cache is
no floor: with flash attention it is cast to f16 first, and gives the same bits).
"""

from __future__ import annotations

import argparse
import ctypes
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kv_quality import circumstances, store

from turbomoe.cli.eval import render
from turbomoe.cli.loading import quiet_transformers
from turbomoe.config import EngineSettings
from turbomoe.files.reference import resolve
from turbomoe.insight.divergence import CHUNK, Divergence, kl_divergence
from turbomoe.insight.texts import NAME, judgement_text

# ggml's type number and bits a value: q8_0 is 34 bytes for 32 values, q4_0 18.
TYPES = {"f16 (reference)": (1, 16.0), "bf16 (noise floor)": (30, 16.0), "q8_0": (8, 8.5), "q4_0": (2, 4.5)}


def measure(reference: str, name: str, tokens: int) -> None:
    """Judge its caches side by side, chunk by chunk."""
    quiet_transformers()
    import llama_cpp

    path = resolve(reference)
    ids = _ids(path, tokens)
    arms = {label: _Context(llama_cpp, str(path), kind, len(ids)) for label, (kind, _) in TYPES.items()}
    found: dict[str, list[torch.Tensor]] = {label: [] for label in arms}
    for at in range(0, len(ids), CHUNK):
        chunk, targets = ids[at : at + CHUNK], torch.tensor(ids[at + 1 : at + 1 + CHUNK])
        expected = None
        for label, arm in arms.items():
            log_q = arm.decode(chunk, at).log_softmax(-1)
            expected = log_q if expected is None else expected
            found[label].append(_figures(expected, log_q, targets))
    verdicts = [_verdict(label, torch.cat(rows), TYPES[label][1]) for label, rows in found.items()]
    record = {
        "text": NAME, "tokens": len(ids), **circumstances(), "llama-cpp-python": version("llama-cpp-python"),
        "results": [verdict.to_json() for verdict in verdicts],
    }  # fmt: skip
    store(f"llama.cpp-{name}", record)
    print(render(verdicts))
    print(json.dumps(record))


def _ids(path: Path, tokens: int) -> list[int]:
    """The very tokens that kv_quality.py judges."""
    from turbomoe.models import load_model
    from turbomoe.upstream.prompts import encode_text

    model = load_model(path, EngineSettings(ctx_size=tokens))
    return encode_text(model.tokenizer, judgement_text())[:tokens]


def _figures(expected: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n, 3]: KL, whether the likeliest token is the same, and the loss (NaN where the next token is not known)."""
    loss = torch.full((len(log_q),), float("nan"))
    loss[: len(targets)] = -log_q[: len(targets)].gather(1, targets[:, None])[:, 0]
    same = (log_q.argmax(-1) == expected.argmax(-1)).float()
    return torch.stack([kl_divergence(expected, log_q), same, loss], 1)


def _verdict(label: str, rows: torch.Tensor, bits: float) -> Divergence:
    kl, same, loss = rows.double().unbind(1)
    return Divergence(
        label, len(rows), float(loss.nanmean().exp()), float(kl.mean()), float(kl.median()), float(kl.quantile(0.999)),
        float(same.mean()), bits, kv_bytes=0,
    )  # fmt: skip


class _Context:
    """One context of llama.cpp, with keys and values of one type, flash attention and all logits."""

    def __init__(self, api: Any, path: str, kind: int, tokens: int) -> None:
        self.api = api
        self.llama = api.Llama(
            path, n_ctx=-(-tokens // 256) * 256, n_batch=CHUNK, n_ubatch=CHUNK, n_threads=1, n_threads_batch=1,
            type_k=kind, type_v=kind, flash_attn=True, verbose=False,
        )  # fmt: skip
        self.batch = api.llama_batch_init(CHUNK, 0, 1)

    def decode(self, ids: list[int], first: int) -> torch.Tensor:
        """Logits float32 [n, vocab] of the tokens at positions ``first`` and on."""
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, first + i, 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        status = self.api.llama_decode(self.llama.ctx, self.batch)
        assert status == 0, f"llama_decode answered {status}"
        found = self.api.llama_get_logits(self.llama.ctx)
        shape = (len(ids), self.llama.n_vocab())
        pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=shape).copy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    measure(args.reference, args.name, args.tokens)


if __name__ == "__main__":
    main()
