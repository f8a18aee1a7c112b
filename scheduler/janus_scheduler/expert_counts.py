"""How often each expert is chosen of late: what a placement is made from.

Pure: time is an argument. Shapes: E logical experts.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class RecentExpertTokens:
    """Tokens of each expert and layer, in which those of `half_life_s` seconds ago count half.

    Fed with totals that only grow, so that a report that is lost is made up for by the next.
    """

    def __init__(self, half_life_s: float) -> None:
        assert half_life_s > 0
        self.half_life_s = half_life_s
        self._totals: dict[int, npt.NDArray[np.int64]] = {}
        self._recent: dict[int, npt.NDArray[np.float64]] = {}
        self._updated_s = 0.0

    def update(self, totals: Mapping[int, npt.NDArray[np.int64]], now_s: float) -> None:
        """Take note of totals_E of some layers; smaller ones than before mean a new beginning."""
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
        """Layer -> tokens of late of each expert, as of the last update."""
        return self._recent
