"""``turbomoe run``: one prompt, one streamed answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from turbomoe.cli.answer import AnswerWriter
from turbomoe.cli.asking import ask, ask_alone, tokens_needed
from turbomoe.cli.loading import Stopwatch, load, make_engine, statistics, statistics_line
from turbomoe.cli.main import INTERRUPTED
from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.prompts import read_text
from turbomoe.cli.sampling import add_sampling, check_sampling, sampling_params
from turbomoe.cli.session import add_session, session_file
from turbomoe.errors import SettingsError
from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from turbomoe.engine.request import Event, Finish


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = "Answer one prompt. The answer goes to standard output; thinking, notes and statistics to standard error."
    parser = subparsers.add_parser("run", help="answer one prompt", description=text)
    add_model(parser)
    parser.add_argument("prompt", nargs="?", help="the prompt; without it -f or standard input is read")
    parser.add_argument("-p", "--prompt", dest="prompt_flag", metavar="TEXT", help="the same, as a flag")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument("--raw", action="store_true", help="complete the text as it stands, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--think", choices=("on", "off"), help="switch a thinking model's thoughts on or off")
    add_session(parser)
    add_sampling(parser)
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load, answer, report."""
    check_sampling(args)
    if args.raw and (args.system or args.think):
        raise SettingsError("--raw leaves no place for --system and --think", fix="Leave out one or the other")
    text = read_prompt(args)
    session = session_file(args)
    check = None if session is None else session.check_model
    model, settings = load(args, needed=lambda model: tokens_needed(model, text, args), check=check)
    engine = make_engine(model, settings)
    sampling = sampling_params(args, model.sampling)
    asked = ask_alone(engine, text, sampling, args) if session is None else ask(session, engine, text, sampling, args)
    watch, writer = Stopwatch(), AnswerWriter(asked.opens_thought, show=not args.json)
    with asked.interrupts, closing(asked.events):
        finish = stream(asked.events, watch, writer)
    figures = statistics(engine, asked.usage(), watch)
    if args.json:
        answer = {"text": writer.answer, "reasoning": writer.reasoning, "finish": finish.value}
        print(json.dumps({"model": model.name, **answer, **figures}))
    else:
        print(statistics_line(figures, finish.value), file=sys.stderr)
    note_cut(finish, engine.ctx_size)
    return INTERRUPTED if finish.value == "cancelled" else 0


def stream(events: Generator[Event, None, None], watch: Stopwatch, writer: AnswerWriter) -> Finish:
    """Write the answer while it comes; why it ended."""
    from turbomoe.engine.request import Finish

    finish = Finish.CANCELLED
    for event in events:
        if event.token is not None:
            watch.tick()
        writer.write(event.text)
        finish = event.finish or finish
    writer.close()
    return finish


def note_cut(finish: Finish, ctx_size: int) -> None:
    """Tell that the context, and not the model, ended the answer."""
    if finish.value == "context":
        why = f"the context of {ctx_size} tokens is full"
        board.post(Notice("the answer was cut", why, avoid="use a larger --ctx-size"))


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the argument, a file or standard input; it must be UTF-8 and not empty."""
    given = [text for text in (args.prompt, args.prompt_flag) if text is not None]
    if len(given) + (args.file is not None) > 1:
        raise SettingsError("There are two prompts", fix="Give one, as an argument, with -p, or with -f")
    if given:
        return _not_empty(str(given[0]))
    if args.file is None and sys.stdin.isatty():
        raise SettingsError("There is no prompt", fix="Give one as an argument, with -f FILE, or on standard input")
    return _not_empty(read_text(args.file))


def _not_empty(text: str) -> str:
    if not text.strip():
        raise SettingsError("The prompt is empty", fix="Write something to answer")
    return text
