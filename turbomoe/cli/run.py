"""``turbomoe run``: one prompt, one streamed answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.cli.loading import Stopwatch, load, make_engine, statistics, statistics_line
from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.sampling import add_sampling, sampling_params
from turbomoe.errors import RequestError, SettingsError

if TYPE_CHECKING:
    from turbomoe.engine.engine import Engine


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
    add_sampling(parser)
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load, answer, report."""
    text = read_prompt(args)
    from turbomoe.engine.request import Request

    model, settings = load(args)
    engine = make_engine(model, settings)
    ids, opens_thought = prompt_ids(engine, text, args)
    request = Request(tuple(ids), args.predict, sampling_params(args, model.sampling), tuple(args.stop))
    watch = Stopwatch()
    writer = AnswerWriter(opens_thought, show=not args.json)
    finish = None
    for event in engine.stream(request):
        if event.token is not None:
            watch.tick()
        writer.write(event.text)
        finish = event.finish or finish
    writer.close()
    figures = statistics(engine, next(iter(engine.usage.values())), watch)
    if args.json:
        answer = {"text": writer.answer, "reasoning": writer.reasoning, "finish": finish and finish.value}
        print(json.dumps({"model": model.name, **answer, **figures}))
    else:
        print(statistics_line(figures), file=sys.stderr)
    return 0


def prompt_ids(engine: Engine, text: str, args: argparse.Namespace) -> tuple[list[int], bool]:
    """Tokens of the prompt, and whether it leaves the model inside a thought."""
    from turbomoe.engine.reasoning import OPEN
    from turbomoe.errors import ModelError
    from turbomoe.upstream.prompts import encode_chat, encode_text, render_chat

    tokenizer = engine.model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{engine.model.name} has no tokenizer and cannot read text")
    if args.raw or not tokenizer.chat_template:
        return encode_text(tokenizer, text), False
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = [*system, {"role": "user", "content": text}]
    thinking = None if args.think is None else args.think == "on"
    rendered = render_chat(tokenizer, messages, thinking=thinking)
    return encode_chat(tokenizer, messages, thinking=thinking), rendered.rstrip().endswith(OPEN)


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


def read_text(path: str | None) -> str:
    """A UTF-8 text file, or standard input for None. Errors name the file and the place."""
    name = path or "standard input"
    try:
        data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"Cannot read {name}", why=error.strerror or str(error)) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text",
            why=f"byte {error.start} cannot be read",
            fix="Convert it, as with iconv -t utf-8",
        ) from error


def _not_empty(text: str) -> str:
    if not text.strip():
        raise SettingsError("The prompt is empty", fix="Write something to answer")
    return text


class AnswerWriter:
    """Streams an answer to standard output and thoughts to standard error, and keeps both."""

    def __init__(self, thinking: bool, show: bool = True) -> None:
        from turbomoe.engine.reasoning import ReasoningSplitter

        self._splitter, self._show = ReasoningSplitter(thinking), show
        self.answer = self.reasoning = ""

    def write(self, text: str) -> None:
        self._put(self._splitter.push(text))

    def close(self) -> None:
        """Flush what was held back and end the line."""
        self._put(self._splitter.finish())
        if self._show:
            print(flush=True)

    def _put(self, pieces: list[tuple[bool, str]]) -> None:
        for is_reasoning, text in pieces:
            if is_reasoning:
                self.reasoning += text
            else:
                text = text if self.answer else text.lstrip("\n")
                self.answer += text
            if self._show:
                print(text, end="", flush=True, file=sys.stderr if is_reasoning else sys.stdout)
