"""What an expert worker needs of memory. Torch-free."""

from janus_scheduler.model_spec import ModelSpec
from janus_scheduler.placement import EMPTY, Placement
from janus_server.model.config import ModelConfig
from janus_server.model.memory import FP32_BYTES, PROCESS_BYTES, MemoryNeeds


def expert_needs(
    spec: ModelSpec, placement: Placement, worker: int, model: ModelConfig, *, num_tokens: int
) -> MemoryNeeds:
    """What expert worker number `worker` needs, in steps of up to `num_tokens` tokens."""
    held = [placement.worker_slots(layer, worker) != EMPTY for layer in placement.layers]
    gates = len(held) * spec.num_experts * spec.hidden_size
    experts = sum(int(held_C.sum()) for held_C in held) * spec.expert_values
    return MemoryNeeds(
        name="expert worker",
        weights=(gates + experts) * model.value_bytes,
        working_buffers=max(
            num_tokens * _token_bytes(spec, placement.slots_per_worker, model.value_bytes),
            # An expert as read, converted, joined and packed.
            4 * spec.expert_values * model.value_bytes,
        ),
        process=PROCESS_BYTES[model.device],
    )


def _token_bytes(spec: ModelSpec, num_slots: int, value_bytes: int) -> int:
    hidden, inner = spec.hidden_size, spec.expert_intermediate_size
    # Hidden states, the partial result and its rounded copy, the gate's probabilities.
    token = hidden * (2 * value_bytes + FP32_BYTES) + 3 * FP32_BYTES * spec.num_experts
    # Gathered rows; both projections, joined from their groups; the result in fp32.
    pair = hidden * (3 * value_bytes + FP32_BYTES) + 6 * inner * value_bytes
    return token + min(spec.top_k, num_slots) * pair
