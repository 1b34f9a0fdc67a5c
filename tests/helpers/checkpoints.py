"""Checkpoints through a file, and runs that are stopped and resumed from one."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.problems import run, same, tensors


def through_a_file(saved, **options):
    """What torch.load gives back of ``saved``, read without running code."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def check_resume(make, grads, stop, through=through_a_file, loaded=lambda optimizer, params: None):
    """Stopping after ``stop`` steps, saving and loading must not change a bit of the run.

    ``make()`` gives (parameters, optimizer); ``grads`` has a list of gradients per parameter.
    ``through`` carries the checkpoint, and ``loaded`` sees the optimizer that has just loaded it.
    """
    params, straight = make()
    expected = run(straight, params, grads)
    others, first = make()
    run(first, others, [series[:stop] for series in grads])
    weights, saved = through([[p.detach() for p in others], first.state_dict()])
    resumed, second = make()
    for p, W in zip(resumed, weights, strict=True):
        p.data.copy_(W)
    second.load_state_dict(saved)
    assert same(tensors(first), tensors(second))
    loaded(second, resumed)
    out = run(second, resumed, [series[stop:] for series in grads])
    assert same(out, expected[stop:])
    assert same(tensors(straight), tensors(second))


def same_bits(a: Any, b: Any) -> bool:
    """Equal bit for bit, through every level of a checkpoint."""
    if isinstance(a, Tensor):
        equal = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        bits = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
        return equal and torch.equal(*bits)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def content(path: Path) -> dict[str, Any]:
    """A checkpoint without the two clocks that measure this machine."""
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    for key in ("optimizer_seconds", "step_seconds"):
        del saved["record"][key]
    return saved
