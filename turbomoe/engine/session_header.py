"""What a session file says about itself: written once, and checked before anything of the file is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from turbomoe import __version__
from turbomoe.engine.conversation import Transcript
from turbomoe.engine.engine import Engine
from turbomoe.engine.session_arrays import BITS, entry
from turbomoe.files.array_file import ArrayFile, RecordError
from turbomoe.kv.snapshot import depends_on, parts

KINDS = {"chat": "a chat", "text": "plain text", "slot": "the bare memory of a slot"}
OTHER_MODEL = "Use it with that model, or choose another file"
# What differs, in words, and the next step; by the names of ``depends_on``.
Words = Callable[[Any, Any], tuple[str, str]]
DIFFERENCES: dict[str, Words] = {
    "types": lambda theirs, mine: (
        f"its keys and values are stored as {_both(theirs)}, and this run stores them as {_both(mine)}",
        f"Use {_flags(('-ctk', '-ctv'), theirs)}, or choose another file",
    ),
    "windows": lambda theirs, mine: (
        f"its first and last exact tokens are {_both(theirs)}, and this run's are {_both(mine)}",
        f"Use {_flags(('--kv-sink', '--kv-recent'), theirs)}, or choose another file",
    ),
    "dtype": lambda theirs, mine: (
        f"its recurrent states are {_short(theirs)}, and this run's are {_short(mine)}",
        "Use the --dtype that it was written with, or choose another file",
    ),
    "codecs": lambda theirs, mine: (
        f"its codes are those of another version of turbomoe ({_versions(theirs)}; here {_versions(mine)})",
        "Choose another file, or start anew without it",
    ),
    "means": lambda theirs, mine: (
        "its codes were made with other key and value means than this machine has for the model",
        "Copy the means of the machine that wrote it (docs/sessions.md), or choose another file",
    ),
}


def make_header(engine: Engine, said: Transcript) -> dict[str, Any]:
    """The header of a session: where it comes from, and what was said."""
    return {
        "turbomoe": __version__,
        "model": {"name": engine.model.name, "identity": engine.model.identity},
        "depends_on": depends_on(engine.runner.memory),
        "bits": {_name(dtype): _name(stored) for dtype, stored in BITS.items()},
        "kind": said.kind,
        "messages": said.messages,
        "thinking": said.thinking,
        "seen_text": said.seen_text,
    }


def check_model(header: Mapping[str, Any], identity: str) -> None:
    """Raise ``RecordError`` unless the file is of the model with this identity."""
    model = header.get("model")
    if not isinstance(model, dict):
        raise RecordError("its header lacks the model")
    if model.get("identity") != identity:
        raise RecordError(f"it belongs to another model, {_short(model.get('name'))}", fix=OTHER_MODEL)


def check_origin(engine: Engine, header: Mapping[str, Any]) -> None:
    """Raise ``RecordError`` unless the file's codes mean in this engine what they meant in theirs."""
    check_model(header, engine.model.identity)
    theirs = header.get("depends_on")
    if not isinstance(theirs, dict):
        raise RecordError("its header lacks the settings")
    mine = json.loads(json.dumps(depends_on(engine.runner.memory)))
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if theirs.get(name) != mine.get(name):
            words = DIFFERENCES.get(name, lambda *_, name=name: (f"its {_short(name)} differ from this run's", ""))
            what, fix = words(theirs.get(name), mine.get(name))
            raise RecordError(what, fix=fix)


def read_transcript(header: Mapping[str, Any], kind: str | None, seen: list[int]) -> Transcript:
    """What was said, each field checked. Raises ``RecordError``, also unless it is of ``kind`` (None: any)."""
    found = header.get("kind")
    if not isinstance(found, str) or found not in KINDS:
        raise RecordError("its kind is unknown")
    if kind not in (None, found):
        fix = "A chat goes on with turbomoe chat or run, plain text with turbomoe run --raw"
        raise RecordError(f"it holds {KINDS[found]}, not {KINDS[kind]}", fix=fix)
    messages, thinking, text = (header.get(name) for name in ("messages", "thinking", "seen_text"))
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise RecordError("its messages are not messages")
    if thinking not in (None, True, False) or not isinstance(text, str):
        raise RecordError("its header is not that of a session")
    return Transcript(found, messages, thinking, seen, text)


def read_tokens(engine: Engine, file: ArrayFile, name: str) -> list[int]:
    """One of the two lists of token ids. Raises ``RecordError`` unless all are tokens of the model."""
    if file.table.get(name, ("",))[0] != "I32" or len(file.table[name][1]) != 1:
        raise RecordError(f"it lacks the tokens ({name})")
    ids: list[int] = file.read(name).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < engine.model.config.vocab_size:
        raise RecordError("it has tokens that the model does not have")
    return ids


def check_memory(engine: Engine, file: ArrayFile, length: int) -> None:
    """Raise ``RecordError`` unless the context holds ``length`` tokens and the arrays are those of so many."""
    memory = engine.runner.memory
    if length > memory.ctx_size:
        why = f"it holds {length} tokens, and this context {memory.ctx_size}"
        raise RecordError(why, fix=f"Use -c {length + 1} or more")
    wanted = {part.name: entry(part) for part in parts(memory, 0, length)}
    found = {name: known for name, known in file.table.items() if name not in ("ids", "seen_ids")}
    if found != (wanted if length else {}):
        raise RecordError("its arrays are not those of such a session")


def _is_message(message: Any) -> bool:
    texts = isinstance(message, dict) and all(isinstance(text, str) for text in message.values())
    return texts and message.keys() == {"role", "content"}


def _both(pair: Any) -> str:
    return " and ".join(map(_short, pair)) if isinstance(pair, list) else _short(pair)


def _flags(names: tuple[str, ...], values: Any) -> str:
    pairs = zip(names, values if isinstance(values, list) else (), strict=False)
    return " ".join(f"{name} {_short(value)}" for name, value in pairs) or "what it was written with"


def _versions(codecs: Any) -> str:
    """Like "tcq2 2": of any value that a file may hold."""
    found = codecs.items() if isinstance(codecs, dict) else ()
    named = [f"{str(name).partition('/')[0]} {each.get('version')}" for name, each in found if isinstance(each, dict)]
    return _short(", ".join(dict.fromkeys(named)) or "unknown")


def _short(value: Any) -> str:
    """For a terminal, whatever a file may hold."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:80])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
