"""A worker that holds attention and all experts in one process: the reference for separate ones."""

import asyncio

from janus_proto.v1 import control_pb2
from janus_scheduler.activation import ActivationCosts, Scheduling
from janus_scheduler.placement import Placement
from janus_server.attention import worker as attention_worker
from janus_server.attention.config import EngineConfig
from janus_server.comm.base import ExpertPool
from janus_server.comm.local import LocalExpertPool
from janus_server.controller.membership import check_pools
from janus_server.controller.placement import first_placement
from janus_server.controller.scheduling import given_costs
from janus_server.experts.calibration import measure_costs
from janus_server.experts.runner import ExpertRunner
from janus_server.experts.weights import load_layers
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.memory import MemoryNeeds
from janus_server.model.weights import WeightReader, device_of, dtype_of
from janus_server.monolith.config import MonolithConfig
from janus_server.monolith.memory import monolith_needs


async def main(config: MonolithConfig, stop: asyncio.Event) -> None:
    """Serve as an attention worker whose experts are in this process."""
    checkpoint = Checkpoint.open(config.attention.model.checkpoint)
    check_pools(config.pools, checkpoint.spec)
    placement = first_placement(config.pools, checkpoint.spec)
    costs = given_costs(config.schedule)

    def join(epoch: control_pb2.Epoch, worker_id: str) -> ExpertPool:
        return local_expert_pool(config, checkpoint, placement, costs)

    def needs(engine: EngineConfig) -> MemoryNeeds:
        return monolith_needs(checkpoint, engine, config.attention.model, placement)

    attention = attention_worker.fit_memory(config.attention, checkpoint.spec, needs)
    await attention_worker.serve(attention, stop, checkpoint, join, holds_experts=True)


def local_expert_pool(
    config: MonolithConfig,
    checkpoint: Checkpoint,
    placement: Placement,
    costs: ActivationCosts | None,
) -> LocalExpertPool:
    """Load all experts, in as many shares as there are expert workers; `costs` None: measured."""
    spec, model = checkpoint.spec, config.attention.model
    device, dtype = device_of(model, config.attention.device_index), dtype_of(model)
    scheduling = Scheduling(
        policy=config.schedule.schedule,
        costs=costs or measure_costs(spec, dtype=dtype, device=device),
    )
    with WeightReader(checkpoint, dtype=dtype, device=device) as reader:
        runners = [
            ExpertRunner(
                spec,
                load_layers(reader, placement, worker),
                worker=worker,
                scheduling=scheduling,
            )
            for worker in range(placement.num_workers)
        ]
    return LocalExpertPool([runner.partial for runner in runners])
