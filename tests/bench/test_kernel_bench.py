"""The benchmark of kernels: with a timer of the CPU, and what it says where there is no GPU."""

import importlib.util
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import BENCH

from stiefel.kernels import reference

sys.path.append(str(BENCH))
SPEC = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
bench = importlib.util.module_from_spec(SPEC)  # "kernels" is the name of a folder
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)

H100 = bench.PEAKS["H100"]


def timed(*seconds):
    """A timer that runs what it is given once, and says these times in turn."""
    left = list(seconds)

    def timer(run, flush):
        run()
        return left.pop(0) if left else 1e-3

    return timer


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_every_operation_is_timed_on_the_cpu(name):
    jobs = list(bench.jobs((16, 32), (1, 2), (1, 3), only=[name]))
    kind = bench.OPERATIONS[name].kind
    assert {job.K for job in jobs} == ({1} if kind == "pass" else {1, 3})
    for job in jobs:
        figure = bench.measured(job, reference, bench.Clock(1), "cpu", H100)
        assert figure.error <= 1e-6 and not figure.missed
        assert figure.seconds > 0 and figure.bytes > 0 and 0 < figure.share < 1
        assert figure.flops == 0 or figure.flops >= 2 * 16**3
        assert len(bench.cells(figure)) == len(bench.HEAD)


def test_every_kernel_is_timed():
    triton = pytest.importorskip("stiefel.kernels.triton")
    new = bench.operands("cpu")
    calls = {op.build(reference, new, 16, 16, 16).func for op in bench.OPERATIONS.values()}
    wanted = set(triton.__all__) - {"INTERPRETED"}
    assert not wanted - {call.__name__ for call in calls}


def test_bytes_and_flops():
    def figure(name, m=16, n=32):
        job = bench.Job(name, 1, m, n)
        return bench.measured(job, reference, timed(), "cpu", H100)

    assert figure("gram").flops == 2 * 16 * 16 * 32
    assert figure("gram").bytes == 2 * (16 * 32 + 16 * 16)  # X, S
    assert figure("normalized").bytes == (4 + 4 + 2) * 16 * 32  # X twice, then the copy
    assert figure("adam").bytes == (3 + 2 + 1) * 4 * 16 * 32  # R, M, V; M, V; N
    assert figure("scaled_add_").bytes == (2 + 2 + 4) * 16 * 32 + 4 * 16  # W, W, X; factors
    lift = figure("lift_", 256, 512)
    assert lift.bytes == 4 * 256 * 512 + 4 * 128 * (256 + 512) and lift.flops == 2 * 256 * 512 * 128
    assert lift.bound == max(lift.bytes / 3.35e12, lift.flops / 495e12)


def test_what_is_asked_for():
    def missed(name, side, ours, torchs=1.0, error=0.0, bound=0.0):
        job = bench.Job(name, 1, side, side)
        figure = bench.Figure(name, job.shape, ours, torchs, 1.0, 1.0, bound, error)
        return bench.judged(figure, job).missed

    assert missed("gram", 4096, 0.66) == missed("gram", 2048, 1.05) == ""
    assert missed("gram", 4096, 0.68) == "1.47 of torch's speed, not 1.5"
    assert missed("symmetric_poly", 2048, 1.06) == "0.94 of torch's speed, not 0.95"
    assert missed("scale_and_apply", 4096, 2.0) == ""  # nothing is asked of it but to be right
    assert missed("row_norm", 2048, 1.0, bound=0.71) == missed("row_norm", 1024, 1.0) == ""
    assert missed("row_norm", 2048, 1.0, bound=0.69) == "69% of the bound, not 70%"
    assert missed("gram", 512, 1.0, error=0.04) == "differs from torch by 4.0e-02"
    assert missed("gram", 512, 1.0, error=math.nan) == "differs from torch by nan"


def test_wrong_and_failing_operations_are_listed(tmp_path, capsys):
    def broken(X):
        raise RuntimeError("no such kernel")

    def hollow(X, b, c):
        return torch.full_like(X, float("nan"))

    ours = SimpleNamespace(**{**vars(reference), "gram": broken, "symmetric_poly": hollow})
    jobs = bench.jobs((16,), (1,), (1,), only=["gram", "symmetric"])
    figures = list(bench.all_measured(jobs, ours, timed(), "cpu", H100))
    assert [figure.missed for figure in figures] == [
        "RuntimeError: no such kernel", "differs from torch by inf", "",
    ]  # fmt: skip
    assert bench.report(figures, tmp_path, "some device") == 1
    text = capsys.readouterr().out
    assert "2 of 3 figures are missed:\ngram 16x16: RuntimeError" in text
    assert (tmp_path / "kernels.md").read_text() == text
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert lines[0] == ",".join(bench.HEAD) and len(lines) == 4
    assert bench.report(figures[2:], None, "some device") == 0


def test_five_steps_are_judged():
    slow = bench.five_steps(timed(1.0, 1.2, 1.0, 1.2), "cpu", (32, 64))
    assert [figure.missed for figure in slow] == ["1.20 of torch's speed, not 1.25", ""]
    good = bench.five_steps(timed(1.0, 1.3), "cpu", (32, 64))
    assert good[0].missed == "" and good[0].ratio == 1.3


def test_too_large_stacks_are_left_out():
    jobs = list(bench.jobs())
    assert all(2 * job.K * job.m * job.n <= bench.MOST for job in jobs)
    sizes = {(job.K, job.m, job.n) for job in jobs if job.name == "gram"}
    assert (8, 8192, 32768) in sizes and (32, 8192, 32768) not in sizes
    assert len(sizes) == 5 * 2 * 3 - 1
    assert {job.n for job in jobs if job.name == "symmetric_poly"} == {512, 1024, 2048, 4096, 8192}


def test_peaks():
    assert bench.peaks_of("NVIDIA H100 80GB HBM3", None) == H100
    assert bench.peaks_of("unheard of", None) is None
    assert bench.peaks_of("unheard of", [1, 2, 3]) == bench.Peaks(1, 2, other=2, memory=3)


def without_gpu(*flags):
    command = [sys.executable, str(BENCH / "kernels.py"), *flags]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_probe_says_that_there_is_no_gpu():
    done = without_gpu("--probe")
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.startswith("No GPU was found") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_without_a_gpu_the_static_report_is_printed():
    pytest.importorskip("triton", reason="there is no triton on this platform")
    done = without_gpu("--only", "gram bf16 of columns")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| case / target") and lines[-1].startswith("No GPU was found, so")
    assert any("sm_90" in line for line in lines)
