"""Polar factors by factorization: singular vectors, eigenvectors, one rational step.

X is (m, n) or (K, m, n) with m <= n, of Frobenius norm at most one, and may be overwritten. LAPACK
refuses non-finite input with an exception; here such a matrix becomes NaN instead.
"""

import torch
from torch import Tensor

from ..dispatch import backend_for
from .coefficients import Rational
from .inverse_sums import sum_of_inverses, uses_blocks


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


def zolo(X: Tensor, step: Rational) -> Tensor:
    """C (I + sum_j a_j (S + c_j I)^(-1)) X / sqrt(norm), S = X X^T / norm, norm = ||X X^T||_F.

    The inverses are summed first, so that the long side is touched by two products only.
    """
    T: Tensor = backend_for(X, "symmetric").gram(X)
    norm = torch.linalg.matrix_norm(T, keepdim=True)
    # X of norm one has norm >= m^(-1/2), so this acts only where eps did.
    norm = norm.clamp(min=0.5 * X.shape[-2] ** -0.5)
    if uses_blocks(T):
        T, factorized = sum_of_inverses(T, step, norm)
    else:
        T, factorized = _sum_of_inverses(T.div_(norm), step)
        T.mul_(step.scale * norm.rsqrt())
    O = product_like(T, X)
    if bool(factorized.all()):
        return O
    # A shift is far above the rounding of S, so only a non-finite matrix is seen here.
    return torch.where(factorized[..., None, None], O, eigh(X))


def _sum_of_inverses(S: Tensor, step: Rational) -> tuple[Tensor, Tensor]:
    """I + sum_j a_j (S + c_j I)^(-1) and whether each factorization worked; S is overwritten."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    entries = diagonal.clone()
    factorized = torch.ones(S.shape[:-2], dtype=torch.bool, device=S.device)
    total: Tensor | None = None
    for j, (shift, weight) in enumerate(zip(step.shifts, step.weights, strict=True)):
        torch.add(entries, shift, out=diagonal)
        inverse, worked = inverse_(S if j == len(step.shifts) - 1 else S.clone())
        factorized &= worked
        total = inverse.mul_(weight) if total is None else total.add_(inverse, alpha=weight)
    assert total is not None
    total.diagonal(dim1=-2, dim2=-1).add_(1)
    return total, factorized


def inverse_(S: Tensor) -> tuple[Tensor, Tensor]:
    """Invert a symmetric positive definite S in place; also whether its factorization succeeded.

    Where it failed the result is the identity: torch refuses a factor with a zero on its diagonal.
    """
    # LAPACK wants columns, and a symmetric matrix is its own transpose. One tensor object as input
    # and result tells torch that there is nothing to copy.
    L = S.mT
    info = torch.empty(S.shape[:-2], dtype=torch.int32, device=S.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    factorized = info == 0
    if not bool(factorized.all()):
        L.masked_fill_(~factorized[..., None, None], 0.0)
        L.diagonal(dim1=-2, dim2=-1).masked_fill_(~factorized[..., None], 1.0)
    torch.cholesky_inverse(L, out=L)
    return L, factorized


def product_like(T: Tensor, X: Tensor) -> Tensor:
    """T X in the memory layout of X, so that transposing it back costs no copy."""
    O = torch.empty_like(X)
    torch.matmul(T, X, out=O)
    return O


def masked(X: Tensor) -> tuple[Tensor, Tensor]:
    """X with its non-finite matrices set to zero in place, and the mask (..., 1, 1) of those."""
    bad = ~X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return X.masked_fill_(bad, 0.0), bad
