import pytest

from janus_bench.demo import DEMO_CHECKPOINT, PROMPTS
from janus_server.model.checkpoint import Checkpoint
from tests.fakes.checkpoints import reference_decode, reference_model
from tests.fakes.decoding import greedy_decode, local_pool
from tests.fakes.serving import run_janus


@pytest.mark.e2e
def test_the_demo_streams_every_prompt_and_ends() -> None:
    result = run_janus("demo", "--max-tokens", "12", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    for index in range(len(PROMPTS)):
        assert f"[{index + 1}] " in result.stdout
    assert "TTFT ms" in result.stdout
    assert "activated experts" in result.stdout
    assert result.stdout.rstrip().endswith("all processes have ended")


def test_the_demo_checkpoint_gives_the_tokens_of_transformers() -> None:
    spec = Checkpoint.open(DEMO_CHECKPOINT).spec
    assert (spec.num_experts, spec.top_k) == (32, 4)
    assert spec.eos_token_ids
    prompts = [[17, 300, 5], list(range(40, 90))]
    decoded = greedy_decode(DEMO_CHECKPOINT, local_pool(DEMO_CHECKPOINT, 2), prompts, 16)
    model = reference_model(DEMO_CHECKPOINT)
    for prompt, ours in zip(prompts, decoded, strict=True):
        assert ours.token_ids == reference_decode(model, prompt, 16)[0]
