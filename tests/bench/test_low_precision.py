"""Weights of low precision follow float32 ones: move, loss, decay and a constant step."""

import json
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from helpers.covering import in_turn
from helpers.paths import BENCH, EXAMPLES

sys.path += [str(EXAMPLES), str(BENCH)]

import low_precision
from common import load_corpus
from low_precision import CARRYING, TINY, Size, loss, no_gradients, shares, walk

RATES = [1e-3, 1e-4, 1e-5]
MODES = ("stochastic", "kahan")
FOLLOWING = [
    name
    for name in (*low_precision.plain_methods(), *low_precision.pair_methods())
    if name != "torch-adamw"
]
BY_NAME = pytest.mark.parametrize("name", FOLLOWING)
DECAYING = ["adamw", "muon", "galore", "fira", "altlora", "symmetrystack"]
"""One class for each road by which a decayed weight is written; the command measures all."""


def by_mode(found):
    return {one.mode: one for one in found}


# --- How far weights move ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lr"),
    [(name, lr) for i, name in enumerate(FOLLOWING) for j, lr in enumerate(RATES) if in_turn(i, j)],
)
def test_weights_make_the_move_of_float32(name, lr):
    found = by_mode(shares(name, lr, Size(64, 4, 100, 2), modes=MODES))
    assert abs(found["kahan"].share - 1) < 0.01 and found["kahan"].error < 0.05
    one = found["stochastic"]
    assert abs(one.share - 1) < max(0.05, 4 * one.doubt)
    assert one.doubt < 0.15


@pytest.mark.slow
@BY_NAME
def test_what_is_rounded_to_nearest_stays_behind(name):
    """Else the problem is too easy to tell the modes apart."""
    (nearest,) = shares(name, 1e-5, Size(64, 2, 50, 1), modes=["nearest"])
    assert nearest.share < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "low", "high"), [(1e-3, 0.95, 1.05), (1e-5, 0.0, 0.7)])
def test_eco_on_muon_follows_only_where_the_step_is_no_smaller_than_the_error(lr, low, high):
    """A polar factor is bounded, so the next step cannot undo an error larger than itself."""
    (eco,) = shares("muon", lr, Size(64, 8, 200, 2), modes=["eco"])
    assert low < eco.share < high


@pytest.mark.slow
@pytest.mark.parametrize("lr", RATES)
def test_eco_on_adamw_follows(lr):
    (eco,) = shares("adamw", lr, Size(64, 8, 200, 2), modes=["eco"])
    assert abs(eco.share - 1) < max(0.05, 4 * eco.doubt)


# --- Decay alone ---


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), [(name, RATES[i % 2]) for i, name in enumerate(DECAYING)])
def test_decay_is_that_of_float32(name, lr):
    found = by_mode(shares(name, lr, Size(64, 24, 300, 1), no_gradients, MODES))
    assert abs(found["kahan"].share - 1) < 0.01 and found["kahan"].error < 0.05
    one = found["stochastic"]
    assert abs(one.share - 1) < max(0.01, 4 * one.doubt)
    # Of the weight itself, decay included, within 1 %.
    assert abs(one.share - 1) * (1 - (1 - 0.1 * lr) ** 300) < 0.01


# --- Loss ---


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("code", TINY["seq"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in FOLLOWING if name not in low_precision.pair_methods()]
)
def test_losses_stay_within_the_spread_of_seeds(name, corpus):
    modes = [x for j, x in enumerate(MODES) if in_turn(FOLLOWING.index(name), j, of=2)]
    exact, *others = (
        [loss(name, corpus, TINY, 40, seed, mode) for seed in range(3)] for mode in (None, *modes)
    )
    spread = max(exact) - min(exact)
    for values in others:
        # The range of three seeds is small by chance now and then.
        assert abs(fmean(values) - fmean(exact)) < max(spread, 0.01)


# --- A constant step ---


@pytest.mark.parametrize("name", ["descent", *CARRYING])
def test_a_step_of_a_fiftieth_of_the_distance_is_lost_to_nearest_and_kept_by_kahan(name):
    run = [walk(name, torch.bfloat16, mode, 4, 8, 1) for mode in ("nearest", "kahan")]
    assert run[0].mean == run[0].std == 0
    lag = 9 / 50 if name == "descent" else 0  # the momentum starts at 0
    assert abs(run[1].mean - (4 - lag)) < 0.02 and run[1].std < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["descent", "adamw"])
def test_the_walk_of_a_constant_step(name):
    """200 distances in 1e4 steps: means within 0.5 %, and eco's weights stay together."""
    run = {
        mode: walk(name, torch.float16, mode, 200, 64, 1) for mode in ("stochastic", "kahan", "eco")
    }
    for mode, one in run.items():
        assert abs(one.mean / 200 - 1) < max(0.005, 4 * one.std / 64 / 200), mode
    assert 12 < run["stochastic"].std < 16  # sqrt(1e4 * 0.02 * 0.98) is 14
    assert run["kahan"].std < 0.1 and run["eco"].std < 1


# --- The command ---


@pytest.mark.parametrize("arguments", [["--methods", "adamw,muon,altlora"]])
def test_the_command_prints_and_writes_all_tables(arguments, tmp_path):
    script = [sys.executable, str(BENCH / "low_precision.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert list(found) == list(low_precision.PARTS) and all(found.values())
    assert {row["name"] for row in found["share"]} == {"adamw", "muon", "altlora"}
    assert done.stdout.count("\n## ") == len(found)


def test_a_wrong_name_is_said_in_a_sentence(capsys, tmp_path):
    for option in ("--only", "--methods"):
        assert low_precision.main([option, "nothing", "--out", str(tmp_path)]) == 2
        assert f"{option} nothing: choose from" in capsys.readouterr().err
