"""How large Adam's direction is beside what it was made of: factors of Fira and APOLLO, limited.

N = adam(R) of the coordinates R = P^T G of a gradient G. The factors |N| / |R|, per column or for
the matrix, scale what Adam has not seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORM_EPS = 1e-8  # added to norms that divide, as published
ROUND_OFF = 1e-6  # R / G below which R has no scale
MAX_RMS = 3.0
"""Bound of rms(phi G) / rms(N). A basis that is blind to G has sqrt(1 - r / m) there."""
MAX_COLUMN = 96.0
"""Bound of |phi G_i| / rms(N), so that no first step moves an entry by much more than 96 lr."""


def column_factors(
    N_squares: Tensor,
    R_squares: Tensor,
    G_squares: Tensor,
    N_total: Tensor,
    R_total: Tensor,
    G_total: Tensor,
    r: int,
    m: int,
    n: int,
    *,
    gain: float = 1.0,
    most: float = MAX_COLUMN,
) -> Tensor:
    """Compute phi_i = |N_i| / max(|R_i|, b |G_i|), so that a tiny R_i lifts G_i to no size at will.

    b = sqrt(r) / min(3 sqrt(m), 96): the root mean square of phi_i G_i is at most 3 times that of
    N_i, and |phi_i G_i| at most 96 times. A column that R lacks takes the mean of |N_i|^2 and of
    |R_i|^2 over the matrix for its own, or 0 if all of R is round-off, which has no scale.

    Args:
        N_squares: (K, 1, n), squared norms of the columns of N (r x n).
        R_squares: The same of R (r x n).
        G_squares: The same of G (m x n).
        N_total: (K, 1, 1), their sum over all n columns of the weight.
        R_total: The same of R.
        G_total: The same of G.
        r: Rows of N.
        m: Rows of G.
        n: Columns of the weight.
        gain: |P^T g|^2 over that of an orthonormal P, in the mean over all g (default: 1).
        most: Bound of |phi_i G_i| over the root mean square of N (default: 96).

    Returns:
        (K, 1, n).
    """
    has_column = R_squares > NORM_EPS**2 * R_total
    N_mean = (N_total / n).where(R_total > ROUND_OFF**2 * G_total, 0.0)
    N_norm = N_squares.where(has_column, N_mean).sqrt_()
    R_norm = R_squares.where(has_column, R_total / n).sqrt_().add_(NORM_EPS)
    G_part = (G_squares * (gain * r / min(MAX_RMS**2 * m, most**2))).sqrt_()
    return N_norm.div_(torch.maximum(R_norm, G_part))


def matrix_factor(
    N_total: Tensor,
    R_total: Tensor,
    G_total: Tensor,
    longest: Tensor | None,
    N_count: int,
    G_count: int,
    *,
    gain: float = 1.0,
) -> Tensor:
    """Compute phi = |N| / |R|, bounded by norms of the matrix as :func:`column_factors` is.

    Args:
        N_total: (K, 1, 1), squared norm of N.
        R_total: The same of R.
        G_total: The same of G.
        longest: Squared norms that 96 bounds: of every column of G, (K, 1, n), to cut each by
            itself; or the largest of them, (K, 1, 1), for one factor. None: no such bound.
        N_count: Entries of N.
        G_count: Entries of G.
        gain: As in :func:`column_factors` (default: 1).

    Returns:
        (K, 1, n) or (K, 1, 1), as ``longest``.
    """
    G_part = G_total * (gain * N_count / (MAX_RMS**2 * G_count))
    if longest is not None:
        G_part = torch.maximum(G_part, longest * (N_count / MAX_COLUMN**2))
    G_part = G_part.sqrt()
    N_norm = N_total.sqrt().where(R_total > ROUND_OFF**2 * G_total, 0.0)
    return N_norm / torch.maximum(R_total.sqrt().add_(NORM_EPS), G_part)


def norm_growth_limiter(
    norm: Tensor,
    stored: Tensor,
    gamma: float = 1.01,
    floor: float | None = 1e-8,
    finite: Tensor | None = None,
) -> Tensor:
    """Compute the divisor L that lets a norm grow by gamma per step at most.

    L = max(norm / (stored + 1e-8), gamma) / gamma, and the limited norm / L is stored. Where no
    norm is stored yet (a number below zero) L = 1. Source: Fira, arXiv 2410.01623.

    Args:
        norm: (K, 1, 1) norms of this step. A norm that is not finite gives L = inf and is not
            stored.
        stored: (K, 1, 1) limited norms of the last step, changed in place.
        gamma: At least 1 (default: 1.01).
        floor: Stored norms up to this count as absent, because they would hold the next ones down
            for hundreds of steps (default: 1e-8). None: as published, only those below zero do.
        finite: Flags (K,), 0 where nothing may be stored (default: None, all may).

    Returns:
        L: (K, 1, 1), at least 1.
    """
    previous = stored.to(norm.dtype)
    is_absent = previous < 0 if floor is None else previous <= floor
    is_finite = norm.isfinite()
    L = (norm / (previous + NORM_EPS)).div_(gamma).clamp_(min=1.0).masked_fill_(is_absent, 1.0)
    may_store = is_finite if finite is None else is_finite & (finite.view(-1, 1, 1) != 0)
    stored.copy_(torch.where(may_store, norm / L, previous))
    return L.masked_fill_(~is_finite, math.inf)
