"""The pins against what the package declares, and the environment script on machines that lack something."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from turbomoe.upstream.versions import OLDEST, RANGE

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = ("constraints.txt", "constraints-oldest.txt")
DECLARED = [Requirement(text) for text in PROJECT["dependencies"]]
TEST = [Requirement(text) for text in PROJECT["optional-dependencies"]["test"]]
DEV = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]


def pins(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {pin.name.lower().replace("_", "-"): pin for pin in found}


def pinned(name: str, package: str) -> str:
    (specifier,) = pins(name)[package.lower().replace("_", "-")].specifier
    return specifier.version


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_one_exact_version_of_an_index(name: str) -> None:
    for pin in pins(name).values():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert pin.url is None
        assert Version(specifier.version).local is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("requirement", [*DECLARED, *TEST], ids=str)
def test_what_is_declared_is_pinned_within_its_range(name: str, requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned(name, requirement.name))


@pytest.mark.parametrize("requirement", DEV, ids=str)
def test_the_tools_are_pinned(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned("constraints.txt", requirement.name))


def test_the_oldest_set_is_the_oldest_that_is_declared() -> None:
    assert RANGE in PROJECT["dependencies"]
    assert Version(pinned("constraints-oldest.txt", "transformers")).release == (*OLDEST, 0)
    assert Version(pinned("constraints.txt", "transformers")) > Version(
        pinned("constraints-oldest.txt", "transformers")
    )


@pytest.mark.parametrize("package", ["torch", "triton", "setuptools", "scikit-build-core"])
def test_both_sets_share_what_does_not_follow_transformers(package: str) -> None:
    assert pinned(FILES[0], package) == pinned(FILES[1], package)


def test_the_script_installs_the_pinned_torch() -> None:
    script = (ROOT / "tools/make_venv.sh").read_text()
    assert f"pip torch=={pinned('constraints.txt', 'torch')} " in script


def stub(folder: Path, body: str) -> Path:
    path = folder / "python3.stub"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


STUBS = {
    "too old": (
        'case "$1" in -V) echo Python 3.10.2;; *) exit 1;; esac',
        "needs Python 3.11 or newer; * is Python 3.10.2",
    ),
    "no venv": ('case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac', "cannot make virtual environments"),
}


@pytest.mark.parametrize(("body", "message"), STUBS.values(), ids=STUBS)
def test_an_unfit_python_is_one_clear_sentence(tmp_path: Path, body: str, message: str) -> None:
    done = make_venv(tmp_path, str(stub(tmp_path, body)))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for part in message.split(" * "):
        assert part in done.stderr


def test_no_python_is_one_clear_sentence(tmp_path: Path) -> None:
    done = make_venv(tmp_path, "python-that-is-not-there")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("No 'python-that-is-not-there' on this machine.")


def make_venv(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools/make_venv.sh"), str(folder / "venv"), "constraints.txt", "", python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert not (folder / "venv").exists()
    return done


@pytest.mark.parametrize("script", [".ci/run", "tools/make_venv.sh"])
def test_scripts_are_executable_and_sound(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    assert "set -euo pipefail" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=60)
