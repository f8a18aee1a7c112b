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
        """Text that can be shown now. Of several stops the one that begins first counts."""
        assert not self.matched, "fed after a stop string was found"
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: (pair[0], self._stops.index(pair[1])))
            # An earlier stop may have begun but is not whole: the whole one ends the text first.
            return self._cut(at, keep="")
        return self._cut(self._first_possible_start(), keep=None)

    def finish(self) -> str:
        """What was held back, once no text follows."""
        return self._cut(len(self._held), keep="")

    def _cut(self, at: int, *, keep: str | None) -> str:
        shown, rest = self._held[:at], self._held[at:]
        self._held = rest if keep is None else keep
        return shown

    def _first_possible_start(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1)
        for at in range(max(len(self._held) - longest + 1, 0), len(self._held)):
            tail = self._held[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(self._held)
