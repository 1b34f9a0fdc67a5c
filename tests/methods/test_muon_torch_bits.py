"""``Muon(compat="torch")`` and the installed ``torch.optim.Muon``, bit for bit."""

import itertools

import pytest
import torch
from helpers.problems import gradients, weight

from stiefel.optimizers import Muon

SHAPES = [(12, 15), (15, 12), (7, 5), (33, 31), (1, 9), (9, 1), (12, 12), (13, 13), (1, 1)]
"""Most have entries that fill no whole vector of the CPU."""


def lr_of(kind):
    return {
        "float": 0.0123,
        "float32": torch.tensor(0.0123),
        "one entry": torch.tensor([0.0123]),
        "float64": torch.tensor(0.0123, dtype=torch.float64),
    }[kind]


def differing(shape, dtype, count, lr, steps=10, layout=lambda x: x, **settings):
    """Entries of the weights that differ after some steps, and of the buffers."""
    ours, theirs = (
        [torch.nn.Parameter(layout(weight(shape, k, dtype).detach())) for k in range(count)]
        for _ in range(2)
    )
    optimizers = (
        Muon(ours, lr=lr_of(lr), compat="torch", **settings),
        torch.optim.Muon(theirs, lr=lr_of(lr), **settings),
    )
    draws = [gradients(shape, steps, k, dtype) for k in range(count)]
    for step in range(steps):
        for params in (ours, theirs):
            for p, Gs in zip(params, draws, strict=True):
                p.grad = layout(Gs[step].clone())
        for optimizer in optimizers:
            optimizer.step()
    buffers = [
        [o.state[p]["momentum_buffer"] for p in ps]
        for o, ps in zip(optimizers, (ours, theirs), strict=True)
    ]
    return [
        sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))
        for a, b in ((ours, theirs), buffers)
    ]


@pytest.mark.parametrize("lr", ["float", "float32", "one entry", "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_and_several_weights_have_the_bits_of_torch(shape, dtype, lr):
    for count, scale in itertools.product((1, 5), ("original", "match_rms_adamw")):
        assert differing(shape, dtype, count, lr, adjust_lr_fn=scale) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_momentum_has_the_bits_of_torch(shape, dtype):
    """Of bfloat16 torch spoils its own buffer there, which we do not copy."""
    assert differing(shape, dtype, 3, "float32", nesterov=False) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(401, 331), (331, 401), (130, 70)])
def test_weights_of_many_panels_have_the_bits_of_torch(shape, dtype):
    assert differing(shape, dtype, 2, "float32", steps=3) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_lie_transposed_have_the_bits_of_torch(shape, dtype):
    def layout(x):
        return x.t().contiguous().t()

    for count in (1, 2, 5):
        assert differing(shape, dtype, count, "float", layout=layout) == [0, 0]


def test_weights_of_one_shape_that_lie_in_two_ways_have_the_bits_of_torch():
    lies = itertools.cycle([False, True, True])

    def layout(x):  # a weight and its gradients alike
        return x.t().contiguous().t() if next(lies) else x

    assert differing((13, 15), torch.bfloat16, 3, "float", layout=layout) == [0, 0]
