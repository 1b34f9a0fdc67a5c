"""The dynamically weighted Halley iteration: the exact polar factor without singular vectors."""

import math

import torch
from torch import Tensor

from ..dispatch import backend_for
from .coefficients import Schedule, Triple
from .factorizations import masked, product_like
from .inverse_sums import inverse_

# Above this weight c the Gram matrix I + c X X^T is too ill conditioned to be factorized.
_CHOLESKY = 100.0


def qdwh(X: Tensor, l: float | None = None) -> Tensor:
    """X <- X (a I + b X^T X) (I + c X^T X)^(-1) with the weights of ``qdwh_schedule``.

    Args:
        X: (m, n) or (K, m, n), m <= n, of Frobenius norm at most one. It may be overwritten.
        l: lower bound of the nonzero singular values; None: ``lower_bound(X)``.
    """
    X, bad = masked(X)
    l = lower_bound(X) if l is None else l
    for a, b, c in qdwh_schedule(l, tolerance=1e-15 if X.dtype == torch.float64 else 1e-7):
        X = (_qr_step if c > _CHOLESKY else _cholesky_step)(X, a, b, c)
    return X.masked_fill_(bad, torch.nan)


def lower_bound(X: Tensor) -> float:
    """A lower bound of the singular values of X that are not rounding, least over a stack.

    Too small a bound costs an iteration or two, too large a one leaves singular values below it
    short of one. With S = X X^T, sigma_min^2 >= 1 / ||S^(-1)||_F, less 2 (m + n) eps for the
    rounding of S and of its Cholesky factor (||X||_F <= 1), less a tenth for that of the inverse.
    Where nothing is left of it, or S cannot be factorized, the bound is eps / sqrt(m), which is at
    most eps sigma_1: what lies below that is rounding of X itself. So the square of the condition
    number must be resolved for the sharp bound, and nothing is assumed where it is not.
    """
    m, n = X.shape[-2:]
    eps = torch.finfo(X.dtype).eps
    inverse, factorized = inverse_(backend_for(X, "symmetric").gram(X))
    square = 0.9 / torch.linalg.matrix_norm(inverse) - 2 * (m + n) * eps
    # a norm that is not a number fails the comparison, and leaves the floor
    square = torch.where(factorized & (square > eps * eps / m), square, eps * eps / m)
    return min(1.0, math.sqrt(float(square.min())))


def qdwh_schedule(l: float, tolerance: float = 1e-15) -> Schedule:
    """Weights (a, b, c) of the steps x -> x (a + b x^2) / (1 + c x^2), until l has become one.

    Each is the best such function on the interval [l, 1] that the previous ones left: it keeps one
    fixed, stays below one, and raises l as far as it can.

    Args:
        l: lower end of the singular values, 1e-40 <= l <= 1.
        tolerance: of the final l, at least 1e-16.

    Returns:
        A tuple of triples: 4, 5 and 6 of them for l = 1e-2, 1e-8, 1e-14.

    Raises:
        ValueError: if l is out of range.

    Source: Nakatsukasa, Bai and Gygi, Optimizing Halley's iteration for computing the matrix polar
    decomposition, SIAM J. Matrix Anal. Appl. 31(5), 2010.
    """
    if not 1e-40 <= l <= 1:
        raise ValueError(f"l={l} must lie in [1e-40, 1]: pass 1e-16 if nothing is known")
    schedule: list[Triple] = []
    while not schedule or 1 - l > tolerance:
        d = (4 * (1 - l * l) / l**4) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - l * l) / (l * l * root))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        schedule.append((a, b, c))
        l = min(1.0, l * (a + b * l * l) / (1 + c * l * l))
    return tuple(schedule)


def _qr_step(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """(b / c) X + (a - b / c) / sqrt(c) Q_2 Q_1^T, where [sqrt(c) X^T; I] = [Q_1; Q_2] R.

    The stack [Q_1; Q_2] is held as m rows of n + m entries, which LAPACK reads as columns.
    """
    m, n = X.shape[-2:]
    rows = torch.zeros(*X.shape[:-1], n + m, dtype=X.dtype, device=X.device)
    torch.mul(X, math.sqrt(c), out=rows[..., :n])
    rows[..., n:].diagonal(dim1=-2, dim2=-1).fill_(1)
    columns = rows.mT
    tau = torch.empty(*X.shape[:-2], m, dtype=X.dtype, device=X.device)
    torch.geqrf(columns, out=(columns, tau))
    torch.linalg.householder_product(columns, tau, out=columns)
    factors = columns[..., n:, :], columns[..., :n, :].mT  # Q_2 (m, m), Q_1^T (m, n)
    add = X.addmm_ if X.ndim == 2 else X.baddbmm_
    return add(*factors, beta=b / c, alpha=(a - b / c) / math.sqrt(c))


def _cholesky_step(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """((b / c) I + (a - b / c) (I + c X X^T)^(-1)) X."""
    T: Tensor = backend_for(X, "symmetric").gram(X)
    T.mul_(c).diagonal(dim1=-2, dim2=-1).add_(1)
    T, _ = inverse_(T)  # its eigenvalues lie in [1, 1 + c], so it cannot fail
    T.mul_(a - b / c).diagonal(dim1=-2, dim2=-1).add_(b / c)
    return product_like(T, X)
