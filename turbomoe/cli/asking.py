"""How ``run`` asks: one prompt alone, or the next turn of a session."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turbomoe.cli.chat import interrupts
from turbomoe.cli.session import SessionFile
from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Event, SamplingParams, Usage
    from turbomoe.models.base import LoadedModel


@dataclass(frozen=True)
class Asked:
    """An answer on its way. Inside ``interrupts`` Ctrl-C may end it as that verb wants; ``usage`` is for afterwards."""

    events: Generator[Event, None, None]
    opens_thought: bool
    usage: Callable[[], Usage]
    interrupts: AbstractContextManager[None] = field(default_factory=nullcontext)


def ask_alone(engine: Engine, text: str, sampling: SamplingParams, args: argparse.Namespace) -> Asked:
    """The prompt and nothing else."""
    from turbomoe.engine.request import Request

    ids, opens_thought = prompt_ids(engine.model, text, args)
    request = Request(tuple(ids), args.predict, sampling, tuple(args.stop))
    return Asked(engine.stream(request), opens_thought, lambda: next(iter(engine.usage.values())))


def ask(
    session: SessionFile, engine: Engine, text: str, sampling: SamplingParams, args: argparse.Namespace
) -> Asked:  # fmt: skip
    """The next turn of a session; the first Ctrl-C ends its answer, which is saved as far as it came."""
    talk = conversation(engine, args)
    session.take_up(talk)
    args.at_exit.insert(0, session.save)
    events = talk.ask(text, sampling, args.predict, tuple(args.stop))
    return Asked(events, talk.opens_thought, lambda: talk.usage, interrupts(talk.stop))


def conversation(engine: Engine, args: argparse.Namespace) -> Conversation:
    """A chat, or a text that goes on, as ``run`` would treat the prompt without a session."""
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.plain_text import PlainText

    tokenizer = engine.model.tokenizer
    if args.raw or tokenizer is None or not tokenizer.chat_template:
        talk = PlainText(engine)
        if not args.raw:
            note_base_model(args)
        return talk
    return Conversation(engine, system=args.system, thinking=thinking(args))


def thinking(args: argparse.Namespace) -> bool | None:
    """What ``--think`` says."""
    return None if args.think is None else args.think == "on"


def tokens_needed(model: LoadedModel, text: str, args: argparse.Namespace) -> int:
    """Tokens of the prompt and of the longest answer; 0 where -n sets no limit, or a session brings more."""
    if args.predict == 0 or args.session is not None or model.tokenizer is None:
        return 0
    return len(prompt_ids(model, text, args)[0]) + int(args.predict)


def prompt_ids(model: LoadedModel, text: str, args: argparse.Namespace) -> tuple[list[int], bool]:
    """Tokens of the prompt, and whether it leaves the model inside a thought."""
    from turbomoe.engine.reasoning import OPEN
    from turbomoe.errors import ModelError
    from turbomoe.upstream.prompts import encode_chat, encode_text, render_chat

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer and cannot read text")
    if args.raw:
        return encode_text(tokenizer, text), False
    if not tokenizer.chat_template:
        note_base_model(args)
        return encode_text(tokenizer, text), False
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = [*system, {"role": "user", "content": text}]
    rendered = render_chat(tokenizer, messages, thinking=thinking(args))
    return encode_chat(tokenizer, messages, thinking=thinking(args)), rendered.rstrip().endswith(OPEN)


def note_base_model(args: argparse.Namespace) -> None:
    """Say that there is no chat; an error under ``--strict`` only where a flag is lost by it."""
    lost = " and ".join(flag for flag, value in (("--system", args.system), ("--think", args.think)) if value)
    why = "the model has no chat template (a base model)"
    if lost:
        board.post(Notice(f"{lost} has no effect", why, avoid=f"leave {lost} out or take an instruction-tuned model"))
    board.post(Notice("the prompt is completed as plain text", why, expected=True))
