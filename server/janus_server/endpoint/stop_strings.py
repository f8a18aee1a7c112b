"""Find the first stop string in a text that comes piece by piece. Pure."""

from collections.abc import Sequence


class StopMatcher:
    """Holds back what may be the beginning of a stop string, and cuts before a whole one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = ""
        """The stop string that was found; "" so far. Nothing may be fed after it."""

    def feed(self, text: str) -> str:
        """Text that can be shown now.

        Of several stops the one that is whole first counts, however the text is cut into pieces;
        of those that end together the longest.
        """
        assert not self.matched, "fed after a stop string was found"
        self._held += text
        found = [
            (at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0
        ]
        if found:
            _, at, self.matched = min(found)
            shown, self._held = self._held[:at], ""
        else:
            at = self._first_possible_start()
            shown, self._held = self._held[:at], self._held[at:]
        return shown

    def finish(self) -> str:
        """What was held back, once no text follows."""
        shown, self._held = self._held, ""
        return shown

    def _first_possible_start(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1)
        for at in range(max(len(self._held) - longest + 1, 0), len(self._held)):
            tail = self._held[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(self._held)
