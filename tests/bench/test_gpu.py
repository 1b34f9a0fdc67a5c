"""``bench/gpu.py`` without a GPU: its dry run, planted defects, jobs that fail, and no GPU."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from helpers.paths import BENCH, ROOT

triton = pytest.importorskip("triton", reason="there is no triton on this platform")
needs_interpreter = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="the interpreter of this triton does not take a numpy of today",
)
COMMAND = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import gpu

def fails():
    raise ValueError("of no use")

def job(x):
    return lambda: [gpu.Row(x, {"x": 1})]

def run(name, *flags):
    print("STATUS", name, gpu.main(["--dry", "--out", os.path.join(sys.argv[2], name), *flags]))

run("clean")
run("wrong", "--plant", "wrong", "--only", "numerics", "products")
run("slow", "--plant", "slow", "--only", "numerics", "products")
record = gpu.Record(None)
jobs = [
    ("fails", fails), ("dies", lambda: os._exit(7)), ("good", job("good")),
    ("hangs", lambda: time.sleep(60)), ("late", job("late")), ("later", job("later")),
]
record.run(gpu.Stage("trial", 8, jobs), time.monotonic() + 60)
print("VERDICT", *record.verdict("trial"))
record.run(gpu.Stage("over", 60, jobs), time.monotonic() - 1)
print("VERDICT", *record.verdict("over"))
"""
STAGES = (
    "device numerics optimizers waits graphs products gates polar steps layers cosines tests"
).split()


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What the runs print, split at the verdicts, and their folder."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [*COMMAND, "-c", SCRIPT, str(BENCH), str(out)], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=out, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    _, clean, wrong, slow, trial, over = done.stdout.split("VERDICT ")
    return {"clean": clean, "wrong": wrong, "slow": slow, "trial": trial, "over": over}, out


def rows_of(out, name):
    lines = (out / name / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@needs_interpreter
def test_every_stage_runs_and_finds_nothing(dry):
    verdicts, out = dry
    rows = rows_of(out, "clean")
    assert list(dict.fromkeys(row["stage"] for row in rows)) == STAGES
    assert not [row for row in rows if row["wrong"] or row["slow"]]
    assert "STATUS clean 0" in verdicts["clean"] and "not done: none" in verdicts["clean"]
    assert f"wrong: 0 of {len(rows)} figures\nslow: 0 of {len(rows)} figures" in verdicts["clean"]
    assert "no slower than torch from a side of 16 on; the table says" in verdicts["clean"]
    assert len(verdicts["clean"].split("STATUS")[0].splitlines()) == 5
    assert {path.name for path in (out / "clean").iterdir()} == {
        "results.jsonl", "report.md", "errors.txt", "tests.txt"
    }  # fmt: skip
    assert "passed" in (out / "clean" / "tests.txt").read_text()
    report = (out / "clean" / "report.md").read_text()
    assert all(f"## {name}\n" in report for name in STAGES)
    sides = [row["figures"].get("side", 0) for row in rows]
    assert max(sides) <= 64


@pytest.mark.slow
@needs_interpreter
def test_a_wrong_kernel_is_called_wrong(dry):
    verdicts, out = dry
    names = [row["name"] for row in rows_of(out, "wrong") if row["wrong"]]
    assert names == ["gram 2x9x20"] and not any(row["slow"] for row in rows_of(out, "wrong"))
    assert "STATUS wrong 1" in verdicts["wrong"] and "numerics, gram 2x9x20" in verdicts["wrong"]


@pytest.mark.slow
@needs_interpreter
def test_a_slow_kernel_is_called_slow(dry):
    verdicts, out = dry
    names = [row["name"] for row in rows_of(out, "slow") if row["slow"]]
    assert names == [f"gram 16, aspect {x}" for x in ("1", "1, batch 8", "4")]
    assert not any(row["wrong"] for row in rows_of(out, "slow"))
    assert "STATUS slow 1" in verdicts["slow"] and "products, gram 16, aspect 1" in verdicts["slow"]
    assert "at no side that was timed" in verdicts["slow"]


@pytest.mark.slow
@needs_interpreter
def test_jobs_that_fail_die_or_hang_cost_themselves_only(dry):
    verdicts, _ = dry
    text = verdicts["trial"]
    assert "wrong: 2 of 3 figures" in text and "trial, fails: ValueError: of no use" in text
    assert "trial, dies: its process died, exit status 7" in text
    assert "not done: trial 3 of 6" in text and "of 6 1\n" in text
    assert "not done: trial 3 of 6, over 6 of 6" in verdicts["over"]


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [*COMMAND, str(BENCH / "gpu.py"), "--out", str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("No GPU was found: run this where")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--only", "numeric"], "no stage numeric; --only takes numerics, optimizers"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--seconds", "nan"], "--seconds must be positive, got nan"),
        (["--out", __file__], "--out must be a folder that can be made"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_a_gpu_is_looked_for(
    flags, text, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(BENCH))
    gpu = importlib.import_module("gpu")
    assert [*gpu.STAGES] == [name for name in STAGES if name not in ("device", "gates")]
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--dry", *flags])
    assert refused.value.code == 2 and text in capsys.readouterr().err


def test_make_calls_it():
    recipe = (ROOT / "Makefile").read_text().split("\ngpu-check:")[1].split("\n\n")[0]
    steps = [line.strip() for line in recipe.splitlines()]
    assert steps == ["", "$(PYTHON) bench/gpu.py --out runs/gpu"]
