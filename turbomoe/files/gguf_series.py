"""Mapping a GGUF file, or all files of a split series, into memory.

A series is ``name-00001-of-0000N.gguf`` and so on, each a GGUF file with the keys ``split.no`` (from 0),
``split.count`` and ``split.tensors.count``; the first carries the metadata. Opening any member opens them all.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from turbomoe.errors import ModelFileError
from turbomoe.files.gguf_header import Header, read_header

SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# Keys that may differ between the shards of one model.
OWN_KEYS = {"split.no", "general.alignment"}


@dataclass(frozen=True)
class Shard:
    """One mapped file and its checked header."""

    path: Path
    data: mmap.mmap
    header: Header


def open_series(path: Path) -> list[Shard]:
    """Map ``path`` and, if it belongs to a series, the others too, in order. Raises ``ModelFileError`` alone."""
    shard = _open_shard(path)
    stem, named = _parse_name(path.name)
    count = _split_number(shard, "split.count") if "split.count" in shard.header.metadata else 1
    if named != max(count, 1):
        _refuse(shard, f"it says it is one of {count} files where its name says one of {named}", "split.count")
    return _open_rest(shard, stem, count) if count > 1 else [shard]


def _parse_name(name: str) -> tuple[str, int]:
    """The stem and the number of files of a series; a name of another shape stands for a series of one."""
    parts = SHARD_NAME.fullmatch(name)
    return (parts["stem"], int(parts["count"])) if parts else (name, 1)


def _open_rest(opened: Shard, stem: str, count: int) -> list[Shard]:
    shards: list[Shard] = []
    for number in range(count):
        path = opened.path.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf")
        shard = opened if path == opened.path else _open_sibling(path, number, count)
        _check_member(shard, shards[0] if shards else shard, number, count)
        shards.append(shard)
    _check_whole(shards)
    return shards


def _open_sibling(path: Path, number: int, count: int) -> Shard:
    if not path.exists():
        fix = "Download every file of the series into the same folder"
        raise ModelFileError(path, f"file {number + 1} of a series of {count} is missing", field="split.count", fix=fix)
    return _open_shard(path)


def _check_member(shard: Shard, first: Shard, number: int, count: int) -> None:
    """Refuse a shard whose own keys do not say what its name says, or that contradicts the first one."""
    for key, expected in (("split.count", count), ("split.no", number)):
        if (found := _split_number(shard, key)) != expected:
            _refuse(shard, f"it says {found} where its place in the series asks for {expected}", key)
    theirs = first.header.metadata
    for key, value in shard.header.metadata.items():
        if key in theirs and key not in OWN_KEYS and not _same(theirs[key], value):
            _refuse(shard, f"it contradicts {first.path.name}: the files belong to different models", key)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Sequence) and not isinstance(one, str):
        return bool(one == other)  # not by repr, which shows only the first elements
    return repr(one) == repr(other)  # not ==, because a not-a-number differs from itself


def _check_whole(shards: list[Shard]) -> None:
    """Each tensor once, and as many as the first shard promises."""
    seen: dict[str, str] = {}
    for shard in shards:
        for entry in shard.header.tensors:
            if before := seen.get(entry.info.name):
                _refuse(shard, f"this tensor is in {before} too", f"tensor {entry.info.name!r:.80}")
            seen[entry.info.name] = shard.path.name
    promised = _split_number(shards[0], "split.tensors.count")
    if promised != len(seen):
        _refuse(shards[0], f"the series should hold {promised} tensors but has {len(seen)}", "split.tensors.count")


def _split_number(shard: Shard, key: str) -> int:
    found = shard.header.metadata.get(key)
    # type() because True is an int to isinstance.
    if type(found) is int and found >= 0:
        return found
    raise ModelFileError(shard.path, f"a file of a series needs a whole number here, not {found!r:.80}", field=key)


def _refuse(shard: Shard, reason: str, field: str) -> NoReturn:
    raise ModelFileError(shard.path, reason, field=field)


def _open_shard(path: Path) -> Shard:
    data = _map(path)
    return Shard(path, data, read_header(path, data))


def _map(path: Path) -> mmap.mmap:
    """Map a regular file read-only."""
    try:
        # Asked before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFileError(path, "it is not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(path, "it is empty", field="header", offset=0)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelFileError(path, getattr(error, "strerror", None) or str(error)) from error
