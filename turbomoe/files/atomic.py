"""Files are written whole or not at all: temporary file, flush, fsync, rename, fsync of the folder.

The only place in the project that puts bytes where a reader may look for them; downloads, which must be resumable,
have their own (``hub_transfer.py``). A process killed at any moment leaves the old file, or the new one, and at worst
an orphaned temporary file that the next writer in that folder sweeps away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from turbomoe.errors import TurbomoeError

_TEMPORARY = re.compile(r"\.turbomoe-(\d{1,9})-[0-9a-f]{16}\.tmp")
_live: set[str] = set()  # names of this process's own temporary files
_swept: set[Path] = set()  # folders this process has already looked through
_NEXT_STEP = {
    errno.ENOSPC: "Free space on that disk, or choose another folder (TURBOMOE_HOME moves turbomoe's own files)",
    errno.EDQUOT: "Free space within your disk quota, or choose another folder",
    errno.EACCES: "Make the folder writable, or choose another one (TURBOMOE_HOME moves turbomoe's own files)",
    errno.EROFS: "Choose a folder on a disk that is not mounted read-only",
    errno.EIO: "The disk reports a failure: check it before trusting it with more data",
}


class WriteError(TurbomoeError):
    """A file could not be written; what stood there before still stands. ``__cause__`` is the ``OSError``."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``write`` puts into the binary file it is handed, in one step.

    Missing folders are created, a symbolic link is followed (its target is replaced), an existing file keeps its
    permissions. Raises ``WriteError`` when the system refuses; any other exception of ``write`` passes through. In
    both cases the old file is untouched and the temporary file is gone; a failure to sync the folder after the rename
    is the exception: it is reported with the new file, whole, already in place.
    """
    target = Path(os.path.realpath(path))
    try:
        _prepare(target)
        _write_and_rename(target, write)
    except OSError as error:
        why = error.strerror or str(error)
        raise WriteError(f"Cannot write {target}: {why}", fix=_NEXT_STEP.get(error.errno or 0, "")) from error


def write_bytes(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """``write_atomically`` for bytes at hand."""
    write_atomically(path, lambda file: file.write(data))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_atomically`` for text, as UTF-8 and with line ends as they are."""
    write_bytes(path, text.encode())


def sweep_orphans(folder: str | os.PathLike[str]) -> int:
    """Remove temporary files in ``folder`` (not below) whose writers are dead; return how many went.

    Never touches a file whose writer may live: its process exists, or it holds its lock from another container.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    matches = [match for name in names if (match := _TEMPORARY.fullmatch(name))]
    return sum(_remove_if_orphan(Path(folder, match[0]), int(match[1])) for match in matches)


def _prepare(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renaming over a device or a pipe would destroy it: /dev/null is one typo away.
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a regular file")
    if target.parent not in _swept:
        _swept.add(target.parent)
        sweep_orphans(target.parent)


def _write_and_rename(target: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = target.with_name(f".turbomoe-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    _live.add(temporary.name)
    try:
        # Closed before the rename, so that an error of close() (network disks report a full disk there) is seen.
        with open(temporary, "xb") as file:
            _lock(file.fileno())
            write(file)
            _flush_to_disk(file, target)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        _live.discard(temporary.name)
    _sync_folder(target.parent)


def _lock(descriptor: int) -> None:
    # Process ids mean nothing across containers that share a folder; the lock does. Some disks have none.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush_to_disk(file: BinaryIO, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks cannot sync a folder and say so this way
            raise
    finally:
        os.close(descriptor)


def _remove_if_orphan(path: Path, pid: int) -> bool:
    if path.name in _live or (pid != os.getpid() and _alive(pid)):
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
