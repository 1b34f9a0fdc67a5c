"""The heavy steps in plain torch: the CPU path, and what any other back end is tested against.

All take one matrix (m, n) or a stack (K, m, n), in any floating dtype, and allocate their result.
"""

import torch
from torch import Tensor

from .adam import adam
from .cosines import dct_project as dct_project
from .cosines import dct_reorder as dct_reorder
from .cosines import dct_restore as dct_restore
from .cosines import dct_take as dct_take
from .cosines import dct_twiddle as dct_twiddle
from .cosines import dct_untwiddle as dct_untwiddle
from .normalising import normalised as normalised
from .normalising import padded as padded
from .passes import blend_ as blend_
from .passes import blend_power_sums_ as blend_power_sums_
from .passes import cast_stack as cast_stack
from .passes import power_sums as power_sums
from .passes import scaled_add_ as scaled_add_
from .passes import squares as squares
from .products import add_product_, product
from .rows import column_norm as column_norm
from .rows import row_norm as row_norm
from .rows import row_step_ as row_step_
from .scaling import equal_rows as equal_rows
from .scaling import sinkhorn as sinkhorn
from .sums import column_squares

# Rows per panel of a symmetric product on the CPU. Below twice this size one product is faster.
PANEL = 128


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
    m = X.shape[0]
    S = X.new_empty(m, m)
    for i in range(0, m, PANEL):
        j = min(i + PANEL, m)
        torch.mm(X[i:j], X[:j].mT, out=S[i:j, :j])
        S[:i, i:j] = S[i:j, :i].mT
    return S


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
    S = S if trace is None else (S / _each(trace, S)).to(S.dtype)
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
    for i in range(0, m, PANEL):
        j = min(i + PANEL, m)
        torch.addmm(S[i:j, :j], A[i:j], B[:, :j], beta=beta, alpha=alpha, out=P[i:j, :j])
        P[:i, i:j] = P[i:j, :i].mT
    return P


def scale_and_apply(
    X: Tensor, P: Tensor, a: float, alpha: float = 1.0, trace: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum a X + alpha P X, or that over the root of trace.

    Args:
        X: (m, n) or (K, m, n).
        P: (m, m) or (K, m, m).
        a: factor of X.
        alpha: factor of P X.
        trace: None, or that of each X X^T, (K,) float32.
        only: None, or flags as for ``gram``.

    Returns:
        A new tensor of X's shape and dtype.
    """
    add = torch.baddbmm if X.ndim == 3 else torch.addmm
    Y = add(X, P, X, beta=a, alpha=alpha)
    return Y if trace is None else (Y / _each(trace, X).sqrt()).to(X.dtype)


def _each(numbers: Tensor, X: Tensor) -> Tensor:
    """One number for each matrix of X, so that it broadcasts against X."""
    return numbers.view(-1, 1, 1) if X.ndim == 3 else numbers.view(())


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


# inside a subspace --------------------------------------------------------------------------------


def project(P: Tensor, G: Tensor, squares: bool = False) -> tuple[Tensor, Tensor | None]:
    """The coordinates R = P^T G.

    Args:
        P: (K, m, r), or (1, m, r) for all matrices.
        G: (K, m, n), any strides. The narrower of the two is widened.
        squares: whether the columns' sums of squares are wanted too.

    Returns:
        R: (K, r, n), at least float32.
        G2: (K, 1, n), the sums of squares of G's columns, at least float32; None if not wanted.
    """
    wide = torch.promote_types(torch.promote_types(P.dtype, G.dtype), torch.float32)
    P = P if len(P) == len(G) else P.expand(len(G), -1, -1)
    G2 = column_squares(G.to(torch.promote_types(G.dtype, torch.float32))) if squares else None
    return product(P.mT.to(wide), G.to(wide)), G2


def lift_(
    W: Tensor, P: Tensor, N: Tensor, keep: float, alpha: float, *, X: Tensor | None = None,
    by: Tensor | None = None, R: Tensor | None = None, free: float = 0.0,
    floor: Tensor | None = None, control: Tensor | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N + rest), in place, rounded once.

    The rest is by * X; with R it is free * sign(X - P R), the sign of what P cannot reach of X.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        N: (K, r, n).
        keep: multiplies W.
        alpha: multiplies all that is added.
        X: None (no rest), or (K, m, n), any strides.
        by: None (1), or what multiplies X: (K, m, 1), (K, 1, n), (K, 1, 1), and 1 for K.
        R: None, or (K, r, n) for the sign.
        free: multiplies the sign.
        floor: None (0), or (K, 1, 1): entries of X - P R up to it in magnitude have the sign 0.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. A matrix whose flag is 0 stays as it is.
    """
    wide = torch.promote_types(torch.promote_types(W.dtype, N.dtype), torch.float32)
    P, N = P.expand(len(W), -1, -1).to(wide), N.to(wide)
    if control is None and W.dtype == wide:
        add_product_(W, P, N, beta=keep, alpha=alpha)
        _add_rest_(W, P, alpha, X, by, R, free, floor)
        return
    if control is None:
        new = W.to(wide)
        add_product_(new, P, N, beta=keep, alpha=alpha)
        _add_rest_(new, P, alpha, X, by, R, free, floor)
        W.copy_(new)
        return
    good, keeps, alphas = control.to(wide).view(len(W), 3, 1, 1).unbind(1)
    new = product(P, N)
    _add_rest_(new, P, 1.0, X, by, R, free, floor)
    new.mul_(alphas).add_(W.to(wide) * keeps)
    W.copy_(torch.where(good != 0, new.to(W.dtype), W))


def _add_rest_(
    out: Tensor, P: Tensor, alpha: float, X: Tensor | None, by: Tensor | None, R: Tensor | None,
    free: float, floor: Tensor | None,
) -> None:  # fmt: skip
    """Add alpha times what stands beside P N to out."""
    if X is None:
        return
    X = X.to(out.dtype)
    if R is None:
        out.add_(X, alpha=alpha) if by is None else out.addcmul_(X, by.to(out.dtype), value=alpha)
        return
    rest = X - product(P, R.to(out.dtype))
    sign = rest.sign()
    if floor is not None:
        sign.mul_(rest.abs_() > floor)
    out.add_(sign, alpha=alpha * free)


def adam_lift_(
    W: Tensor, P: Tensor, R: Tensor, M: Tensor, V: Tensor, t: int | Tensor, keep: float,
    alpha: float, *, beta1: float, beta2: float, eps: float, X: Tensor | None = None,
    free: float = 0.0, floor: Tensor | None = None, control: Tensor | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N [+ free * sign(X - P R)]) with N = adam(R), in place.

    :func:`adam` and :func:`lift_` in one, so that N need not be stored.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        R: (K, r, n), what ``project`` gave.
        M: (K, r, n) first moment, changed in place.
        V: (K, r, n) second moment, changed in place.
        t: number of this update, or clocks that broadcast against R, as for ``adam``.
        keep: multiplies W.
        alpha: multiplies all that is added.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        X: None, or (K, m, n), whose sign outside of the subspace is added.
        free: multiplies the sign.
        floor: None (0), or (K, 1, 1), as for ``lift_``.
        control: None, or (K, 3), as for ``lift_``; where a flag is 0, M and V stay too.
    """
    ok = None if control is None else control[:, 0]
    N = adam(R, M, V, t, beta1=beta1, beta2=beta2, eps=eps, ok=ok)
    if X is None or free == 0.0:
        lift_(W, P, N, keep, alpha, control=control)
    else:
        lift_(W, P, N, keep, alpha, X=X, R=R, free=free, floor=floor, control=control)


# some columns, rows or entries --------------------------------------------------------------------


def split_step_(
    W: Tensor, G: Tensor, index: Tensor, dim: int | None, M: Tensor, V: Tensor,
    t: float | Tensor, keep: float, alpha: float, *, beta1: float, beta2: float, eps: float,
    free: str = "sign_sgd", free_scale: float = 1.0, floor: Tensor | None = None,
    control: Tensor | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha U, in place: U is Adam's direction where chosen, else a free one of G.

    Args:
        W: (K, m, n), any strides.
        G: (K, m, n), any strides.
        index: (K, c) int32, different numbers of columns, rows, or entries row by row.
        dim: -1 for columns, -2 for rows, None for entries.
        M: first moments, (K, m, c), (K, c, n) or (K, 1, c), changed in place.
        V: second moments, likewise.
        t: number of this update, or clocks of their own (K, c).
        keep: multiplies W.
        alpha: multiplies U.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        free: direction of the others: ``"sign_sgd"``, ``"sgd"`` (G itself) or ``"no"``.
        free_scale: multiplies it.
        floor: None (0), or (K, 1, 1): entries of G up to it in magnitude have the sign 0.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. Where the flag is 0, W, M and V of that matrix stay as they are.
    """
    wide = torch.promote_types(torch.promote_types(W.dtype, G.dtype), torch.float32)
    X = G.to(wide)
    if free == "sign_sgd":
        U = X.sign()
        U = U if floor is None else U.mul_(X.abs() > floor)
    else:
        U = X if free == "sgd" else torch.zeros_like(X)
    U = (U * free_scale).contiguous()
    along, out = (-1, U.view(len(U), 1, -1)) if dim is None else (dim, U)
    X = X.reshape(out.shape)
    place = index.long().unsqueeze(-1 if along == -2 else -2).expand(M.shape)
    clock = t.unsqueeze(-1 if along == -2 else -2) if isinstance(t, Tensor) else t
    ok = None if control is None else control[:, 0]
    N = adam(X.gather(along, place), M, V, clock, beta1=beta1, beta2=beta2, eps=eps, ok=ok)
    out.scatter_(along, place, N)
    if control is None:
        W.copy_(torch.add(W.to(wide) * keep, U, alpha=alpha))
        return
    good, keeps, alphas = control.to(wide).view(len(W), 3, 1, 1).unbind(1)
    new = (W.to(wide) * keeps).addcmul_(U, alphas)
    W.copy_(torch.where(good != 0, new.to(W.dtype), W))
