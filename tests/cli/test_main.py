"""The command line itself: quick help, exit codes, one sentence an error, a clean end when interrupted."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from turbomoe import __version__
from turbomoe.cli import main as cli
from turbomoe.cli.options import add_common
from turbomoe.errors import RequestError, SettingsError
from turbomoe.notices import Notice, board

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "triton", "jinja2")


def turbomoe(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turbomoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], Callable[..., int]]:
    """A command line whose only verb, ``test``, does what the test says."""

    def install(action: Callable[[], int]) -> Callable[..., int]:
        def build() -> argparse.ArgumentParser:
            parser = argparse.ArgumentParser(prog="turbomoe")
            sub = parser.add_subparsers(dest="verb").add_parser("test")
            add_common(sub)
            sub.set_defaults(main=lambda args: action())
            return parser

        monkeypatch.setattr(cli, "build_parser", build)
        monkeypatch.setattr(board, "strict", False)
        return lambda *flags: cli.main(["test", *flags])

    return install


def fail_with(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_help_comes_at_once() -> None:
    """The issue's limit, best of five: 0.4 s. In processor time, so that a busy machine does not fail it."""
    taken = []
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert turbomoe("--help").returncode == 0
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)
    assert min(taken) < 0.4, taken


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom turbomoe.cli.main import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit as end: assert end.code == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_an_unknown_kv_type_is_refused_while_nothing_heavy_is_there() -> None:
    for line in (["run", "-m", "x", "-ctk", "tq5"], ["eval", "-m", "x", "--kv", "tq5"]):
        code = (
            f"import sys\nfrom turbomoe.cli.main import main\nassert main({line!r}) == 2\n"
            f"print([name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "[]\n" and done.stderr.startswith(
            "There is no KV cache type 'tq5'. The nearest name is tq"
        )


def test_every_verb_is_listed_and_explains_itself() -> None:
    listing = turbomoe("--help").stdout
    needed = {verb: ["-m", "x"] for verb in ("run", "chat", "eval")}
    needed |= {"profile": ["-m", "x", "--text", "t"], "simulate": ["t"]}
    for verb in cli.VERBS:
        assert f"\n    {verb}" in listing
        assert cli.build_parser().parse_args([verb, *needed.get(verb, [])]).verb == verb


def test_version() -> None:
    assert turbomoe("--version").stdout == f"turbomoe {__version__}\n"


def test_no_verb_is_a_usage_error_that_shows_the_help() -> None:
    done = turbomoe()
    assert done.returncode == cli.USAGE
    assert done.stdout == ""
    assert "usage: turbomoe" in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"], ["doctor", "extra"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = turbomoe(*arguments)
    assert done.returncode == cli.USAGE
    assert "usage: turbomoe" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_its_sentences_and_nothing_else(verb, capsys) -> None:
    error = RequestError("The prompt is too long", why="it has 9 tokens and 8 fit", fix="Raise --ctx-size")
    assert verb(fail_with(error))() == cli.ERROR
    output = capsys.readouterr()
    assert output.err == "The prompt is too long. it has 9 tokens and 8 fit. Raise --ctx-size.\n"
    assert output.out == ""


def test_a_setting_out_of_range_is_a_usage_error(verb, capsys) -> None:
    assert verb(fail_with(SettingsError("--ctx-size must be positive")))() == cli.USAGE
    assert capsys.readouterr().err == "--ctx-size must be positive.\n"


def test_debug_shows_the_traceback(verb, capsys) -> None:
    assert verb(fail_with(RequestError("Too long")))("--debug") == cli.ERROR
    output = capsys.readouterr().err
    assert output.startswith("Traceback")
    assert output.endswith("turbomoe.errors.RequestError: Too long.\n")


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_unexpected_error_is_one_line_with_a_next_step(verb, capsys, error: Exception) -> None:
    assert verb(fail_with(error))() == cli.ERROR
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert type(error).__name__ in line
    assert "--debug" in line


def test_strict_makes_a_note_an_error(verb, capsys) -> None:
    def action() -> int:
        board.post(Notice("the cache was shrunk", "memory is short"))
        return 0

    run = verb(action)
    assert run() == cli.OK
    assert "note: the cache was shrunk" in capsys.readouterr().err
    assert run("--strict") == cli.ERROR
    assert capsys.readouterr().err.startswith("the cache was shrunk.")


def test_the_code_of_a_verb_is_the_code_of_the_command(verb) -> None:
    assert verb(lambda: 1)() == 1


def test_interrupt_is_quiet(verb, capsys) -> None:
    assert verb(fail_with(KeyboardInterrupt()))() == cli.INTERRUPTED
    assert capsys.readouterr().err == "\n"


def test_a_real_interrupt_ends_a_real_process_quietly() -> None:
    code = (
        "import sys, time, argparse\nfrom turbomoe.cli import main as cli\n"
        "import turbomoe.cli.doctor as doctor\n"
        "def work(): print('ready', flush=True); time.sleep(30)\n"
        "doctor.software_checks = work\n"
        "sys.exit(cli.main(['doctor']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == cli.INTERRUPTED
        assert child.stderr is not None and "Traceback" not in child.stderr.read()


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "turbomoe", "doctor"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == ""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A command line whose verb ends as ``action`` does, and leaves ``finishes`` to be done."""

    def run(action: Callable[[], int], *finishes: Callable[[], None]) -> int:
        def main(args: argparse.Namespace) -> int:
            args.at_exit += finishes
            return action()

        def build() -> argparse.ArgumentParser:
            parser = argparse.ArgumentParser(prog="turbomoe")
            sub = parser.add_subparsers(dest="verb").add_parser("test")
            add_common(sub)
            sub.set_defaults(main=main)
            return parser

        monkeypatch.setattr(cli, "build_parser", build)
        monkeypatch.setattr(board, "strict", False)
        return cli.main(["test"])

    return run


NO_SESSION, NO_PROFILE = (fail_with(RequestError(f"No {name}")) for name in ("session", "profile"))


def test_what_is_done_at_the_end_does_not_hang_on_what_failed_before(ending, capsys) -> None:
    done: list[str] = []
    assert ending(lambda: 0, NO_SESSION, NO_PROFILE, lambda: done.append("last")) == cli.ERROR
    assert done == ["last"] and capsys.readouterr().err == "No session.\nNo profile.\n"


def test_saving_that_fails_does_not_hide_why_the_verb_ended(ending, capsys) -> None:
    """Both are told, the first one first, and it decides the exit code."""
    bad_setting = fail_with(SettingsError("Too many slots"))
    assert ending(bad_setting, NO_SESSION) == cli.USAGE
    assert capsys.readouterr().err == "Too many slots.\nNo session.\n"
    assert ending(lambda: 7, NO_SESSION) == 7


def test_saving_that_fails_does_not_hide_an_interrupt(ending, capsys) -> None:
    assert ending(fail_with(KeyboardInterrupt()), NO_SESSION) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nInterrupted.\nNo session.\n"
    assert ending(lambda: 0, fail_with(KeyboardInterrupt()), NO_PROFILE) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nNo profile.\n"


def test_saving_happens_though_nobody_reads_the_answer(ending, monkeypatch, capsys) -> None:
    gone: list[bool] = []
    monkeypatch.setattr(cli, "_abandon_stdout", lambda: gone.append(True))
    assert ending(fail_with(BrokenPipeError()), NO_SESSION) == cli.BROKEN_PIPE
    assert gone == [True] and capsys.readouterr().err == "No session.\n"


def test_a_full_disk_is_told_in_a_sentence(ending, monkeypatch, capsys) -> None:
    gone: list[bool] = []
    monkeypatch.setattr(cli, "_abandon_stdout", lambda: gone.append(True))
    assert ending(fail_with(OSError(errno.ENOSPC, "No space left on device"))) == cli.ERROR
    assert capsys.readouterr().err == "No space is left for what this writes. Free some.\n" and not gone
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout.flush", fail_with(OSError(errno.ENOSPC, "No space left on device", "/out")))
        assert ending(lambda: 0) == cli.ERROR
    assert gone and capsys.readouterr().err == "No space is left for /out. Free some.\n"
    assert ending(fail_with(OSError(errno.EIO, "x"))) == cli.ERROR
    assert "did not expect: OSError" in capsys.readouterr().err
