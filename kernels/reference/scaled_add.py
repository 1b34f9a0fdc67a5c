"""The write of a term that exists already, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import write
from ._stacks import Stack, stacked
from .rounding import Rounding


def scaled_add_(
    W: Stack, X: Stack, by: Tensor | None, keep: float, alpha: float,
    control: Tensor | None = None, *, Y: Stack | None = None, by_Y: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (by X + by_Y Y), in place, rounded once.

    Args:
        W: (K, m, n), any strides, or a list of K matrices, as X and Y may be.
        X: (K, m, n), any strides and floating dtype.
        by: None (1), or a factor of X: (K, m, n), (K, m, 1), (K, 1, n) or (K, 1, 1), where K may
            be 1.
        keep: Multiplies W.
        alpha: Multiplies all that is added.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W does not change.
        Y: None (default), or a second (K, m, n).
        by_Y: As ``by``, for Y (None).
        rounding: How a weight of low precision is rounded, whose keys belong to the matrices of W;
            None (default): to nearest.
    """
    stack = stacked(W)
    dtype = torch.promote_types(stack.dtype, torch.float32)
    terms = [(stacked(Z).to(dtype), c) for Z, c in ((X, by), (Y, by_Y)) if Z is not None]

    def change(w: Tensor) -> None:
        if control is None:
            if keep != 1.0:
                w.mul_(keep)
            for Z, c in terms:
                w.add_(Z, alpha=alpha) if c is None else w.addcmul_(Z, c.to(dtype), value=alpha)
            return
        finite, keeps, alphas = control.to(dtype).view(len(w), 3, 1, 1).unbind(1)
        new = w * keeps
        for Z, c in terms:
            new.addcmul_(Z, alphas if c is None else c.to(dtype) * alphas)
        w.copy_(torch.where(finite != 0, new, w))

    write.update_flagged_weight_(stack, change, dtype, control, rounding)
    if stack is not W:  # a list: its matrices take the rounded values, bit for bit
        for place, w in zip(W, stack, strict=True):
            place.copy_(w)
