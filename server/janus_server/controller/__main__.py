"""`python -m janus_server.controller`: one controller until it is told to stop."""

import asyncio
import contextlib

from janus_proto.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from janus_server import process
from janus_server.addresses import (
    advertised_host,
    check_can_dial,
    check_can_listen,
    first_address,
    join_address,
    listening_socket,
)
from janus_server.comm.authentication import read_secret, start_internal_server
from janus_server.controller.config import ControllerConfig
from janus_server.controller.membership import (
    HEARTBEAT_INTERVAL_S,
    Membership,
    check_pools,
)
from janus_server.controller.placement import first_placement
from janus_server.controller.registration import Deployment
from janus_server.controller.scheduling import given_costs
from janus_server.controller.service import SERVICE_NAME, ControlService
from janus_server.model.checkpoint import Checkpoint

_STOP_GRACE_S = 1.0


async def main(config: ControllerConfig, stop: asyncio.Event) -> None:
    """Serve the control service, and the store in which an epoch's workers meet, until `stop`."""
    checkpoint = Checkpoint.open(config.model.checkpoint)
    check_pools(config.pools, checkpoint.spec)
    given_costs(config.schedule)
    has_experts = config.pools.expert_workers > 0
    membership = Membership(
        deployment=Deployment(
            fingerprint=checkpoint.fingerprint(),
            dtype=config.model.dtype,
            comm_timeout_s=config.comm.comm_timeout_s,
            has_expert_workers=has_experts,
        ),
        pools=config.pools,
        placement=first_placement(config.pools, checkpoint.spec) if has_experts else None,
        schedule=config.schedule,
    )
    secret = read_secret(config.comm)
    listen_host, _ = check_can_listen(config.listen)
    check_can_dial(listen_host)
    host = advertised_host(config.advertise_host, config.listen)
    store, store_port = _open_store(listen_host)
    service = ControlService(membership, store_address=join_address(host, store_port))
    server = await start_internal_server(
        lambda grpc_server: add_ControlServiceServicer_to_server(service, grpc_server),
        [SERVICE_NAME],
        config.listen,
        secret,
    )
    try:
        server.set_serving(True)
        process.announce(server.address, config.process)
        while not stop.is_set():
            service.expire()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), HEARTBEAT_INTERVAL_S)
    finally:
        service.close()
        await server.stop(_STOP_GRACE_S)
        del store  # it listens for as long as it is referred to


def _open_store(host: str) -> tuple[object, int]:
    """Open the store in which an epoch's workers meet, and return it with its port.

    It lives as long as it is referred to.
    """
    import torch.distributed  # slow to import, so only after the checks

    # A socket of our own, because the store would listen on every interface.
    store_socket = listening_socket(host)
    port: int = store_socket.getsockname()[1]
    store = torch.distributed.TCPStore(
        first_address(host),
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=store_socket.detach(),
    )
    return store, port


if __name__ == "__main__":
    process.run("controller", ControllerConfig, main)
