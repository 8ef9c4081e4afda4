"""One family of errors for people: a sentence, the cause, the next step.

The command line prints ``str(error)`` and nothing else, unless ``--debug`` asks for the traceback.
"""

from __future__ import annotations

from os import PathLike, fspath


class TurbomoeError(Exception):
    """Base of everything turbomoe raises on purpose.

    ``what`` is one sentence; ``why`` the cause; ``fix`` the next step a person can take.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what.rstrip(".") + "."]
        if self.why:
            parts.append(self.why.rstrip(".") + ".")
        if self.fix:
            parts.append(self.fix.rstrip(".") + ".")
        return " ".join(parts)


class ModelFileError(TurbomoeError):
    """A model file that cannot be trusted or read: names the file, the byte offset, the field and the reason."""

    def __init__(
        self, path: str | PathLike[str], reason: str, *, field: str = "", offset: int | None = None, fix: str = ""
    ) -> None:
        self.path, self.reason, self.field, self.offset = fspath(path), reason, field, offset
        at = f" at byte {offset}" if offset is not None else ""
        of = f" in {field}" if field else ""
        super().__init__(f"Cannot read {self.path}{at}{of}: {reason}", fix=fix)


class ModelError(TurbomoeError):
    """A readable file that is not a model turbomoe can run: unknown architecture, missing or misshapen tensor."""


class ModelReferenceError(TurbomoeError):
    """A model reference (path, ``hf:``, ``demo:``) that leads nowhere."""


class SettingsError(TurbomoeError):
    """A setting out of its range, or settings that contradict each other."""


class RequestError(TurbomoeError):
    """A request that cannot be served as asked: prompt too long, bad sampling parameter."""


class ContextFullError(RequestError):
    """The sequence has reached the context limit."""


class OutOfMemoryError(TurbomoeError):
    """The plan does not fit the memory of a device or of this process's cgroup."""


class IntegrityError(TurbomoeError):
    """An invariant of a cache or pool does not hold: a bug in turbomoe, never a user's fault."""
