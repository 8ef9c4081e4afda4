"""Print what the model writes after a prompt of each domain; the same every time.

python samples.py demo:moe
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from turbomoe.config import EngineSettings
from turbomoe.engine.engine import Engine
from turbomoe.engine.request import Request, SamplingParams
from turbomoe.files.reference import resolve
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

PROMPTS = {
    "prose": ("The captain looked at the sea and", "Mr. Bennet replied that he"),
    "docs": ("The option --verbose", "To install the package, run"),
    "code": ('def merge(left, right):\n    """', "static int __init"),
    "multilingual": ("Wenn Sie die Datei speichern,", "Cette commande permet de", "Если файл не найден,"),
}
SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
TOKENS, CONTEXT = 80, 256


def continuation(model: LoadedModel, prompt: str) -> str:
    """At most ``TOKENS`` tokens after the prompt."""
    assert model.tokenizer is not None
    request = Request(tuple(encode_text(model.tokenizer, prompt)), max_tokens=TOKENS, sampling=SAMPLING)
    return "".join(event.text for event in Engine(model, EngineSettings(ctx_size=CONTEXT)).stream(request))


def samples(model: LoadedModel) -> Iterator[str]:
    """One Markdown section a prompt."""
    for domain, prompts in PROMPTS.items():
        for prompt in prompts:
            yield f"{domain}: **{prompt!r}**\n\n```text\n{prompt}{continuation(model, prompt)}\n```\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo:moe, or a path to an exported file")
    model = load_model(resolve(parser.parse_args().model), EngineSettings(ctx_size=CONTEXT))
    for sample in samples(model):
        print(sample, flush=True)


if __name__ == "__main__":
    main()
