"""``--session FILE``: a conversation taken up at the start, saved after answers where that is cheap, and at the end."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.errors import SettingsError
from turbomoe.files.atomic import WriteError
from turbomoe.kv_types import AUTO
from turbomoe.notices import Notice, board
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.engine.conversation import Conversation, Transcript

# Hashing, writing and syncing so much takes well under a second; a gigabyte would keep a person waiting each time.
CHEAP = 64 << 20


def add_session(parser: argparse.ArgumentParser) -> None:
    """The flag of verbs that hold a conversation."""
    parser.add_argument(
        "--session", metavar="FILE", help="go on with the conversation in FILE if it is there, and save it there"
    )


def session_file(args: argparse.Namespace) -> SessionFile | None:
    """The session that ``args`` ask for, if any; refused before a model is loaded where that can be known.

    Where ``args`` leave KV types to ``auto``, the session's own are put in their place.
    """
    if args.session is None:
        return None
    from turbomoe.engine.session import check_replaceable, session_types

    check_replaceable(args.session)
    check_folder(args.session)
    for name, own in zip(("cache_type_k", "cache_type_v"), session_types(args.session) or (), strict=False):
        if getattr(args, name) == AUTO:
            setattr(args, name, own)
    return SessionFile(args.session)


def check_folder(path: str) -> None:
    """Raise ``SettingsError`` if no file can be made at ``path``: the end of a long answer is too late to learn it."""
    folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = f"{folder} is no folder that can be written"
        raise SettingsError(f"No session can be saved as {path}", why=why, fix="Choose another place")


class SessionFile:
    """One conversation and its file. ``take_up`` comes first."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._saved: Transcript | None = None  # as it is in the file
        self._talk: Conversation | None = None

    def check_model(self, identity: str) -> None:
        """Raise ``RecordError`` if the file is of another model than the one with this identity."""
        from turbomoe.engine.session import check_session_model

        check_session_model(self.path, identity)

    def take_up(self, talk: Conversation) -> None:
        """Go on with what the file holds; a conversation that has not begun where there is no file."""
        from turbomoe.engine.session import load_session

        asked = talk.messages
        if Path(self.path).exists():
            load_session(talk.engine, talk, self.path)
            if asked and talk.messages[: len(asked)] != asked:
                fix = "Leave --system out, or choose another file"
                raise SettingsError(f"The session in {self.path} has another system message", fix=fix)
            print(f"Going on with {self.path}.", file=sys.stderr, flush=True)
        self._talk, self._saved = talk, talk.transcript()

    def answered(self) -> None:
        """Save after an answer, if it is cheap; what is not is saved at the end."""
        from turbomoe.engine.session import session_nbytes

        assert self._talk is not None
        if session_nbytes(self._talk.engine, self._talk) > CHEAP:
            why = f"it holds more than {format_bytes(CHEAP)}"
            board.post(Notice("the session is saved at the end only", why, expected=True))
            return
        try:
            self.save()
        except WriteError as error:  # a full disk is no reason to end a conversation
            board.post(Notice("the session is not saved yet", str(error).rstrip("."), "it is tried again later"))

    def save(self) -> None:
        """Save unless nothing has been said since the last time (or the conversation never began)."""
        if self._talk is None:
            return
        self._talk.give_up()  # nobody reads an answer now
        if (said := self._talk.transcript()) == self._saved:
            return
        from turbomoe.engine.session import save_session

        save_session(self._talk.engine, self._talk, self.path)
        self._saved = said
        if said.seen_ids and self._talk.engine.slots.knowing(said.seen_ids) is None:
            avoid = "let the step under way end: press Ctrl-C once"
            board.post(Notice("the session is saved without its cache", "a step was broken off", "a prefill", avoid))
