"""Every public optimizer with a small problem that it can be built on; a new class takes part."""

import inspect

import pytest
import torch
from torch import nn

import stiefel.optimizers
from stiefel.optimizers import StackedOptimizer
from stiefel.optimizers._lora.pair_groups import PairOptimizer

CLASSES = [
    cls
    for cls in (getattr(stiefel.optimizers, name) for name in stiefel.optimizers.__all__)
    if isinstance(cls, type) and issubclass(cls, StackedOptimizer) and cls is not StackedOptimizer
]
EVERY = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
PLAIN = pytest.mark.parametrize(
    "cls",
    [cls for cls in CLASSES if not issubclass(cls, PairOptimizer)],
    ids=lambda cls: cls.__name__,
)
"""The classes that take plain parameters."""


def problem(cls, seed=0):
    """Parameters for a class, the rest of its arguments, and all tensors."""
    draw = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return nn.Parameter(torch.randn(shape, generator=draw))

    if issubclass(cls, PairOptimizer):
        A, B, W, v = weight(2, 6), weight(8, 2), weight(8, 6).requires_grad_(False), weight(6)
        is_triple = "total_steps" in inspect.signature(cls).parameters
        groups = [
            {"params": [A, B, W] if is_triple else [A, B], "scale": 2.0},
            {"params": [v], "rule": "adamw"},
        ]
        return groups, ({"total_steps": 100} if is_triple else {}), [A, B, v]
    W, v = weight(8, 6), weight(6)
    return [W, v], {}, [W, v]


def set_gradients(params):
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape).sin()
