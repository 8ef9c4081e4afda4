"""Sessions: a conversation and its memory in one file, taken up again without computing what was computed.

The file (``docs/sessions.md``) is one of ``files/array_file.py``: what was said, the tokens, and the arrays of one
slot. It is refused, and nothing changes, unless its codes mean here what they meant where they were written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from turbomoe.engine.conversation import Conversation, Transcript
from turbomoe.engine.engine import Engine
from turbomoe.engine.session_arrays import late, to_tensor
from turbomoe.engine.session_header import (
    check_memory,
    check_model,
    check_origin,
    make_header,
    read_tokens,
    read_transcript,
)
from turbomoe.errors import RequestError
from turbomoe.files.array_file import (
    Array,
    ArrayFile,
    LateArray,
    RecordError,
    claimed_header,
    kind_of,
    open_arrays,
    save_arrays,
)
from turbomoe.files.atomic import sweep_orphans
from turbomoe.kv.codecs import CODECS
from turbomoe.kv.snapshot import nbytes, parts, restore

KIND, VERSION = "turbomoe-session", 1
LARGEST = 1 << 44
ANEW = "Choose another file, or delete this one to start anew"


@dataclass(frozen=True)
class _Content:
    """What goes into a file: a slot (None: no memory is kept), the tokens that it holds, and what was said."""

    slot: int | None
    ids: list[int]
    transcript: Transcript


def save_session(engine: Engine, of: Conversation | int, path: str | PathLike[str]) -> None:
    """Write a conversation, or the bare memory of an idle slot, to ``path``, whole or not at all.

    What is there is replaced only if it is a session. Raises ``RecordError`` if it is not, ``RequestError`` while
    the conversation or the slot is at work, ``files.atomic.WriteError`` when the system refuses.
    """
    check_replaceable(path)
    content = _content(engine, of)
    memory, arrays = engine.runner.memory, _token_arrays(content)
    if content.slot is not None:
        arrays |= {part.name: late(part) for part in parts(memory, content.slot, len(content.ids))}
    sweep_orphans(Path(path).absolute().parent)  # of saves that were killed: they are as large as a session
    save_arrays(path, KIND, VERSION, make_header(engine, content.transcript), arrays, private=True)


def load_session(engine: Engine, into: Conversation | int, path: str | PathLike[str]) -> None:
    """Take up what ``save_session`` wrote: the memory goes into an idle slot, the rest into the conversation.

    Raises ``RecordError`` with the reason for a file that cannot be used here, and then nothing has changed;
    ``RequestError`` while the conversation, the slot or every slot is at work.
    """
    slot = _slot_for(engine, into)
    with _naming(path), open_arrays(path, KIND, VERSION, LARGEST) as file:
        _load(engine, into, slot, file)


def check_session_model(path: str | PathLike[str], identity: str) -> None:
    """Raise ``RecordError`` if the session at ``path`` is not of the model with this identity.

    It spares a person the loading of the wrong model. Only a file that says so is looked at whole: what else may be
    wrong with it shows when it is loaded.
    """
    model = claimed_header(path).get("model")
    if kind_of(path) == KIND and isinstance(model, dict) and model.get("identity") != identity:
        with _naming(path), open_arrays(path, KIND, VERSION, LARGEST) as file:
            check_model(file.header, identity)


@contextmanager
def _naming(path: str | PathLike[str]) -> Iterator[None]:
    """Errors name the file and the way out."""
    try:
        yield
    except RecordError as error:
        about = "" if error.what.startswith("Cannot ") else f"Cannot use {fspath(path)} as session: "
        raise RecordError(about + error.what, fix=error.fix or ANEW) from error


def session_types(path: str | PathLike[str]) -> tuple[str, str] | None:
    """The KV types that a session says it was saved under, before any of it is checked; None if it says none."""
    origin = claimed_header(path).get("depends_on") if kind_of(path) == KIND else None
    types = origin.get("types") if isinstance(origin, dict) else None
    if isinstance(types, list) and len(types) == 2 and all(isinstance(name, str) and name in CODECS for name in types):
        return types[0], types[1]
    return None


def session_nbytes(engine: Engine, of: Conversation) -> int:
    """Bytes that the arrays of this conversation's session will take."""
    return nbytes(engine.runner.memory, len(_content(engine, of).ids))


def check_replaceable(path: str | PathLike[str]) -> None:
    """Raise ``RecordError`` if something other than a session is at ``path``: it may be somebody's only copy."""
    if not Path(path).exists():
        return
    if kind_of(path) != KIND:
        fix = "Choose another name: what is there stays as it is"
        raise RecordError(f"Cannot use {fspath(path)} as session: what is there is no session", fix=fix)


def _content(engine: Engine, of: Conversation | int) -> _Content:
    if isinstance(of, int):
        return _Content(of, engine.slots.known(of), Transcript("slot", [], None, [], ""))
    _check_quiet(of)
    transcript = of.transcript()
    slot = engine.slots.knowing(transcript.seen_ids)
    return _Content(slot, [] if slot is None else engine.slots.known(slot), transcript)


def _slot_for(engine: Engine, into: Conversation | int) -> int:
    """The idle slot that the memory goes into."""
    engine.find_lost_slots()
    if isinstance(into, int):
        engine.slots.known(into)
        return into
    _check_quiet(into)
    return engine.slots.spare()


def _check_quiet(conversation: Conversation) -> None:
    if conversation.busy:
        raise RequestError("An answer is on its way", fix="Let it end, or stop it, before saving or loading a session")


def _load(engine: Engine, into: Conversation | int, slot: int, file: ArrayFile) -> None:
    """Every check comes before the first change."""
    check_origin(engine, file.header)
    ids, seen = (read_tokens(engine, file, name) for name in ("ids", "seen_ids"))
    transcript = read_transcript(file.header, into.kind if isinstance(into, Conversation) else None, seen)
    check_memory(engine, file, len(ids))
    if ids:
        memory = engine.runner.memory
        types = {part.name: part.dtype for part in parts(memory, slot, len(ids))}
        try:
            restore(memory, slot, len(ids), lambda name: to_tensor(file.read(name), types[name]))
            engine.slots.replace(slot, ids)
        except BaseException:  # too little memory, Ctrl-C: the slot is empty now, and must not be taken for what it was
            engine.slots.forget(slot)
            raise
    if isinstance(into, Conversation):
        into.resume(transcript)


def _token_arrays(content: _Content) -> dict[str, Array | LateArray]:
    return {"ids": np.array(content.ids, np.int32), "seen_ids": np.array(content.transcript.seen_ids, np.int32)}
