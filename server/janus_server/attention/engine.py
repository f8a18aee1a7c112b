"""The engine of one attention worker: requests in, a step at a time, tokens out; one thread."""

from dataclasses import dataclass

import torch

from janus_scheduler.batching import Batcher
from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.request import FinishReason, SamplingParams, Sequence
from janus_server.attention.config import EngineConfig
from janus_server.attention.kv_cache import KvCache, num_blocks_that_fit
from janus_server.attention.runner import AttentionRunner
from janus_server.attention.sampler import Logprobs, sample_tokens
from janus_server.attention.weights import AttentionWeights
from janus_server.comm.base import ExpertPool
from janus_server.errors import ConfigError
from janus_server.model.config import context_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """What a step brought one request."""

    request_id: str
    token_id: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    """Set when the request is over and its KV blocks are free again."""


class Engine:
    """Continuous batching over one model: decides with the batcher, acts with the runner."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: AttentionWeights,
        config: EngineConfig,
    ) -> None:
        embedding = weights.embedding_VH
        self.max_context = context_limit(spec, config.max_context)
        num_blocks = _num_blocks(spec, config, embedding.dtype, self.max_context)
        self.batcher = Batcher(
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_lanes=config.lanes,
        )
        kv_cache = KvCache.allocate(
            spec,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=embedding.dtype,
            device=embedding.device,
        )
        self.num_blocks = num_blocks
        self.steps = 0
        """Steps run since the start."""
        self._params: dict[str, SamplingParams] = {}
        self._runner = AttentionRunner(spec, weights, kv_cache, max_context=self.max_context)

    @property
    def has_work(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._params)

    def add(self, request_id: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Queue a request; raises ValueError where it can never run or its id is taken."""
        total = len(prompt_ids) + params.max_tokens
        if request_id in self._params:
            raise ValueError(f"request id {request_id} is in use")
        if not prompt_ids or params.max_tokens < 1:
            raise ValueError(f"request {request_id} has no prompt or no tokens to generate")
        # The last token is sampled but never fed.
        if total > self.max_context or total - 1 > self.num_blocks * self.batcher.block_size:
            raise ValueError(f"request {request_id} needs room for {total} tokens, too many here")
        self._params[request_id] = params
        self.batcher.add(Sequence(request_id=request_id, prompt_ids=prompt_ids, params=params))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its KV blocks; false if it is not here (any more)."""
        self._params.pop(request_id, None)
        return self.batcher.abort(request_id)

    def step(self, pool: ExpertPool) -> list[TokenOutput]:
        """Run one step with these experts; no outputs where only prefill went on.

        A step that raises PeerLostError changed nothing and is run again by the next call.
        """
        plan = self.batcher.plan()
        if plan is None:
            return []
        self.steps += 1
        sampling = [one for lane in plan.lanes for one in lane if one.samples]
        logits_BV = self._runner.forward(plan, pool)
        tokens = sample_tokens(
            logits_BV,
            [self._params[one.request_id] for one in sampling],
            [one.start + one.num_tokens for one in sampling],
        )
        sampled = {one.request_id: token for one, token in zip(sampling, tokens, strict=True)}
        outputs = [
            TokenOutput(
                request_id=done.request_id,
                token_id=done.token_id,
                logprobs=sampled[done.request_id].logprobs,
                finish_reason=done.finish_reason,
            )
            for done in self.batcher.complete(
                plan, {request_id: token.token_id for request_id, token in sampled.items()}
            )
        ]
        for output in outputs:
            if output.finish_reason is not None:
                del self._params[output.request_id]
        return outputs


def _num_blocks(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype, max_context: int) -> int:
    fit = num_blocks_that_fit(
        spec,
        memory_bytes=int(config.kv_cache_gib * 2**30),
        block_size=config.block_size,
        dtype=dtype,
    )
    if fit < 1:
        raise ConfigError(
            f"--kv-cache-gib {config.kv_cache_gib:g} holds not even one KV block of "
            f"{config.block_size} tokens"
        )
    # More than all sequences can fill would never be used.
    return min(fit, config.max_sequences * -(-max_context // config.block_size))
