"""How far a KV setting moves a model from itself: KL divergence, same-top and perplexity on a text.

All settings run side by side, chunk by chunk, against the reference setting, so that no logits are stored. The
noise floor is the reference against an exact float32 cache: what rounding alone does to this model.
Units: KL in nats per token, D(reference || setting); same-top as a share of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for, needs_means
from turbomoe.engine.forecast import kv_bytes, memory_use
from turbomoe.engine.runner import ModelRunner, check_finite
from turbomoe.experts.base import Phase
from turbomoe.hardware.memory import MemoryUse
from turbomoe.kv.cache import EXACT_TYPES
from turbomoe.kv.means import KVMeans
from turbomoe.models.base import Forecast, LoadedModel

CHUNK = 256
LOGIT_COPIES = 5  # of a chunk, alive at the same time: logits, their log-softmax, the reference's, two temporaries
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
        self.kl.append(kl_divergence(reference, log_q))
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


def kl_divergence(reference: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """D(reference || q) in nats from log-probabilities [n, vocab]: [n], what rounding makes negative is 0."""
    return (reference.exp() * (reference - log_q)).sum(-1).clamp(min=0.0)


def label_of(kv: KVSettings) -> str:
    """A short name: types, and for codes windows and means."""
    types = kv.type_k if kv.type_k == kv.type_v else f"K {kv.type_k} V {kv.type_v}"
    if kv.type_k in EXACT_TYPES and kv.type_v in EXACT_TYPES:
        return types
    return f"{types} {kv.sink}/{kv.recent}{'' if kv.means else ' no means'}"


def arms_of(settings: Sequence[KVSettings]) -> list[tuple[str, KVSettings]]:
    """What is run side by side to judge ``settings``: the reference, the noise floor, and they."""
    return [("bf16 (reference)", REFERENCE), ("f32 (noise floor)", NOISE), *((label_of(kv), kv) for kv in settings)]


def comparison_use(forecast: Forecast, settings: EngineSettings, judged: Sequence[KVSettings]) -> MemoryUse:
    """What ``compare`` will take: the weights once, a cache for every arm, and the logits of a whole chunk."""
    use = memory_use(forecast, settings)
    caches = sum(kv_bytes(forecast, settings, kv) for _, kv in arms_of(judged))
    logits = 4 * LOGIT_COPIES * CHUNK * int(forecast.config.vocab_size)
    return replace(use, kv=caches, workspace=use.workspace + logits)


def compare(
    model: LoadedModel,
    ids: Sequence[int],
    settings: Sequence[KVSettings],
    progress: Callable[[int, int], None] | None = None,
    others: Mapping[str, tuple[KVSettings, KVMeans]] | None = None,
) -> list[Divergence]:
    """Judge ``settings`` on the tokens ``ids``; the first verdict is the reference, the second the noise floor.

    ``others`` are judged too, each under its label and with means of its own in the place of the model's.
    """
    arms = _arms(model, len(ids), settings)
    for label, (kv, means) in (others or {}).items():
        arms.append(_Arm(label, ModelRunner(model, kv, slots=1, ctx_size=len(ids), means=means)))
    report = progress or (lambda done, total: None)
    tokens = torch.tensor(ids)
    for at in range(0, len(ids), CHUNK):
        report(at, len(ids))
        chunk, targets = tokens[None, at : at + CHUNK], tokens[at + 1 : at + 1 + CHUNK]
        reference = None
        for one in arms:
            logits = one.runner.forward([0], chunk, Phase.PREFILL, keep=0)[0]
            check_finite(logits, model)
            reference = logits.log_softmax(-1) if reference is None else reference
            one.observe(logits, reference, targets)
    report(len(ids), len(ids))
    return [one.verdict() for one in arms]


def _arms(model: LoadedModel, ctx_size: int, settings: Sequence[KVSettings]) -> list[_Arm]:
    wanting = [kv for kv in settings if needs_means(model, kv)]
    shared = means_for(model, wanting[0]) if wanting else None
    return [
        _Arm(label, ModelRunner(model, kv, slots=1, ctx_size=ctx_size, means=shared if kv in wanting else None))
        for label, kv in arms_of(settings)
    ]
