"""``python -m stiefel.optimizers``: what a newcomer sees, with rich and without."""

import importlib.util
import io
import subprocess
import sys

import pytest
import torch
from helpers.paths import TESTS

import stiefel.optimizers as package
from stiefel.kernels import dispatch
from stiefel.optimizers import StackedOptimizer
from stiefel.optimizers import __main__ as page

CLASSES = {
    name
    for name in package.__all__
    if isinstance(getattr(package, name), type)
    and issubclass(getattr(package, name), StackedOptimizer)
} - {"StackedOptimizer"}


def test_it_runs_as_a_module_and_lists_every_class():
    command = [sys.executable, "-m", "stiefel.optimizers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"stiefel {package.__version__}, torch {torch.__version__}" in done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines() if line} >= CLASSES


@pytest.mark.parametrize("is_there", [True, False])
def test_with_rich_and_without(is_there, monkeypatch):
    if is_there:
        pytest.importorskip("rich", reason="rich is not installed")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = io.StringIO()
    page.main(out)
    text = out.getvalue()
    assert all(name in text for name in CLASSES) and "CPU" in text and "kernels" in text
    assert max(map(len, text.splitlines())) <= page.WIDEST


def test_every_class_has_one_line():
    rows = page.classes()
    assert {name for name, _ in rows} == CLASSES
    for name, line in rows:
        assert 20 < len(line) < 90 and not line.endswith(".") and not line.startswith(f"{name}:")


def test_long_lines_are_broken_below_their_column():
    text = page.plain_table([("a", "word " * 20), ("bb", "x")], 40)
    lines = text.splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 40
    assert lines[1].startswith("    word") and lines[-1] == "bb  x"


@pytest.mark.parametrize(
    ("setting", "triton", "gpus", "expected"),
    [
        ("auto", True, 0, "plain torch: no GPU here"),
        ("auto", False, 2, "triton is not installed"),
        ("auto", True, 2, "Triton on cuda:0, cuda:1"),
        ("reference", True, 2, "plain torch everywhere"),
        ("triton", True, 0, "Triton wherever it can run"),
        ("triton", False, 0, "STIEFEL_KERNELS=triton raises"),
        ("cuda", True, 0, "is unknown: set it to auto, reference or triton"),
    ],
)
def test_it_says_which_back_end_runs(setting, triton, gpus, expected, monkeypatch):
    monkeypatch.setenv("STIEFEL_KERNELS", setting)
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: triton)
    monkeypatch.setattr(dispatch, "is_supported_gpu", lambda index: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert expected in dispatch.backend_summary()
