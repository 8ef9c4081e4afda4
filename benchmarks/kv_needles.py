"""Whether a model still finds single sentences in a long text when the text is stored in codes.

    python benchmarks/kv_needles.py FILE --name qwen2.5-coder-0.5b --tokens 16384 --kv tcq2.5

Sentences such as "The access code for Lisbon is 41903." are spread over a real text. Each setting reads it once, beside
a bf16 cache; then every question is asked of the same prefix and answered greedily. Also printed: the KL divergence of
the settings over the whole text. Arithmetic is the one that ``turbomoe run`` uses (packed weights where there are any).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kv_quality import circumstances, store

from turbomoe.cli.eval import parse_spec
from turbomoe.cli.loading import quiet_transformers
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import means_for
from turbomoe.engine.runner import ModelRunner, check_finite
from turbomoe.experts.base import Phase
from turbomoe.files.reference import resolve
from turbomoe.insight.divergence import CHUNK, REFERENCE, kl_divergence, label_of
from turbomoe.insight.texts import judgement_text
from turbomoe.kv.snapshot import parts, restore
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

CITIES = (
    "Lisbon Oslo Cairo Lima Hanoi Quito Dublin Nairobi Vienna Havana "
    "Seoul Tunis Prague Manila Riga Bogota Athens Kyoto Warsaw Denver"
).split()
NEEDLE = " The access code for {city} is {code}."
QUESTION = "\n\nQuestion: What is the access code for {city}?\nAnswer: The access code for {city} is"
ANSWER_TOKENS = 8
MARGIN = 64  # tokens of room for a question and its answer
DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class _Arm:
    kv: KVSettings
    runner: ModelRunner
    kl: list[torch.Tensor] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def measure(reference: str, name: str, tokens: int, specs: list[str]) -> None:
    """Read, ask, store what was found."""
    quiet_transformers()
    model = load_model(resolve(reference), EngineSettings(ctx_size=tokens))
    codes = {city: str(random.Random(city).randrange(10000, 100000)) for city in CITIES}
    ids = encode_text(model.tokenizer, haystack(model, tokens, codes))
    settings = [REFERENCE, *(parse_spec(spec) for spec in specs)]
    arms = [_arm(model, kv, len(ids) + MARGIN) for kv in settings]
    read(model, arms, ids)
    for arm in arms:
        ask(model, arm, len(ids), codes)
        print(label_of(arm.kv), sum(arm.found), "of", len(codes), arm.answers, flush=True)
    record = {
        "model": model.name, "identity": model.identity, "tokens": len(ids), "needles": len(codes), **circumstances(),
        "arms": [_row(arm) for arm in arms],
    }  # fmt: skip
    store(f"needles-{name}-{tokens}", record)
    print(json.dumps(record))


def haystack(model: LoadedModel, tokens: int, codes: dict[str, str]) -> str:
    """Text of at most ``tokens`` tokens, with the sentences of ``codes`` at even depths behind full stops.

    Moby-Dick's first chapters; where they are too short, then this project's documents in order of name.
    """
    text = "\n\n".join([judgement_text(), *(path.read_text("utf-8") for path in sorted(DOCS.glob("*.md")))])
    kept = encode_text(model.tokenizer, text)[: tokens - 16 * len(codes)]
    text = model.tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [_full_stop(text, (i + 0.5) / len(codes)) for i in range(len(codes))]
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    needles = [NEEDLE.format(city=city, code=code) for city, code in codes.items()]
    return "".join(piece + needle for piece, needle in zip(pieces, [*needles, ""], strict=True))


def _full_stop(text: str, depth: float) -> int:
    """Where the first sentence ends behind this share of the text."""
    return text.index(". ", int(depth * len(text))) + 1


def _arm(model: LoadedModel, kv: KVSettings, size: int) -> _Arm:
    means = means_for(model, kv)
    return _Arm(kv, ModelRunner(model, kv, slots=1, ctx_size=size, means=means, measuring=True))


def read(model: LoadedModel, arms: list[_Arm], ids: list[int]) -> None:
    """Prefill all arms side by side, collecting their KL from the first."""
    for chunk in _chunks(ids):
        expected = None
        for arm in arms:
            logits = arm.runner.forward([0], chunk, Phase.PREFILL, keep=0)[0]
            check_finite(logits, model)
            log_q = logits.log_softmax(-1)
            expected = log_q if expected is None else expected
            arm.kl.append(kl_divergence(expected, log_q))


def _chunks(ids: list[int]) -> Iterator[torch.Tensor]:
    for at in range(0, len(ids), CHUNK):
        yield torch.tensor([ids[at : at + CHUNK]])


def ask(model: LoadedModel, arm: _Arm, length: int, codes: dict[str, str]) -> None:
    """Every question after the same prefix, which is put back each time."""
    memory = arm.runner.memory
    saved = {part.name: part.read().clone() for part in parts(memory, 0, length)}
    for city, code in codes.items():
        restore(memory, 0, length, saved.__getitem__)
        answer = _answer(model, arm.runner, encode_text(model.tokenizer, QUESTION.format(city=city)))
        arm.answers.append(answer)
        arm.found.append(code in answer)


def _answer(model: LoadedModel, runner: ModelRunner, ids: list[int]) -> str:
    said: list[int] = []
    logits = runner.forward([0], torch.tensor([ids]), Phase.PREFILL)
    while len(said) < ANSWER_TOKENS:
        said.append(int(logits[0, -1].argmax()))
        logits = runner.forward([0], torch.tensor([said[-1:]]), Phase.DECODE)
    return str(model.tokenizer.decode(said))


def _row(arm: _Arm) -> dict[str, object]:
    kl = torch.cat(arm.kl).double()
    return {
        "label": label_of(arm.kv),
        "bits_per_value": arm.runner.memory.bits_per_value(),
        "found": sum(arm.found),
        "missed": [city for city, found in zip(CITIES, arm.found, strict=True) if not found],
        "mean_kl": float(kl.mean()),
        "median_kl": float(kl.median()),
        "mean_kl_second_half": float(kl[len(kl) // 2 :].mean()),
        "answers": arm.answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kv", action="append", required=True, metavar="SPEC", help="as in turbomoe eval")
    args = parser.parse_args()
    measure(args.reference, args.name, args.tokens, args.kv)


if __name__ == "__main__":
    main()
