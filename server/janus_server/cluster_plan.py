"""What a ServeConfig means: whether it can work, and what each process is handed."""

import dataclasses
from dataclasses import dataclass

from janus_server.addresses import check_can_dial, check_can_listen, split_address
from janus_server.attention.config import AttentionConfig
from janus_server.comm.authentication import read_secret
from janus_server.command_line import to_argv
from janus_server.config import ServeConfig
from janus_server.controller.config import ControllerConfig
from janus_server.controller.membership import check_pools
from janus_server.controller.placement import first_placement
from janus_server.controller.scheduling import given_costs
from janus_server.endpoint.config import EndpointConfig
from janus_server.endpoint.tokenizer_file import checked_tokenizer
from janus_server.experts.config import ExpertConfig
from janus_server.model.checkpoint import Checkpoint
from janus_server.model.config import context_limit
from janus_server.monolith.config import MonolithConfig
from janus_server.process import ProcessConfig
from janus_server.surroundings import check_threads, threads_of_process


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerProcess:
    """How to start one worker: `python -m module argv`."""

    name: str
    module: str
    argv: tuple[str, ...]


def check_config(config: ServeConfig) -> Checkpoint:
    """Refuse, with one sentence, what could not work, before any process is started.

    Each number alone is within its bounds already. Returns the checkpoint, which is checked too.
    Raises CheckpointError or ConfigError.
    """
    checkpoint = Checkpoint.open(config.model.checkpoint)
    check_pools(config.pools, checkpoint.spec)
    first_placement(config.pools, checkpoint.spec)
    given_costs(config.schedule)
    context_limit(checkpoint.spec, config.engine.max_context)
    checked_tokenizer(checkpoint)
    listen_host, _ = check_can_listen(config.admission.listen)
    controller_host, _ = split_address(controller_config(config).listen)
    for host in (listen_host, controller_host):
        check_can_dial(host)
    read_secret(config.comm)
    num_workers = len(worker_processes(config, "", num_devices=1))
    # `janus serve` itself, controller and endpoint compute nothing.
    num_threads = num_workers * threads_of_process(config.threads) + 3 * threads_of_process()
    check_threads(f"the {num_workers + 3} processes of this server run", num_threads)
    return checkpoint


def with_secret_file(config: ServeConfig, path: str) -> ServeConfig:
    """The same with the secret of its cluster at `path`."""
    comm = dataclasses.replace(config.comm, cluster_secret_file=path)
    return dataclasses.replace(config, comm=comm)


def controller_config(config: ServeConfig) -> ControllerConfig:
    """What the controller is handed: with transport local it places no experts."""
    pools = config.pools
    if config.transport == "local":
        pools = dataclasses.replace(pools, expert_workers=0)
    return ControllerConfig(
        model=config.model,
        pools=pools,
        schedule=config.schedule,
        comm=config.comm,
        process=_process_config(config),
    )


def endpoint_config(config: ServeConfig, controller: str) -> EndpointConfig:
    """What the endpoint is handed; `controller` is the HOST:PORT of the controller."""
    return EndpointConfig(
        model=config.model,
        admission=config.admission,
        comm=config.comm,
        controller=controller,
        max_context=config.engine.max_context,
        process=_process_config(config),
    )


def _process_config(config: ServeConfig) -> ProcessConfig:
    return ProcessConfig(log_level=config.log_level, lifeline=True)


def worker_processes(
    config: ServeConfig, controller: str, *, num_devices: int
) -> list[WorkerProcess]:
    """The workers of both pools, attention first, spread over `num_devices` devices in turn."""
    return [
        *(
            _attention_process(config, controller, index % num_devices)
            for index in range(config.pools.attention_workers)
        ),
        *(
            _expert_process(config, controller, index % num_devices)
            for index in range(
                config.pools.attention_workers,
                config.pools.attention_workers + config.pools.expert_workers,
            )
            if config.transport != "local"
        ),
    ]


def _attention_process(config: ServeConfig, controller: str, device_index: int) -> WorkerProcess:
    attention = AttentionConfig(
        model=config.model,
        engine=config.engine,
        comm=config.comm,
        controller=controller,
        device_index=device_index,
        threads=config.threads,
        process=_process_config(config),
    )
    if config.transport == "local":
        monolith = MonolithConfig(attention=attention, pools=config.pools, schedule=config.schedule)
        return WorkerProcess(
            name="monolithic worker",
            module="janus_server.monolith",
            argv=tuple(to_argv(monolith)),
        )
    return WorkerProcess(
        name="attention worker",
        module="janus_server.attention",
        argv=tuple(to_argv(attention)),
    )


def _expert_process(config: ServeConfig, controller: str, device_index: int) -> WorkerProcess:
    expert = ExpertConfig(
        model=config.model,
        comm=config.comm,
        controller=controller,
        device_index=device_index,
        threads=config.threads,
        process=_process_config(config),
    )
    return WorkerProcess(
        name="expert worker", module="janus_server.experts", argv=tuple(to_argv(expert))
    )
