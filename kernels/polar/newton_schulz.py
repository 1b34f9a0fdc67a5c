"""Polar factors by matrix polynomials, and the norms that such an iteration may start from.

:func:`newton_schulz` is the method as Muon states it, to be read beside the paper. What runs is
:func:`polynomial`: the same iteration with any schedule and norm, on either back end. X is (m, n)
or (K, m, n) with m <= n, of Frobenius norm at most one, and may be overwritten.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..dispatch import backend_for
from ..random import splitmix
from .coefficients import NS5, Schedule

# Columns of the power iteration's start, and the squared length below which the part of such a
# Gaussian block along a given direction falls once in four million draws (chi^2 of 8 degrees).
_COLUMNS = 8
_LEAST = 0.1


def newton_schulz(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The Newton-Schulz iteration of Muon in its plainest form: nearly U V^T of G = U diag(s) V^T.

    ``polar_factor(G, "ns5")`` gives the same to rounding, and takes stacks and kernels.

    Args:
        G: (m, n), any floating dtype; not changed.
        steps: how many times the quintic is applied (5).
        eps: least norm to divide by (1e-7).

    Returns:
        (m, n), a new tensor whose singular values lie near 1.

    Source: Jordan et al., Muon, 2024.
    """
    a, b, c = NS5[0]
    transposed = G.shape[0] > G.shape[1]
    X = G.mT if transposed else G  # (m, n) with m <= n, so that X X^T is the smaller Gram matrix
    norm: Tensor = torch.linalg.matrix_norm(X)  # ||X||_F >= ||X||_2
    X = X / norm.clamp(min=eps)  # the singular values are at most 1 now
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X  # every singular value x becomes a x + b x^3 + c x^5
    return X.mT if transposed else X


def polynomial(
    X: Tensor,
    schedule: Schedule,
    norm: str = "frobenius",
    margin: float = 1.0,
    *,
    exact: bool = False,
    eps: float | None = None,
    only: Tensor | None = None,
) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, once for each (a, b, c).

    ``exact`` keeps to torch's own products. With ``eps`` X is a stack (K, m, n) that has not been
    normalized, of norms below 1e19 (a greater one gives NaN), and is not overwritten. The norms
    come from the first A and are divided out in the first step, max(margin ||X||_F, eps) each. With
    ``only`` (K,) a matrix whose flag is 0 may be left undefined.
    """
    ops = reference if exact else backend_for(X, "symmetric")
    A: Tensor | None = rescale_(X, norm, margin, ops) if eps is None else ops.gram(X)
    trace = None if A is None or eps is None else _square(A, margin, eps)
    for a, b, c in schedule:
        A = ops.gram(X, only=only) if A is None else A
        if c != 0:
            P = ops.symmetric_poly(A, b, c, trace=trace, only=only)  # (m, m)
        else:
            P = A if trace is None else A.div_(trace.view(-1, 1, 1))
        A = None  # before the next product needs room
        X = ops.scale_and_apply(X, P, a, b if c == 0 else 1.0, trace=trace, only=only)
        trace = None
        del P
    return X


def _square(A: Tensor, margin: float, eps: float) -> Tensor:
    """max(margin ||X||_F, eps)^2 from A = X X^T, (K,)."""
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)
    return trace.mul_(margin**2).clamp_(min=eps**2)


def check_norm(norm: object) -> str:
    """``norm`` if it is the name of a norm.

    Raises:
        ValueError: if it is not.
    """
    if norm in ("frobenius", "schatten4", "rowsum", "aol"):
        return str(norm)
    name, _, count = str(norm).partition(":")
    if name == "power" and count.isdecimal() and 1 <= int(count) < 100:
        return str(norm)
    raise ValueError(
        f"norm={norm!r} is unknown: pass frobenius, schatten4, rowsum, aol or power:k with k from "
        "1 to 99"
    )


def rescale_(X: Tensor, norm: str, margin: float, ops: ModuleType) -> Tensor | None:
    """Divide X of Frobenius norm 1 / margin by margin and another norm, and give its X X^T.

    All of them are bounds from above of ||X||_2 that are sharper than the Frobenius norm, so that
    small singular values start higher up. Their Gram matrix is the first one that the iteration
    needs, so they cost passes over m x m entries only.

    * ``schatten4``: ||X X^T||_F^(1/2), between ||X||_2 and ||X||_F.
    * ``rowsum``: ||X X^T||_inf^(1/2), the largest sum of magnitudes in a row of it.
    * ``power:k``: see ``power_bound``.
    * ``aol``: not a norm, but X <- diag(s) X with s_i = (sum_j |A_ij|)^(-1/2). The limit is the
      polar factor of diag(s) X, so left orthogonal equivariance is lost.
    """
    if norm == "frobenius":
        return None
    A: Tensor = ops.gram(X)
    if norm == "aol":
        sums = torch.linalg.vector_norm(A, ord=1, dim=-1, keepdim=True)  # (m, 1)
        s = sums.clamp(min=torch.finfo(X.dtype).tiny).rsqrt() / margin
        X.mul_(s)
        return A.mul_(s).mul_(s.mT)
    m = X.shape[-2]
    # An X of norm 1 / margin lies above either floor, so these act only where eps did.
    if norm == "schatten4":
        size = _norm(A).sqrt().clamp(min=0.5 * m**-0.25)
    elif norm == "rowsum":
        wide = torch.promote_types(A.dtype, torch.float32)
        sums = torch.linalg.vector_norm(A, ord=1, dim=-1, keepdim=True, dtype=wide)
        size = sums.amax(-2, keepdim=True).sqrt().clamp(min=0.5 * m**-0.5)
    else:
        size = power_bound(A, int(norm.partition(":")[2])).clamp(min=0.5 * m**-0.5)
    s = (margin * size).reciprocal().to(X.dtype)
    X.mul_(s)
    return A.mul_(s * s)


def power_bound(A: Tensor, k: int) -> Tensor:
    """A bound of ||A||_2^(1/2) from above, for A = X X^T of trace at most one: (..., 1, 1).

    For a block V of p Gaussian columns ||A^k V||_F >= ||A||_2^k ||u^T V||, u the first eigenvector,
    and ||u^T V||^2 is chi^2 of p degrees of freedom. The bound is (||A^k V||_F / t)^(1 / 2k) with
    p = 8 and t^2 = 0.1: a fixed V fails for one u in four million. This factor of safety is about
    (8 m / 0.1)^(1 / 4k) for equal singular values and (8 / 0.1)^(1 / 4k) for a single large one.
    Plain power iteration bounds from below, and a polynomial with slope 8 diverges beyond one.
    V does not turn with X: equivariance holds up to the scale only.
    """
    V = _gaussian(A.shape[-1], A.device).to(A.dtype)
    V = V.expand(*A.shape[:-1], _COLUMNS)  # else a stack is multiplied as one tall matrix
    log: Tensor | float = -0.5 * math.log(_LEAST)
    for _ in range(k):
        V = A @ V
        length = _norm(V).clamp(min=torch.finfo(torch.float32).tiny)
        log = log + length.log()
        V = V / length.to(V.dtype)
    assert isinstance(log, Tensor)
    return (log / (2 * k)).exp().clamp(max=1.0)


def _gaussian(m: int, device: torch.device) -> Tensor:
    """A fixed block of Gaussian numbers (m, 8), made where it is used: nothing waits for a copy.

    Of a hash of the entry number 20 bits go through the inverse of the normal distribution.
    """
    bits = splitmix(m * _COLUMNS, device=device)
    uniform = ((bits >> 44 & (1 << 20) - 1).float() + 0.5) / 2**20
    return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(m, _COLUMNS)


def _norm(A: Tensor) -> Tensor:
    """||A||_F, (..., 1, 1), summed in float32 at least."""
    wide = torch.promote_types(A.dtype, torch.float32)
    norm: Tensor = torch.linalg.matrix_norm(A, keepdim=True, dtype=wide)
    return norm
