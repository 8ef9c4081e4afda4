"""The text that judgements run on by default: the first chapters of *Moby-Dick* (Melville 1851, public domain).

It is never the text that means are calibrated on.
"""

from __future__ import annotations

from importlib.resources import files

NAME = "the first chapters of Moby-Dick"


def judgement_text() -> str:
    """About 100 KB of English prose."""
    return (files("turbomoe.insight") / "moby_dick.txt").read_text("utf-8")
