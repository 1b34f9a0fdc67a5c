"""Tensors that show what a kernel must not do: read or write beside them, or leave holes."""

import contextlib
import math
import os

import torch

SHAPES = [(1, 1), (1, 33), (45, 1), (7, 100), (33, 45), (70, 33), (16, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["rows", "columns", "strided", "padded"]
DEVICE = os.environ.get("STIEFEL_DEVICE", "cpu")
"""Where tensors are: the CPU, where kernels are interpreted, or "cuda"."""
BAND = 64
"""Elements of the guard band before and behind a tensor."""


def laid(X, layout="rows"):
    """A copy of X (..., m, n) inside a buffer of NaN, in one of LAYOUTS, and that buffer.

    "rows" and "columns" are dense, "strided" has gaps in both directions, "padded" in one.
    """
    *lead, m, n = X.shape
    step = 2 if layout == "strided" else 1
    pad = 5 if layout in ("strided", "padded") else 0
    sides = (n, m) if layout == "columns" else (m, n)
    width = step * sides[1] + pad
    count = math.prod(lead) * sides[0] * width
    buffer = torch.full((count + 2 * BAND,), float("nan"), dtype=X.dtype, device=DEVICE)
    view = buffer[BAND : BAND + count].view(*lead, sides[0], width)[..., : step * sides[1] : step]
    view = view.mT if layout == "columns" else view
    view.copy_(X)
    return view, buffer


def holes(shape, dtype=torch.float32, layout="rows"):
    """A tensor of NaN in a buffer of NaN for a result that has to be filled, and the buffer."""
    return laid(torch.full(shape, float("nan"), dtype=dtype, device=DEVICE), layout)


@contextlib.contextmanager
def nothing_beside(*pairs):
    """Check that of every (view, buffer) only the view has changed, and only if it is listed."""
    before = [buffer.clone() for _, buffer in pairs]
    yield
    for (view, buffer), old in zip(pairs, before, strict=True):
        outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        same = (buffer == old) | (buffer.isnan() & old.isnan())
        assert bool(same[outside].all()), "written beside the tensor"


def unchanged(*tensors):
    """Copies to compare with later: operands that a kernel must not write."""
    return [X.clone() for X in tensors]


def gaussian(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    X = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return X.to(DEVICE, dtype)  # the same on every device


def close(X, expected, dtype, size=1.0):
    """X equals the float64 result but for rounding of dtype, relative to its largest entry."""
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] * size
    assert X.shape == expected.shape
    assert bool(X.isfinite().all())
    if X.numel():
        expected = expected.to(X.device)
        error = (X.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(
            min=1e-30
        )
        assert error <= tolerance, f"{float(error):.2e} > {tolerance:.2e}"
