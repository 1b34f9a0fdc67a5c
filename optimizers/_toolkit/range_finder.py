"""Bases by random draws: range finder, warm power step, Haar.

As in ``svd.py``, rows are projected, P is (K, m, r), and each matrix of a stack is factorized by
itself. Draws follow the keys of ``random_keys.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .random_keys import StackRNG
from .svd import (
    Attempt,
    first_valid_bases,
    normalized_panels,
    right_basis,
    svd_fallbacks,
    work_dtype,
)

__all__ = ["power_bases", "random_bases", "range_bases"]


def range_bases(
    G: Tensor,
    r: int,
    rng: StackRNG,
    old: Sequence[Tensor | None] = (None,),
    *,
    oversample: int = 8,
    iterations: int = 1,
) -> tuple[Tensor, ...]:
    """Compute nearly the leading left singular vectors, by the randomized range finder.

    Y = G Omega with r + oversample Gaussian columns; each power iteration replaces it by
    G (G^T orth(Y)); inside Q = orth(Y) the best r directions come from an eigendecomposition of
    (Q^T G)(Q^T G)^T. Without iterations the expected error ||G - Q Q^T G||_F is at most
    sqrt(1 + r / (oversample - 1)) of the optimum; iterations improve it.
    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.3 and 4.4, theorem 10.5.

    Args:
        G: (K, m, n), finite and not zero, any strides.
        r: Number of columns, at most min(m, n).
        rng: Keys of the random numbers.
        old: Bases that stay if all attempts fail, one entry per side (default: one side, None).
        oversample: Extra columns p (default: 8).
        iterations: Power iterations q (default: 1).

    Returns:
        P: (K, m, r) by falling singular value, signs fixed, and for two sides Q = orth(G^T P).
    """
    m, n = G.shape[-2:]

    def attempts(k: int, X: Tensor) -> Sequence[Attempt]:
        (Omega,) = rng.gaussian(k, X, (n, min(r + oversample, m)))
        find = partial(_range_finder, X, r, Omega, iterations)
        return _with_fallbacks(X, r, find, len(old))

    return first_valid_bases(G, r, old, attempts)


def _with_fallbacks(
    G: Tensor, r: int, find: Callable[[torch.dtype], Tensor], sides: int
) -> Sequence[Attempt]:
    """Attempts: ``find`` in the work dtype and in fp64, then those of "svd"; Q follows P."""

    def attempt(dtype: torch.dtype) -> Sequence[Tensor]:
        P = find(dtype)
        return (P, right_basis(G, P)) if sides == 2 else (P,)

    preferred = [partial(attempt, dtype) for dtype in (work_dtype(G), torch.float64)]
    return [*preferred, *svd_fallbacks(G, r, "svd", sides)]


def _range_finder(G: Tensor, r: int, Omega: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """The basis P (m, r) of one matrix G (m, n) from random columns Omega (n, k)."""
    Omega = Omega.to(G.device, dtype)
    Y = Omega.new_zeros(G.shape[0], Omega.shape[1])
    for columns, X in normalized_panels(G, Omega.dtype):
        Y.addmm_(X, Omega[columns])
    Q = torch.linalg.qr(Y).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(_gram_product(G, Q)).Q
    S = Q.new_zeros(Q.shape[1], Q.shape[1])
    for _, X in normalized_panels(G, Q.dtype):
        B = Q.mT @ X
        S.addmm_(B, B.mT)
    W = torch.linalg.eigh(S).eigenvectors[:, -r:].flip(-1)  # eigh's order is rising
    P: Tensor = Q @ W
    return P


def _gram_product(G: Tensor, P: Tensor) -> Tensor:
    """G (G^T P) for one matrix, up to scale, in one pass over G without all of G^T P."""
    Y = torch.zeros_like(P)
    for _, X in normalized_panels(G, P.dtype):
        Y.addmm_(X, X.mT @ P)
    return Y


def power_bases(
    G: Tensor, r: int, rng: StackRNG, old: Sequence[Tensor], *, probes: int = 8
) -> tuple[Tensor, ...]:
    """Do one step of subspace iteration from the old basis; without one, a truncated SVD.

    With K = G G^T and S = [P_old, W], W random directions outside P_old, the columns of the new P
    are the r leading eigenvectors of the Nystrom approximation (K S)(S^T K S)^+ (K S)^T. Without
    probes W this is the plain step orth(K P_old), ordered by singular value. On a fixed G the
    captured energy never falls, and a top singular space stays. The plain step cannot find a
    direction that P_old has lost. A probe contains some of every direction, and K enlarges the
    strong ones, so a direction that outweighs the weakest column returns within a few refreshes.
    Sources: LDAdam, arXiv 2410.16103 (the warm step); Tropp, Yurtsever, Udell, Cevher, arXiv
    1706.05736 (Nystrom, shifted for stability).

    Args:
        G: (K, m, n), finite and not zero, any strides.
        r: Number of columns, at most min(m, n).
        rng: Keys of the random numbers.
        old: Bases (K, m, r)[, (K, n, r)] to start from, zeros where there is none yet. The second
            side only says that Q = orth(G^T P) is wanted.
        probes: Random directions added to the start (default: 8).

    Returns:
        P: (K, m, r) by falling singular value, signs fixed, and for two sides Q.
    """
    m = G.shape[-2]

    def attempts(k: int, X: Tensor) -> Sequence[Attempt]:
        if not bool(old[0][k].any()):
            return svd_fallbacks(X, r, "svd", len(old))
        (W,) = rng.gaussian(k, X, (m, min(probes, m - r)))
        return _with_fallbacks(X, r, partial(_nystrom_step, X, old[0][k], W), len(old))

    return first_valid_bases(G, r, old, attempts)


def _nystrom_step(G: Tensor, P: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """The new basis (m, r) of one matrix G (m, n) from the old P (m, r) and probes W (m, p)."""
    r = P.shape[1]
    P, W = P.to(G.device, dtype), W.to(G.device, dtype)
    W = torch.linalg.qr(W - P @ (P.mT @ W)).Q
    S = torch.cat([P, W], dim=1)
    Y = _gram_product(G, S)
    shift = torch.finfo(Y.dtype).eps * torch.linalg.matrix_norm(Y)
    Y = Y + shift * S  # so that rounding leaves S^T Y positive definite
    M = S.mT @ Y
    L = torch.linalg.cholesky((M + M.mT) / 2)
    B = torch.linalg.solve_triangular(L, Y.mT, upper=False).mT  # B B^T is the approximation of K
    V = torch.linalg.eigh(B.mT @ B).eigenvectors[:, -r:].flip(-1)
    new_basis: Tensor = torch.linalg.qr(B @ V).Q
    return new_basis


def random_bases(
    G: Tensor, r: int, rng: StackRNG, old: Sequence[Tensor | None] = (None,)
) -> tuple[Tensor, ...]:
    """Draw Haar-distributed bases that do not depend on G: E[P P^T] = (r / m) I.

    P = Q sign(diag T) from the QR factors Q T of a Gaussian matrix. Factors are computed on the
    CPU, and numbers are drawn in fp32 also for fp64, so that every device and dtype has the same
    subspace.

    Args:
        G: (K, m, n), for shape, dtype and device only.
        r: Number of columns, at most m (and n, for two sides).
        rng: Keys of the random numbers.
        old: One entry per side (default: one side, None).

    Returns:
        P: (K, m, r), and for two sides an independent (K, n, r).
    """
    sides = G.shape[-2:][: len(old)]

    def attempts(k: int, X: Tensor) -> Sequence[Attempt]:
        gaussians = rng.gaussian(k, X, *((d, r) for d in sides))
        return [
            lambda: [_haar(A) for A in gaussians],
            lambda: [_haar(A.double()) for A in gaussians],
        ]

    return first_valid_bases(G, r, old, attempts, sign_rule=None)


def _haar(A: Tensor) -> Tensor:
    Q, T = torch.linalg.qr(A)
    P: Tensor = Q * (1 - 2 * (T.diagonal() < 0).to(Q.dtype))
    return P
