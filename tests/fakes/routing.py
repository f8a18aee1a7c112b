"""Random replicas and batches, of the kinds that a schedule can meet."""

import numpy as np
from hypothesis import strategies as st

from janus_scheduler.placement import LayerReplicas


@st.composite
def replicas(draw: st.DrawFn, max_experts: int = 24, max_workers: int = 10) -> LayerReplicas:
    """Each expert on a single worker, on some, on all; at times more workers than experts."""
    num_experts = draw(st.integers(1, max_experts), "experts")
    num_workers = draw(st.integers(1, max_workers), "workers")
    kind = draw(st.sampled_from(["single", "few", "any", "every", "narrow"]), "kind")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    hosts = []
    for expert in range(num_experts):
        most = {"single": 1, "few": 2, "any": num_workers, "every": num_workers, "narrow": 2}[kind]
        count = num_workers if kind == "every" else rng.integers(1, min(most, num_workers) + 1)
        # Narrow: a chain of workers, in which taking an expert off one worker takes a long path.
        pool = (
            np.array([expert % num_workers, (expert + 1) % num_workers])
            if kind == "narrow"
            else np.arange(num_workers)
        )
        pool = np.unique(pool)
        hosts.append(np.sort(rng.permutation(pool)[: min(count, len(pool))]))
    return layer_replicas([list(map(int, workers)) for workers in hosts], num_workers)


def layer_replicas(hosts: list[list[int]], num_workers: int) -> LayerReplicas:
    """Replicas on these workers, in slots as they come."""
    num_slots = max(1, max(sum(worker in held for held in hosts) for worker in range(num_workers)))
    used = [0] * num_workers
    slots_ER = np.full((len(hosts), max(map(len, hosts))), -1, dtype=np.int32)
    for expert, workers in enumerate(hosts):
        for index, worker in enumerate(sorted(workers)):
            slots_ER[expert, index] = worker * num_slots + used[worker]
            used[worker] += 1
    return LayerReplicas(num_workers=num_workers, slots_per_worker=num_slots, slots_ER=slots_ER)


def skewed_ids(
    rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int, exponent: float = 0.8
) -> np.ndarray:
    """int64 [T, K]: distinct experts of each token, drawn by a Zipf law."""
    logits_TE = -exponent * np.log(np.arange(1, num_experts + 1)) + rng.gumbel(
        size=(num_tokens, num_experts)
    )
    return np.argsort(-logits_TE, axis=1)[:, :top_k].astype(np.int64)
