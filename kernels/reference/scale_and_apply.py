"""The last product of a polynomial step, in plain torch."""

import torch
from torch import Tensor

from ._stacks import per_matrix


def scale_and_apply(
    X: Tensor, P: Tensor, a: float, alpha: float = 1.0, trace: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum a X + alpha P X, or that over the root of trace.

    Args:
        X: (m, n) or (K, m, n).
        P: (m, m) or (K, m, m).
        a: factor of X.
        alpha: factor of P X.
        trace: None, or that of each X X^T, (K,) float32.
        only: None, or flags as for ``gram``.

    Returns:
        A new tensor of X's shape and dtype.
    """
    add = torch.baddbmm if X.ndim == 3 else torch.addmm
    Y = add(X, P, X, beta=a, alpha=alpha)
    return Y if trace is None else (Y / per_matrix(trace, X).sqrt()).to(X.dtype)
