"""Products that are known to be symmetric, in plain torch.

All take one matrix (m, n) or a stack (K, m, n) of any floating dtype, and allocate their result.
"""

import torch
from torch import Tensor

from ._stacks import per_matrix
from .matmul import product

GRAM_PANEL_ROWS = 128
"""Rows of a panel of a symmetric product on the CPU; up to twice as many, one product is faster."""


def gram(X: Tensor, only: Tensor | None = None) -> Tensor:
    """The product X X^T.

    Args:
        X: (m, n) or (K, m, n).
        only: None, or flags (K,) float32: a matrix whose flag is 0 may be left undefined.

    Returns:
        (m, m) or (K, m, m), in X's dtype.
    """
    if not _in_panels(X):
        return X @ X.mT
    return gram_into(X.new_empty(X.shape[0], X.shape[0]), X)


def gram_into(S: Tensor, X: Tensor) -> Tensor:
    """``gram`` of X (m, n) or (K, m, n), written into S (m, m) or (K, m, m), which is returned."""
    if not _in_panels(X):
        return torch.matmul(X, X.mT, out=S)
    m = X.shape[0]
    for i in range(0, m, GRAM_PANEL_ROWS):
        j = min(i + GRAM_PANEL_ROWS, m)
        torch.mm(X[i:j], X[:j].mT, out=S[i:j, :j])
        S[:i, i:j] = S[i:j, :i].mT
    return S


def gram_stack(X: Tensor) -> Tensor:
    """X X^T for every matrix of a stack; a stack has the bits of its matrices one by one.

    Args:
        X: (K, m, n), any strides.

    Returns:
        (K, m, m), in X's dtype.
    """
    if len(X) == 0 or not _in_panels(X[0]):
        return product(X, X.mT)
    return gram(X[0]).unsqueeze(0) if len(X) == 1 else torch.stack([gram(x) for x in X])


def symmetric_poly(
    S: Tensor, b: float, c: float, d: float = 0.0, trace: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The symmetric polynomial b S + c S S + d I of a symmetric S, or of S / trace.

    Args:
        S: symmetric, (m, m) or (K, m, m).
        b: factor of S.
        c: factor of S S.
        d: what is added to the diagonal.
        trace: None, or what each S is to be divided by, (K,) float32.
        only: None, or flags as for ``gram``.

    Returns:
        A new tensor of S's shape and dtype.
    """
    S = S if trace is None else (S / per_matrix(trace, S)).to(S.dtype)
    P = _symmetric(S, S, S, b, c)
    if d != 0:
        P.diagonal(dim1=-2, dim2=-1).add_(d)
    return P


def symmetric_apply(A: Tensor, B: Tensor, a: float) -> Tensor:
    """The sum a A + A B for symmetric A and B that commute, so that it is symmetric too.

    Args:
        A: symmetric, (m, m) or (K, m, m).
        B: symmetric, of A's shape, and A B = B A but for rounding.
        a: factor of A.

    Returns:
        A new tensor of A's shape and dtype.
    """
    return _symmetric(A, A, B, a, 1.0)


def _symmetric(S: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float) -> Tensor:
    """The sum beta S + alpha A B, known to be symmetric: half of it is computed and mirrored."""
    if S.ndim == 3:
        return torch.baddbmm(S, A, B, beta=beta, alpha=alpha)
    if not _in_panels(S):
        return torch.addmm(S, A, B, beta=beta, alpha=alpha)
    m = S.shape[0]
    P = torch.empty_like(S)
    for i in range(0, m, GRAM_PANEL_ROWS):
        j = min(i + GRAM_PANEL_ROWS, m)
        torch.addmm(S[i:j, :j], A[i:j], B[:, :j], beta=beta, alpha=alpha, out=P[i:j, :j])
        P[:i, i:j] = P[i:j, :i].mT
    return P


def _in_panels(X: Tensor) -> bool:
    """Whether half of a symmetric product is worth computing by itself.

    Only on the CPU, where the products are bound by arithmetic, and never in low precision, where
    one whole product keeps the bits of ``torch.optim.Muon``.
    """
    return (
        X.ndim == 2
        and X.shape[0] >= 2 * GRAM_PANEL_ROWS
        and X.device.type == "cpu"
        and X.dtype in (torch.float32, torch.float64)
    )
