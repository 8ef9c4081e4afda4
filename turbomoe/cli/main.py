"""The command line: picks a verb, turns errors into one sentence and an exit code.

Exit codes: 0 success; 1 an error, named in one sentence on standard error; 2 wrong usage or a setting out of its
range; 130 interrupted from the keyboard; 141 the reader of our output went away. Nothing heavy (torch,
transformers) is imported before a verb runs: help has to come at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from turbomoe import __version__
from turbomoe.errors import SettingsError, TurbomoeError
from turbomoe.notices import board

# One file a verb in this folder, each with add_parser(subparsers) and main(args) -> int.
VERBS = ("run", "chat", "profile", "simulate", "eval", "demo", "doctor")

OK, ERROR, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a verb's parser sets ``main`` to the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="turbomoe",
        description="Run language models on one box: long context in TurboQuant codes, experts in system memory.",
        epilog="Exit codes: 0 success, 1 error, 2 usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"turbomoe {__version__}")
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB")
    for verb in VERBS:
        importlib.import_module(f"turbomoe.cli.{verb}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SettingsError as error:  # a value that a flag's own reader refuses
        return report(error, debug=False)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return USAGE
    board.strict = args.strict
    # Before torch is imported. Threads that spin while they wait are ruinous when anything else runs (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    """The verb, then what it wants done at its end, however it ended (``args.at_exit``: saving what was learnt).

    Every error is printed when it happens, and the first one decides the exit code.
    """
    args.at_exit = []
    codes = [_attempt(lambda: int(args.main(args)), args.debug)]
    if codes == [INTERRUPTED] and args.at_exit:
        print("Interrupted.", file=sys.stderr, flush=True)  # saving may take a while, and fail
    codes += [_attempt(partial(_at_exit, finish), args.debug) for finish in args.at_exit]
    return next((code for code in codes if code != OK), OK)


def _at_exit(finish: Callable[[], object]) -> int:
    finish()
    return OK


def _attempt(action: Callable[[], int], debug: bool) -> int:
    """The exit code of ``action``, or of what ended it, once that has been told."""
    try:
        code = action()
        sys.stdout.flush()  # here, where a reader that went away can still be answered
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except SystemExit as stop:  # libraries of servers do that
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        return report(_in_words(error), debug)
    return code


def _in_words(error: Exception) -> Exception:
    """A full disk is nobody's bug; where it is the output that is full, the flush at exit shall not fail once more."""
    if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
        return error
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    full = TurbomoeError(f"No space is left for {error.filename or 'what this writes'}", fix="Free some")
    full.__cause__ = error
    return full


def report(error: Exception, debug: bool) -> int:
    """Print ``error`` for a person and return the exit code that it means."""
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, TurbomoeError):
        print(error, file=sys.stderr)
    else:
        name = type(error).__name__
        print(f"turbomoe met an error it did not expect: {name}: {error}. See more with --debug.", file=sys.stderr)
    return USAGE if isinstance(error, SettingsError) else ERROR


def _abandon_stdout() -> None:
    """Point standard output at nothing, so that the flush at exit does not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
