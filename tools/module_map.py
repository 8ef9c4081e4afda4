"""Write the list of modules in ``docs/architecture.md`` from the first sentence of each module's docstring."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- modules: begin -->\n", "<!-- modules: end -->"


def first_sentence(source: str) -> str:
    """The first sentence of a module's docstring on one line, empty without one."""
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text, maxsplit=1)[0]


def entries(package: Path) -> Iterator[tuple[str, str]]:
    """(path below the package, first sentence) of every module that has something to say."""
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if sentence := first_sentence(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(package)), sentence


def module_list(package: Path) -> str:
    """The list in Markdown, one module a line."""
    return "".join(f"- `{name}`: {sentence}\n" for name, sentence in entries(package)).replace("``", "`")


def insert(document: str, listing: str) -> str:
    """``document`` with ``listing`` between its two marks."""
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}{listing}{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the document in place."""
    document = ROOT / "docs/architecture.md"
    document.write_text(insert(document.read_text(encoding="utf-8"), module_list(ROOT / "turbomoe")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
