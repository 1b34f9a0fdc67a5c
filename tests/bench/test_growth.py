"""The plot of growth: every class on both axes, exponents, and points that are left out."""

import json
import sys

import pytest
import torch
from helpers.paths import BENCH

sys.path.insert(0, str(BENCH))

import growth
from contests import NEVER
from run import CPU, WALL

NAMES = ["AdamW fused", "Muon", "AuON", "FRUGAL", "Fira", "GaLore", "SOAP"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A quick run in this process, whose threads stay as they are: results and what is printed."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def quick(*flags):
        assert growth.main(["--quick", "--repeats", "1", "--out", str(tmp_path), *flags]) == 0
        return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out

    return quick


def test_a_quick_run_has_every_class_at_every_point(run, tmp_path):
    results, printed = run()
    for name, axis in growth.AXES.items():
        assert list(results["axes"][name]) == NAMES and axis.title in printed
        for found in results["axes"][name].values():
            assert found["x"] == list(axis.tiny) and not found["left_out"]
            gap = found["gap"]
            assert len(found["refresh_ms"]) == (len(axis.tiny) if gap else 0)
            for i, mean in enumerate(found["mean_ms"]):
                step = found["step_ms"][i]
                new = found["refresh_ms"][i] if gap else step
                assert mean == pytest.approx(step + (new - step) / gap if gap else step)
                assert mean > 0
    gaps = {who: found["gap"] for who, found in results["axes"]["size"].items()}
    assert gaps == dict(zip(NAMES, (0, 0, 0, 200, 200, 200, 10), strict=True))
    assert "GaLore: a refresh" in printed and "every 10 steps" in printed
    pytest.importorskip("matplotlib")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [("--seconds", "0"), ()])
def test_points_that_take_too_long_or_too_much_memory_are_named(run, monkeypatch, flags):
    if not flags:
        monkeypatch.setattr(growth, "GIB", 0.0)
    results, printed = run(*flags)
    for name, axis in growth.AXES.items():
        first, *rest = axis.tiny
        for who, found in results["axes"][name].items():
            assert found["x"] == [first] and found["exponent"] is None
            assert list(found["left_out"]) == [str(x) for x in rest]
            for x in rest:
                assert f"left out: {who} at {x}: " in printed
    assert ("more than 0 s" in printed) == bool(flags)


def test_what_is_left_out_follows_from_the_last_point_that_was_run():
    size, number = growth.AXES["size"], growth.AXES["number"]
    curve = growth.Curve(torch.optim.AdamW, xs=[1024], dearest=1.0, bytes=2.0**28)
    assert curve.is_within(2048, size, 9.0) and not curve.is_within(4096, size, 60.0)
    assert "about 64 s, more than 60 s" in curve.left_out[4096]
    assert not curve.is_within(8192, size, 1e9) and "16.0 GiB" in curve.left_out[8192]
    curve.left_out.clear()
    assert curve.is_within(4096, number, 4.1) and not curve.is_within(4100, number, 4.0)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.8])
def test_exponents_are_those_of_planted_times(power):
    xs = growth.AXES["size"].points
    found, used = growth.exponent(xs, [3e-6 * x**power for x in xs])
    assert found == pytest.approx(power) and used[-1] == xs[-1]
    # an overhead of a thousandth of the last time bends the lower part only
    times = [1e-3 * (xs[-1] ** power) + x**power for x in xs]
    bent, upper = growth.exponent(xs, times)
    assert len(upper) < len(xs) and upper == list(xs[-len(upper) :])
    assert min(times[-len(upper) :]) >= growth.CLEAR * min(times)
    assert bent == pytest.approx(power, abs=0.15)


def test_too_few_points_have_no_exponent():
    assert growth.exponent((1, 2, 4), (1.0, 1.1, 1.2)) == (None, [])
    assert growth.exponent((1, 2, 4, 8), (1.0, 1.0, 8.0, 16.0)) == (None, [])
    assert "no exponent" in growth.power({"exponent": None, "fitted_to": []})


@pytest.mark.parametrize("name", ["GaLore", "Fira", "FRUGAL", "SOAP"])
def test_a_refresh_is_timed_where_bases_are_kept_else(name):
    step = growth.Paced(growth.curves()[name].make, ((12, 16),), CPU)
    (state,) = step.optimizer.state.values()
    found = []
    for gap in (NEVER, 1):
        step.refresh_every(gap)
        for i in range(2):
            step.prepare(i)
            step.run()
        found.append((state["step"], state["refreshed"]))
    assert found == [(3, 1), (5, 5)]
    assert step.first > 0 and step.bytes > 2 * 12 * 16 * 4


def test_the_clock_is_that_of_the_processor_on_one_thread(monkeypatch):
    taken = []
    monkeypatch.setattr(growth, "rounds", lambda steps, limits, clock: taken.append(clock) or {})
    for threads in ("1", "2"):
        args = growth.parse(["--quick", "--threads", threads])
        with pytest.raises(KeyError):
            growth.measure(growth.AXES["size"], args)
    assert taken == [CPU, CPU, WALL, WALL]
