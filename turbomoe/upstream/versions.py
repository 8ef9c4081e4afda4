"""Which releases of transformers the seams in this room are known to fit."""

from __future__ import annotations

import re
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
        fix = f"Run pip install '{RANGE}'"
        raise TurbomoeError("transformers is not installed", why="Models are built from it", fix=fix) from error


def check_transformers(found: str | None = None) -> None:
    """Raise ``TurbomoeError`` unless ``found`` (default: what is installed) lies in ``RANGE``."""
    found = found or installed_transformers()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and OLDEST <= (int(numbers[1]), int(numbers[2])) < FIRST_UNSUPPORTED:
        return
    raise TurbomoeError(
        f"transformers {found} is outside the supported range {RANGE}",
        why="It relies on parts of it that move between releases",
        fix=f"Run pip install '{RANGE}'",
    )
