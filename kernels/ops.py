"""The operations of the optimizers. Each one runs on the back end that suits its tensors.

A wrapper asks ``dispatch.backend_for`` once, and calls the function of its name in ``reference/``
(plain torch) or ``triton/`` (kernels). Callers never choose a back end; :func:`fuses_passes` tells
those that would work in panels on plain torch.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import reference
from .dispatch import backend_for
from .reference._stacks import Stack
from .reference.rounding import Rounding


def fuses_passes(X: Stack) -> bool:
    """Whether passes over X run as fused kernels.

    On plain torch callers with more than one pass to make work in panels that stay in the cache.

    Args:
        X: (m, n) or (K, m, n), or a list of equal matrices, of which the first decides.
    """
    return backend_for(X, "pass") is not reference


# reductions and casts -----------------------------------------------------------------------------


def squares(X: Stack, dim: int | None) -> Tensor:
    """Sums of squares, in an order that does not depend on how many matrices there are.

    Args:
        X: (K, m, n), any strides and floating dtype.
        dim: -1 for those of the rows, -2 for those of the columns, None for all entries.

    Returns:
        (K, m, 1), (K, 1, n) or (K, 1, 1), at least float32.

    Raises:
        ValueError: ``dim`` is none of the three.
    """
    Y: Tensor = backend_for(X, "pass").squares(X, dim)
    return Y


def power_sums(X: Stack, count: int) -> tuple[Tensor, Tensor]:
    """The norm of X and the sums of even powers of X / norm, which cannot overflow or vanish.

    Args:
        X: (K, m, n), any strides and floating dtype.
        count: How many powers, at least 1.

    Returns:
        norm: (K, 1, 1) float64.
        sums: (K, count) float64, the sum of (x / norm)^(2 j) for j = 1, ..., count: the first is 1,
            or 0 for zeros.
    """
    found: tuple[Tensor, Tensor] = backend_for(X, "pass").power_sums(X, count)
    return found


@overload
def cast_stack(
    Xs: Stack, dtype: torch.dtype, with_flags: Literal[False] = False
) -> tuple[Tensor, None]: ...
@overload
def cast_stack(
    Xs: Stack, dtype: torch.dtype, with_flags: Literal[True]
) -> tuple[Tensor, Tensor]: ...
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
    found: tuple[Tensor, Tensor | None] = backend_for(Xs, "pass").cast_stack(Xs, dtype, with_flags)
    return found


# moments ------------------------------------------------------------------------------------------


@overload
def momentum_step_(
    M: Tensor,
    G: Stack,
    momentum: float,
    *,
    nesterov: bool = False,
    kind: str = "ema",
    squares: None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, None]: ...
@overload
def momentum_step_(
    M: Tensor,
    G: Stack,
    momentum: float,
    *,
    nesterov: bool = False,
    kind: str = "ema",
    squares: str,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def momentum_step_(
    M: Tensor,
    G: Stack,
    momentum: float,
    *,
    nesterov: bool = False,
    kind: str = "ema",
    squares: str | None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]: ...
@overload
def momentum_step_(
    M: Stack,
    G: Stack,
    momentum: float,
    *,
    nesterov: bool = False,
    kind: str = "ema",
    squares: str | None = None,
    finite: Tensor | None = None,
) -> tuple[Stack, Tensor | None]: ...
def momentum_step_(
    M: Stack, G: Stack, momentum: float, *, nesterov: bool = False, kind: str = "ema",
    squares: str | None = None, finite: Tensor | None = None,
) -> tuple[Stack, Tensor | None]:  # fmt: skip
    """Update a momentum buffer by a gradient, in place, and return the step U made of both.

    "ema": M <- M + (1 - momentum) (G - M) and U = G + momentum (M - G) if nesterov, else M.
    "sum": M <- momentum M + G and U = G + momentum M if nesterov, else M.

    Args:
        M: The buffer (K, m, n), or a list of K matrices, changed in place. A buffer narrower than G
            is updated in G's precision and rounded only when it is stored.
        G: The gradient, as M, not changed. A gradient narrower than M is widened.
        momentum: Decay of M.
        nesterov: Whether U looks ahead by one gradient (False).
        kind: ``"ema"`` (default) or ``"sum"``.
        squares: Which sums of squares of U are wanted: None (default), of its ``"rows"`` (K, m, 1),
            of its ``"cols"`` (K, 1, n), or of ``"all"`` entries (K, 1, 1).
        finite: None (default), or flags (K,), or (1,) for all matrices. Where a flag is 0, M of
            that matrix does not change.

    Returns:
        U: M itself if nesterov is False and no dtype is wider than M's; else a new (K, m, n) in the
            wider dtype of the two. Undefined where the flag is 0.
        sums: At least float32; None if not wanted.

    Raises:
        ValueError: ``kind`` or ``squares`` is unknown.
    """
    found: tuple[Stack, Tensor | None] = backend_for(G, "pass").momentum_step_(
        M,
        G,
        momentum,
        nesterov=nesterov,
        kind=kind,
        squares=squares,
        finite=finite,
    )
    return found


def momentum_power_sums_(
    M: Stack, G: Stack, momentum: float, count: int, *, nesterov: bool = False, kind: str = "ema",
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`momentum_step_`, and :func:`power_sums` of the step U, which is not returned.

    Args:
        M: As for :func:`momentum_step_`.
        G: As for :func:`momentum_step_`.
        momentum: As for :func:`momentum_step_`.
        count: As for :func:`power_sums`.
        nesterov: As for :func:`momentum_step_` (False).
        kind: As for :func:`momentum_step_` ("ema").
        finite: As for :func:`momentum_step_` (None).

    Returns:
        What :func:`power_sums` returns for U.
    """
    found: tuple[Tensor, Tensor] = backend_for(G, "pass").momentum_power_sums_(
        M,
        G,
        momentum,
        count,
        nesterov=nesterov,
        kind=kind,
        finite=finite,
    )
    return found


def adam(
    R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, *, beta1: float, beta2: float, eps: float,
    finite: Tensor | None = None, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Update both moments and return the normalized direction, as ``torch.optim.Adam`` does.

    N = Mhat / (sqrt(Vhat) + eps) with M, V the running averages of R and R*R, and the hats their
    bias-corrected values. Source: Adam, arXiv 1412.6980, Algorithm 1.

    Args:
        R: (K, m, n), any strides; not changed unless ``overwrite`` is True.
        M: (K, m, n) first moment, changed in place. A narrower dtype than R's is worked on in R's
            and rounded when it is stored.
        V: (K, m, n) second moment, likewise.
        t: number of this update, from 1; or a tensor of such numbers that broadcasts against R,
            where entries have clocks of their own: (K, m, 1), (K, 1, n) or (K, m, n), or where the
            host does not know the number: (1, 1, 1).
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        finite: None (default), or flags (K,), or (1,) for all matrices. Where a flag is 0, M and V
            of that matrix do not change.
        overwrite: whether R is not needed any more (False), so that N may take its place.

    Returns:
        N: (K, m, n) in R's dtype, a new tensor unless ``overwrite`` is True. Undefined where the
        flag is 0.
    """
    Y: Tensor = backend_for(R, "pass").adam(
        R,
        M,
        V,
        t,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        finite=finite,
        overwrite=overwrite,
    )
    return Y


# subspaces and chosen cosines ---------------------------------------------------------------------


@overload
def project(
    P: Tensor, G: Tensor, squares: Literal[False] = False, like: Tensor | None = None
) -> tuple[Tensor, None]: ...
@overload
def project(
    P: Tensor, G: Tensor, squares: Literal[True], like: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...
def project(
    P: Tensor, G: Tensor, squares: bool = False, like: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The coordinates R = P^T G.

    Args:
        P: (K, m, r), or (1, m, r) for all matrices.
        G: (K, m, n), any strides. The narrower of the two is widened.
        squares: whether the columns' sums of squares are wanted too (False).
        like: None (default), or (K, r, n), beside which R will be used: on the CPU R lies in memory
            as it does, row by row or column by column.

    Returns:
        R: (K, r, n), at least float32.
        G2: (K, 1, n), the sums of squares of G's columns, at least float32; None if not wanted.
    """
    found: tuple[Tensor, Tensor | None] = backend_for(G).project(P, G, squares, like)
    return found


def dct_take(S: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen cosines S[:, I] (dim -1) or S[I] (dim -2).

    Args:
        S: (K, m, n), any strides.
        index: (K, r) int32, or (1, r) for all matrices.
        dim: -1 or -2.

    Returns:
        (K, m, r) or (K, r, n), a new tensor.
    """
    Y: Tensor = backend_for(S, "pass").dct_take(S, index, dim)
    return Y


def dct_project(G: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen coefficients only: G D[:, I] (dim -1) or D[:, I]^T G (dim -2), D = C^T.

    Args:
        G: (K, m, n), any strides.
        index: (K, r) int32, or (1, r) for all matrices.
        dim: -1 or -2.

    Returns:
        (K, m, r) or (K, r, n), at least float32.
    """
    Y: Tensor = backend_for(G, "pass").dct_project(G, index, dim)
    return Y


# rows and columns ---------------------------------------------------------------------------------


def row_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every row of X divided by its norm; zero rows stay zero.

    Permuted rows give permuted results, bit for bit unless centred. Squares are summed in float32
    (float64 for float64): a row with entries above 1e19 becomes zero, and one of norm below 1e-19
    counts as zero beside eps.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: What keeps small rows small, see mode (1e-8).
        mode: How rows of norm s are divided: ``"inverse_eps"`` (default) by s + eps;
            ``"inverse"`` or ``"unit"`` by max(s, eps); ``"relative"`` by s + 0.01 times the root
            mean square of all s of the matrix, without eps.
        centred: Whether the mean of the rows is subtracted before and after (False).

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    Y: Tensor = backend_for(X, "pass").row_norm(X, eps, mode, centred)
    return Y


def column_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every column of X divided by its norm: :func:`row_norm` of the transpose.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`.
        centred: Whether the mean of the columns is subtracted before and after (False).

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    Y: Tensor = backend_for(X, "pass").column_norm(X, eps, mode, centred)
    return Y


def sinkhorn(X: Tensor, iterations: int = 5) -> Tensor:
    """Alternately scales each row to norm sqrt(n) and each column to norm sqrt(m).

    Columns come last, so they are exact and the root mean square of the result is 1. A row or
    column below 1e-8 of the root mean square is not scaled up to full length. Scaling by both norms
    of the same X at once does not converge: it swaps diag(4, 1, 1/4) with its inverse for ever.
    Source: Gradient Multi-Normalization, arXiv 2502.06742.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.
        iterations: how many times, at least 1 (5).

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    Y: Tensor = backend_for(X, "pass").sinkhorn(X, iterations)
    return Y


def equal_rows(X: Tensor) -> Tensor:
    """Scales each row of every matrix to norm sqrt(n); see :func:`sinkhorn`.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    Y: Tensor = backend_for(X, "pass").equal_rows(X)
    return Y


# writes: these round into the weight --------------------------------------------------------------


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
    backend_for(W, "pass").scaled_add_(
        W, X, by, keep, alpha, control, Y=Y, by_Y=by_Y, rounding=rounding
    )


def lift_(
    W: Tensor, P: Tensor, N: Tensor, keep: float, alpha: float, *, X: Tensor | None = None,
    by: Tensor | None = None, R: Tensor | None = None, free: float = 0.0,
    floor: Tensor | None = None, control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N + rest), in place, rounded once.

    The rest is by * X. If R is given, it is free * sign(X - P R) instead: the sign of the part of X
    outside of the span of P.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        N: (K, r, n).
        keep: multiplies W.
        alpha: multiplies all that is added.
        X: None (default, no rest), or (K, m, n), any strides.
        by: None (default, 1), or what multiplies X: (K, m, 1), (K, 1, n) or (K, 1, 1), where K
            may be 1.
        R: None (default), or (K, r, n): the rest is then the sign of X - P R.
        free: multiplies the sign (0.0).
        floor: None (default, 0), or (K, 1, 1): entries of X - P R up to this magnitude have the
            sign 0.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W does not change.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    backend_for(W, "pass").lift_(
        W,
        P,
        N,
        keep,
        alpha,
        X=X,
        by=by,
        R=R,
        free=free,
        floor=floor,
        control=control,
        rounding=rounding,
    )


def adam_lift_(
    W: Tensor, P: Tensor, R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, keep: float,
    alpha: float, *, beta1: float, beta2: float, eps: float, X: Tensor | None = None,
    free: float = 0.0, floor: Tensor | None = None, control: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N [+ free * sign(X - P R)]) with N = adam(R), in place.

    :func:`adam` and :func:`lift_` in one operation, which need not store N.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        R: (K, r, n), what ``project`` gave.
        M: (K, r, n) first moment, changed in place.
        V: (K, r, n) second moment, changed in place.
        t: number of this update, or clocks that broadcast against R, as for :func:`adam`.
        keep: multiplies W.
        alpha: multiplies all that is added.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        X: None (default), or (K, m, n), of which the sign of the part outside of the subspace is
            added.
        free: multiplies the sign (0.0).
        floor: None (default, 0), or (K, 1, 1), as for :func:`lift_`.
        control: None (default), or (K, 3), as for :func:`lift_`. Where the flag is 0, M and V do
            not change either.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    backend_for(W, "pass").adam_lift_(
        W,
        P,
        R,
        M,
        V,
        t,
        keep,
        alpha,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        X=X,
        free=free,
        floor=floor,
        control=control,
        rounding=rounding,
    )


def split_step_(
    W: Tensor, G: Tensor, index: Tensor, dim: int | None, M: Tensor, V: Tensor,
    t: float | Tensor, keep: float, alpha: float, *, beta1: float, beta2: float, eps: float,
    free: str = "sign_sgd", free_scale: float = 1.0, floor: Tensor | None = None,
    control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha U, in place: U is Adam's direction where chosen, else one without state.

    Args:
        W: (K, m, n), any strides.
        G: (K, m, n), any strides.
        index: (K, c) int32, different numbers of columns, rows, or entries row by row.
        dim: -1 for columns, -2 for rows, None for entries.
        M: first moments, (K, m, c), (K, c, n) or (K, 1, c) for the three values of dim, changed in
            place.
        V: second moments, shaped as M and changed in place.
        t: number of this update, or (K, c): a clock for each chosen column, row or entry.
        keep: multiplies W.
        alpha: multiplies U.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        free: direction of the others, which need no state: ``"sign_sgd"`` (default, the sign of
            G), ``"sgd"`` (G itself) or ``"no"``.
        free_scale: multiplies that direction (1.0).
        floor: None (default, 0), or (K, 1, 1): entries of G up to this magnitude have the sign 0.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W, M and V of that
            matrix do not change.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    backend_for(W, "pass").split_step_(
        W,
        G,
        index,
        dim,
        M,
        V,
        t,
        keep,
        alpha,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        free=free,
        free_scale=free_scale,
        floor=floor,
        control=control,
        rounding=rounding,
    )


def row_step_(
    W: Tensor, M: Tensor, G: Tensor, momentum: float, eps: float, mode: str, keep: float,
    alpha: float, control: Tensor | None = None, nesterov: bool = False, *,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """A whole step of RowNorm, in place: momentum, row norms and the write.

    M <- M + (1 - momentum) (G - M); U = G + momentum (M - G) if nesterov, else M;
    W_i <- keep W_i + alpha U_i / |U_i|, where mode and eps define |U_i|.

    Args:
        W: (K, m, n), any strides.
        M: (K, m, n), the buffer. A buffer narrower than G is rounded only when it is stored.
        G: (K, m, n), not changed. A gradient narrower than M is widened.
        momentum: Decay of M.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`, but not ``"relative"``, which needs all rows first.
        keep: Multiplies W.
        alpha: Multiplies the rows of length 1.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W and M of that matrix
            do not change.
        nesterov: Whether U looks ahead by one gradient (False).
        rounding: How a weight of low precision is rounded; None (default): to nearest.

    Raises:
        ValueError: ``mode`` is unknown or ``"relative"``.
    """
    backend_for(W, "pass").row_step_(
        W, M, G, momentum, eps, mode, keep, alpha, control, nesterov, rounding=rounding
    )
