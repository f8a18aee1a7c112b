"""The engine of one attention worker: requests in, a step at a time, tokens out; one thread."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from janus_scheduler.batching import Batcher, SequencePlan, StepPlan
from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.request import FinishReason, SamplingParams, check_range, check_token_ids
from janus_scheduler.request import Sequence as RequestSequence
from janus_server.attention.config import EngineConfig
from janus_server.attention.kv_cache import KvCache
from janus_server.attention.memory import num_kv_blocks
from janus_server.attention.runner import AttentionRunner
from janus_server.attention.sampler import Logprobs, SamplingFault, TokenChoice, sample_tokens
from janus_server.attention.weights import AttentionWeights
from janus_server.comm.base import ExpertPool
from janus_server.errors import PeerLostError
from janus_server.model.config import context_limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """What a step brought one request."""

    request_id: str
    token_id: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    """Set when the request is over and its KV blocks are free again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFailure:
    """A request that a fault of this worker ended; its KV blocks are free again."""

    request_id: str
    reason: str
    """One sentence for its client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What a step brought."""

    outputs: Sequence[TokenOutput] = ()
    failures: Sequence[RequestFailure] = ()


class Engine:
    """Continuous batching over one model: decides with the batcher, acts with the runner."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: AttentionWeights,
        config: EngineConfig,
    ) -> None:
        embedding = weights.embedding_VH
        num_blocks = num_kv_blocks(spec, config, embedding.dtype.itemsize)
        # The last token is sampled but never fed, so it needs no slot.
        room = num_blocks * config.block_size + 1
        self.max_context = min(context_limit(spec, config.max_context), room)
        """Longest prompt plus completion, in tokens."""
        self._config = config
        self._vocab_size = spec.vocab_size
        self.num_blocks = num_blocks
        self.batcher = self._new_batcher()
        kv_cache = KvCache.allocate(
            spec,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=embedding.dtype,
            device=embedding.device,
        )
        self.steps = 0
        """Steps run since the start."""
        self._params: dict[str, SamplingParams] = {}
        self._runner = AttentionRunner(spec, weights, kv_cache, max_context=self.max_context)

    @property
    def has_work(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._params)

    @property
    def progress(self) -> int:
        """Grows while a step goes on; stands still where it hangs. May be read from any thread."""
        return self._runner.progress

    def add(self, request_id: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Queue a request; raises ValueError where it can never run or its id is taken."""
        total = len(prompt_ids) + params.max_tokens
        if request_id in self._params:
            raise ValueError(f"request id {request_id} is in use")
        if not prompt_ids:
            raise ValueError(f"request {request_id} has no prompt")
        if total > self.max_context:
            raise ValueError(f"request {request_id} needs room for {total} tokens, too many here")
        check_token_ids(f"request {request_id}", prompt_ids, self._vocab_size)
        check_range("logprobs", params.num_logprobs or 0, 0, self._vocab_size)
        self.batcher.add(
            RequestSequence(request_id=request_id, prompt_ids=prompt_ids, params=params)
        )
        self._params[request_id] = params

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its KV blocks; false if it is not here (any more)."""
        self._params.pop(request_id, None)
        return self.batcher.abort(request_id)

    def step(self, pool: ExpertPool) -> StepOutcome:
        """Run one step with these experts; no outputs where only prefill went on.

        A step that raises PeerLostError changed nothing and is run again by the next call. Any
        other fault ends the requests that it concerns, and the engine goes on.
        """
        try:
            plan = self.batcher.plan()
            if plan is None:
                assert not self._params, "no plan takes up the requests that are left"
                return StepOutcome()
            self.steps += 1
            try:
                choices = self._run(plan, pool)
            except PeerLostError:
                raise
            except Exception:
                logger.exception("step %d failed", self.steps)
                reason = (
                    "the step that computed it failed; the log of the attention worker says why"
                )
                return self._fail((planned.request_id for planned in plan.sequences), reason)
            return self._complete(plan, choices)
        except PeerLostError:
            raise
        except Exception:
            return self.start_anew("the attention worker's batching failed; its log says why")

    def start_anew(self, reason: str) -> StepOutcome:
        """End every request and free every KV block; called while a fault is handled.

        For faults that leave open whether the batcher's books are right.
        """
        logger.exception("starting anew without the %d requests", len(self._params))
        self.batcher = self._new_batcher()
        return self._fail(list(self._params), reason)

    def _new_batcher(self) -> Batcher:
        return Batcher(
            max_batch_tokens=self._config.max_batch_tokens,
            max_sequences=self._config.max_sequences,
            block_size=self._config.block_size,
            num_blocks=self.num_blocks,
            max_lanes=self._config.lanes,
        )

    def _run(self, plan: StepPlan, pool: ExpertPool) -> list[TokenChoice | SamplingFault]:
        """The outcome for each sequence that samples, in the order of the plan."""
        logits_BV = self._runner.forward(plan, pool)
        sampling = _sampling(plan)
        return sample_tokens(
            logits_BV,
            [self._params[planned.request_id] for planned in sampling],
            [planned.start + planned.num_tokens for planned in sampling],
        )

    def _complete(
        self, plan: StepPlan, choices: Sequence[TokenChoice | SamplingFault]
    ) -> StepOutcome:
        tokens: dict[str, TokenChoice] = {}
        failures: list[RequestFailure] = []
        for planned, choice in zip(_sampling(plan), choices, strict=True):
            if isinstance(choice, SamplingFault):
                failures += self._fail([planned.request_id], choice.reason).failures
            else:
                tokens[planned.request_id] = choice
        token_ids = {request_id: choice.token_id for request_id, choice in tokens.items()}
        outputs = [
            TokenOutput(
                request_id=sampled.request_id,
                token_id=sampled.token_id,
                logprobs=tokens[sampled.request_id].logprobs,
                finish_reason=sampled.finish_reason,
            )
            for sampled in self.batcher.complete(plan, token_ids)
        ]
        for output in outputs:
            if output.finish_reason is not None:
                del self._params[output.request_id]
        return StepOutcome(outputs=outputs, failures=failures)

    def _fail(self, request_ids: Iterable[str], reason: str) -> StepOutcome:
        failed = list(request_ids)
        for request_id in failed:
            logger.error("request %s failed: %s", request_id, reason)
            self.abort(request_id)
        return StepOutcome(
            failures=[RequestFailure(request_id=name, reason=reason) for name in failed]
        )


def _sampling(plan: StepPlan) -> list[SequencePlan]:
    return [planned for planned in plan.sequences if planned.samples]
