"""The measurement behind ``auto``: pairs of KV types side by side on a text, against a bf16 cache.

Only positions that see codes are judged: within sinks and recent tokens every pair is exact. A pair that cannot come
within its limit any more is given up, which saves most of the time on models that bear little; so is one whose
numbers are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch

from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.forecast import kv_bytes
from turbomoe.engine.runner import ModelRunner, check_finite
from turbomoe.experts.base import Phase
from turbomoe.insight.divergence import LOGIT_COPIES, REFERENCE, kl_divergence
from turbomoe.insight.kv_pause import Pause
from turbomoe.insight.kv_search import Measured, Pair
from turbomoe.insight.texts import judgement_text
from turbomoe.kv.cache import KVCache
from turbomoe.kv.means import KVMeans
from turbomoe.models.base import Forecast, LoadedModel
from turbomoe.notices import Notice, board

TOKENS = 2048
JUDGED = 1024  # at least, where windows are so wide that they leave less of TOKENS
FEWEST = 64  # judged positions below which a mean says nothing
CHUNK = 64  # rows of logits alive at once: some 40 MB a copy for a vocabulary of 150,000
UNJUDGED_CHUNK = 512
LETTERS = 6  # a token has fewer, on average, in any vocabulary made for English
Progress = Callable[[int, int], None]


def first_judged(kv: KVSettings) -> int:
    """The first position that sees a code: all up to it lie in the windows."""
    return kv.sink + kv.recent + 1


def check_tokens(kv: KVSettings, context_length: int) -> int:
    """Tokens that a check of these windows runs, at most."""
    return min(max(TOKENS, first_judged(kv) + JUDGED), context_length)


def check_ids(model: LoadedModel, kv: KVSettings) -> list[int]:
    """Tokens from the end of the judgement text: neither what means are calibrated on nor what eval reads first.

    Fewer than ``check_tokens`` where the text has no more.
    """
    from turbomoe.upstream.prompts import encode_text

    assert model.tokenizer is not None
    count = check_tokens(kv, model.context_length)
    text = judgement_text()
    paragraph = text.find("\n\n", max(0, len(text) - LETTERS * count))
    return encode_text(model.tokenizer, text[max(0, paragraph) :].lstrip())[:count]


def check_bytes(forecast: Forecast, settings: EngineSettings, arms: Sequence[KVSettings]) -> int:
    """What a check of ``arms`` side by side takes beside the weights: their caches, and logits of a chunk."""
    tokens = check_tokens(settings.kv, forecast.context_length)
    small = replace(settings, ctx_size=tokens, parallel=1)
    caches = sum(kv_bytes(forecast, small, kv) for kv in (REFERENCE, *arms))
    return caches + 4 * LOGIT_COPIES * CHUNK * int(forecast.config.vocab_size)


@dataclass(eq=False)
class _Arm:
    runner: ModelRunner
    limit: float
    sums: list[tuple[float, int]] = field(default_factory=list)  # of KLs, and over how many positions, by chunk
    failed: bool = False

    def measured(self, of: int) -> Measured:
        tokens = sum(count for _, count in self.sums)
        mean = sum(total for total, _ in self.sums) / max(1, tokens)
        return Measured(mean, tokens, of, self.failed, _error_of(mean, self.sums))

    def run(self, chunk: torch.Tensor, expected: torch.Tensor, judged: bool) -> None:
        """One chunk more, against the reference's log-probabilities ``expected``."""
        log_q = _forward(self.runner, chunk, judged)
        self.failed = not log_q.isfinite().all()
        if judged and not self.failed:
            self.sums.append((float(kl_divergence(expected, log_q).double().sum()), chunk.shape[1]))


def _error_of(mean: float, sums: list[tuple[float, int]]) -> float:
    """The standard error of a mean over chunks, each with its sum and count; 0 for fewer than two."""
    if len(sums) < 2:
        return 0.0
    squares = sum((total - count * mean) ** 2 for total, count in sums)
    return sqrt(squares * len(sums) / (len(sums) - 1)) / sum(count for _, count in sums)


def measure(
    model: LoadedModel, kv: KVSettings, means: KVMeans | None, ids: list[int], limits: Mapping[Pair, float],
    progress: Progress | None = None, pause: Pause | None = None,
) -> dict[Pair, Measured]:  # fmt: skip
    """Mean KL of every pair of ``limits`` with the windows of ``kv``, over the tokens ``ids``.

    With ``pause`` it goes on where the same pass was broken off, and leaves there how far it has come.

    A pair that computes numbers that are not finite has failed, and the others go on; raises ``ModelError`` where
    the bf16 cache gives such numbers: then it is the model.
    """

    def runner(mine: KVSettings, means: KVMeans | None = None) -> ModelRunner:
        return ModelRunner(model, mine, slots=1, ctx_size=len(ids), means=means, measuring=True)

    reference = runner(REFERENCE)
    arms = {(k, v): _Arm(runner(replace(kv, type_k=k, type_v=v), means), limit) for (k, v), limit in limits.items()}
    of, live = len(ids) - first_judged(kv), list(arms.values())
    report = progress or (lambda done, total: None)
    done = 0 if pause is None else _take_up(pause, reference, arms, len(ids))
    for start, end in _chunks(first_judged(kv), len(ids)):
        if start < done:
            continue
        report(start, len(ids))
        live = [arm for arm in live if not arm.failed and arm.measured(of).at_least <= arm.limit]
        if not live:
            break
        if pause is not None:
            pause.keep(_plan(arms), start, _shown(arms), _caches(reference, arms, live))
        chunk, judged = torch.tensor([ids[start:end]]), start >= first_judged(kv)
        expected = _forward(reference, chunk, judged)
        check_finite(expected, model)
        for arm in live:
            arm.run(chunk, expected, judged)
    report(len(ids), len(ids))
    return {pair: arm.measured(of) for pair, arm in arms.items()}


def _take_up(pause: Pause, reference: ModelRunner, arms: Mapping[Pair, _Arm], total: int) -> int:
    """The tokens that this pass has behind it, with caches and sums as they were there."""

    def read(shown: Any) -> None:
        found = [([(float(kl), int(count)) for kl, count in sums], bool(failed)) for sums, failed in shown]
        for arm, known in list(zip(arms.values(), found, strict=True)):
            arm.sums, arm.failed = known

    done = pause.take_up(_plan(arms), _caches(reference, arms, list(arms.values())), read)
    if done:
        what, why = "the check of KV types goes on", f"it was broken off after {done} of {total} tokens"
        board.post(Notice(what, why, expected=True))
    return done


def _plan(arms: Mapping[Pair, _Arm]) -> list[Any]:
    return [UNJUDGED_CHUNK, CHUNK, *([*pair, arm.limit] for pair, arm in arms.items())]


def _shown(arms: Mapping[Pair, _Arm]) -> list[Any]:
    return [[arm.sums, arm.failed] for arm in arms.values()]


def _caches(reference: ModelRunner, arms: Mapping[Pair, _Arm], live: list[_Arm]) -> dict[str, KVCache]:
    mine = {"/".join(pair): arm.runner.memory for pair, arm in arms.items() if arm in live}
    return {"reference": reference.memory, **mine}


def _chunks(judged: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(0, judged, UNJUDGED_CHUNK):
        yield start, min(start + UNJUDGED_CHUNK, judged)
    for start in range(judged, end, CHUNK):
        yield start, min(start + CHUNK, end)


def _forward(runner: ModelRunner, chunk: torch.Tensor, judged: bool) -> torch.Tensor:
    """Log-probabilities [n, vocab] of a chunk; of its last position alone where nothing is judged."""
    return runner.forward([0], chunk, Phase.PREFILL, keep=0 if judged else 1)[0].log_softmax(-1)
