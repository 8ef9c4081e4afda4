"""Which files of a hub repository make up the model that was asked for: pure decisions over a listing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from turbomoe.errors import ModelReferenceError
from turbomoe.files.safetensors_index import INDEX, SINGLE

DEFAULT_QUANT = "Q4_K_M"
# What a safetensors model needs beside its weights. Never code: a repository's .py files are not even downloaded.
COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
    INDEX,
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE)
_LABEL = re.compile(r"(?<![A-Za-z0-9])((UD-)?(I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: ``oid`` is its SHA-256 (64 hex digits, LFS) or its git blob id (40)."""

    path: str
    size: int
    oid: str = ""


@dataclass(frozen=True)
class Series:
    """A GGUF model: one file, or all shards of a split one in order. ``stem`` is the path without the ending."""

    stem: str
    files: tuple[RemoteFile, ...]
    total: int

    @property
    def label(self) -> str:
        """The quantisation by its usual name (``Q4_K_M``), or the whole file name where there is none."""
        name = PurePosixPath(self.stem).name
        return found[1].upper() if (found := _LABEL.search(name)) else name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def check_listing(repository: str, files: Iterable[RemoteFile]) -> None:
    """Raise ``ModelReferenceError`` if a listed path could lead out of its folder, or a size or digest is none."""
    for file in files:
        why = ""
        if not is_safe_path(file.path):
            why = f"Its listing holds the name {file.path!r}, which could be written outside the download folder"
        elif not isinstance(file.size, int) or file.size < 0:
            why = f"Its listing gives {file.path} the size {file.size!r}"
        elif not _DIGEST.fullmatch(file.oid):
            why = f"Its listing gives {file.path} the digest {file.oid!r}"
        if why:
            raise ModelReferenceError(f"The repository {repository} cannot be trusted", why=why)


def is_safe_path(path: str) -> bool:
    """Whether a repository path is relative, plain and inside its folder on any system."""
    parts = path.split("/")
    plain = path.isprintable() and not set(path) & set("\\:")
    return plain and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)


def choose_gguf(repository: str, files: Sequence[RemoteFile], quant: str) -> tuple[RemoteFile, ...]:
    """The GGUF files to load; empty if the repository has none to offer and none was asked for by name.

    With ``quant``: the series of that path or name, else of that label, else with it anywhere in its path. Without:
    ``Q4_K_M``, else the only one there is, else nothing if there are safetensors. ``ModelReferenceError`` lists the
    choices where more than one remains.
    """
    series = _group(files)
    if quant:
        found = _matching(series, quant)
        if not found:
            raise _nothing_matches(repository, series, quant)
    else:
        found = [one for one in series if one.label == DEFAULT_QUANT] or series
        if len(found) > 1 and has_safetensors(files):
            found = []
    if len(found) > 1:
        fix = f"Choose one: {_choices(repository, found)}"
        raise ModelReferenceError(f"{repository} holds {len(found)} models that fit", fix=fix)
    return _whole(repository, found[0]) if found else ()


def has_safetensors(files: Sequence[RemoteFile]) -> bool:
    """Whether the repository holds a safetensors model at its top."""
    paths = {file.path for file in files}
    return "config.json" in paths and bool(paths & {SINGLE, INDEX})


def choose_companions(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The small files of a safetensors model; a single-file model needs no index."""
    single = any(file.path == SINGLE for file in files)
    return tuple(file for file in files if file.path in COMPANIONS and not (single and file.path == INDEX))


def choose_shards(repository: str, files: Sequence[RemoteFile], names: Iterable[str]) -> tuple[RemoteFile, ...]:
    """The weight files called ``names``, in order; ``ModelReferenceError`` if the repository lacks one."""
    known = {file.path: file for file in files}
    if missing := [name for name in names if name not in known]:
        raise ModelReferenceError(f"{repository} is incomplete", why=f"Its index names {missing[0]}, which it lacks")
    return tuple(known[name] for name in names)


def human(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _group(files: Sequence[RemoteFile]) -> list[Series]:
    groups: dict[tuple[str, int], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if not file.path.lower().endswith(".gguf") or _NO_MODEL.search(PurePosixPath(file.path).name):
            continue
        shard = _SHARD.fullmatch(file.path)
        key = (shard["stem"], int(shard["total"])) if shard else (file.path[: -len(".gguf")], 1)
        groups.setdefault(key, []).append(file)
    return [Series(stem, tuple(members), total) for (stem, total), members in groups.items()]


def _matching(series: list[Series], quant: str) -> list[Series]:
    tag = quant.lower().removesuffix(".gguf")
    anywhere = re.compile(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9_])")
    tests: tuple[Callable[[Series], bool], ...] = (
        lambda one: one.stem.lower() == tag,
        lambda one: PurePosixPath(one.stem).name.lower() == tag,
        lambda one: one.label.lower() == tag,
        lambda one: bool(anywhere.search(one.stem.lower())),
    )
    hits = ([one for one in series if test(one)] for test in tests)
    return next((found for found in hits if found), [])


def _whole(repository: str, series: Series) -> tuple[RemoteFile, ...]:
    wanted = [f"{series.stem}-{n:05}-of-{series.total:05}.gguf".lower() for n in range(1, series.total + 1)]
    if series.total > 1 and [file.path.lower() for file in series.files] != wanted:
        why = f"It holds {len(series.files)} of the {series.total} files of {series.stem}"
        raise ModelReferenceError(f"{repository} is incomplete", why=why)
    return series.files


def _nothing_matches(repository: str, series: list[Series], quant: str) -> ModelReferenceError:
    fix = f"It has {_choices(repository, series)}" if series else "It has no GGUF files: leave the quant out"
    return ModelReferenceError(f"{repository} has no {quant!r}", fix=fix)


def _choices(repository: str, series: list[Series]) -> str:
    labels = [one.label for one in series]
    names = [one.label if labels.count(one.label) == 1 else one.stem for one in series]
    return ", ".join(f"hf:{repository}:{name} ({human(one.size)})" for name, one in zip(names, series, strict=True))
