import platform

import pytest
import torch

from janus_proto.v1.control_pb2 import ComputeIdentity
from janus_server.comm.compute_identity import compute_identity, differences


def test_this_process() -> None:
    identity = compute_identity(torch.device("cpu"), 3)
    assert (identity.device, identity.threads) == ("cpu", 3)
    assert identity.versions["torch"] == torch.__version__
    assert {"numpy", "numba", "janus-moe"} <= identity.versions.keys()
    assert identity.cpu_capability
    assert differences(identity, identity) == []
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        assert ("avx512f" in identity.cpu_features) == (
            "AVX512" in identity.cpu_capability or torch.cpu._is_avx512_supported()
        )


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
def test_differences_are_named(
    first: dict[str, object], second: dict[str, object], found: list[str]
) -> None:
    assert differences(ComputeIdentity(**first), ComputeIdentity(**second)) == found
