"""Models from the hub: ``user/repo[:quant]`` becomes files in the hub library's own cache, shared with other tools.

One commit for the whole set, all shards of a series, room on the disk checked before, downloads resumed, no code
ever loaded. The endpoint, token, cache folder and offline mode are the library's (``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from turbomoe.errors import ModelReferenceError, TurbomoeError
from turbomoe.files.atomic import WriteError
from turbomoe.files.hub_choice import (
    RemoteFile,
    check_listing,
    choose_companions,
    choose_gguf,
    choose_shards,
    has_safetensors,
    human,
)
from turbomoe.files.hub_transfer import bytes_missing, can_resume, fetch
from turbomoe.files.safetensors_index import INDEX, SINGLE, read_index
from turbomoe.notices import Notice, board

_COMMIT = re.compile(r"[0-9a-f]{40}")
Fetch = Callable[[Sequence[RemoteFile]], None]


class HubUnreachableError(ModelReferenceError):
    """The hub did not answer, or may not be asked: a copy in the cache would do."""


def download(repository: str, quant: str = "") -> Path:
    """The local GGUF file (first of a series) or safetensors folder of ``repository``, downloaded where missing.

    ``choose_gguf`` says what ``quant`` selects. Raises ``ModelReferenceError`` (no such repository, no access, no
    such quant, hub out of reach and no copy here), ``WriteError`` (no room) or ``ModelFileError`` (damaged bytes).
    """
    try:
        commit, files = _list(repository)
    except HubUnreachableError as error:
        return _cached(repository, quant, error)
    check_listing(repository, files)
    folder = _cache(repository) / "snapshots" / commit
    return _select(repository, quant, files, folder, lambda wanted: _fetch_all(repository, commit, wanted))


def _select(repository: str, quant: str, files: Sequence[RemoteFile], folder: Path, fetch_all: Fetch) -> Path:
    if series := choose_gguf(repository, files, quant):
        fetch_all(series)
        return folder / series[0].path
    if not has_safetensors(files):
        why = "It has neither GGUF files nor a safetensors model; pickle files are never read"
        raise ModelReferenceError(f"{repository} holds no model for turbomoe", why=why)
    companions = choose_companions(files)
    fetch_all(companions)
    sharded = any(file.path == INDEX for file in companions)
    names = sorted(set(read_index(folder / INDEX).values())) if sharded else [SINGLE]
    fetch_all(choose_shards(repository, files, names))
    return folder


def _list(repository: str) -> tuple[str, list[RemoteFile]]:
    try:
        api = HfApi(library_name="turbomoe")
        commit = api.model_info(repository).sha or ""
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"it names the commit {commit!r}")
        entries = list(api.list_repo_tree(repository, recursive=True, revision=commit))
    except Exception as error:  # the library also lets through errors of its HTTP client, which differ by release
        raise _explain(error, repository) from error
    return commit, [_remote(entry) for entry in entries if isinstance(entry, RepoFile)]


def _remote(entry: RepoFile) -> RemoteFile:
    if entry.lfs is None:
        return RemoteFile(entry.path, entry.size, entry.blob_id)
    return RemoteFile(entry.path, entry.lfs.size, entry.lfs.sha256)


def _fetch_all(repository: str, commit: str, files: Sequence[RemoteFile]) -> None:
    missing = [file for file in files if not (_cache(repository) / "snapshots" / commit / file.path).exists()]
    _check_space(repository, missing)
    for file in missing:
        try:
            _fetch_one(repository, commit, file)
        except TurbomoeError:
            raise
        except Exception as error:
            raise _explain(error, repository) from error


def _fetch_one(repository: str, commit: str, file: RemoteFile) -> None:
    if can_resume(file):
        fetch(repository, commit, file, _blob(repository, file))
    else:
        cost = "the file starts from zero if the download is stopped"
        board.post(Notice(f"{file.path} is downloaded by the hub library", "plain HTTP ends at 50 GB", cost))
    # The bytes are there: this only links them into the snapshot, as every tool that shares the cache expects.
    hf_hub_download(repository, file.path, revision=commit, library_name="turbomoe")


def _check_space(repository: str, files: Sequence[RemoteFile]) -> None:
    needed = sum(bytes_missing(file, _blob(repository, file)) for file in files)
    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        what = f"{repository} does not fit on the disk: {human(needed)} to download, {human(free)} free in {folder}"
        raise WriteError(what, fix="Free space there, or point HF_HUB_CACHE at a folder on a larger disk")


def _cache(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")


def _blob(repository: str, file: RemoteFile) -> Path:
    return _cache(repository) / "blobs" / file.oid


def _cached(repository: str, quant: str, reason: HubUnreachableError) -> Path:
    """The model from the newest snapshot that has all of it; ``reason`` is raised if none has."""
    snapshots = sorted((_cache(repository) / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    for folder in reversed(snapshots):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = [RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
        try:
            path = _select(repository, quant, files, folder, lambda wanted: None)
        except TurbomoeError:
            continue
        if not constants.HF_HUB_OFFLINE:
            cost = "a newer version would not be noticed"
            board.post(Notice(f"using the copy of {repository} in the cache", reason.what, cost))
        return path
    raise reason


def _explain(error: Exception, repository: str) -> TurbomoeError:
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, GatedRepoError):
        fix = f"Accept its conditions at {page}, then log in with 'hf auth login' or set HF_TOKEN"
        return ModelReferenceError(f"{repository} is open only to those who accept its conditions", fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        fix = f"Check the name at {page}; for a private one, log in with 'hf auth login' or set HF_TOKEN"
        return ModelReferenceError(f"The hub has no repository {repository} that you may see", fix=fix)
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, repository, page)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"The disk of {constants.HF_HUB_CACHE} is full; what was downloaded is kept"
        return WriteError(what, fix="Free space there, then run the same command again: it goes on where it stopped")
    if constants.HF_HUB_OFFLINE:
        fix = "Unset HF_HUB_OFFLINE to download it"
        return HubUnreachableError(f"{repository} is not whole in the cache, and the hub may not be asked", fix=fix)
    fix = "Check the connection and HF_ENDPOINT, then run the same command again: downloads go on where they stopped"
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return HubUnreachableError(f"The hub at {constants.ENDPOINT} cannot be reached", why=why, fix=fix)


def _explain_status(status: int, repository: str, page: str) -> TurbomoeError:
    if status in (401, 403):
        fix = "Log in again with 'hf auth login', or set HF_TOKEN to a token that may read it"
        return ModelReferenceError(f"The hub refuses access to {repository} (HTTP {status})", fix=fix)
    if status == 404:
        return ModelReferenceError(f"The hub no longer has a file of {repository} (HTTP 404)", fix=f"Look at {page}")
    fix = "Try again in a minute: downloads go on where they stopped"
    return HubUnreachableError(f"The hub at {constants.ENDPOINT} is in trouble (HTTP {status})", fix=fix)
