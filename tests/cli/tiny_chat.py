"""A tiny model file that can chat, and the command line in this process, for tests of the verbs.

The weights are random, so what the model says is noise, but it says it through the whole path: file, tokenizer,
chat template, engine. ``says`` puts a model in its place that says what a test wants.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from tests.engine.scripted import scripted_model, smollm2_tokenizer
from tests.files.vocabularies import byte_level, trained
from tests.tiny_models import tiny_model, write_gguf
from turbomoe.cli import main as cli
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.base import Forecast
from turbomoe.notices import board

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 512
IM_END = 2


@cache
def _vocabulary() -> dict[str, Any]:
    return byte_level(trained(ByteLevel(add_prefix_space=False), 300), "gpt-2")


def write_chat_model(
    path: Path, *, family: str = "llama", template: str | None = CHATML, tokenizer: bool = True,
    more: Callable[[GGUFWriter], None] | None = None,
) -> Path:  # fmt: skip
    """A tiny model of ``family`` with a byte-level tokenizer of some 300 tokens."""
    vocabulary = _vocabulary()

    def keys(writer: GGUFWriter) -> None:
        if tokenizer:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(vocabulary["tokenizer.ggml.tokens"])
            writer.add_token_types(vocabulary["tokenizer.ggml.token_type"])
            writer.add_token_merges(vocabulary["tokenizer.ggml.merges"])
        if tokenizer and template is not None:
            writer.add_chat_template(template)
        if more is not None:
            more(writer)

    roles = {role: vocabulary[f"tokenizer.ggml.{role}_id"] for role in ("bos_token", "eos_token")}
    ids = {f"{role}_id": number for role, number in roles.items()}
    model = tiny_model(family, vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), **ids)
    return write_gguf(model, path, keys=keys)


@dataclass(frozen=True)
class Done:
    """What one command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Turbomoe = Callable[..., Done]


def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Turbomoe:
    """The command line in this process, with a fresh notice board each time."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(board, "strict", False)
        monkeypatch.setattr(board, "_printed", set())
        monkeypatch.setattr(board, "counts", type(board.counts)())
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        output = capsys.readouterr()
        return Done(code, output.out, output.err)

    return run


class Says:
    """A model for ``-m``: SmolLM2's tokenizer, and the answers that it is given, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        path.touch()
        self.path, self.model, self._patch = path, scripted_model(stop_ids=[IM_END]), monkeypatch
        monkeypatch.setattr("turbomoe.models.load_model", self._load)
        monkeypatch.setattr("turbomoe.engine.calibrate.needs_means", lambda model, kv: False)  # it has no attention

    def __call__(self, *answers: str) -> None:
        """Answer the next prompts so; each answer is followed by the end of the turn."""
        from turbomoe.engine.engine import Engine

        left, submit = list(answers), Engine.submit

        def scripted(engine: Engine, request: Any) -> int:
            request_id = submit(engine, request)
            answer = smollm2_tokenizer()(left.pop(0))["input_ids"]
            engine.model.shell.script = [0] * (len(request.prompt) - 1) + [*answer, IM_END]
            return request_id

        self._patch.setattr(Engine, "submit", scripted)

    def template(self, text: str | None) -> None:
        self._patch.setattr(smollm2_tokenizer(), "chat_template", text)

    def _load(self, path: Path, settings: Any, progress: Any, *, before: Any) -> Any:
        from transformers import LlamaConfig

        shapes, model = (AttentionShape(0, 2, 1, 64),), self.model
        before(Forecast(1000, 0, shapes, model.context_length, LlamaConfig(), model.identity))
        progress(1000, 1000)
        return self.model
