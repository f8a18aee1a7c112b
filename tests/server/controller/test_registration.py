import dataclasses

import pytest

from janus_proto.v1 import control_pb2
from janus_server.controller.registration import (
    Deployment,
    RegistrationRefusedError,
    check_registration,
    compute_differences,
)
from tests.fakes.controller import registration

ATTENTION = control_pb2.WORKER_ROLE_ATTENTION
EXPERT = control_pb2.WORKER_ROLE_EXPERT
DEPLOYMENT = Deployment(
    fingerprint="same", dtype="bf16", comm_timeout_s=60.0, has_expert_workers=True
)
WITHOUT_EXPERT_WORKERS = dataclasses.replace(DEPLOYMENT, has_expert_workers=False)


@pytest.mark.parametrize("role", [ATTENTION, EXPERT])
def test_what_may_take_part(role: int) -> None:
    costs = control_pb2.ActivationCosts(expert_ps=5, pair_ps=10**12)
    checked = check_registration(registration(role, activation_costs=costs), DEPLOYMENT)
    assert (checked.role, checked.address, checked.pid) == (role, "host:1", 1)
    assert checked.max_batch_tokens == (64 if role == ATTENTION else 0)
    assert (checked.costs.expert_ps, checked.costs.pair_ps) == (5, 10**12)


def test_an_expert_worker_has_no_address() -> None:
    assert check_registration(registration(EXPERT, address=""), DEPLOYMENT).address == ""


@pytest.mark.parametrize(
    ("role", "fields", "sentence"),
    [
        (0, {}, "a worker must register as attention or expert worker"),
        (7, {}, "a worker must register as attention or expert worker"),
        (
            EXPERT,
            {"dtype": "fp32", "pid": 7},
            "the expert worker with process id 7 computes in fp32, this deployment in bf16",
        ),
        (ATTENTION, {"model_fingerprint": ""}, "serves another model than this controller"),
        (
            EXPERT,
            {"comm_timeout_s": 2.0, "pid": 7},
            "the expert worker with process id 7 has --comm-timeout-s 2.0, this controller 60.0: "
            "all processes of a cluster need the same",
        ),
        (ATTENTION, {"comm_timeout_s": float("nan")}, "has --comm-timeout-s nan, this controller"),
        (
            ATTENTION,
            {"holds_experts": True, "pid": 7},
            "the attention worker with process id 7 holds all experts itself, but this controller "
            "waits for expert workers",
        ),
        (ATTENTION, {"address": ""}, "'' is not HOST:PORT"),
        (ATTENTION, {"address": "host"}, "'host' is not HOST:PORT"),
        (ATTENTION, {"address": "host:0"}, "its address host:0 has no port"),
        (EXPERT, {"address": "host:65536"}, "the port of host:65536 is above 65535"),
        (EXPERT, {"address": "h" * 10**6 + ":1"}, "its address has 1000002 characters"),
        (
            EXPERT,
            {"activation_costs": control_pb2.ActivationCosts(expert_ps=5)},
            "must be from 1 to 1000000000000 ps, not 5 and 0",
        ),
        (
            EXPERT,
            {"activation_costs": control_pb2.ActivationCosts(expert_ps=2**64 - 1, pair_ps=1)},
            "must be from 1 to 1000000000000 ps",
        ),
        (ATTENTION, {"max_batch_tokens": 0}, "max_batch_tokens is 0; it must be from 1 to 1048576"),
        (ATTENTION, {"max_batch_tokens": 2**32 - 1}, "max_batch_tokens is 4294967295"),
        (EXPERT, {"max_batch_tokens": 1}, "an expert worker has no steps of its own"),
        (
            EXPERT,
            {"compute": control_pb2.ComputeIdentity(device="x" * 2**15)},
            "says too much of what it computes with",
        ),
    ],
)
def test_what_may_not_take_part(role: int, fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(RegistrationRefusedError) as raised:
        check_registration(registration(role, **fields), DEPLOYMENT)
    assert sentence in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("role", [ATTENTION, EXPERT])
def test_without_expert_workers_monoliths_alone_take_part(role: int) -> None:
    monolith = registration(ATTENTION, holds_experts=True)
    assert check_registration(monolith, WITHOUT_EXPERT_WORKERS).role == ATTENTION
    with pytest.raises(RegistrationRefusedError, match="--expert-workers 0, and that is for"):
        check_registration(registration(role), WITHOUT_EXPERT_WORKERS)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({}, {}, []),
        ({"device": "cpu"}, {"device": "NVIDIA H100"}, ["device cpu and NVIDIA H100"]),
        ({"threads": 1}, {"threads": 4}, ["threads 1 and 4"]),
        ({"has_onednn": True}, {}, ["oneDNN yes and none"]),
        (
            {"cpu_capability": "AVX512", "cpu_features": ["amx_bf16", "avx2"]},
            {"cpu_capability": "AVX2", "cpu_features": ["avx2"]},
            ["amx_bf16 yes and none", "instruction set of torch AVX512 and AVX2"],
        ),
        (
            {"versions": {"torch": "2.11.0", "numba": "0.63"}},
            {"versions": {"torch": "2.13.0"}},
            ["numba 0.63 and none", "torch 2.11.0 and 2.13.0"],
        ),
    ],
)
def test_differences_of_what_workers_compute_with(
    first: dict[str, object], second: dict[str, object], found: list[str]
) -> None:
    assert (
        compute_differences(
            control_pb2.ComputeIdentity(**first), control_pb2.ComputeIdentity(**second)
        )
        == found
    )
