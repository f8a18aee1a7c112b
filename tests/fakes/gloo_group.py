"""An epoch's group inside one process: each worker is a thread, the sockets are real."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist

from janus_server.comm.base import PartialFfn
from janus_server.comm.epoch import GroupConfig
from janus_server.comm.gloo import GlooAttentionPool, GlooExpertPool
from janus_server.comm.gloo_group import join_group

_prefixes = count()
T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def group_configs(
    num_attention: int, num_experts: int, timeout_s: float = 20.0
) -> Iterator[list[GroupConfig]]:
    """The place of every worker, over a store of their own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    prefix = f"group-{next(_prefixes)}"
    yield [
        GroupConfig(
            store_address=f"127.0.0.1:{store.port}",
            own_host="127.0.0.1",
            prefix=prefix,
            rank=rank,
            num_attention=num_attention,
            num_experts=num_experts,
            max_batch_tokens=(4096,) * num_attention,
            timeout_s=timeout_s,
            # Threads that share two cores may be slow to meet, however short a silence is.
            join_timeout_s=max(timeout_s, 20.0),
        )
        for rank in range(num_attention + num_experts)
    ]


def attention_side(config: GroupConfig) -> GlooExpertPool:
    """Join as an attention worker."""
    return GlooExpertPool(join_group(config), config)


def expert_side(
    config: GroupConfig, *, hidden_size: int, dtype: torch.dtype = torch.float32
) -> GlooAttentionPool:
    """Join as an expert worker."""
    return GlooAttentionPool(
        join_group(config),
        config,
        hidden_size=hidden_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def serve_experts(
    config: GroupConfig,
    ffn: PartialFfn,
    *,
    layers: list[int],
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Join as an expert worker and serve until all attention workers close."""
    pool = expert_side(config, hidden_size=hidden_size, dtype=dtype)
    with torch.inference_mode():
        pool.serve(ffn, layers)
