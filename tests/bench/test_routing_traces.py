"""Routing traces: what is read of a file, what is refused, and what made-up routing looks like."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_bench.routing_traces import SyntheticRouting, read_routing
from janus_server.errors import ConfigError

TOPK_IDS = np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]]], np.uint8)


def write(path: Path, **arrays: Any) -> None:
    """A trace of 2 layers with 4 experts, but for `arrays`; None leaves an array out."""
    whole = {"layers": np.array([0, 2], np.int32), "topk_ids": TOPK_IDS, "num_experts": np.int32(4)}
    kept = {name: array for name, array in (whole | arrays).items() if array is not None}
    with path.open("wb") as file:
        np.savez_compressed(file, **kept)


def refusal(path: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(ConfigError) as refused:
        read_routing(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_reads_layers_with_their_experts(tmp_path: Path) -> None:
    write(tmp_path / "t.npz")
    routing = read_routing(tmp_path / "t.npz")
    assert routing.num_experts == 4
    assert {layer: ids.tolist() for layer, ids in routing.layers.items()} == {
        0: TOPK_IDS[0].tolist(),
        2: TOPK_IDS[1].tolist(),
    }


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        *(({name: None}, "needs the arrays") for name in ("layers", "topk_ids", "num_experts")),
        ({"topk_ids": TOPK_IDS + 1}, "must be experts 0 to 3"),
        ({"topk_ids": TOPK_IDS.astype(np.int64) - 1}, "must be experts 0 to 3"),
        ({"topk_ids": TOPK_IDS.astype(np.uint64) * 2**62}, "must be experts 0 to 3"),
        ({"topk_ids": TOPK_IDS * 0}, "names an expert twice"),
        ({"topk_ids": TOPK_IDS[:, :0]}, "holds no tokens"),
        ({"topk_ids": TOPK_IDS[0]}, "must be integers"),
        ({"topk_ids": TOPK_IDS[:1]}, "must be integers"),
        ({"topk_ids": TOPK_IDS.astype(float)}, "must be integers"),
        ({"layers": np.array([2, 2])}, "names a layer twice"),
        *(
            ({"layers": np.array(layers)}, "layers must be a row of integers from 0 to")
            for layers in (
                *([-1, 0], [0, 2**40], [0.2, 0.7], [0, float("nan")], [0j, 1], ["a", "b"]),
                *(np.array([0, 2**63], np.uint64), [[0], [1]], 0, [True, False]),
                np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
            )
        ),
        *(
            ({"num_experts": np.array(count)}, "num_experts must be one integer from 1 to")
            for count in (0, -3, 2**62, float("inf"), float("nan"), [4], [4, 4], "4", 4j, True)
        ),
    ],
)
def test_a_trace_that_means_nothing_is_refused(
    arrays: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write(tmp_path / "t.npz", **arrays)
    assert sentence in refusal(tmp_path / "t.npz")


def test_other_things_than_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    assert "No such file" in refusal(path)
    os.mkfifo(path)
    assert "is a pipe (FIFO)" in refusal(path)
    path.unlink()
    path.write_text("no archive")
    assert "is no routing trace" in refusal(path)
    os.truncate(path, 2**36)  # takes no room on the disk
    assert "is larger than" in refusal(path)


def test_a_file_that_unpacks_to_far_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    assert "unpacks to more than 256 MiB" in refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1099511627776, 2), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999, 1, 2), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, -1, 2), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 1, 2), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 1, 2), }",  # as Python 2 wrote it
        "{'descr': ",
        "{'descr': '''",
        "(" * 900,
    ],
)
def test_a_header_that_numpy_fails_at_is_refused(header: str, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write(path, topk_ids=None)
    line = f"{header}\n".encode()
    array = b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(64)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("topk_ids.npy", array)
    assert "is no routing trace" in refusal(path)


@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    write(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ConfigError):
        assert read_routing(path).layers[0].tolist() == TOPK_IDS[0].tolist()


def test_synthetic_routing_has_the_stated_skew_and_blocks() -> None:
    counts = {
        zipf: np.bincount(
            SyntheticRouting(num_experts=32, top_k=2, zipf=zipf, block_boost=1)
            .sample(4000)
            .layers[0]
            .ravel(),
            minlength=32,
        )
        for zipf in (0.0, 1.0)
    }
    assert counts[0.0].max() < 1.3 * counts[0.0].mean()
    assert counts[1.0].max() > 4 * counts[1.0].mean()
    together = [
        SyntheticRouting(num_experts=32, top_k=4, zipf=0.0, block_boost=boost).sample(2000)
        for boost in (1.0, 50.0)
    ]
    distinct_sets = [len(np.unique(np.sort(t.layers[0], axis=1), axis=0)) for t in together]
    assert distinct_sets[1] < distinct_sets[0] / 2
