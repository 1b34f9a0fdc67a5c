"""Kernels under a default device and a default dtype that are not those of their tensors."""

import contextlib

import pytest
import torch
from helpers.foreign import foreign, forget
from helpers.methods import METHODS
from helpers.operands import DEVICE
from helpers.problems import gradients, run, same, tensors, weight

SHAPES = [(24, 10), (24, 10), (17, 5)]
NAMES = ["muon-low-rank", "galore", "frugal-rows", "auon", "trion", "dctadamw"]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_ignore_default_device_and_default_dtype(name, monkeypatch):
    monkeypatch.setenv("STIEFEL_KERNELS", "triton")

    def trained(around):
        forget()
        with torch.device("cpu"):
            params = [weight(shape, i).detach().to(DEVICE) for i, shape in enumerate(SHAPES)]
            grads = [
                [G.to(DEVICE) for G in gradients(shape, 3, i)] for i, shape in enumerate(SHAPES)
            ]
        params = [torch.nn.Parameter(p) for p in params]
        with around:
            optimizer = METHODS[name](params)
            return run(optimizer, params, grads), tensors(optimizer)

    assert same(trained(contextlib.nullcontext()), trained(foreign(torch.float64)))
