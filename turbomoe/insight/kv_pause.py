"""A check of KV types that was broken off goes on where it was: now and then a pass leaves its caches in one file.

Halfway through a text, what the pairs have shown is of no use without their caches, so both are kept until the pass has
ended. The file is one of ``files/array_file.py``: whole or not at all, and taken up only by the same pass under the
same conditions. All of it can be computed again, so that a file of no use here is passed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from turbomoe.config import state_dir
from turbomoe.engine.session_arrays import entry, late, to_tensor
from turbomoe.files.array_file import ArrayFile, RecordError, open_arrays, save_arrays
from turbomoe.files.atomic import WriteError, sweep_orphans
from turbomoe.kv.cache import KVCache
from turbomoe.kv.snapshot import depends_on, parts, restore
from turbomoe.notices import Notice, board

KIND, VERSION = "turbomoe-kv-check", 1
LARGEST = 1 << 36
REST = 10.0  # seconds of work between two writes, at least,
SHARE = 20  # and this many times what the last write took
# What comes of a header whose checksum is right and that is not one of a check.
NO_HEADER = (KeyError, TypeError, ValueError, OverflowError)


def pause_path(identity: str) -> Path:
    """Where a pass over the model with this identity leaves how far it has come."""
    return state_dir() / "models" / identity / "kv-check.safetensors"


class Pause:
    """The file of one check. ``conditions`` (JSON) are all that its figures depend on beside the pass itself."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self._path, self._conditions = path, conditions
        self._due = time.monotonic() + REST

    def keep(self, plan: Any, at: int, shown: Any, live: Mapping[str, KVCache]) -> None:
        """If it is time to, write where the pass ``plan`` stands after ``at`` tokens.

        ``shown`` (JSON) is what its pairs have come to, ``live`` the caches that go on.
        """
        if (begun := time.monotonic()) < self._due:
            return
        arrays = {f"{name} {part.name}": late(part) for name, cache in live.items() for part in parts(cache, 0, at)}
        try:
            sweep_orphans(self._path.parent)
            save_arrays(self._path, KIND, VERSION, {"of": self._of(plan, live), "at": at, "shown": shown}, arrays)
        except WriteError as error:
            what = "a check that is broken off will begin anew"
            board.post(Notice(what, str(error).rstrip("."), expected=True))
        ended = time.monotonic()
        self._due = ended + max(REST, SHARE * (ended - begun))

    def take_up(self, plan: Any, caches: Mapping[str, KVCache], read: Callable[[Any], None]) -> int:
        """Fill ``caches`` with what the pass ``plan`` has left: how many tokens.

        ``read`` takes what its pairs had shown. A file that does not hold what it should counts for nothing, also
        where ``read`` finds it out.
        """
        if not self._path.exists():
            return 0
        try:
            with open_arrays(self._path, KIND, VERSION, LARGEST) as file:
                of = file.header["of"]
                live = {name: cache for name, cache in caches.items() if name in of["caches"]}
                if of != json.loads(json.dumps(self._of(plan, live))):
                    return 0
                at = self._length(file, live)
                for name, cache in live.items():
                    restore(cache, 0, at, _reader(file, name, cache, at))
                read(file.header["shown"])
                return at
        except (RecordError, *NO_HEADER) as error:
            for cache in caches.values():
                cache.release(0)  # those that had been filled before the damage showed
            why = str(error).rstrip(".") if isinstance(error, RecordError) else f"{self._path} holds something else"
            board.post(Notice("a check that was broken off begins anew", why, expected=True))
            return 0

    def _length(self, file: ArrayFile, live: Mapping[str, KVCache]) -> int:
        """How many tokens of these caches the file has. Raises ``RecordError`` unless its arrays are of so many."""
        at = file.header["at"]
        if not isinstance(at, int) or not 0 < at <= min(cache.ctx_size for cache in live.values()):
            raise RecordError(f"{self._path} does not say where it was broken off")
        wanted = {f"{name} {part.name}": entry(part) for name, cache in live.items() for part in parts(cache, 0, at)}
        if file.table != wanted:
            raise RecordError(f"The arrays in {self._path} are not those of such a check")
        return at

    def tell(self) -> None:
        """Say to who broke it off that not all is lost."""
        if self._path.exists():
            what, why = "the check of KV types stops", "it goes on from where it was last written the next time"
            board.post(Notice(what, why, expected=True))

    def end(self) -> None:
        """What the pass has come to is kept elsewhere now."""
        with suppress(OSError):
            self._path.unlink()

    def _of(self, plan: Any, live: Mapping[str, KVCache]) -> dict[str, Any]:
        caches = {name: depends_on(cache) for name, cache in live.items()}
        return {"conditions": self._conditions, "plan": plan, "caches": caches}


def _reader(file: ArrayFile, name: str, cache: KVCache, at: int) -> Callable[[str], torch.Tensor]:
    types = {part.name: part.dtype for part in parts(cache, 0, at)}
    return lambda part: to_tensor(file.read(f"{name} {part}"), types[part])
