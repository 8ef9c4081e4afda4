"""The corpus from packages: small samples of every format by hand, the writer's rules, and no fetch that is not due."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from gather import containers, manuals, packages, text
from gather.packages import Folders
from gather.writer import SEPARATOR, Source, Writer
from hypothesis import given
from hypothesis import strategies as st

needs_lxml = pytest.mark.skipif(importlib.util.find_spec("lxml") is None, reason="needs: pip install lxml")


@given(st.text(max_size=300))
def test_tidy_text_stays_tidy(raw: str) -> None:
    once = text.tidy(raw)
    assert text.tidy(once) == once
    assert "\r" not in once and "\n\n\n" not in once and once == once.strip()
    assert not any(ord(character) < 32 and character not in "\n\t" for character in once)


def test_unwrapping_joins_lines_and_keeps_paragraphs() -> None:
    assert text.unwrap("one\n  two\n> three\n\nfour\nfive") == "one two three\n\nfour five"


def test_reading_undoes_gzip_and_guesses_latin_1(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress("süß".encode()))
    (tmp_path / "b.txt").write_bytes("süß".encode("latin-1"))
    assert text.read(str(tmp_path / "a.gz")) == text.read(str(tmp_path / "b.txt")) == "süß"


def test_files_are_sorted_and_links_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    found = text.files(str(tmp_path), "**/*.txt", "a.*")
    assert [Path(path).name for path in found] == ["a.txt", "b.txt", "c.txt"]
    with pytest.raises(ValueError, match="too many values"):
        text.one_file(str(tmp_path), "*.txt")


MAN = r""".\" a comment
.TH LS 1 "June 2020"
.SH NAME
ls \- list files
.SH OPTIONS
.TP
.BR \-a , " \-\-all"
do not ignore \fBdot\fP files
.IP \(bu 2
.nf
a  b
.fi
.ig
unseen
..
end .
"""


def test_man_pages() -> None:
    lines = [line for line in manuals.roff_text(MAN).split("\n") if line]
    body = ["-a, --all do not ignore dot files", "a  b", "end."]
    assert lines == ["LS(1)", "NAME", "ls - list files", "OPTIONS", *body]


def test_restructured_text_and_pod() -> None:
    rst = ".. highlight:: c\n\n.. note:: Use :func:`open <os.open>` or ``close``; see `here <http://x>`_.\n"
    assert manuals.rst_text(rst) == "Note: Use open or close; see here."
    pod = "=head1 NAME\n\nB<bold> and C<< a > b >> see L<text|perlfunc> E<lt>\n\n=begin html\nx\n=end html\n\n=cut\n"
    assert manuals.pod_text(pod) == "NAME\n\nbold and a > b see text <"


@pytest.mark.parametrize(
    "text", ["", ".", ".TH", "\\", ".SH", ".IP", '.B "', "\\f", "=begin", "``", ".. note::", "B<<"]
)
def test_broken_manuals_are_only_text(text: str) -> None:
    for convert in (manuals.roff_text, manuals.rst_text, manuals.pod_text):
        assert len(convert(text)) <= len(text) + 4


def r_object(strings: list[str], method: str) -> bytes:
    raw = b"".join(struct.pack(">ii", 0x00040009, len(one.encode())) + one.encode() for one in strings)
    if method == "2":
        packed = b"2" + bz2.compress(raw)
    elif method == "Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        packed = b"Z" + lzma.compress(raw, lzma.FORMAT_RAW, filters=filters)
    else:
        packed = zlib.compress(raw)
    return struct.pack(">I", len(raw)) + packed


@pytest.mark.parametrize("method", ["", "2", "Z"])
def test_strings_of_r_data(tmp_path: Path, method: str) -> None:
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(r_object(["It is", "", "a truth"], method) + r_object(["é"], method))
    assert list(containers.r_strings(str(path))) == [["It is", "", "a truth"], ["é"]]
    content = path.read_bytes()
    path.write_bytes(struct.pack(">I", 5) + content[4:])
    with pytest.raises(ValueError, match="where 5 were announced"):
        list(containers.r_strings(str(path)))


@pytest.mark.parametrize("order", ["<", ">"])
def test_gettext_catalogues(tmp_path: Path, order: str) -> None:
    pairs = [(b"", b"Header"), (b"menu\4Open", "Öffnen".encode()), (b"file\0files", b"Datei\0Dateien")]
    start, blob, first, second = 28 + 16 * len(pairs), b"", b"", b""
    for table, column in ((0, 0), (1, 1)):
        for pair in pairs:
            row = struct.pack(order + "2I", len(pair[column]), start + len(blob))
            first, second = (first + row, second) if table == 0 else (first, second + row)
            blob += pair[column] + b"\0"
    head = struct.pack(order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    (tmp_path / "x.mo").write_bytes(head + first + second + blob)
    found = containers.catalogue(str(tmp_path / "x.mo"))
    assert found == {"": "Header", "Open": "Öffnen", "file": "Datei"}


def test_wikipedia_is_cut_into_two_parts(tmp_path: Path) -> None:
    body = "'''Bold''' [[a|link]] {{{{x {{{{y}}}}}}}}&lt;ref&gt;z&lt;/ref&gt;."
    page = f"<page><title>{{}}</title><text xml:space='preserve'>{body}</text></page>"
    dump = "".join(page.format(f"T{number}") for number in range(4)) + page.format("Talk:no")
    (tmp_path / "dump.bz2").write_bytes(bz2.compress(dump.encode()))
    train, rest = (list(containers.wikipedia(str(tmp_path / "dump.bz2"), part)) for part in ("train", "eval"))
    assert train == [f"T{number}\n\nBold link ." for number in range(3)] and rest == ["T3\n\nBold link ."]


def test_code_in_an_archive_is_chosen_by_name_and_size(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as archive:
        for name, size in (("a/k/good.c", 500), ("a/k/short.c", 10), ("a/k/long.c", 300_000), ("a/o/other.c", 500)):
            (tmp_path / "file").write_text("x" * size)
            archive.add(tmp_path / "file", name)
    found = containers.archived_code(str(tmp_path / "x.tar.xz"), lambda name: "/k/" in name, (".c",))
    assert [len(one) for one in found] == [500]


HTML = """<html><head><title>t</title></head><body><nav>n</nav><h1>Head¶</h1><p class="toc">no</p>
<p>One <b>two</b>
three.</p><ul><li><p>item</p></li></ul><pre>a
  b</pre><script>s</script><table><tr><td>x</td><td>y</td></tr></table></body></html>"""


@needs_lxml
def test_html_pages() -> None:
    from gather.markup import html_text

    assert html_text(HTML).split() == "Head One two three. - item a b x y".split()
    assert "\na\n  b\n" in html_text(HTML)
    assert html_text("") == "" and html_text("<") in ("", "<")


@needs_lxml
def test_mallard_pages() -> None:
    from gather.markup import xml_text

    page = (
        "<page xmlns='p'><info><credit>me</credit></info><title>Head</title><p>One <em>two</em>.</p><!-- c --></page>"
    )
    assert xml_text(page) == "Head\n\nOne two." and xml_text("") == ""


def source(documents: list[str], domain: str = "prose", **options: Any) -> Source:
    return Source(
        domain, "name", ("deb:x",), "free", lambda at: documents, **({"shortest": 1, "shuffle": False} | options)
    )


def written(tmp_path: Path, *sources: Source) -> list[list[str]]:
    writer, found = Writer(tmp_path), []
    for one in sources:
        writer.write(one, Folders(tmp_path / "none"))
        content = (tmp_path / one.domain / "name.txt").read_text("utf-8")
        found.append(content.split(SEPARATOR) if content else [])
    return found


LONG = "This paragraph has certainly more than thirty characters"


def test_a_paragraph_is_written_once_in_a_domain_and_never_if_held_out(tmp_path: Path) -> None:
    held = source([f"{LONG} held."], "eval")
    first = source([f"{LONG}.\n\nshort\n\n{LONG}!", f"{LONG} held!\n\nshort"])
    other = source([f"{LONG}."], "docs")
    assert written(tmp_path, held, first, other)[1:] == [[f"{LONG}.\n\nshort", "short"], [f"{LONG}."]]


def test_whole_documents_are_compared_where_paragraphs_may_repeat(tmp_path: Path) -> None:
    code = source([f"{LONG}\n\n{LONG}", f"{LONG}\n\n{LONG}", LONG], "code", repeats="documents")
    assert written(tmp_path, code) == [[f"{LONG}\n\n{LONG}", LONG]]


def test_size_and_length_limits(tmp_path: Path) -> None:
    texts = ["a" * 50, "b" * 30, "c" * 5, "d" * 15]
    assert written(tmp_path, source(texts, megabytes=70e-6, shortest=10)) == [["a" * 50, "d" * 15]]
    assert written(tmp_path, source(texts, megabytes=1e-6)) == [["a" * 50]], "the first is written whatever its size"
    assert written(tmp_path, source([])) == [[]]


def test_foreign_scripts_are_left_out_of_english_domains_only(tmp_path: Path) -> None:
    russian = "Это предложение написано по-русски"
    found = written(tmp_path, source([russian, LONG]), source([russian, LONG], "multilingual"))
    assert found == [[LONG], [russian, LONG]]


def test_the_manifest_names_every_source(tmp_path: Path) -> None:
    written(tmp_path, source([LONG]), source([LONG, LONG + "x"], "docs"))
    rows = [line.split("\t") for line in (tmp_path / "MANIFEST.tsv").read_text().splitlines()]
    sizes = [str((tmp_path / domain / "name.txt").stat().st_size) for domain in ("prose", "docs")]
    assert rows == [["prose", "name", sizes[0], "1", "free", "deb:x"], ["docs", "name", sizes[1], "2", "free", "deb:x"]]


def test_the_same_shuffle_every_time(tmp_path: Path) -> None:
    texts = [f"{LONG} {number}" for number in range(20)]
    runs = [written(tmp_path / name, source(texts, shuffle=True)) for name in "ab"]
    assert runs[0] == runs[1] != [texts] and sorted(runs[0][0]) == sorted(texts)


def wheel(name: str, downloads: Path, target: Path) -> None:
    with zipfile.ZipFile(downloads / f"{name}.whl", "w") as archive:
        archive.writestr("file.txt", "x")
    with zipfile.ZipFile(downloads / f"{name}.whl") as archive:
        archive.extractall(target)


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setitem(packages.FETCHERS, "npm", lambda name, *folders: (asked.append(name), wheel("x", *folders)))
    folders = Folders(tmp_path)
    for _ in range(2):
        folders.fetch(["npm:@scope/name"])
    assert asked == ["@scope/name"] and text.files(folders["npm:@scope/name"], "**/*")[0].endswith("file.txt")


def test_a_failed_fetch_leaves_nothing_that_looks_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, downloads: Path, target: Path) -> None:
        wheel("x", downloads, target)
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setitem(packages.FETCHERS, "pip", fail)
    folders = Folders(tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        folders.fetch(["pip:x"])
    assert not Path(folders["pip:x"]).exists()


@needs_lxml
def test_the_list_of_sources_is_in_order() -> None:
    from gather_corpus import SOURCES

    assert len({(one.domain, one.name) for one in SOURCES}) == len(SOURCES) == 53
    domains = list(dict.fromkeys(one.domain for one in SOURCES))
    assert domains == ["eval", "prose", "docs", "code", "multilingual"], "evaluation first: others leave its text out"
    named = {package for one in SOURCES for package in one.packages}
    assert all(package.partition(":")[0] in packages.FETCHERS for package in named)
    assert all(one.licence and one.packages for one in SOURCES)
    assert not [one for one in SOURCES if "brown" in one.name or "lee" in one.name]
