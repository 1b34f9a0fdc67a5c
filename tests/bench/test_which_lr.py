"""The sweep of bench/which_lr.py ends at a rate whose neighbours are worse."""

import importlib.util
import math
import re

import pytest
from helpers.paths import EXAMPLES, ROOT


@pytest.fixture
def which_lr(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("which_lr", ROOT / "bench" / "which_lr.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("best", [1e-4, 3e-3, 3e-2, 1.0])
@pytest.mark.parametrize("start", [1e-3, 2e-2])
def test_a_sweep_ends_at_the_lowest_rate(which_lr, best, start):
    tried = []

    def loss(lr):
        tried.append(lr)
        return abs(math.log(lr / best))

    assert which_lr.sweep(loss, start) == (best, 0.0)
    assert len(tried) == len(set(tried)) <= len(which_lr.RATES)


def test_a_run_that_diverges_counts_as_the_worst(which_lr):
    assert which_lr.sweep(lambda lr: lr if lr < 0.01 else float("inf"), 0.3)[0] <= 0.3


def test_the_page_has_every_method_of_the_sweep(which_lr):
    page = (ROOT / "docs" / "which-lr.md").read_text()
    rows = {name.split(".")[-1].lower() for name in re.findall(r"^\| `([\w.]+)` \|", page, re.M)}
    assert rows == set(which_lr.available_methods())
