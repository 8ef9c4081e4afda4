"""doctor: every finding has a state, a problem has a next step, and the exit code tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hardware.machines import GIB, join_v2, meminfo, v2_group, write
from turbomoe.cli import doctor
from turbomoe.cli.main import main
from turbomoe.hardware import checks
from turbomoe.hardware.checks import Check
from turbomoe.hardware.cpu import Cpu

EXPECTED = {"turbomoe", "python", "torch", "transformers", "tokenizers", "triton", "platform", "cpu", "memory"}
EXPECTED |= {"c compiler", "native core", "state folder", "demo:smollm2", "demo:moe"}


def test_this_machine_is_well(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert {check["name"] for check in report["checks"]} >= EXPECTED
    assert all(set(check) == {"name", "value", "state", "advice"} for check in report["checks"])


def test_text_says_the_same(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all well"
    assert any(str(state_home) in line for line in lines)


def test_a_problem_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "machine_checks", lambda: [Check("cpu", "on fire", "problem", "Put it out")])
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "problem cpu" in output
    assert "-> Put it out" in output
    assert output.endswith("1 to mend\n")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_note_does_not() -> None:
    assert doctor.render([Check("cpu", "slow", "note", "Be patient")]).endswith("all well")


@pytest.mark.parametrize(
    ("requirement", "state"),
    [("torch>=2.0", "ok"), ("torch<1", "problem"), ("torch", "ok"), ("no-such-package-here>=1", "problem")],
)
def test_requirements(requirement: str, state: str) -> None:
    check = doctor.requirement_check(requirement)
    assert check.state == state
    assert check.advice == (f"pip install '{requirement}'" if state == "problem" else "")


def test_declared_requirements_hold_the_seams() -> None:
    assert any(text.startswith("transformers") and "<6" in text for text in doctor.declared_requirements())


@pytest.mark.parametrize(("system", "state"), [("Linux", "ok"), ("Darwin", "problem"), ("", "problem")])
def test_platform(system: str, state: str) -> None:
    assert checks.platform_check(system, "arm64", "1.0").state == state


def cpu(usable: int, quota: float | None = None) -> Cpu:
    return Cpu("Fast 9000", ("avx2",), 8, usable, quota)


def test_cpu_states_what_limits_it() -> None:
    assert checks.cpu_check(cpu(8)) == Check("cpu", "Fast 9000, 8 of 8 cores usable, avx2")
    assert checks.cpu_check(cpu(2, 1.5)).advice.endswith("a quota of 1.5 CPUs")
    assert checks.cpu_check(cpu(2)).advice.endswith("its affinity mask")


def test_memory_states_what_limits_it(tmp_path: Path) -> None:
    meminfo(tmp_path, 8 * GIB, 6 * GIB)
    assert checks.memory_check(tmp_path) == Check("memory", "6.0 GiB available of 8.0 GiB")
    join_v2(tmp_path, "/")
    v2_group(tmp_path, "/", max=GIB)
    limited = checks.memory_check(tmp_path)
    assert (limited.state, limited.value) == ("note", "1.0 GiB available of 1.0 GiB")
    assert "memory.max" in limited.advice


def test_memory_of_another_system_is_a_problem(tmp_path: Path) -> None:
    assert checks.memory_check(tmp_path).state == "problem"


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "word"),
    [(False, None, "ok", "none"), (True, None, "note", "CPU build"), (True, "13.0", "note", "13.0")],
)
def test_why_there_is_no_gpu(driver: bool, cuda: str | None, state: str, word: str) -> None:
    check = checks.no_gpu_check(driver, cuda)
    assert check.state == state
    assert word in check.value


def test_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, "file", "not a folder")
    check = checks.state_check(tmp_path / "file")
    assert check.state == "problem"
    assert "TURBOMOE_HOME" in check.advice
    assert checks.state_check(tmp_path / "new" / "folder").state == "ok"


def test_no_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert checks.compiler_check().state == "note"


def test_a_broken_compiler_is_still_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, "cc", "#!/bin/false")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.compiler_check() == Check("c compiler", str(tmp_path / "cc"))
