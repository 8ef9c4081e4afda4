"""``turbomoe chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from turbomoe.cli.answer import AnswerWriter
from turbomoe.cli.loading import Stopwatch, load, make_engine, statistics, statistics_line
from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.prompts import questions
from turbomoe.cli.sampling import add_sampling, check_sampling, sampling_params
from turbomoe.cli.session import SessionFile, add_session, session_file
from turbomoe.errors import ContextFullError, RequestError

if TYPE_CHECKING:
    from collections.abc import Generator

    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.request import Event, SamplingParams

HELP = """\
/help           this list
/clear          start anew (the system message stays)
/drop           forget the oldest question and its answer, to make room
/retry          answer the last question again
/think on|off   thinking, where the model has a switch for it
/stats          figures after each answer, on and off
/exit           leave (so does Ctrl-D)
Several lines:  end a line with \\ to go on, or press Alt-Enter. Ctrl-C stops an answer."""
COMMAND = re.compile(r"/[a-z]+")
WAY_ON = "/drop forgets the oldest exchange, then /retry asks again; /clear starts anew; a larger -c gives more room."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = f"Chat in the terminal, or answer the lines of standard input in turn. Commands:\n\n{HELP}"
    parser = subparsers.add_parser("chat", help="chat in the terminal", description=text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--think", choices=("on", "off"), help="switch a thinking model's thoughts on or off")
    add_session(parser)
    add_sampling(parser)
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load the model and talk until the user leaves."""
    check_sampling(args)
    session = session_file(args)
    from turbomoe.engine.conversation import Conversation

    model, settings = load(args, check=None if session is None else session.check_model)
    thinking = None if args.think is None else args.think == "on"
    conversation = Conversation(make_engine(model, settings), system=args.system, thinking=thinking)
    if session is not None:
        session.take_up(conversation)
        args.at_exit.insert(0, session.save)
    print(f"{model.name}, {conversation.engine.ctx_size} tokens of context. /help shows the commands.", file=sys.stderr)
    sampling = sampling_params(args, model.sampling)
    Chat(conversation, sampling, args.predict, json_lines=args.json, session=session).loop(questions())
    return 0


@contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C calls ``stop``, which lets the step under way finish; a second one breaks it off."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """Reads questions and commands, streams answers."""

    def __init__(
        self, conversation: Conversation, sampling: SamplingParams, limit: int, json_lines: bool,
        session: SessionFile | None = None,
    ) -> None:  # fmt: skip
        self.session = session
        self.conversation, self.sampling, self.limit, self.json_lines = conversation, sampling, limit, json_lines
        self.show_statistics = True
        self.unanswered: str | None = None  # a question that was refused or stopped before its first word
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP),
            "/clear": self.clear,
            "/drop": self.drop,
            "/retry": self.retry,
            "/think": self.think,
            "/stats": self.statistics,
        }

    def loop(self, questions: Iterable[str]) -> None:
        """Until /exit or the end of the input."""
        for text in questions:
            word, _, rest = text.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word in self.commands:
                self.commands[word](rest.strip())
            elif COMMAND.fullmatch(word):  # and not a path, which a question may well begin with
                self.say(f"There is no command {word}; /help lists them.")
            elif word:
                self.answer(text)

    def say(self, text: str) -> None:
        """A remark of ours, not the model's."""
        print(text, file=sys.stderr, flush=True)

    def clear(self, _: str) -> None:
        self.conversation.clear()
        self.unanswered = None
        self.say("Starting anew.")

    def drop(self, _: str) -> None:
        self.say("Forgot the oldest exchange." if self.conversation.forget_oldest() else "There is nothing to forget.")

    def retry(self, _: str) -> None:
        asked = self.unanswered or self.conversation.retract()
        self.say("There is nothing to answer again.") if asked is None else self.answer(asked)

    def think(self, choice: str) -> None:
        from turbomoe.upstream.prompts import supports_thinking

        if choice not in ("on", "off"):
            self.say("Write /think on or /think off.")
        elif not supports_thinking(self.conversation.tokenizer):
            self.say("This model has no switch for thinking.")
        else:
            self.conversation.thinking = choice == "on"
            self.say(f"Thinking is {choice}.")

    def statistics(self, _: str) -> None:
        self.show_statistics = not self.show_statistics
        self.say(f"Statistics are {'on' if self.show_statistics else 'off'}.")

    def answer(self, text: str) -> None:
        """Stream one answer; Ctrl-C stops it and keeps what was said."""
        try:
            events = self.conversation.ask(text, self.sampling, self.limit)
        except RequestError as error:
            self._refuse(text, error)
            return
        watch, writer = Stopwatch(), AnswerWriter(self.conversation.opens_thought, show=not self.json_lines)
        finish = self._stream(events, watch, writer)
        self.unanswered = text if finish == "cancelled" and not watch.tokens else None
        self._report(finish, watch, writer)
        if self.session is not None:
            self.session.answered()

    def _stream(self, events: Generator[Event, None, None], watch: Stopwatch, writer: AnswerWriter) -> str:
        """Write what comes; why it ended."""
        finish = "cancelled"
        try:
            with interrupts(self.conversation.stop):
                for event in events:
                    if event.token is not None:
                        watch.tick()
                    writer.write(event.text)
                    finish = event.finish.value if event.finish else finish
        except KeyboardInterrupt:
            events.close()
        writer.close()
        return finish

    def _refuse(self, text: str, error: RequestError) -> None:
        self.unanswered = text
        if self.json_lines:
            self._print_json({"error": str(error)})
        self.say(f"{error}\n{WAY_ON}" if isinstance(error, ContextFullError) else str(error))

    def _report(self, finish: str, watch: Stopwatch, writer: AnswerWriter) -> None:
        figures = statistics(self.conversation.engine, self.conversation.usage, watch)
        if self.json_lines:
            self._print_json({"text": writer.answer, "reasoning": writer.reasoning, "finish": finish, **figures})
        elif self.show_statistics:
            self.say(statistics_line(figures, finish))
        if finish == "context":
            self.say(f"The context is full. {WAY_ON}")

    def _print_json(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)
