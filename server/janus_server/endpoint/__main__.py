"""Start the endpoint: `python -m janus_server.endpoint`."""

import asyncio

from janus_proto.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from janus_server.comm.authentication import read_secret
from janus_server.comm.control_client import ControlClient
from janus_server.endpoint.config import EndpointConfig
from janus_server.endpoint.generation import Generation
from janus_server.endpoint.limits import public_limits
from janus_server.endpoint.service import SERVICE_NAME, InferenceService
from janus_server.endpoint.tokenizer import load_tokenizer
from janus_server.endpoint.workers import WorkerPool
from janus_server.grpc_server import RunningServer, start_server
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import context_limit
from janus_server.process import announce, run

_READINESS_POLL_S = 0.05
_STOP_GRACE_S = 1.0


async def main(config: EndpointConfig, stop: asyncio.Event) -> None:
    """Serve the public API until `stop`, then drain; fails at once where the controller is lost."""
    checkpoint = Checkpoint.open(config.model.checkpoint)
    max_context = context_limit(checkpoint.spec, config.max_context)
    tokenizer = load_tokenizer(checkpoint)
    control = ControlClient(config.controller, read_secret(config.comm))
    pool = WorkerPool(
        control,
        model_fingerprint=checkpoint.fingerprint(),
        comm_timeout_s=config.comm.comm_timeout_s,
    )
    generation = Generation(
        checkpoint.spec,
        tokenizer,
        pool,
        max_context=max_context,
        max_requests=config.admission.max_requests,
    )
    service = InferenceService(checkpoint, generation, pool)
    server = await start_server(
        lambda grpc_server: add_InferenceServiceServicer_to_server(service, grpc_server),
        [SERVICE_NAME],
        config.admission.listen,
        public_limits(config.admission, max_context=max_context),
    )
    announce(server.address, config.process)
    try:
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(pool.follow(), name="epochs")
            publishing = tasks.create_task(_publish_readiness(server, pool), name="readiness")
            await stop.wait()
            publishing.cancel()
            server.set_serving(False)
            await generation.drain(config.admission.drain_timeout_s)
            following.cancel()
    finally:
        await server.stop(_STOP_GRACE_S)
        await control.close()
        if tokenizer is not None:
            tokenizer.close()


async def _publish_readiness(server: RunningServer, pool: WorkerPool) -> None:
    published = False
    while True:
        if pool.is_ready != published:
            published = pool.is_ready
            server.set_serving(published)
        await asyncio.sleep(_READINESS_POLL_S)


if __name__ == "__main__":
    run("endpoint", EndpointConfig, main)
