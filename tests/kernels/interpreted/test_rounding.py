"""One place of the kernels rounds weights: without it no method's kernel moves a weight."""

import sys

import pytest
import torch
from helpers.methods import METHODS
from helpers.operands import DEVICE
from helpers.problems import gradients, weight
from helpers.rounding import drop_writes, moved

from stiefel.kernels.triton._write import store_weight

if DEVICE != "cpu":
    pytest.skip(
        "only the interpreter takes another function for a kernel's", allow_module_level=True
    )

SHAPES = [(24, 10), (24, 10), (17, 5)]
WRITES = {
    "muon": "scaled_add", "auon": "scaled_add", "rownorm-columns": "scaled_add",
    "rownorm": "row_step", "fira": "lift", "fira-paper": "lift", "galore": "adam_lift",
    "dctadamw": "adam_lift", "frugal-svd": "adam_lift", "frugal-columns": "split_step",
    "frugal-rows": "split_step", "frugal-randk": "split_step",
}  # fmt: skip
"""Methods and the kernel that writes their weights, each of the five at least once."""


def step(name, dtype, wait=None):
    """Which weights two steps moved."""
    params = [weight(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    optimizer = METHODS[name](params)
    optimizer._wait = wait
    series = [gradients(shape, 2, i) for i, shape in enumerate(SHAPES)]
    return moved(optimizer, params, series=series)


def drop_stores(monkeypatch):
    """Kernels store no weight from here on; the names of those that would have done so."""
    users = set()

    def drop(pointers, value, mask, *random):
        assert value.shape == mask.shape and len(random) == 10
        users.add(sys._getframe(2).f_globals["__name__"].rpartition(".")[2])

    monkeypatch.setitem(store_weight.rewritten_fn, store_weight.fn, drop)
    return users


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("STIEFEL_KERNELS", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_kernels_write_weights_by_store_weight(name, dtype, monkeypatch):
    """Where plain torch writes nothing every weight moves, and without this function none."""
    drop_writes(monkeypatch)
    assert all(step(name, dtype))
    users = drop_stores(monkeypatch)
    assert not any(step(name, dtype)) and WRITES[name] in users


def test_all_five_kernels_are_tried():
    assert set(WRITES.values()) == {"adam_lift", "lift", "row_step", "scaled_add", "split_step"}


@pytest.mark.parametrize("name", METHODS)
def test_no_weight_moves_without_both_places(name, monkeypatch):
    """Flags are not waited for by those whose kernels take them, so that these write by them."""
    wait = False if name in WRITES else None
    assert all(step(name, torch.bfloat16, wait))
    drop_writes(monkeypatch)
    drop_stores(monkeypatch)
    assert not any(step(name, torch.bfloat16, wait))
