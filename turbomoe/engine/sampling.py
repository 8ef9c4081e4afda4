"""Drawing the next token: transformers' own logits processors, one private random stream a request."""

from __future__ import annotations

from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from turbomoe.engine.request import SamplingParams


def processors(params: SamplingParams) -> LogitsProcessorList:
    """The processors that ``params`` asks for, in the order of ``generate``."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature == 0.0:
        return chain
    if params.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain


class Sampler:
    """Draws tokens for one request. The same seed and the same logits give the same tokens, whoever else runs."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.chain = processors(params)
        self.generator = torch.Generator()
        self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed)

    def draw(self, logits: torch.Tensor, history: list[int]) -> int:
        """One token from logits [vocab] of a sequence whose tokens so far are ``history``."""
        scores = logits[None].float().cpu()
        if self.chain:
            ids = cast(torch.LongTensor, torch.tensor([history]))
            scores = self.chain(ids, cast(torch.FloatTensor, scores))
        if self.params.temperature == 0.0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generator))
