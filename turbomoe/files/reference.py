"""Model references: what a person types, turned into a path on this machine.

A path to a file or folder; ``hf:user/repo[:quant]`` from the hub; ``demo:name`` from this package or another.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from turbomoe.errors import ModelReferenceError
from turbomoe.files.demo import DEMOS, locate_demo

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--(?P<user>[\w.-]+?)--(?P<repo>[\w.-]+)/snapshots/[0-9a-f]{40}")  # of the hub's cache
_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
_FORMS = "A model is a path, hf:user/repo[:quant], demo:moe or demo:smollm2"


def resolve(reference: str) -> Path:
    """The file or folder that ``reference`` names, downloaded if need be; ``files.open_model`` opens it.

    Raises ``ModelReferenceError`` (unknown scheme, missing path, no such repository: with the nearest thing that does
    exist), ``ModelFileError`` (a demo model with other contents) and ``WriteError`` (no room for a download).
    """
    if os.path.exists(path := os.path.expanduser(reference)):
        return Path(path)
    scheme = _SCHEME.match(reference)
    if scheme is None:
        raise _no_such_path(reference, Path(path))
    rest = reference[scheme.end() :]
    match scheme[1].lower():
        case "demo":
            return locate_demo(rest)
        case "hf":
            return _from_hub(reference, rest)
        case unknown:
            raise ModelReferenceError(f"{reference!r} begins with {unknown}:, which turbomoe does not know", fix=_FORMS)


def _from_hub(reference: str, rest: str) -> Path:
    repository, _, quant = rest.partition(":")
    if not _REPOSITORY.fullmatch(repository):
        fix = "Write hf:user/repo or hf:user/repo:quant, for example hf:unsloth/Qwen3-0.6B-GGUF:Q4_K_M"
        raise ModelReferenceError(f"{reference!r} does not name a repository of the hub", fix=fix)
    from turbomoe.files.hub import download

    return download(repository, quant)


def _no_such_path(reference: str, path: Path) -> ModelReferenceError:
    if not reference.strip():
        return ModelReferenceError("No model was named", fix=_FORMS)
    if close := difflib.get_close_matches(reference.lower(), DEMOS, n=1):
        return ModelReferenceError(f"There is no file {reference!r}", fix=f"For the demo model, write demo:{close[0]}")
    if close := difflib.get_close_matches(path.name, _names_beside(path), n=3):
        fix = f"Near it there is {', '.join(str(path.with_name(name)) for name in close)}"
        return ModelReferenceError(f"There is no file {reference!r}", fix=fix)
    if _REPOSITORY.fullmatch(reference) and not path.parent.exists():
        return ModelReferenceError(f"There is no file {reference!r}", fix=f"For the hub, write hf:{reference}")
    return ModelReferenceError(f"There is no file {reference!r}", fix=_FORMS)


def _names_beside(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except (OSError, ValueError):
        return []


def title_of(path: Path) -> str:
    """What a person knows the model at ``path`` by: the name of its file or folder, or of its repository on the hub.

    Not the title that a file states: it is often that of a training run or of another quantisation.
    """
    whole = path.absolute()
    if snapshot := _SNAPSHOT.fullmatch("/".join(whole.parts[-3:])):
        return f"{snapshot['user']}/{snapshot['repo']}"
    return _ENDING.sub("", whole.name) or whole.name
