"""The part of a grid that runs still has every value, and every two values of two axes."""

import itertools
import subprocess
import sys

import pytest
from helpers.covering import chosen, class_of, does_all, in_turn, value_of, wanted
from helpers.methods import METHODS
from helpers.paths import ROOT


def grid(**axes):
    return [
        dict(zip(axes, map(value_of, case), strict=True))
        for case in itertools.product(*axes.values())
    ]


GRIDS = {
    "classes": grid(method=METHODS, shape=[(3, 4), (4, 3), (1, 7)], wait=[True, False]),
    "options": grid(kind="abcde", scaling="xy", form=[{}, {"a": 1}, {"b": 2}], shape=range(6)),
    "one axis": grid(method=METHODS),
    "holes": [case for i, case in enumerate(grid(a="abcd", b=range(5), c=range(3))) if i % 4],
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("whole", [(), ("method",)], ids=str)
def test_what_runs_covers_what_the_whole_grid_does(name, whole, strength):
    cases, given = GRIDS[name], (whole, strength)
    kept = chosen(cases, *given)
    covered = set().union(*(wanted(cases[i], *given) for i in kept))
    assert covered == set().union(*(wanted(case, *given) for case in cases))
    assert kept == sorted({*kept}) and kept == chosen(cases, *given)
    for axis in cases[0]:
        assert {cases[i][axis] for i in kept} == {case[axis] for case in cases}


def test_every_class_meets_every_value_and_every_entry_runs():
    cases = grid(method=METHODS, shape=range(6), dtype=["a", "b", "c"])
    kept = [cases[i] for i in chosen(cases)]
    met = {(class_of(case["method"]), case["shape"], axis) for case in kept for axis in ("shape",)}
    assert len(met) == len({class_of(x) for x in METHODS}) * 6
    assert {case["method"] for case in kept} == {*METHODS} and len(kept) < len(cases) / 6
    kept = [cases[i] for i in chosen(cases, ["method"])]
    assert {(case["method"], case["shape"]) for case in kept} == {
        *itertools.product(METHODS, map(repr, range(6)))
    }
    assert len(kept) == 6 * len(METHODS)


def test_cases_of_a_loop_take_turns():
    if does_all():
        pytest.skip("all cases run")
    kept = [at for at in itertools.product(range(5), range(7), range(4)) if in_turn(*at)]
    for a, b in itertools.combinations(range(3), 2):
        sizes = (5, 7, 4)
        assert {(at[a], at[b]) for at in kept} == {
            *itertools.product(range(sizes[a]), range(sizes[b]))
        }


GRID = """
import pytest

@pytest.mark.covering
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(4))
def test_grid(a, b, c):
    pass
"""


@pytest.mark.parametrize(
    "arguments, least, most",
    [([], 16, 30), (["--full-grids"], 64, 64), (["-k", "grid"], 64, 64)],
    ids=["default", "full", "named"],
)
def test_how_many_cases_are_collected(arguments, least, most, tmp_path):
    (tmp_path / "test_it.py").write_text(GRID)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    options = ["-o", f"pythonpath={ROOT / 'tests'}", "-o", "markers=covering", "-n", "0"]
    done = subprocess.run(
        [*command, *options, *arguments, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert least <= done.stdout.count("::test_grid[") <= most, done.stdout
