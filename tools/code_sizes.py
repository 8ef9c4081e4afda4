"""Print how large files and functions are: a mirror held up to the code, never a gate.

Counted with the syntax tree: a function's lines run from its ``def`` to its last line, docstring included; a
file's lines are all of its lines. Run ``make sizes`` or ``python tools/code_sizes.py [--json] [FOLDER]``.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

AIM_FILE_MEDIAN, AIM_FILE_MAX = 110, 400
AIM_FUNCTION_MEDIAN, AIM_FUNCTION_P95 = 10, 45


@dataclass(frozen=True)
class Item:
    """A file or a function and its length in lines."""

    name: str
    lines: int


@dataclass(frozen=True)
class Spread:
    """How a set of lengths is distributed."""

    count: int
    total: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Report:
    """Sizes of one folder of Python files."""

    folder: str
    files: Spread
    functions: Spread
    longest_files: tuple[Item, ...]
    longest_functions: tuple[Item, ...]


def spread(lengths: Iterable[int]) -> Spread:
    """Distribution of ``lengths`` by nearest rank: every figure is a length that really occurs (0 when empty)."""
    ordered = sorted(lengths)
    if not ordered:
        return Spread(0, 0, 0, 0, 0)
    last = len(ordered) - 1
    return Spread(len(ordered), sum(ordered), ordered[last // 2], ordered[-(-last * 95 // 100)], ordered[last])


def functions_in(source: str, name: str) -> list[Item]:
    """Every function and method in ``source``, nested ones too (they count in their parent as well)."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [Item(f"{name}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1) for node in nodes]


def longest(items: Sequence[Item], count: int = 5) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: (-item.lines, item.name))[:count])


def measure(root: Path, folder: str) -> Report:
    """Sizes of every ``*.py`` below ``root/folder``. A file that does not parse is named and counted as a file only."""
    files, functions = [], []
    for path in sorted((root / folder).rglob("*.py")):
        name, source = str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")
        files.append(Item(name, len(source.splitlines())))
        try:
            functions += functions_in(source, name)
        except (SyntaxError, ValueError) as error:
            print(f"{name}: not counted, {error}", file=sys.stderr)
    return Report(
        folder,
        spread(item.lines for item in files),
        spread(item.lines for item in functions),
        longest(files),
        longest(functions),
    )


def render(reports: Sequence[Report]) -> str:
    """The reports as a table and, below it, the longest files and functions."""
    out = [f"{'':10} {'count':>6} {'lines':>7} {'median':>7} {'p95':>5} {'max':>5}   aim"]
    file_aim = f"median <= {AIM_FILE_MEDIAN}, few over {AIM_FILE_MAX}"
    function_aim = f"median <= {AIM_FUNCTION_MEDIAN}, p95 <= {AIM_FUNCTION_P95}"
    for report in reports:
        out.append(report.folder)
        for label, s, aim in (("files", report.files, file_aim), ("functions", report.functions, function_aim)):
            out.append(f"  {label:9}{s.count:>6} {s.total:>7} {s.median:>7} {s.p95:>5} {s.max:>5}   {aim}")
    for report in reports:
        for label, items in (("files", report.longest_files), ("functions", report.longest_functions)):
            out.append(f"longest {label} of {report.folder}")
            out += [f"  {item.lines:>5}  {item.name}" for item in items]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sizes of the package and of its tests, and the ratio between them; always 0."""
    parser = argparse.ArgumentParser(description="Sizes of files and functions of the package and of its tests")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    package, tests = measure(args.root, "turbomoe"), measure(args.root, "tests")
    ratio = round(tests.files.total / max(package.files.total, 1), 2)
    if args.json:
        print(json.dumps({"package": asdict(package), "tests": asdict(tests), "tests_per_code": ratio}))
        return 0
    print(render((package, tests)))
    print(f"test lines per line of code: {ratio:.2f} (aim >= 1)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
