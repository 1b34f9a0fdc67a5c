"""The benchmark runner runs, and its results have the form that others read."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.allocations import AllocationCounter
from helpers.paths import BENCH

from stiefel import optimizers
from stiefel.optimizers._lora.pair_groups import PairOptimizer
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS


def bench(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "run.py"), "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=600)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    done = bench(out, "--quick")
    assert done.returncode == 0, done.stderr
    assert "galore-step" in done.stdout and "not judged" in done.stdout
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """What is printed and found of a run with every flag: one, then two threads."""
    out = tmp_path_factory.mktemp("flagged")
    flags = ("--repeats", "1", "--only", "galore-step,memory", "optimizers", "--threads", "1,2")
    done = bench(out, *flags, "--shapes", "24x40,8x16x3+16x8")
    assert done.returncode == 0, done.stderr
    paths = [out / f"threads-{count}" / "results.json" for count in (1, 2)]
    return done.stdout, [json.loads(path.read_text()) for path in paths]


def test_environment_says_what_figures_depend_on(results):
    assert results["environment"]["threads"] == 1
    assert torch.__version__.startswith(results["environment"]["versions"]["torch"])
    for line in (BENCH / "cases.py").read_text().partition("CASES: ")[2].splitlines():
        if ": Case(" in line:
            assert line.split('"')[1] in results["cases"]
    assert len(results["cases"]) >= 7


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


def test_sweep_has_every_exported_optimizer(results):
    case = results["cases"]["optimizers"]
    times = [ratio["cell"] for c in case["contests"] for ratio in c["ratios"]]
    sizes = [figure["cell"] for figure in case["figures"]]
    for name in optimizers.__all__:
        cls, base = getattr(optimizers, name), optimizers.StackedOptimizer
        if not (isinstance(cls, type) and issubclass(cls, base)) or issubclass(cls, PairOptimizer):
            continue  # LoRA pairs have a contest of their own
        if cls is not base:
            assert any(row.split()[0] == name for _, row, _ in times)
            assert any(row.split()[0] == name for _, row, _ in sizes)
    columns = {tuple(cell[1:]) for cell in times + sizes}
    for kind in "svd range power random randk topk dct".split():
        wanted = "/ fused", "/ foreach", "/ limit", "refresh / step", "mean / fused", "state"
        assert columns >= {(f"GaLore {kind}", column) for column in wanted}
    assert columns >= {("Muon", "/ torch Muon"), ("AdamW rule", "/ limit"), ("Muon", "state")}


def test_sweep_counts_state_as_documented(results):
    state = {
        figure["cell"][1]: figure["figure"]
        for figure in results["cases"]["optimizers"]["figures"]
        if figure["cell"][2] == "state"
    }
    # rank 4 of two matrices of 16 and 32: r (m + 2 n) of m n, and r indices for a basis
    assert state["GaLore svd"] == 4 * (16 + 64) / 512
    assert state["GaLore randk"] == 4 * (1 + 64) / 512
    assert state["Muon"] == 1 and state["AdamW rule"] == state["AdamW fused"] == 2


def test_mean_steps_are_there_for_every_class_and_lie_between_their_parts(results):
    rows = {}
    for contest in results["cases"]["amortised"]["contests"]:
        for ratio in contest["ratios"]:
            _, row, column = ratio["cell"]
            rows.setdefault(row, {})[column] = (ratio["min"], ratio["max"])
    public = {name: getattr(optimizers, name) for name in optimizers.__all__}
    classes = {k for k, v in public.items() if isinstance(v, type) and hasattr(v, "zero_grad")}
    assert set(rows) == classes - {"StackedOptimizer"}
    for row, cells in rows.items():
        parts = [cells[column] for column in ("step", "refresh") if column in cells]
        low, high = cells["mean step"]
        assert parts and min(p[0] for p in parts) <= 1.001 * low, row
        assert high <= 1.001 * max(p[1] for p in parts), row
    both = {row for row, cells in rows.items() if len(cells) == 3}
    assert both == {"GaLore", "Fira", "APOLLO", "FRUGAL", "SOAP", "SwitchLoRA"}
    assert all("step" not in rows[row] for row in ("ARO", "SOAPMuon", "DCTAdamW"))


def test_the_column_of_the_readme_is_that_of_a_run(results, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    page = tmp_path / "README.md"
    page.write_text((BENCH.parent / "README.md").read_text())
    case = results["cases"]["amortised"]
    run.write_column(case, page)
    means = {r["cell"][1]: r["cpu"] for c in case["contests"] for r in c["ratios"][-1:]}
    written = dict(re.findall(r"^\| `(\w+)` \| .*? \| .*? \| (.*?) \|", page.read_text(), re.M))
    assert written == {name: run.short(mean) for name, mean in means.items()}


def test_thread_counts_run_one_after_the_other(flagged):
    printed, runs = flagged
    assert printed.index("threads: 1 ===") < printed.index("threads: 2 ===")
    assert [run["environment"]["threads"] for run in runs] == [1, 2]
    for run in runs:
        assert set(run["cases"]) == {"galore-step", "memory", "optimizers"}


def test_shapes_replace_those_of_the_cases(flagged):
    for run in flagged[1]:
        ratios = [r for c in run["cases"].values() for d in c["contests"] for r in d["ratios"]]
        assert {r["name"].split()[0].strip(",") for r in ratios} == {"24x40", "8x16x3+16x8"}
        assert all(r["pairs"] == 1 and r["met"] is None for r in ratios)
        figures = {f["name"]: f["figure"] for f in run["cases"]["memory"]["figures"]}
        assert figures["8x16x3+16x8 state / formula, Muon"] == 1
        assert figures["8x16x3+16x8 state / formula, GaLore"] == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--shapes", "3x"),
        ("--shapes", "8"),
        ("--only", "speed"),
        ("--threads", "0"),
        ("--readme", "--quick"),
        ("--readme", "--only", "memory"),
    ],
)
def test_flags_that_make_no_sense_are_refused(monkeypatch, capsys, flags):
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    with pytest.raises(SystemExit):
        run.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_labels_are_read_back(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from contests import label, parse_model

    for text in ("1024x4096", "512x512x12", "96x96x16+256x96x8+96x256"):
        assert label(parse_model(text)) == text
    assert parse_model("2x3x2+3x2") == ((2, 3), (2, 3), (3, 2))


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


def test_the_toolkits_figures_have_a_command_that_runs(tmp_path):
    script = BENCH / "toolkit.py"
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", done.stdout)]
    assert len(numbers) > 40 and min(numbers) > 0
    assert all(kind in done.stdout for kind in PROJECTION_KINDS)
