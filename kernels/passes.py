"""Passes over memory in plain torch: momentum, sums of squares and of powers, the write, stacking.

Wherever a stack (K, m, n) is taken, a list of K matrices (m, n) of equal strides is too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sums import column_squares, total

Stack = Tensor | Sequence[Tensor]
"""(K, m, n), or a list of K matrices (m, n) of equal shape, strides and dtype."""
KINDS = ("ema", "sum")
SIDES = (None, "rows", "cols", "all")


def blend_(
    M: Stack, G: Stack, momentum: float, *, nesterov: bool = False, kind: str = "ema",
    squares: str | None = None, ok: Tensor | None = None,
) -> tuple[Stack, Tensor | None]:  # fmt: skip
    """Takes a gradient into a momentum buffer, in place, and gives the step U that is made of both.

    "ema": M <- M + (1 - momentum) (G - M) and U = G + momentum (M - G) if nesterov, else M.
    "sum": M <- momentum M + G and U = G + momentum M if nesterov, else M.

    Args:
        M: The buffer, changed in place. One that is narrower than G is worked on in G's precision,
            and rounded only when it is stored.
        G: The gradient, not changed. One that is narrower than M is widened.
        momentum: Decay of M.
        nesterov: Whether U looks ahead by one gradient.
        kind: ``"ema"`` or ``"sum"``.
        squares: Which sums of squares of U are wanted: None, of its ``"rows"`` (K, m, 1), of its
            ``"cols"`` (K, 1, n), or of ``"all"`` entries (K, 1, 1).
        ok: None, or flags (K,), or (1,) for all: where one is 0, M of that matrix stays as it is.

    Returns:
        U: M itself if there is no nesterov and M is as wide as U; else a new (K, m, n) in the wider
            dtype of the two. Where ok is 0 it means nothing.
        sums: At least float32; None if not wanted.

    Raises:
        ValueError: ``kind`` or ``squares`` is unknown.
    """
    check_names(kind, squares)
    X, g = stacked(M), stacked(G)
    work = torch.promote_types(X.dtype, g.dtype)
    old = X.clone() if ok is not None else None
    moved, g = X.to(work), g.to(work)
    if kind == "ema":
        moved.lerp_(g, 1 - momentum)
        U = g.lerp(moved, momentum) if nesterov else moved
    else:
        moved = (moved if momentum == 1.0 else moved.mul_(momentum)).add_(g)
        U = g.add(moved, alpha=momentum) if nesterov else moved
    sums = None if squares is None else _sides(U, squares)
    if moved is not M or ok is not None:
        _put_back(M, moved, old, ok)
    return M if U is X else U, sums


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
    return _sides(stacked(X), side_of(dim))


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
    found = [_powers(x, count) for x in stacked(X)]
    if not found:
        return torch.empty(0, 1, 1).double(), torch.empty(0, count).double()
    norm = torch.stack([x[0] for x in found]).view(-1, 1, 1)
    return norm, torch.stack([torch.stack(x[1:]) for x in found])


def blend_power_sums_(
    M: Stack, G: Stack, momentum: float, count: int, *, nesterov: bool = False, kind: str = "ema",
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``blend_``, and ``power_sums`` of the step U, which is not kept.

    Args:
        M: As for :func:`blend_`.
        G: As for :func:`blend_`.
        momentum: As for :func:`blend_`.
        count: As for :func:`power_sums`.
        nesterov: As for :func:`blend_`.
        kind: As for :func:`blend_`.
        ok: As for :func:`blend_`.

    Returns:
        What :func:`power_sums` returns for U.
    """
    U, _ = blend_(M, G, momentum, nesterov=nesterov, kind=kind, ok=ok)
    return power_sums(U, count)


def scaled_add_(
    W: Stack, X: Stack, by: Tensor | None, keep: float, alpha: float,
    control: Tensor | None = None, *, Y: Stack | None = None, by_Y: Tensor | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (by X + by_Y Y), in place, rounded once.

    Args:
        W: (K, m, n), any strides.
        X: (K, m, n), any strides and floating dtype.
        by: None (1), or what broadcasts: (K, m, n), (K, m, 1), (K, 1, n), (K, 1, 1), and 1 for K.
        keep: Multiplies W.
        alpha: Multiplies all that is added.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. A matrix whose flag is 0 stays as it is.
        Y: None, or a second (K, m, n).
        by_Y: As ``by``, for Y.
    """
    w = stacked(W)
    work = torch.promote_types(w.dtype, torch.float32)
    terms = [(stacked(Z).to(work), c) for Z, c in ((X, by), (Y, by_Y)) if Z is not None]
    if control is None:
        new = w.to(work)
        if keep != 1.0:
            new.mul_(keep)
        for Z, c in terms:
            new.add_(Z, alpha=alpha) if c is None else new.addcmul_(Z, c.to(work), value=alpha)
        if new is not W:
            _put_back(W, new, None, None)
        return
    flags, keeps, alphas = control.to(work).view(len(w), 3, 1, 1).unbind(1)
    new = w.to(work) * keeps
    for Z, c in terms:
        new.addcmul_(Z, alphas if c is None else c.to(work) * alphas)
    _put_back(W, new, w, flags)


def cast_stack(Xs: Stack, dtype: torch.dtype, finite: bool = False) -> tuple[Tensor, Tensor | None]:
    """One stack of a list of matrices, in another precision and with their memory order.

    Args:
        Xs: K matrices (m, n), or a stack (K, m, n).
        dtype: Of the result.
        finite: Whether flags are wanted.

    Returns:
        stack: A new (K, m, n); a turned one if the matrices are.
        flags: (K,) float32, 1 where all entries are finite, else 0; None if not wanted.
    """
    X = stacked(Xs)
    out = X.to(dtype, copy=X is Xs)
    if not finite:
        return out, None
    return out, X.isfinite().all(-1).all(-1).to(torch.float32)


def check_names(kind: str, sides: str | None) -> None:
    """Raise ValueError unless ``blend_`` knows both names."""
    if kind not in KINDS:
        raise ValueError(f"kind must be 'ema' or 'sum', got {kind!r}")
    if sides not in SIDES:
        raise ValueError(f"squares must be None, 'rows', 'cols' or 'all', got {sides!r}")


def side_of(dim: int | None) -> str:
    """The name that ``blend_`` has for the sums of squares along a dimension."""
    if dim not in (-1, -2, None):
        raise ValueError(f"dim must be -1, -2 or None, got {dim!r}")
    return "all" if dim is None else "rows" if dim == -1 else "cols"


def stacked(X: Stack) -> Tensor:
    """(K, m, n) itself, or a new one of a list, laid out as its matrices are."""
    if isinstance(X, Tensor):
        return X
    if X and X[0].stride(-1) != 1 and X[0].stride(-2) == 1:
        return torch.stack([x.mT for x in X]).mT
    return torch.stack(list(X))


def _sides(X: Tensor, which: str) -> Tensor:
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if X.numel() == 0:
        return X.sum({"rows": -1, "cols": -2}.get(which, (-2, -1)), keepdim=True)
    if which == "rows":
        return column_squares(X.mT).mT
    return column_squares(X) if which == "cols" else total(column_squares(X))


def _powers(X: Tensor, count: int) -> list[Tensor]:
    """The norm of X (m, n), and the sums, all float64 and of no dimension."""
    norm: Tensor = torch.linalg.vector_norm(X, dtype=torch.float64)
    q = (X.double() * norm.reciprocal().clamp(max=torch.finfo(torch.float64).max)).square_()
    power, found = q.clone(), [norm]
    for _ in range(count):
        found.append(power.sum())
        power.mul_(q)
    return found


def _put_back(to: Stack, new: Tensor, old: Tensor | None, ok: Tensor | None) -> None:
    """Store a stack where it belongs, but for matrices of flag 0, which are as old says."""
    if ok is not None and old is not None:
        new = torch.where(ok.reshape(-1, 1, 1) != 0, new.to(old.dtype), old)
    for i, place in enumerate([to] if isinstance(to, Tensor) else to):
        place.copy_(new if isinstance(to, Tensor) else new[i])
