"""Fixtures of the verbs' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny_chat import Says, Turbomoe, in_process, write_chat_model


@pytest.fixture
def turbomoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Turbomoe:
    """The command line in this process: ``turbomoe("run", "-m", path, ...)`` gives code, out and err."""
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer and a chat template; do not change the file."""
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Says:
    """A model that says what it is told, at ``says.path``."""
    return Says(monkeypatch, tmp_path / "scripted.gguf")
