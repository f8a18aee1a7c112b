"""What an expert worker counts, against the routing of transformers."""

import numpy as np
import torch

from janus_scheduler.model_spec import ModelSpec
from janus_server.experts.worker import expert_load
from tests.conftest import CheckpointFactory
from tests.fakes.decoding import expert_runners


def test_counts_are_those_of_the_batches(make_checkpoint: CheckpointFactory) -> None:
    folder = make_checkpoint(num_experts=7, decoder_sparse_step=2, num_hidden_layers=4)
    runners = expert_runners(folder, 2, slots=5)
    spec: ModelSpec = runners[0]._spec
    torch.manual_seed(0)
    batches = [torch.randn(n, spec.hidden_size) for n in (1, 6)]
    for layer in spec.moe_layers:
        for hidden_TH in batches:
            for runner in runners:
                runner.partial(layer, hidden_TH)
    for layer, counts in runners[0].counts().items():
        assert layer in spec.moe_layers
        assert counts.num_steps == 2
        assert sum(counts.tokens_E) == sum(counts.tokens_W) == 7 * spec.top_k
        assert counts.sum_a_max >= -(-sum(counts.experts_W) // 2)
        assert counts.sum_a_max <= sum(counts.experts_W)
    first, second = (expert_load(runner) for runner in runners)
    assert first.num_layer_steps == 2 * len(spec.moe_layers)
    assert first.num_token_pairs + second.num_token_pairs == 7 * spec.top_k * len(spec.moe_layers)
    assert [one.expert_tokens for one in first.layers] == [
        one.expert_tokens for one in second.layers
    ]
    assert np.sum([one.num_activated_experts for one in first.layers]) == (
        first.num_activated_experts + second.num_activated_experts
    )
