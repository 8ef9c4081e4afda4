"""One file from the hub into the hub library's cache, resumed where an earlier run stopped, checked at the end.

The library resumes a cut connection, but deletes what it has when the process is stopped; for files of many
gigabytes that is not good enough. Here the partial file stays beside its destination until it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]  # public, but not in __all__

from turbomoe.errors import ModelFileError
from turbomoe.files.hub_choice import RemoteFile
from turbomoe.notices import Notice, board

_BLOCK = 1 << 22
_SLOW_TO_CHECK = 1 << 30


def can_resume(file: RemoteFile) -> bool:
    """Whether the file may be fetched here: larger ones the library gets by the hub's own protocol alone."""
    return file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE


def partial_path(blob: Path) -> Path:
    """Where the bytes of ``blob`` are collected until they are whole."""
    return blob.with_name(f"{blob.name}.turbomoe.partial")


def bytes_missing(file: RemoteFile, blob: Path) -> int:
    """How many bytes of ``file`` are still to be fetched."""
    if blob.exists():
        return 0
    partial = partial_path(blob)
    return max(0, file.size - (partial.stat().st_size if partial.exists() else 0))


def fetch(repository: str, commit: str, file: RemoteFile, blob: Path) -> None:
    """Make ``blob`` hold ``file`` as it is in ``commit``. Another process fetching the same file is waited for.

    Raises ``ModelFileError`` if the bytes are not those that were promised; errors of the network and the disk pass
    through, and what was fetched by then is kept for the next call.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(blob)
    with open(partial, "ab") as out:
        _lock(out, file)
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        if out.tell() > file.size:
            out.truncate(0)
        _continue(hf_hub_url(repository, file.path, revision=commit), file, out)
        out.flush()
        os.fsync(out.fileno())
        _verify(partial, file)
        partial.replace(blob)


def _continue(url: str, file: RemoteFile, out: BinaryIO) -> None:
    out.seek(0, os.SEEK_END)
    # Compressed answers cannot be resumed, and their length is not the file's.
    headers = {**build_hf_headers(library_name="turbomoe"), "Accept-Encoding": "identity"}
    http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size, displayed_filename=file.path)


def _lock(out: BinaryIO, file: RemoteFile) -> None:
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        board.post(Notice(f"waiting for {file.path}", "another process is downloading it"))
        fcntl.flock(out, fcntl.LOCK_EX)


def _verify(partial: Path, file: RemoteFile) -> None:
    is_lfs = len(file.oid) == 64
    digest = hashlib.sha256() if is_lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    for block in _blocks(partial, file):
        digest.update(block)
    if digest.hexdigest() != file.oid:
        partial.unlink()
        reason = f"what the hub sent for {file.path} is not what it had promised (digest {digest.hexdigest()})"
        raise ModelFileError(partial, reason, fix="It was deleted: run the same command again")


def _blocks(path: Path, file: RemoteFile) -> Iterator[bytes]:
    hidden = True if file.size < _SLOW_TO_CHECK else None  # None: shown on a terminal only
    options = {"desc": "checking", "total": file.size, "unit": "B", "unit_scale": True, "disable": hidden}
    with open(path, "rb") as source, tqdm(**options) as bar:  # type: ignore[no-untyped-call]
        while block := source.read(_BLOCK):
            bar.update(len(block))
            yield block
