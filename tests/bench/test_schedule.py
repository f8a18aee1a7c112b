"""`janus bench schedule` on a small grid: rows for all policies, exact at the optimum."""

import json
from pathlib import Path

import pytest

from janus_bench.schedule import command
from janus_scheduler.activation import POLICIES
from janus_server.errors import ConfigError


def test_exact_is_the_optimum_and_none_the_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "schedule.json"
    grid = "--shapes demo --batches 1 24 --workers 8 40 --slots 1 1.5 --samples 5 --proven 5"
    assert command([*grid.split(), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {"commit", "device", "command"} <= set(result["environment"])
    named = [dict(zip(result["columns"], row, strict=True)) for row in result["results"]]
    rows = {(row["slots"], row["batch"], row["policy"]): row for row in named}
    # 32 experts on 40 workers cannot be placed and have no rows.
    assert len(rows) == len(named) == 2 * 2 * len(POLICIES)
    for (slots, _, policy), row in rows.items():
        assert row["us"] > 0
        assert row["against_exact"] >= 1
        assert row["against_flow"] >= 1
        if policy in ("exact", "auto"):
            assert row["against_flow"] == 1
        if slots == 1:
            # Nobody has a choice.
            assert row["against_exact"] == 1
    assert rows[1.5, 24, "exact"]["against_none"] < 1
    assert output.with_suffix(".svg").stat().st_size > 5000
    assert "demo on 8 workers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shapes", "gpt"], "there is no shape 'gpt'"),
        (["--slots", "0.5"], "--slots must be at least 1, not 0.5"),
        (["--batches", "64", "0"], "--batches must be at least 1, not 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--device", "cuda"], "torch finds no GPU"),
        (["--output", "/"], "--output: cannot write /: Is a directory"),
        (["--output", "x.svg"], "--output is the JSON file, not the figure: x.svg"),
    ],
)
def test_refuses_with_a_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(flags)
