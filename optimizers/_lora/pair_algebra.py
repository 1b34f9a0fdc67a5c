"""The algebra of LoRA pairs: Grams of the factors, damped inverses, and carrying a momentum along.

A step dA of one factor moves W = W0 + s B A by s B dA, so what a pair's formulas solve is

    min_D |s X D - Y|^2 + s^2 delta |D|^2,   D = (X^T X + delta I)^-1 X^T Y / s,

with X the other factor (B, or A^T for the transposed problem). Everything that is not a product
with a factor is r x r, and all functions take stacks: (K, m, r) and (K, r, r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import product
from .._core.rule import LOCAL_REDUCTIONS, Member

__all__ = [
    "LONG_SIDES",
    "completed",
    "completed_together",
    "cross_gram",
    "damped",
    "damped_inverse",
    "debias_factor",
    "gram",
    "grams_with_old",
    "holds_everywhere",
    "is_in_range",
    "is_nonzero",
    "is_on_host",
    "left_matmul",
    "right_matmul",
    "saturate",
    "transport",
]

LONG_SIDES = (frozenset({"cols"}), frozenset({"rows"}))
"""Of A (r, n) and B (m, r) the sides that everything r x r is a sum over.

Shards of these are enough for rules that complete each such sum."""
DAMPING_FLOOR = 4.0
"""Least damping in units of r * eps * mean eigenvalue, about the round-off of a Gram matrix."""
FALLBACK_DAMPING = 256.0
"""Damping in the same units where Cholesky's factorization fails."""
MAX_HALF = torch.finfo(torch.float16).max
"""The largest number of float16."""


def gram(X: Tensor, weight: Tensor | None = None) -> Tensor:
    """X^T X, or X^T diag(weight) X.

    Args:
        X: (K, m, r).
        weight: None, or (K, m, 1).

    Returns:
        (K, r, r).
    """
    return product(X.mT, X if weight is None else X * weight)


def cross_gram(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y (K, r, r) of X and Y (K, m, r): the columns of Y seen in those of X."""
    return product(X.mT, Y)


def completed(w: Member, *sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over the long side of A or of B, of which shards have parts, by one call."""
    return w.reductions.sums_together(*((w.reductions, x) for x in sums))


def completed_together(ws: Sequence[Member], *sums: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The same for all members of a unit.

    Args:
        ws: The members.
        *sums: Those of each of them.

    Returns:
        The completed ones of each.
    """
    parts = [(w.reductions, x) for w, xs in zip(ws, sums, strict=True) for x in xs]
    found = iter(ws[0].reductions.sums_together(*parts))
    return [tuple(next(found) for _ in xs) for xs in sums]


def grams_with_old(w: Member, X: Tensor, X_old: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X and X^T X_old of a factor, equal in bits where X has not moved.

    Ranks may add the parts of one in another order than those of the other, so each says whether
    its parts differ.

    Args:
        w: The factor, of which X may be a shard.
        X: (K, m, r).
        X_old: (K, m, r), an earlier X.
    """
    S, C = gram(X), cross_gram(X, X_old)
    if w.reductions is LOCAL_REDUCTIONS:
        return S, C
    differs = (S != C).any(-1, keepdim=True).any(-2, keepdim=True).to(S.dtype)
    S, C, differs = completed(w, S, C, differs)
    return S, torch.where(differs > 0, C, S)


def left_matmul(T: Tensor, M: Tensor) -> Tensor:
    """T M for T (K, r, r) and M (K, r, n), in the layout of M, so that nothing is transposed."""
    row, column = M.stride()[-2:]
    return product(T, M) if row != 1 and column == 1 else product(M.mT, T.mT).mT


def is_nonzero(S: Tensor) -> Tensor:
    """Whether each Gram matrix (K, r, r) is not zero, as (K, 1, 1)."""
    return (S.diagonal(dim1=-2, dim2=-1).amax(-1) > 0).view(-1, 1, 1)


def holds_everywhere(flags: Tensor) -> Tensor:
    """Whether all flags of each matrix (K, m, n) are set, as (K, 1, 1); in one long row each."""
    return flags.flatten(-2).all(-1).view(-1, 1, 1)


def is_on_host(x: Tensor) -> bool:
    """Whether the host can read x without waiting for a device."""
    return x.is_cpu


def is_in_range(S: Tensor, delta: float, relative: float = 0.0) -> Tensor:
    """Whether each damped Gram matrix (K, r, r) and its inverse have the digits of their dtype.

    Args:
        S: (K, r, r).
        delta: Absolute damping.
        relative: Damping relative to the mean eigenvalue.

    Returns:
        (K, 1, 1), in float32 true for factors from about 1e-15 to 1e15.
    """
    info = torch.finfo(S.dtype)
    least = info.tiny / info.eps
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1) * (1 + relative) + delta
    finite = holds_everywhere(S.isfinite())
    return finite & (mean >= least) & (mean <= 1 / least)


def saturate(N: Tensor, out: Tensor, limit: float) -> Tensor:
    """Store N in ``out``, at the limit where N is larger than can be stored.

    In one pass where the two have one dtype, as a plain copy is. A sum of infinite parts of both
    signs has no value and is 0.

    Args:
        N: The values, which may be changed.
        out: Where they are stored.
        limit: The limit. Above the largest float16 only infinite values are replaced.

    Returns:
        ``out``, or N where that is more precise.
    """
    is_half = limit < MAX_HALF  # then no product has left float32
    if N.dtype == out.dtype:
        if is_half:
            return torch.clamp(N, -limit, limit, out=out)
        return torch.nan_to_num(N, nan=0.0, posinf=limit, neginf=-limit, out=out)
    out.copy_(N.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit).clamp_(-limit, limit))
    return N


def damped(S: Tensor, delta: float, relative: float = 0.0, least: float = 0.0) -> Tensor:
    """S + d I as a new tensor, d = max(delta + relative * mean, least * mean) of eigenvalues."""
    K = S.clone()
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.maximum(delta + relative * mean, least * mean))
    return K


def damped_inverse(S: Tensor, delta: float, relative: float = 0.0) -> Tensor:
    """(S + (delta + relative * mean eigenvalue) I)^-1 by Cholesky.

    Zero where S is zero, or not in range (:func:`is_in_range`), so that it is finite. Damping is
    never below the round-off of the Gram matrix, so that a singular one does not fill the result
    with noise, and more where the factorization fails; no device is waited for.

    Args:
        S: (K, r, r), symmetric, no negative eigenvalues beyond round-off.
        delta: Absolute damping.
        relative: Damping relative to the mean eigenvalue.

    Returns:
        (K, r, r).
    """
    nonzero = is_nonzero(S) & is_in_range(S, delta, relative)
    roundoff = S.shape[-1] * torch.finfo(S.dtype).eps
    K = damped(S, delta, relative, DAMPING_FLOOR * roundoff)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand_as(K)
    K = torch.where(nonzero, K, eye)
    L, info = torch.linalg.cholesky_ex(K)
    if K.device.type != "cpu" or bool(info.any()):
        fallback, _ = torch.linalg.cholesky_ex(
            torch.where(nonzero, damped(S, delta, relative, FALLBACK_DAMPING * roundoff), eye)
        )
        L = torch.where((info != 0).view(-1, 1, 1), fallback, L)
    return torch.where(nonzero, inverse_from(L), 0.0)


def inverse_from(L: Tensor, at_once: bool | None = None) -> Tensor:
    """(L L^T)^-1 of lower triangular factors L (K, r, r).

    Args:
        L: The factors.
        at_once: Whether one triangular solve and one product serve all matrices. None (default): on
            an accelerator, where torch launches a Cholesky solve for one matrix after the other.
    """
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    if not (L.device.type != "cpu" if at_once is None else at_once):
        return torch.cholesky_solve(eye, L)
    Y = torch.linalg.solve_triangular(L, eye, upper=False)
    return product(Y.mT, Y)


def transport(S: Tensor, inverse: Tensor, C: Tensor) -> Tensor:
    """T (K, r, r) that carries a momentum M along: X (T M) is as near to X_old M as can be.

    Where X has not moved T is I exactly: damping would shrink M step by step.

    Args:
        S: X^T X, (K, r, r).
        inverse: (S + delta I)^-1.
        C: X^T X_old.

    Returns:
        T = inverse C.
    """
    unmoved = holds_everywhere(S == C)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.where(unmoved, eye, product(inverse, C))


def debias_factor(count: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - beta^count) for counts (K, 1, 1) that live on the device; 1 / (1 - beta) for 0."""
    return (1 / (1 - beta ** count.clamp(min=1).double())).to(dtype)


def right_matmul(X: Tensor, K: Tensor) -> Tensor:
    """X K of X (K, m, r) and K (K, r, r), a new tensor in the layout of X."""
    is_column_major = X.stride(-1) != 1 and X.stride(-2) == 1
    return product(K.mT, X.mT).mT if is_column_major else product(X, K)
