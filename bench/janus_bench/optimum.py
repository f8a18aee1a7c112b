"""The least a_max of a batch, by maximum flow: a judge that shares no code with the schedules."""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from janus_scheduler.placement import EMPTY, LayerReplicas


def least_a_max(active: npt.NDArray[np.int64], replicas: LayerReplicas) -> int:
    """Least number of distinct experts on the fullest worker for the `active` experts.

    One unit flows from each expert, through a worker that holds it, to the sink. Bisection finds
    the least capacity of the workers with which all units arrive.
    """
    num_active, num_workers = len(active), replicas.num_workers
    first_worker, sink = 1 + num_active, 1 + num_active + num_workers
    hosts_AR = replicas.workers_ER[active]
    index_P, replica_P = np.nonzero(hosts_AR != EMPTY)
    rows = np.concatenate(
        [np.zeros(num_active), 1 + index_P, first_worker + np.arange(num_workers)]
    )
    columns = np.concatenate(
        [
            1 + np.arange(num_active),
            first_worker + hosts_AR[index_P, replica_P],
            np.full(num_workers, sink),
        ]
    )

    def fits(capacity: int) -> bool:
        values = np.ones(len(rows), dtype=np.int32)
        values[-num_workers:] = capacity
        graph = csr_array((values, (rows.astype(int), columns.astype(int))), shape=(sink + 1,) * 2)
        return int(maximum_flow(graph, 0, sink).flow_value) == num_active

    low, high = -(-num_active // num_workers), num_active
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
