"""``turbomoe chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from turbomoe.cli.loading import Stopwatch, load, make_engine, statistics, statistics_line
from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.run import AnswerWriter
from turbomoe.cli.sampling import add_sampling, sampling_params
from turbomoe.errors import RequestError

if TYPE_CHECKING:
    from turbomoe.engine.conversation import Conversation
    from turbomoe.engine.request import SamplingParams

HELP = """\
/help           this list
/clear          start anew (the system message stays)
/drop           forget the oldest question and its answer, to make room
/retry          answer the last question again
/think on|off   thinking, where the model has a switch for it
/stats          figures after each answer, on and off
/exit           leave (so does Ctrl-D)
Several lines:  end a line with \\ to go on, or press Alt-Enter. Ctrl-C stops an answer."""
CONTEXT_FULL = (
    "The context is full. /drop forgets the oldest exchange, /clear starts anew, a larger -c gives more room."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("chat", help="chat in the terminal", description=f"Chat. Commands:\n{HELP}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--think", choices=("on", "off"), help="switch a thinking model's thoughts on or off")
    add_sampling(parser)
    add_engine(parser)
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Load the model and talk until the user leaves."""
    from turbomoe.engine.conversation import Conversation

    model, settings = load(args)
    thinking = None if args.think is None else args.think == "on"
    conversation = Conversation(make_engine(model, settings), system=args.system, thinking=thinking)
    print(f"{model.name}. /help shows the commands.", file=sys.stderr)
    Chat(conversation, sampling_params(args, model.sampling), args.predict, json_lines=args.json).loop(questions())
    return 0


def questions() -> Iterator[str]:
    """What the user types, one question at a time; plain lines when nobody sits at a terminal."""
    if not sys.stdin.isatty():
        yield from _plain_questions()
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    from turbomoe.config import state_dir

    folder = state_dir()
    folder.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(folder / "chat_history")))
    ask: Callable[[str], str] = session.prompt
    while True:
        try:
            yield _joined(ask)
        except KeyboardInterrupt:
            print("Ctrl-D or /exit leaves.", file=sys.stderr)
        except EOFError:
            return


def _joined(ask: Callable[[str], str]) -> str:
    """One question, which goes on while its lines end with a backslash."""
    text = ask("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + ask(". ")
    return text


def _plain_questions() -> Iterator[str]:
    lines = iter(sys.stdin)
    for line in lines:
        text = line.rstrip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + next(lines, "").rstrip("\n")
        yield text


class Chat:
    """Reads questions and commands, streams answers."""

    def __init__(self, conversation: Conversation, sampling: SamplingParams, limit: int, json_lines: bool) -> None:
        self.conversation, self.sampling, self.limit, self.json_lines = conversation, sampling, limit, json_lines
        self.show_statistics = True
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP),
            "/clear": self.clear,
            "/drop": self.drop,
            "/retry": self.retry,
            "/think": self.think,
            "/stats": self.statistics,
        }

    def loop(self, questions: Iterator[str]) -> None:
        """Until /exit or the end of the input."""
        for text in questions:
            word, _, rest = text.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word in self.commands:
                self.commands[word](rest.strip())
            elif word.startswith("/"):
                self.say(f"There is no command {word}; /help lists them.")
            elif word:
                self.answer(text)

    def say(self, text: str) -> None:
        """A remark of ours, not the model's."""
        print(text, file=sys.stderr)

    def clear(self, _: str) -> None:
        self.conversation.clear()
        self.say("Starting anew.")

    def drop(self, _: str) -> None:
        self.say("Forgot the oldest exchange." if self.conversation.forget_oldest() else "There is nothing to forget.")

    def retry(self, _: str) -> None:
        asked = self.conversation.retract()
        self.say("There is nothing to answer again.") if asked is None else self.answer(asked)

    def think(self, choice: str) -> None:
        if choice not in ("on", "off"):
            self.say("Write /think on or /think off.")
            return
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
            self.say(f"{error}\n{CONTEXT_FULL}")
            return
        watch, writer = Stopwatch(), AnswerWriter(self.conversation.opens_thought, show=not self.json_lines)
        finish = "cancelled"
        try:
            for event in events:
                if event.token is not None:
                    watch.tick()
                writer.write(event.text)
                finish = event.finish.value if event.finish else finish
        except KeyboardInterrupt:
            events.close()
        writer.close()
        self._report(finish, watch, writer)

    def _report(self, finish: str, watch: Stopwatch, writer: AnswerWriter) -> None:
        figures = statistics(self.conversation.engine, self.conversation.usage, watch)
        if self.json_lines:
            print(json.dumps({"text": writer.answer, "reasoning": writer.reasoning, "finish": finish, **figures}))
        elif self.show_statistics:
            self.say(statistics_line(figures))
        if finish == "context":
            self.say(CONTEXT_FULL)
