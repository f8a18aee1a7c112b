"""Real processes over real sockets, judged by transformers on the same checkpoint."""

import math
import random
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from janus_proto.v1 import inference_pb2, worker_pb2
from janus_proto.v1.worker_pb2_grpc import AttentionWorkerServiceStub
from tests.conftest import CheckpointFactory
from tests.fakes.checkpoints import reference_decode, reference_model
from tests.fakes.serving import JANUS, Served, generate_json, request, run_janus, serving

pytestmark = pytest.mark.e2e


def random_prompts(count: int, longest: int = 120) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def folder(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(num_experts=7, decoder_sparse_step=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder, "--attention-workers", "1", "--expert-workers", "2") as server:
        yield server


def test_says_who_is_ready(served: Served) -> None:
    roles = sorted(line.split(" ready ")[0] for line in served.ready_lines)
    assert roles == [
        "attention worker attention-0",
        "expert worker expert-0",
        "expert worker expert-1",
    ]


def test_workers_answer_nobody_without_the_secret_which_no_command_line_shows(
    served: Served,
) -> None:
    for address in served.attention_addresses:
        with grpc.insecure_channel(address) as channel:
            stub = AttentionWorkerServiceStub(channel)
            with pytest.raises(grpc.RpcError) as raised:
                stub.GetEngineLoad(worker_pb2.GetEngineLoadRequest(), timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    [(_, token)] = served.secret.metadata
    for process in served.family():
        shown = [*process.cmdline(), *process.environ().values()]
        assert any("/dev/fd/" in argument for argument in process.cmdline())
        assert not any(token in text for text in shown)


def test_model_info(served: Served) -> None:
    info = served.stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=10)
    assert (info.family, info.num_experts, info.top_k) == ("qwen3_moe", 7, 2)
    assert (info.num_attention_workers, info.num_expert_workers) == (1, 2)
    assert (info.num_layers, info.num_moe_layers) == (4, 2)


def test_concurrent_streams_give_the_tokens_of_transformers(folder: Path, served: Served) -> None:
    prompts = random_prompts(8)

    def stream(prompt: list[int]) -> list[list[int]]:
        responses = served.stub.Generate(request(prompt, 12), timeout=60)
        return [list(response.token_ids) for response in responses]

    with ThreadPoolExecutor(8) as clients:
        streams = list(clients.map(stream, prompts))
    model = reference_model(folder)
    for prompt, deltas in zip(prompts, streams, strict=True):
        tokens = [token for delta in deltas for token in delta]
        assert tokens == reference_decode(model, prompt, 12)[0]
        assert len(deltas) > 1


def test_generate_json_gives_the_tokens_of_transformers(folder: Path, served: Served) -> None:
    prompt = [12, 7, 99]
    answer = generate_json(served.address, prompt, "--max-tokens", "32", "--temperature", "0")
    assert answer["token_ids"] == reference_decode(reference_model(folder), prompt, 32)[0]
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 32}


@pytest.mark.parametrize("filters", [{"min_p": 0.5}, {"min_p": 1.0, "top_p": 1e-30}, {}])
@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-6])
def test_the_smallest_temperatures_are_greedy(
    served: Served, temperature: float, filters: dict[str, float]
) -> None:
    (greedy,), (sampled,) = (
        list(served.stub.Generate(request([12, 7, 99], 1, **sampling), timeout=60))
        for sampling in ({"temperature": 0.0}, {"temperature": temperature, **filters})
    )
    assert sampled.token_ids == greedy.token_ids


def test_cancel_in_the_middle_frees_the_kv_blocks(served: Served) -> None:
    call = served.stub.Generate(request(range(200), 800), timeout=60)
    next(call)
    assert served.free_blocks()[0] < served.free_blocks()[1]
    call.cancel()
    served.wait_until_idle()


def test_a_deadline_frees_the_kv_blocks(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        for _ in served.stub.Generate(request(range(200), 800), timeout=0.3):
            pass
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.wait_until_idle()


def test_bad_requests_harm_nobody_else(served: Served) -> None:
    alone = generate_json(served.address, [5, 6], "--max-tokens", "40", "--temperature", "0")
    call = served.stub.Generate(request([5, 6], 40), timeout=60)
    for bad in (
        request([], 4),
        request([256], 4),
        request([1], 0),
        request([1] * 1024, 4),
        request([1], 4, temperature=float("nan")),
        request([1], 4, top_p=1.5),
        request([1], 4, stop=[""]),
        request([1], 4, logprobs=1000),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            list(served.stub.Generate(bad, timeout=10))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Traceback" not in raised.value.details()
    tokens = [token for response in call for token in response.token_ids]
    assert tokens == alone["token_ids"]


def test_port_in_use(folder: Path, served: Served) -> None:
    result = run_janus("serve", str(folder), "--listen", served.address)
    assert result.returncode == 1
    assert result.stderr.startswith("janus: cannot listen on")
    assert result.stderr.count("\n") == 1


def test_queue_full_and_shutdown_under_load(folder: Path) -> None:
    with serving(folder, "--expert-workers", "1", "--max-requests", "2") as server:
        calls = [server.stub.Generate(request([1, 2, 3], 400), timeout=60) for _ in range(2)]
        firsts = [next(call) for call in calls]
        with pytest.raises(grpc.RpcError) as raised:
            next(server.stub.Generate(request([1], 4), timeout=10))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with ThreadPoolExecutor(2) as clients:
            rests = [clients.submit(list, call) for call in calls]
            status, stderr = server.stop(signal.SIGTERM)
            for first, rest in zip(firsts, rests, strict=True):
                deltas = [first, *rest.result(60)]
                assert sum(len(delta.token_ids) for delta in deltas) == 400
                assert deltas[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert status == 0, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_drain_is_bounded(folder: Path, number: signal.Signals) -> None:
    flags = ("--expert-workers", "1", "--drain-timeout-s", "0.2", "--max-batch-tokens", "16")
    with serving(folder, *flags) as server:
        call = server.stub.Generate(request([1, 2, 3], 1000), timeout=60)
        next(call)
        status, _ = server.stop(number)
        assert status == 0
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "flags",
    [
        ("--attention-workers", "2", "--expert-workers", "3", "--lanes", "2"),
        ("--attention-workers", "2", "--transport", "local", "--expert-slots", "5"),
        ("--expert-workers", "3", "--expert-slots", "4"),
        ("--expert-workers", "3", "--expert-slots", "4", "--schedule", "eplb"),
        ("--expert-slots", "7", "--expert-us", "1", "--pair-us", "1"),
    ],
)
def test_other_layouts_give_the_same_tokens(folder: Path, flags: tuple[str, ...]) -> None:
    prompts = random_prompts(6)
    with (
        serving(folder, *flags, "--max-batch-tokens", "48") as server,
        ThreadPoolExecutor(6) as clients,
    ):
        answers = list(
            clients.map(
                lambda prompt: [
                    token
                    for response in server.stub.Generate(request(prompt, 10), timeout=60)
                    for token in response.token_ids
                ],
                prompts,
            )
        )
        assert server.stop()[0] == 0
    model = reference_model(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == reference_decode(model, prompt, 10)[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--expert-workers", "8"), "--expert-workers 8 does not fit a model that has 7 experts"),
        (("--lanes", "9"), "lanes"),
        (("--device", "cuda"), "GPU"),
        (("--max-context", "4096"), "from 2 to the model's 1024, not 4096"),
    ],
)
def test_configurations_that_cannot_start(
    folder: Path, flags: tuple[str, ...], sentence: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    result = run_janus("serve", str(folder), "--listen", listen, *flags)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    result = run_janus("serve", str(tmp_path / "nothing"))
    assert result.returncode == 1
    assert result.stderr == f"janus: no checkpoint folder at {tmp_path / 'nothing'}\n"


def test_a_weight_that_is_no_number_ends_the_start_with_a_sentence(
    folder: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(spoilt / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name][3, 7] = math.nan
    save_file(tensors, spoilt / "model.safetensors")
    result = run_janus("serve", str(spoilt), "--listen", "127.0.0.1:0")
    assert result.returncode == 1
    assert result.stderr.count(f"{name} in {spoilt / 'model.safetensors'} holds nan at [3, 7]") == 1
    assert "Traceback" not in result.stderr


def test_flags_are_keys_of_a_toml_file(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "janus.toml"
    config.write_text('transport = "local"\nmax_requests = 3\n')
    with serving(folder, "--config", str(config)) as server:
        assert [line.split()[0] for line in server.ready_lines] == ["attention"]


def test_the_command_is_installed() -> None:
    assert Path(JANUS).exists()
    assert run_janus("--help").returncode == 0
