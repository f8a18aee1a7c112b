"""What decides the last bits of the numbers that a worker computes.

Expert workers compute the gate of a layer each for itself. Where their numbers differ in the last
bit, they may choose different experts for a token: an expert is then left out or computed twice.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from janus_proto.v1 import control_pb2

_LIBRARIES = ("janus-moe", "torch", "numpy", "numba", "triton")

_CPU_INFO = Path("/proc/cpuinfo")

_CPU_FEATURES = """
    avx avx2 fma avx512f avx512_vnni avx512_bf16 avx512_fp16 avx_vnni
    amx_tile amx_int8 amx_bf16 amx_fp16
    asimd asimdhp asimddp fphp bf16 i8mm sve sve2 svebf16 sme
"""
"""Names in /proc/cpuinfo of what makes libraries take other paths; x86 first, then Arm."""


def compute_identity(device: torch.device, threads: int) -> control_pb2.ComputeIdentity:
    """What this process computes with on `device`; `threads`: of its CPU."""
    identity = control_pb2.ComputeIdentity(device=device.type, versions=_versions())
    if device.type == "cuda":
        identity.device = torch.cuda.get_device_name(device)
        return identity
    identity.cpu_capability = torch.backends.cpu.get_cpu_capability()
    identity.cpu_features.extend(_cpu_features())
    identity.has_onednn = torch.backends.mkldnn.is_available()
    identity.threads = threads
    return identity


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _cpu_features() -> list[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not on Linux
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(set(_CPU_FEATURES.split()) & set(flags.partition(":")[2].split()))
