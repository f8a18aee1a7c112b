"""The public InferenceService, thin over `Generation`."""

from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio

from janus_proto.v1 import inference_pb2
from janus_proto.v1.inference_pb2_grpc import InferenceServiceServicer
from janus_server.endpoint.generation import Generation
from janus_server.endpoint.workers import WorkerPool
from janus_server.model.checkpoint import Checkpoint

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(InferenceServiceServicer):
    """Serves the public API over gRPC."""

    def __init__(self, checkpoint: Checkpoint, generation: Generation, pool: WorkerPool) -> None:
        self._checkpoint = checkpoint
        self._generation = generation
        self._pool = pool

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Generate from one prompt."""
        return self._generation.generate(request)

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: _Context
    ) -> inference_pb2.AbortResponse:
        """End a running request."""
        if not self._generation.abort(request.request_id):
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "no request with this request_id is running"
            )
        return inference_pb2.AbortResponse()

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        """Describe the model and the pools."""
        spec, epoch = self._checkpoint.spec, self._pool.epoch
        return inference_pb2.GetModelInfoResponse(
            model_name=self._checkpoint.path.name,
            family=spec.family,
            vocab_size=spec.vocab_size,
            max_context=self._generation.bounds().max_context,
            num_layers=spec.num_layers,
            num_moe_layers=len(spec.moe_layers),
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            eos_token_ids=spec.eos_token_ids,
            num_attention_workers=len(epoch.attention_workers),
            num_expert_workers=len(epoch.expert_workers),
            version=version("janus-moe"),
        )
