"""The documents against the code: commands parse, links resolve, tables agree, the module list is fresh."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from tools.module_map import BEGIN, first_sentence, insert, module_list
from turbomoe import __version__
from turbomoe.cli.main import build_parser
from turbomoe.cli.options import add_common, add_engine, add_model
from turbomoe.cli.session import add_session
from turbomoe.config import EngineSettings
from turbomoe.files.blocks import FORMATS
from turbomoe.insight.kv_check import TOKENS
from turbomoe.kv.codecs import CODECS
from turbomoe.models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """Every command of ``program`` in the code blocks of the documents, comments cut off."""
    blocks = "".join(block for page in PAGES for block in CODE_BLOCK.findall(page.read_text()))
    lines = (line.partition("  #")[0].strip() for line in blocks.splitlines())
    return sorted({line for line in lines if line.split()[:1] == [program]})


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_two_commands_are_there() -> None:
    assert {"make demo", "make test"} <= set(commands("make"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= make_targets()


def test_every_target_is_phony_and_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    assert phony == make_targets()
    head = makefile.partition("\n\nSHELL")[0]
    assert not [target for target in phony - {"help"} if target not in head]


@pytest.mark.parametrize("line", commands("turbomoe"))
def test_commands_in_the_documents_parse(line: str) -> None:
    arguments = shlex.split(line)[1:]
    assert build_parser().parse_args(arguments).verb == arguments[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_documents_exist(page: Path) -> None:
    named = re.findall(r"`((?:turbomoe|tests|docs|tools)/[\w./]+)`", page.read_text())
    assert not [name for name in named if not name.endswith("yours.py") and not (ROOT / name).exists()]


def table() -> dict[str, str]:
    """The README's table of flags: name to default."""
    rows = re.findall(r"^\| (`-.*?) \| .* \| ?(.*?) ?\|$", README, re.MULTILINE)
    return {flag: default for names, default in rows for flag in re.findall(r"`(-[\w-]+)`", names)}


def test_the_flags_of_the_table_exist() -> None:
    parser = argparse.ArgumentParser()
    for add in (add_common, add_model, add_engine, add_session):
        add(parser)
    assert len(table()) >= 12
    assert set(table()) <= set(parser._option_string_actions)


def test_the_defaults_of_the_table_are_the_defaults() -> None:
    settings, found, flags = EngineSettings(), table(), argparse.ArgumentParser()
    add_engine(flags)
    assert found["--ctx-size"] == str(settings.ctx_size)
    assert found["-ctk"] == found["-ctv"] == flags.get_default("cache_type_k") == flags.get_default("cache_type_v")
    assert found["--kv-sink"] == f"{settings.kv.sink}, {settings.kv.recent}"
    assert found["--moe-cache"] == settings.experts.cache
    assert found["--threads"] == str(settings.threads)


def test_the_readme_names_every_block_format_and_codec() -> None:
    assert not [name for name in FORMATS if not re.search(rf"\b{name}\b", README)]
    exact = {"f32", "f16"}  # of use to tests and as a reference
    assert not [name for name in set(CODECS) - exact if f"`{name}`" not in README]


@pytest.mark.parametrize("page", ["README.md", "docs/kv-auto.md"])
def test_what_auto_cannot_promise_stands_beside_it(page: str) -> None:
    """The length that it judges by, what may go wrong beyond it, where that is measured and what to do."""
    said = " ".join((ROOT / page).read_text().split())
    assert f"over {TOKENS:,} tokens" in said and "buried in a very long text" in said and "needles" in said
    assert "kv-quality.md)" in said
    advice = "-ctk tcq4 -ctv tcq4"
    assert f"`{advice}`" in said and "`tcq3`" in said
    assert build_parser().parse_args(["run", "-m", "x", *shlex.split(advice)]).verb == "run"


def test_every_family_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert not [family.name for family in FAMILIES if not re.search(rf"\b{family.name}\b", changelog)]


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_module_list_is_fresh() -> None:
    document = (ROOT / "docs/architecture.md").read_text()
    assert insert(document, module_list(ROOT / "turbomoe")) == document, "run: make docs"


def test_every_module_says_what_it_is_for() -> None:
    listed = module_list(ROOT / "turbomoe")
    silent = [
        path for path in (ROOT / "turbomoe").rglob("*.py") if str(path.relative_to(ROOT / "turbomoe")) not in listed
    ]
    assert [path for path in silent if path.read_text().strip()] == []


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ('"""One. Two."""', "One."),
        ('"""One over\ntwo lines."""', "One over two lines."),
        ('"""Head\n\nBody."""', "Head"),
        ('"""See e.g. this. `That` too."""', "See e.g. this."),
        ("x = 1", ""),
    ],
)
def test_first_sentence(source: str, sentence: str) -> None:
    assert first_sentence(source) == sentence


def test_insert_replaces_what_was_there() -> None:
    document = f"head\n{BEGIN}old\n<!-- modules: end -->\ntail\n"
    assert insert(document, "new\n") == f"head\n{BEGIN}new\n<!-- modules: end -->\ntail\n"
