"""The benchmark runner runs, and its results have the form that others read."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import AllocationCounter

BENCH = Path(__file__).resolve().parent.parent / "bench" / "run.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "galore-step" in done.stdout and "not judged" in done.stdout
    return json.loads((out / "results.json").read_text())


def test_environment_says_what_figures_depend_on(results):
    assert results["environment"]["threads"] == 1
    assert torch.__version__.startswith(results["environment"]["versions"]["torch"])
    assert set(results["cases"]) == {
        "galore-step", "galore-refresh", "muon-step", "adamw-parity", "overhead", "memory",
    }  # fmt: skip


def test_ratios_are_positive_and_lie_in_their_range(results):
    seen = 0
    for case in results["cases"].values():
        for contest in case["contests"]:
            assert len(contest["medians_ms"]) >= 2
            assert all(ms > 0 for ms in contest["medians_ms"].values())
            for ratio in contest["ratios"]:
                assert 0 < ratio["min"] <= ratio["figure"] <= ratio["max"] < math.inf
                assert ratio["cpu"] > 0 and ratio["pairs"] == 3
                assert ratio["met"] is None  # tiny shapes: nothing is judged
                seen += 1
    assert seen >= 14  # with every peer missing


def test_figures_are_finite_and_states_follow_their_formulas(results):
    figures = [f for case in results["cases"].values() for f in case["figures"]]
    assert all(math.isfinite(f["figure"]) and f["figure"] >= 0 for f in figures)
    shares = {f["name"]: f["figure"] for f in figures if "state / formula" in f["name"]}
    assert set(shares.values()) == {1.0} and len(shares) == 3


def test_counter_sees_new_storages_and_their_end():
    x = torch.ones(1000)
    with AllocationCounter() as counter:
        x.add_(1)  # in place: nothing new
        y = x.view(10, 100).mT  # a view: nothing new
        assert counter.peak == 0
        y = y + 1
        del y
        y = x + 1
        z = y[:10]
        del y  # kept alive by its view
        assert counter.live == counter.peak == counter.largest == 4000
        torch.mul(x, 2, out=x)
        a, b = x.chunk(2)
        w = [a + b, a - b]
        assert counter.peak == counter.live == 8000
        del w, z
        assert counter.live == 0
