"""What is installed is what is needed: wheels with the core, without a compiler, and the one set of compiler flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from turbomoe.native.build import FLAGS, LEVEL_FLAGS, SOURCE_DIR

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_both_builds_have_the_same_flags() -> None:
    """CMake says C11 and position-independent code in its own words."""
    lines = (ROOT / "CMakeLists.txt").read_text().split("target_compile_options(turbomoe_core PRIVATE ")[1]
    assert lines.split(")")[0].split() == [f for f in FLAGS if f not in ("-std=gnu11", "-fPIC", "-pthread")]
    for name, flags in LEVEL_FLAGS.items():
        assert f'"{";".join(flags)}"' in (ROOT / "CMakeLists.txt").read_text(), name


def test_the_core_is_optional_and_editable_installs_leave_it_out() -> None:
    editable, failed = PROJECT["tool"]["scikit-build"]["overrides"]
    assert editable["if"] == {"state": "editable"} and failed["if"] == {"failed": True}
    assert editable["wheel"]["cmake"] is failed["wheel"]["cmake"] is False
    assert "python -m turbomoe.native.build" in failed["messages"]["after-success"]


def copy_of_the_project(folder: Path) -> Path:
    """What a wheel is made of, without what was built beside it."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", ".build-*")
    shutil.copytree(ROOT / "turbomoe", folder / "turbomoe", ignore=ignore)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(project: Path, to: Path, **environment: str) -> Path:
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed (make_venv.sh does)")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(to), str(project)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = to.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("turbomoe/")}


def everything(project: Path) -> set[str]:
    return {str(p.relative_to(project)) for p in (project / "turbomoe").rglob("*") if p.is_file()}


def run_unpacked(site: Path, expression: str) -> subprocess.CompletedProcess[str]:
    """Print what ``turbomoe.native.library`` of the package in ``site`` says."""
    # The finder of an editable install, an object and no class, would come before the path.
    code = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]\n"
    code += f"from turbomoe.native import library; print({expression})"
    environment = os.environ | {"PYTHONPATH": str(site), "TURBOMOE_HOME": str(site.parent / "home")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_pure_and_whole(tmp_path: Path) -> None:
    """Every file comes along, the C sources too; where it is unpacked it computes, and says what it lacks."""
    project = copy_of_the_project(tmp_path / "project")
    wheel = build_wheel(project, tmp_path / "wheels", CC="/nonexistent/cc")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == everything(project)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = run_unpacked(site, "library.load_core(), library.__file__")
    assert done.stdout.startswith(f"None {site}")
    assert done.stderr.count("\n") == 1 and "python -m turbomoe.native.build" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_wheel_with_a_compiler_has_the_core(tmp_path: Path) -> None:
    """One wheel for every Python on this platform, with the library in place of its sources."""
    project = copy_of_the_project(tmp_path / "project")
    wheel = build_wheel(project, tmp_path / "wheels")
    assert "-py3-none-linux_" in wheel.name
    sources = {str(Path("turbomoe/native/src") / p.name) for p in SOURCE_DIR.iterdir()}
    assert contents(wheel) == everything(project) - sources | {"turbomoe/native/libturbomoe_core.so"}
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = run_unpacked(site, "library.__file__, library.describe_core()")
    assert done.stdout.startswith(f"{site}/turbomoe/native/library.py compiled core, ")
