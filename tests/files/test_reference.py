"""References: every form leads somewhere, or to an error that says what would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.errors import ModelReferenceError
from turbomoe.files import hub
from turbomoe.files.reference import resolve, title_of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the hub was asked for."""
    calls: list[tuple[str, str]] = []

    def download(repository: str, quant: str = "") -> Path:
        calls.append((repository, quant))
        return Path("/downloaded")

    monkeypatch.setattr(hub, "download", download)
    return calls


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "hf:odd").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("hf:odd") == Path("hf:odd")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("hf:user/repo", ("user/repo", "")),
        ("hf:user/repo:Q4_K_M", ("user/repo", "Q4_K_M")),
        ("HF:some-org/Qwen3.5-35B_A3B-GGUF:ud-q4_k_xl", ("some-org/Qwen3.5-35B_A3B-GGUF", "ud-q4_k_xl")),
    ],
)
def test_hub_references_are_split(asked: list[tuple[str, str]], text: str, call: tuple[str, str]) -> None:
    assert resolve(text) == Path("/downloaded")
    assert asked == [call]


@pytest.mark.parametrize(
    "text", ["hf:", "hf:repo", "hf:a/b/c", "hf:../..", "hf:a/..", "hf:/etc/passwd", "hf:a b/c", "hf:a/b\n", "hf:-a/b"]
)
def test_other_hub_references_never_reach_the_hub(asked: list[tuple[str, str]], text: str) -> None:
    with pytest.raises(ModelReferenceError, match="Write hf:user/repo"):
        resolve(text)
    assert asked == []


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "A model is a path"),
        ("  ", "A model is a path"),
        ("smollm2", "write demo:smollm2"),
        ("SmolLM", "write demo:smollm2"),
        ("demo:smollm", "Known: .*smollm2"),
        ("demo:", "Known: moe, smollm2"),
        ("user/some-repo", "write hf:user/some-repo"),
        ("https://example.org/model.gguf", "begins with https:.* A model is a path"),
        ("ollama:llama3", "begins with ollama:"),
        ("nul\0byte", "A model is a path"),
        ("n" * 5000, "A model is a path"),
        ("/no/such/folder/model.gguf", "A model is a path"),
    ],
)
def test_references_that_lead_nowhere_say_what_would(text: str, advice: str) -> None:
    with pytest.raises(ModelReferenceError, match=advice):
        resolve(text)


def test_a_mistyped_name_gets_its_neighbours(tmp_path: Path) -> None:
    for name in ("qwen3-Q4_K_M.gguf", "qwen3-Q8_0.gguf", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelReferenceError, match=r"Near it there is .*qwen3-Q4_K_M\.gguf") as caught:
        resolve(str(tmp_path / "qwen3-Q4_KM.gguf"))
    assert "notes.txt" not in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"(hf|demo|file|C):[\w./:\\-]{0,30}", fullmatch=True))
def test_any_text_is_a_path_or_one_error(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "download", lambda repository, quant: Path("/downloaded"))
        try:
            assert isinstance(resolve(text), Path)
        except ModelReferenceError as error:
            assert str(error)


def test_a_path_costs_no_import_of_the_hub_or_torch(tmp_path: Path) -> None:
    script = "import sys; from turbomoe.files.reference import resolve; resolve(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert not {"huggingface_hub", "torch"} & set(done.stdout.split())


TITLES = {
    "/models/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1",
    "/models/Qwen3.5-397B-Q4_K_M-00001-of-00012.gguf": "Qwen3.5-397B-Q4_K_M",
    "/models/Qwen3-1.7B": "Qwen3-1.7B",
    "/models/OLD.GGUF": "OLD",
    "/models/my.gguf.files": "my.gguf.files",
    "/models/.gguf": ".gguf",
    f"/hub/models--user--my--repo-1.7B/snapshots/{'a1' * 20}": "user/my--repo-1.7B",
    f"/hub/models--user--repo/snapshots/{'a1' * 20}/repo-Q8_0.gguf": "repo-Q8_0",
    f"/elsewhere/snapshots/{'a1' * 20}": "a1" * 20,
}


@pytest.mark.parametrize("path", TITLES)
def test_a_model_is_called_by_its_file_its_folder_or_its_repository(path: str) -> None:
    assert title_of(Path(path)) == TITLES[path]


def test_the_title_of_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-1.7B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen3-1.7B")
    assert title_of(Path()) == "Qwen3-1.7B"
