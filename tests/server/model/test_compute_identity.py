import platform

import torch

from janus_server.model.compute_identity import compute_identity


def test_this_process() -> None:
    identity = compute_identity(torch.device("cpu"), 3)
    assert (identity.device, identity.threads) == ("cpu", 3)
    assert identity.versions["torch"] == torch.__version__
    assert {"numpy", "numba", "janus-moe"} <= identity.versions.keys()
    assert identity.cpu_capability
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        assert ("avx512f" in identity.cpu_features) == (
            "AVX512" in identity.cpu_capability or torch.cpu._is_avx512_supported()
        )
