"""Torch and oneDNN keep compiled code of every shape: only few shapes may reach them.

Each test runs in a process of its own, whose resident memory says how much was kept: without
padding 250 to 570 MiB on a CPU with AMX.
"""

import subprocess
import sys

import pytest

_MAX_GROWTH_MIB = 150

_LINEAR = """
weight = pack_weight(torch.zeros(64, 64, dtype=dtype))
for tokens in range(1, 1025):
    linear(torch.zeros(tokens, 64, dtype=dtype), weight)
"""

_ATTENTION = """
cache = torch.zeros(1, 512, 64, dtype=dtype)
device = torch.device("cpu")
for new in range(192, 224):
    for context in range(new, new + 128):
        span = sequence_span(first_token=0, num_new=new, runs=[(0, context)], device=device)
        paged_attention(torch.zeros(new, 1, 64, dtype=dtype), cache, cache, [span])
"""

_PROGRAM = """
import psutil, torch
from janus_kernels.linear import linear, pack_weight
from janus_kernels.paged_attention import paged_attention, sequence_span
torch.set_num_threads(1)
dtype = torch.{dtype}
before = psutil.Process().memory_info().rss
{work}
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "dtype"), [(_LINEAR, "bfloat16"), (_LINEAR, "float32"), (_ATTENTION, "bfloat16")]
)
def test_resident_memory_hardly_grows_with_new_sizes(work: str, dtype: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(dtype=dtype, work=work)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) < _MAX_GROWTH_MIB
