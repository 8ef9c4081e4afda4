"""Which releases of transformers the seams in this room are known to fit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from turbomoe.errors import TurbomoeError

OLDEST = (5, 17)
FIRST_UNSUPPORTED = (6, 0)
RANGE = "transformers>=5.17,<6"


def installed_transformers() -> str:
    """Version text of the installed transformers, found without importing it. Raises ``TurbomoeError`` if absent."""
    try:
        return version("transformers")
    except PackageNotFoundError as error:
        fix = f"pip install '{RANGE}'"
        raise TurbomoeError("transformers is not installed", why="models are built from it", fix=fix) from error


def check_transformers(found: str | None = None) -> None:
    """Raise ``TurbomoeError`` unless ``found`` (default: what is installed) lies in ``RANGE``."""
    found = found or installed_transformers()
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and OLDEST <= numbers < FIRST_UNSUPPORTED:
        return
    raise TurbomoeError(
        f"transformers {found} is outside the supported range {RANGE}",
        why="turbomoe relies on parts of it that move between releases",
        fix=f"pip install '{RANGE}'",
    )
