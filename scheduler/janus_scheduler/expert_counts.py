"""How often each expert was chosen recently: what a placement is made from.

Pure: time is an argument. Shapes: E logical experts.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class RecentExpertTokens:
    """Tokens of each expert and layer; tokens of `half_life_s` seconds ago count half.

    It is fed with totals since a worker's start, so that the next report makes up for a lost one.
    """

    def __init__(self, half_life_s: float) -> None:
        assert half_life_s > 0
        self.half_life_s = half_life_s
        self._totals: dict[int, npt.NDArray[np.int64]] = {}
        self._recent: dict[int, npt.NDArray[np.float64]] = {}
        self._updated_s = 0.0

    def update(self, totals: Mapping[int, npt.NDArray[np.int64]], now_s: float) -> None:
        """Take in the totals [E] of some layers; totals that shrank are those of a new worker."""
        decay = 0.5 ** (max(now_s - self._updated_s, 0.0) / self.half_life_s)
        self._updated_s = now_s
        for recent_E in self._recent.values():
            recent_E *= decay
        for layer, total_E in totals.items():
            before_E = self._totals.get(layer, np.zeros_like(total_E))
            added_E = total_E - before_E if (total_E >= before_E).all() else total_E
            self._recent[layer] = self._recent.get(layer, np.zeros(len(total_E))) + added_E
            self._totals[layer] = total_E

    def of(self) -> Mapping[int, npt.NDArray[np.float64]]:
        """Layer -> recent tokens of each expert [E], as of the last update."""
        return self._recent
