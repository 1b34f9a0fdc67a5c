"""The place that rounds weights, replaced by one that writes nothing; and weights of every form."""

import torch
from torch import nn

from helpers.problems import gradients, run, weight
from stiefel.kernels.reference import write


def drop(target, change, dtype, rounding=None):
    """In place of plain torch's rounding: the change is made to a copy, and state moves with it."""
    change(target.to(dtype, copy=True))


def drop_writes(monkeypatch):
    """No weight can be written by ``update_weight_`` from here on."""
    monkeypatch.setattr(write, "_round_into_", drop)


def every_form(dtype):
    """Groups of parameters that reach a weight in every way, and one AdamW parameter, the last."""

    def fresh(*shape, seed=0):
        return nn.Parameter(weight(shape, seed, dtype).detach() * 0.1)

    conv = fresh(8, 3, 2, 2, seed=5)
    sideways = nn.Parameter(fresh(10, 8, seed=6).detach().T)  # its memory runs along columns
    spread = nn.Parameter(fresh(8, 3, 2, 2).detach().to(memory_format=torch.channels_last))
    return [
        {"params": [*(fresh(12, 8, seed=i) for i in range(3)), fresh(8, 12)]},  # a stack, a single
        {"params": [fresh(4, 6, seed=i) for i in range(4)]},
        {"params": [fresh(16, 10)], "view": "heads:2"},
        {"params": [fresh(10, 16)], "view": "heads_in:2"},
        {"params": [fresh(16, 10)], "view": "rows:6,10"},
        {"params": [fresh(10, 16)], "view": "transposed"},
        {"params": [sideways, conv]},
        {"params": [spread], "view": "flatten"},  # matrices are a copy, which is put back
        {"params": [fresh(3, 8, 10)]},  # experts
        {"params": [fresh(8)], "rule": "adamw"},
    ]


def moved(optimizer, params, steps=3, series=None):
    """Which parameters differ after some steps from what they were."""
    before = [p.detach().clone() for p in params]
    run(optimizer, params, series or [gradients(p.shape, steps, i) for i, p in enumerate(params)])
    return [not torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True)]
