import numpy as np

from janus_scheduler.expert_counts import RecentExpertTokens


def test_older_tokens_count_less() -> None:
    recent = RecentExpertTokens(half_life_s=10)
    recent.update({1: np.array([4, 0])}, 0.0)
    recent.update({1: np.array([4, 2])}, 10.0)
    assert recent.of()[1].tolist() == [2, 2]
    recent.update({1: np.array([4, 2])}, 20.0)
    assert recent.of()[1].tolist() == [1, 1]


def test_a_worker_that_counts_anew() -> None:
    recent = RecentExpertTokens(half_life_s=10)
    recent.update({1: np.array([100, 50])}, 0.0)
    recent.update({1: np.array([3, 1])}, 0.0)
    assert recent.of()[1].tolist() == [103, 51]
