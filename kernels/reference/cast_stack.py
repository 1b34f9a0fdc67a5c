"""One stack of a list of matrices, in another precision, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._stacks import Stack, stacked


def cast_stack(
    Xs: Stack, dtype: torch.dtype, with_flags: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One stack of a list of matrices, in another precision and with their memory order.

    Args:
        Xs: K matrices (m, n), or a stack (K, m, n).
        dtype: Of the result.
        with_flags: Whether flags are wanted (False).

    Returns:
        stack: A new (K, m, n), with the memory order of the matrices.
        flags: (K,) float32, 1 where all entries are finite, else 0; None if not wanted.
    """
    X = stacked(Xs)
    out = X.to(dtype, copy=X is Xs)
    if not with_flags:
        return out, None
    return out, X.isfinite().all(-1).all(-1).to(torch.float32)
