"""Shared material of the tests: weights, gradients, runs, and what compares them."""

import pytest
import torch

from helpers.shapes import TALL, WIDE

DOUBLE = torch.float64


def gradients(shape, steps, seed=0, dtype=torch.float32):
    """Correlated gradients of decaying spectrum, exact in float32 and bfloat16's range."""
    draw = torch.Generator().manual_seed(1000 + seed)
    k = min(shape[-2:])
    w = 0.6 ** torch.arange(k)
    A = torch.randn(*shape[:-1], k, generator=draw)
    B = torch.randn(*shape[:-2], k, shape[-1], generator=draw)
    out = []
    for _ in range(steps):
        A = 0.8 * A + 0.6 * torch.randn(A.shape, generator=draw)
        noise = 0.05 * torch.randn(shape, generator=draw)
        out.append(((A * w) @ B / k + noise).to(dtype))
    return out


def weight(shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype))


def run(optimizer, params, grads):
    """Step once per entry of grads (a list per parameter); returns the weights after each step."""
    out = []
    for step in range(len(grads[0])):
        for p, series in zip(params, grads, strict=True):
            p.grad = None if series[step] is None else series[step].to(p.dtype)
        optimizer.step()
        out.append([p.detach().clone() for p in params])
    return out


def trajectory(make, shape, steps=7, seed=0, dtype=torch.float32):
    """Weights of one matrix after each step of ``make([p])``."""
    p = weight(shape, seed, dtype)
    return [W[0] for W in run(make([p]), [p], [gradients(shape, steps, seed)])]


def tensors(optimizer):
    """Every state value by position and key, cloned."""
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    return {
        (i, key): value.clone() if isinstance(value, torch.Tensor) else value
        for i, p in enumerate(flat)
        for key, value in optimizer.state.get(p, {}).items()
    }


def same(a, b):
    """Bitwise equal dictionaries or lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def replay(cls, settings, W, grads):
    p = torch.nn.Parameter(W.clone())
    return torch.stack([V for (V,) in run(cls([p], **settings), [p], [grads])])


def doubles(shape, steps=4, seed=0):
    return gradients(shape, steps, seed, DOUBLE)


def change(cls, W, grads, **options):
    """The change of one weight over these gradients, in the weight's dtype."""
    p = torch.nn.Parameter(W.clone())
    run(cls([p], lr=0.1, **options), [p], [grads])
    return p.detach() - W


def gaussian(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers, the same in every dtype but for rounding."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=DOUBLE).to(dtype)


def rotation(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=DOUBLE))[0]


def permutation(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def unsolved(make, target, steps=400):
    """Share of 0.5 |W - target|^2 that is left, from W = 0, with a rate that falls to zero."""
    p = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = make([p])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    return float((p.detach() - target).square().sum() / target.square().sum())


def refreshes(optimizer, params, steps):
    """At which steps (from 1) each parameter was refreshed."""
    found = [[] for _ in params]
    for step in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, 1, seed=100 * step + i)[0]
        optimizer.step()
        for at, p in zip(found, params, strict=True):
            if optimizer.state[p]["refreshed"] == step:
                at.append(step)
    return found


def check_refusal(cls, bad, text, shape=WIDE):
    """The constructor and ``add_param_group`` refuse a setting alike, in one sentence."""
    with pytest.raises(ValueError, match=text) as caught:
        cls([weight(shape)], **bad)
    assert "\n" not in str(caught.value)
    optimizer = cls([weight(WIDE)])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [weight(TALL)], **bad})
    assert len(optimizer.param_groups) == 1
