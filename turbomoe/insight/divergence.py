"""How far a KV setting moves a model from itself: KL divergence, same-top and perplexity on a text.

All settings run side by side, chunk by chunk, against the reference setting, so that no logits are stored. The
noise floor is the reference against an exact float32 cache: what rounding alone does to this model.
Units: KL in nats per token, D(reference || setting); same-top as a share of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from turbomoe.config import KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.models.base import LoadedModel

CHUNK = 256
REFERENCE = KVSettings("bf16", "bf16")
NOISE = KVSettings("f32", "f32")


@dataclass(frozen=True)
class Divergence:
    """The verdict on one setting over ``tokens`` positions. ``kv_bytes`` is what its cache really allocated."""

    label: str
    tokens: int
    perplexity: float
    mean_kl: float
    median_kl: float
    kl_99_9: float
    same_top: float
    bits_per_value: float
    kv_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Arm:
    label: str
    runner: ModelRunner
    kl: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)

    def observe(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits and reference log-probabilities [n, vocab]; targets [m <= n], the next tokens where known."""
        log_q = logits.log_softmax(-1)
        self.kl.append((reference.exp() * (reference - log_q)).sum(-1).clamp(min=0.0))
        self.same.append(log_q.argmax(-1) == reference.argmax(-1))
        self.nll.append(-log_q[: len(targets)].gather(1, targets[:, None])[:, 0])

    def verdict(self) -> Divergence:
        kl, same, nll = torch.cat(self.kl).double(), torch.cat(self.same), torch.cat(self.nll).double()
        memory = self.runner.memory
        return Divergence(
            label=self.label,
            tokens=len(kl),
            perplexity=float(nll.mean().exp()),
            mean_kl=float(kl.mean()),
            median_kl=float(kl.median()),
            kl_99_9=float(kl.quantile(0.999)),
            same_top=float(same.double().mean()),
            bits_per_value=memory.bits_per_value(),
            kv_bytes=memory.nbytes(),
        )


def label_of(kv: KVSettings) -> str:
    """A short name: types, windows, means."""
    types = kv.type_k if kv.type_k == kv.type_v else f"K {kv.type_k} V {kv.type_v}"
    return f"{types} {kv.sink}/{kv.recent}{'' if kv.means else ' no means'}"


def compare(
    model: LoadedModel,
    ids: Sequence[int],
    settings: Sequence[KVSettings],
    progress: Callable[[int, int], None] | None = None,
) -> list[Divergence]:
    """Judge ``settings`` on the tokens ``ids``; the first verdict is the reference, the second the noise floor."""

    def arm(label: str, kv: KVSettings) -> _Arm:
        return _Arm(label, ModelRunner(model, kv, slots=1, ctx_size=len(ids), means=means_for(model, kv)))

    arms = [arm("bf16 (reference)", REFERENCE), arm("f32 (noise floor)", NOISE)]
    arms += [arm(label_of(kv), kv) for kv in settings]
    tokens = torch.tensor(ids)
    for at in range(0, len(ids), CHUNK):
        chunk, targets = tokens[None, at : at + CHUNK], tokens[at + 1 : at + 1 + CHUNK]
        reference = None
        for one in arms:
            logits = one.runner.forward([0], chunk, Phase.PREFILL, keep=0)[0]
            reference = logits.log_softmax(-1) if reference is None else reference
            one.observe(logits, reference, targets)
        if progress is not None:
            progress(min(at + CHUNK, len(ids)), len(ids))
    return [one.verdict() for one in arms]
