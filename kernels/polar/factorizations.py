"""Polar factors by factorization: singular vectors, eigenvectors, one rational step.

X is (m, n) or (K, m, n) with m <= n, of Frobenius norm at most one, and may be overwritten, but by
``zolo``. LAPACK refuses non-finite input with an exception; here such a matrix becomes NaN instead.
"""

import torch
from torch import Tensor

from ..dispatch import backend_for
from .coefficients import Rational
from .inverse_sums import inverse_sum_of


def svd(X: Tensor) -> Tensor:
    """U V^T over the singular values above max(m, n) eps s_1: the partial isometry."""
    X, bad = masked(X)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    keep = s > max(X.shape[-2:]) * torch.finfo(X.dtype).eps * s[..., :1]
    O: Tensor = U.mul_(keep.unsqueeze(-2)) @ Vh
    return O.masked_fill_(bad, torch.nan)


def eigh(X: Tensor) -> Tensor:
    """(S + 16 eps lambda_1 I)^(-1/2) X with S = X X^T.

    The damping is a few times the rounding of S. A cut in its place would lose the directions whose
    square lies below that rounding, or blow up what is left of them.
    """
    S, bad = masked(backend_for(X, "symmetric").gram(X))
    values, V = torch.linalg.eigh(S)
    del S
    damping = 16 * torch.finfo(X.dtype).eps * values[..., -1:]
    # The floor is for the zero matrix, whose factor must come out as a finite number times zero.
    root = (values.clamp(min=0) + damping.clamp(min=torch.finfo(X.dtype).tiny)).rsqrt()
    T = ((V * root.unsqueeze(-2)) @ V.mT).masked_fill_(bad, torch.nan)  # (m, m)
    return product_like(T, X)


def zolo(
    X: Tensor, step: Rational, size: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """C (I + sum_j a_j (S + c_j I)^(-1)) X / (size norm^(1/2)).

    Here S = X X^T / (size^2 norm) and norm = ||X X^T||_F / size^2. The inverses are summed first,
    so that the long side is touched by two products only.

    Args:
        X: (m, n) or (K, m, n), m <= n, of Frobenius norm at most ``size``; it is left as it is.
        step: Shifts, weights and scale.
        size: A scalar or (K, 1, 1), whose square is in range. None: 1.
        out: Where the result goes, of X's shape, X itself too. None: new memory, laid out as X is.
    """
    T, factorized = inverse_sum_of(X, step, size)
    if not bool(factorized.all()):
        # A shift is far above the rounding of S, so only a non-finite matrix is seen here.
        O = torch.where(factorized[..., None, None], T @ X, eigh(X.clone()))
        return O if out is None else out.copy_(O)
    O = torch.empty_like(X) if out is None else out
    m, n = X.shape[-2:]
    for i in range(0, n, m):  # in panels of columns, so that O may be X
        Y, P = X[..., i : i + m], O[..., i : i + m]
        P.copy_(product_like(T, Y)) if O is X else torch.matmul(T, Y, out=P)
    return O


def product_like(T: Tensor, X: Tensor) -> Tensor:
    """T X in the memory layout of X, so that transposing it back costs no copy."""
    O = torch.empty_like(X)
    torch.matmul(T, X, out=O)
    return O


def masked(X: Tensor) -> tuple[Tensor, Tensor]:
    """X with its non-finite matrices set to zero in place, and the mask (..., 1, 1) of those."""
    bad = ~X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return X.masked_fill_(bad, 0.0), bad
