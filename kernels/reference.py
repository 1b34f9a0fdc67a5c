"""The heavy steps in plain torch: the CPU path, and what any other back end is tested against.

All take one matrix (m, n) or a stack (K, m, n), in any floating dtype, and allocate their result.
"""

import torch
from torch import Tensor

# Rows per panel of a symmetric product on the CPU. Below twice this size one product is faster.
PANEL = 128


def gram(X: Tensor) -> Tensor:
    """The product X X^T.

    Args:
        X: (m, n) or (K, m, n).

    Returns:
        (m, m) or (K, m, m), in X's dtype.
    """
    if not _in_panels(X):
        return X @ X.mT
    m = X.shape[0]
    S = X.new_empty(m, m)
    for i in range(0, m, PANEL):
        j = min(i + PANEL, m)
        torch.mm(X[i:j], X[:j].mT, out=S[i:j, :j])
        S[:i, i:j] = S[i:j, :i].mT
    return S


def symmetric_poly(S: Tensor, b: float, c: float) -> Tensor:
    """The symmetric polynomial b S + c S S of a symmetric S.

    Args:
        S: symmetric, (m, m) or (K, m, m).
        b: factor of S.
        c: factor of S S.

    Returns:
        A new tensor of S's shape and dtype.
    """
    return _symmetric(S, S, S, b, c)


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
    for i in range(0, m, PANEL):
        j = min(i + PANEL, m)
        torch.addmm(S[i:j, :j], A[i:j], B[:, :j], beta=beta, alpha=alpha, out=P[i:j, :j])
        P[:i, i:j] = P[i:j, :i].mT
    return P


def scale_and_apply(X: Tensor, P: Tensor, a: float, alpha: float = 1.0) -> Tensor:
    """The sum a X + alpha P X.

    Args:
        X: (m, n) or (K, m, n).
        P: (m, m) or (K, m, m).
        a: factor of X.
        alpha: factor of P X.

    Returns:
        A new tensor of X's shape and dtype.
    """
    if X.ndim == 3:
        return torch.baddbmm(X, P, X, beta=a, alpha=alpha)
    return torch.addmm(X, P, X, beta=a, alpha=alpha)


def _in_panels(X: Tensor) -> bool:
    """Whether half of a symmetric product is worth computing by itself.

    Only on the CPU, where the products are bound by arithmetic, and never in low precision, where
    one whole product keeps the bits of ``torch.optim.Muon``.
    """
    return (
        X.ndim == 2
        and X.shape[0] >= 2 * PANEL
        and X.device.type == "cpu"
        and X.dtype in (torch.float32, torch.float64)
    )
