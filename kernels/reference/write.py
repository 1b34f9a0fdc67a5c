"""The one place of plain torch that rounds a weight, and so the place of every mode of rounding.

The kernels' counterpart is ``store_weight`` in ``triton/_write.py``. Nothing else rounds weights,
but torch's own AdamW for weights that are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .rounding import LOW_PRECISION_DTYPES, Rounding

Change = Callable[[Tensor], object]
"""What changes a tensor in place."""


def update_weight_(
    W: Tensor,
    change: Change,
    dtype: torch.dtype | None = None,
    panel: tuple[slice, ...] = (),
    rounding: Rounding | None = None,
) -> None:
    """Change the values of a weight in the accumulation dtype, and round them into it once.

    Together with ``store_weight`` of the Triton kernels this function is all that rounds weights.
    Callers hand over the whole W and name the panel, so W and ``rounding`` are cut here alike. A
    matrix that stays as it is comes out of ``change`` unchanged, and values of W's dtype are fixed
    points of every mode.

    Args:
        W: The weight, changed in place: any shape, strides and floating dtype.
        change: Called once with a tensor X of the panel's shape and values, which it changes in
            place; W itself it does not touch. X is the panel of W where W has the accumulation
            dtype, so that nothing is copied.
        dtype: The accumulation dtype. None (default): float32 for bfloat16 and float16, else W's.
        panel: Which slices of W change; () (default) for all of it.
        rounding: How a weight of low precision is rounded; None (default): to nearest, as weights
            of float32 and float64 always are. X is float32 under it, whatever ``dtype`` is, as
            sums in the weight's own dtype are rounded to nearest already.
    """
    dtype = accumulation_dtype(W, dtype, rounding)
    target = W[panel] if panel else W
    if W.dtype not in LOW_PRECISION_DTYPES:
        rounding = None
    _round_into_(target, change, dtype, None if rounding is None else rounding.part(panel))


def accumulation_dtype(
    W: Tensor, dtype: torch.dtype | None, rounding: Rounding | None
) -> torch.dtype:
    """In which dtype ``update_weight_`` changes the values of W, for the one that is wanted."""
    is_low = W.dtype in LOW_PRECISION_DTYPES
    if dtype is None or (is_low and rounding is not None):
        return torch.float32 if is_low else W.dtype
    return dtype


def update_flagged_weight_(
    W: Tensor,
    change: Change,
    dtype: torch.dtype,
    control: Tensor | None,
    rounding: Rounding | None,
) -> None:
    """``update_weight_`` of matrices some of which stay, with what earlier writes have cut off.

    Args:
        W: (K, m, n), any strides.
        change: As for ``update_weight_``; it changes no matrix whose flag is 0.
        dtype: As for ``update_weight_``.
        control: None, or (K, 3), whose first column has the flags.
        rounding: As for ``update_weight_``.
    """
    flags = None if control is None else control[:, 0].view(-1, 1, 1)
    with unflagged_stay(W, flags, rounding):
        update_weight_(W, change, dtype, rounding=rounding)


@contextmanager
def unflagged_stay(W: Tensor, flags: Tensor | None, rounding: Rounding | None) -> Iterator[None]:
    """A context after which matrices whose flag is 0 are as before, where rounding moves them.

    That is so with a residual alone: W plus the residual may be halfway between two grid points,
    and be rounded to the other one.

    Args:
        W: (K, m, n).
        flags: None, or (K, 1, 1).
        rounding: As for ``update_weight_``.
    """
    residual = None if rounding is None else rounding.residual
    if flags is None or residual is None:
        yield
        return
    old = W.clone(), residual.clone()
    yield
    for X, before in zip((W, residual), old, strict=True):
        X.copy_(torch.where(flags != 0, X, before))


def _round_into_(
    target: Tensor, change: Change, dtype: torch.dtype, rounding: Rounding | None
) -> None:
    """Do what ``update_weight_`` does, with a panel of a weight: the only lines that write it."""
    if target.dtype == dtype:
        change(target)
        return
    X = target.to(dtype)
    if rounding is None:
        change(X)
        target.copy_(X)  # to nearest, halves to even
        return
    if rounding.residual is not None:
        X.add_(rounding.residual)
    change(X)
    rounding.round_into_(target, X)
