"""Stop strings over streamed text: nothing that may belong to a stop string is shown before it is certain."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds text through; holds back a tail that could begin a stop string; cuts at the first match."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to show, whether a stop string was met). After a match nothing more comes out."""
        self.held += text
        hits = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            shown, self.held = self.held[: min(hits)], ""
            return shown, True
        keep = self._possible_start()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, False

    def finish(self) -> str:
        """What was held back, now that no more text will come."""
        shown, self.held = self.held, ""
        return shown

    def _possible_start(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stops):
                return n
        return 0
