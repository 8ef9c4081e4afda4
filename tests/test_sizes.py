"""The mirror of sizes: counts on sources whose numbers are known by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.code_sizes import Item, Spread, functions_in, longest, main, measure, spread

SOURCE = '''"""Three functions, of 2, 8 and 3 lines."""

@decorator
def short():
    return 1


class C:
    async def outer(self):
        """Docstring."""

        def inner():
            x = 1
            return x

        return inner
'''


def test_functions_are_counted_from_def_to_last_line() -> None:
    assert functions_in(SOURCE, "a.py") == [Item("a.py:4 short", 2), Item("a.py:9 outer", 8), Item("a.py:12 inner", 3)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], Spread(0, 0, 0, 0, 0)),
        ([7], Spread(1, 7, 7, 7, 7)),
        ([3, 1, 2], Spread(3, 6, 2, 3, 3)),
        (list(range(1, 101)), Spread(100, 5050, 50, 96, 100)),
    ],
)
def test_spread_by_hand(lengths: list[int], expected: Spread) -> None:
    assert spread(lengths) == expected


@given(st.lists(st.integers(1, 1000), min_size=1))
def test_spread_is_ordered_and_made_of_real_lengths(lengths: list[int]) -> None:
    found = spread(reversed(lengths))
    assert min(lengths) <= found.median <= found.p95 <= found.max == max(lengths)
    assert {found.median, found.p95} <= set(lengths)
    assert found.total == sum(lengths)


def test_longest_first_and_ties_by_name() -> None:
    items = [Item("b", 2), Item("a", 2), Item("c", 9)]
    assert longest(items, 2) == (Item("c", 9), Item("a", 2))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "turbomoe/deep").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "turbomoe/deep/a.py").write_text(SOURCE)
    (tmp_path / "tests/test_a.py").write_text("def test():\n    pass\n" * 16)
    return tmp_path


def test_a_folder_is_measured_whole(project: Path) -> None:
    report = measure(project, "turbomoe")
    assert (report.files.count, report.files.total) == (1, 16)
    assert (report.functions.count, report.functions.max) == (3, 8)
    assert report.longest_files == (Item("turbomoe/deep/a.py", 16),)


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe\n", b"x = '\0'\n"])
def test_a_mirror_never_fails(project: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (project / "turbomoe/broken.py").write_bytes(content)
    assert main([str(project)]) == 0
    output = capsys.readouterr()
    assert "turbomoe/broken.py: not counted" in output.err
    assert "\n      1  turbomoe/broken.py\n" in output.out


def test_text_and_json_agree(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(project)]) == 0
    assert capsys.readouterr().out.endswith("test lines per line of code: 2.00 (aim >= 1)\n")
    assert main([str(project), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tests_per_code"] == 2.0
    assert report["package"]["functions"]["median"] == 3


def test_an_empty_project(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
