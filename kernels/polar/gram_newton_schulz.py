"""The Gram-space form of a polynomial iteration: m x m products in place of m x n ones.

Every step multiplies X by a polynomial in X X^T, so the product Q of those polynomials can be
collected by itself: the long side is touched at the start, at the end and at restarts.
"""

import math
from collections.abc import Collection
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..dispatch import backend_for
from .coefficients import Schedule
from .factorizations import product_like
from .newton_schulz import polynomial, rescale_

# n / m from which the Gram form is used. Below it costs as much as the plain form (break-even for
# whole products, one restart and five steps), and its four m x m matrices need more room.
_MIN_ASPECT = 1.5

# A negative eigenvalue of X X^T that half precision can leave in place of zero.
_EIGENVALUE_NOISE = 4e-4
# A score that is good enough, the most sets of restarts tried of one size, and the worst score.
_GOOD_SCORE, _MAX_SETS, _MAX_SCORE = 1e3, 1000, 1e8

# The longest result in units of sqrt(m), the length of an isometry, that is taken for one.
_MAX_LENGTH = 1.3


def gram_iteration(
    X: Tensor,
    schedule: Schedule,
    restarts: Collection[int],
    norm: str = "frobenius",
    margin: float = 1.0,
    *,
    exact: bool = False,
) -> Tensor:
    """The polynomial iteration on R = X X^T, m x m, with Q X at the end.

    A step with (a, b, c) is Z = b R + c R^2; Q <- Q (a I + Z); R <- (a I + Z) R (a I + Z). All of
    these are polynomials in R, hence symmetric, and commute. Rounding makes eigenvalues of R that
    should be zero negative, and on those the steps do not converge but grow. So at a restart X
    becomes Q X, and R its Gram matrix, whose error is small again.

    On a back end of kernels a result that is not finite, or longer than 1.3 sqrt(m), is replaced by
    that of the plain iteration. Nothing waits to see which ones are: its kernels are launched in
    any case, and return at once where the result is good.

    Source: Gram Newton-Schulz, Dao-AILab/gram-newton-schulz.
    """
    if X.shape[-1] < _MIN_ASPECT * X.shape[-2]:
        return polynomial(X, schedule, norm, margin, exact=exact)
    ops = reference if exact else backend_for(X, "symmetric")
    on_kernels = ops is not reference
    R: Tensor | None = rescale_(X, norm, margin, ops)
    start = X
    Q: Tensor | None = None
    for t, (a, b, c) in enumerate(schedule):
        if t in restarts and Q is not None:
            # in X's own room, which the caller holds anyway, if it is not needed again
            X = product_like(Q, X) if on_kernels else X.copy_(Q @ X)
            R = Q = None
        R = ops.gram(X) if R is None else R
        Z: Tensor = ops.symmetric_poly(R, b, c)
        if t + 1 in {*restarts, len(schedule)}:
            R = None
        else:
            R = ops.symmetric_apply(R, Z, a)
            R = ops.symmetric_apply(R, Z, a)
        if Q is None:
            Q = Z
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = ops.symmetric_apply(Q, Z, a)
        del Z
    assert Q is not None
    O = product_like(Q, X)
    del Q, X
    return _replace_failures(O, start, schedule) if on_kernels else O


def _replace_failures(O: Tensor, X: Tensor, schedule: Schedule) -> Tensor:
    """Replace matrices of O that are too long or not finite by the plain iteration of X."""
    length = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    bad = ~(length <= _MAX_LENGTH * math.sqrt(O.shape[-2]))  # also NaN
    return torch.where(bad, polynomial(X, schedule, only=bad.view(-1).float()), O)


@lru_cache(maxsize=64)
def gram_restarts(schedule: Schedule) -> tuple[int, ...]:
    """The steps before which the Gram form of a schedule starts afresh.

    Of the sets of one size the one with the least ``restart_score`` is taken. The size is the
    least, one at least, whose score is below 1e3, as long as no more than 1000 sets are tried.

    Args:
        schedule: triples (a, b, c), one for each step.

    Returns:
        Steps, counted from zero, in rising order; empty for a single step.

    Raises:
        ValueError: if no set keeps the score below 1e8.

    Source: the rule of Dao-AILab/gram-newton-schulz, there with a given number of restarts.
    """
    steps = len(schedule)
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    if steps == 1:
        best = restart_score(schedule, ()), ()
    for size in range(1, steps):
        if best[0] < _GOOD_SCORE or math.comb(steps - 1, size) > _MAX_SETS:
            break
        sets = combinations(range(1, steps), size)
        best = min(best, *((restart_score(schedule, chosen), chosen) for chosen in sets))
    if not best[0] < _MAX_SCORE:
        raise ValueError(
            f"coefficients of {steps} steps are unstable in the Gram form whatever the restarts: "
            "pass fewer steps, or take polar_express"
        )
    return best[1]


def restart_score(schedule: Schedule, restarts: Collection[int]) -> float:
    """How far apart the entries of Q get: the greatest over all steps of max|q| / min|q|.

    Simulated on singular values x from 1 down to 1e-10, each with the eigenvalue x^2 - 4e-4 in
    place of x^2, which is what half precision may make of it.
    """
    x = np.logspace(0, -10, 10_000)
    r, q = x * x - _EIGENVALUE_NOISE, np.ones_like(x)
    worst = 0.0
    with np.errstate(all="ignore"):  # a bad set overflows, which is what it is scored for
        for t, (a, b, c) in enumerate(schedule):
            if t in restarts:
                x = x * q
                r, q = x * x - _EIGENVALUE_NOISE, np.ones_like(x)
            z = a + r * (b + r * c)
            q, r = q * z, r * z * z
            size = np.abs(q)
            ratio = float(size.max() / size.min())
            worst = max(worst, ratio if math.isfinite(ratio) else math.inf)
    return worst
