"""Moments on stacks of matrices: Adam, an average of gradients, and changes of their basis.

Pure tensor functions on (K, m, n). The moments are changed in place and nothing else, and a stack
gives the bits of its matrices taken one at a time.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, overload

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import product
from ...kernels import row_total as total
from ...kernels import update_moments_ as average
from .._core.rule import LOCAL_REDUCTIONS, Reductions, Slot

__all__ = [
    "MOMENT_POLICIES",
    "BasisChange",
    "DenseBasisChange",
    "IndexBasisChange",
    "adam",
    "adam_reference",
    "bias_correction",
    "carry_moments",
    "check_moment_policy",
    "column_squares",
    "ema",
    "ema_where_safe",
    "largest_entries",
    "max_safe_value",
    "momentum_slots",
    "momentum_step",
    "safe_square_scale",
    "total",
]

MOMENT_POLICIES = ("keep", "reset", "rotate", "match", "ldadam")


def adam(
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int | Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    finite: Tensor | None = None,
) -> Tensor:
    """Move both moments and return Adam's direction, by :func:`stiefel.kernels.adam`."""
    return kernels.adam(R, exp_avg, exp_avg_sq, t, beta1=beta1, beta2=beta2, eps=eps, finite=finite)


def adam_reference(
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, float]:
    """Move both moments as the published GaLore code does: eps on the uncorrected root.

    Source: the AdamW that accompanies GaLore, arXiv 2403.03507. Arguments as in :func:`adam`.

    Returns:
        N: (K, m, n), M / (sqrt(V) + eps).
        factor: sqrt(1 - beta2^t) / (1 - beta1^t), by which the learning rate is multiplied
            where the bias is corrected.
    """
    M, V = average(R, exp_avg, exp_avg_sq, beta1, beta2)
    return M / V.sqrt().add_(eps), bias_correction(t, beta1, beta2)


@overload
def bias_correction(t: int, beta1: float, beta2: float) -> float: ...
@overload
def bias_correction(t: int | Tensor, beta1: float, beta2: float) -> float | Tensor: ...
def bias_correction(t: int | Tensor, beta1: float, beta2: float) -> float | Tensor:
    """sqrt(1 - beta2^t) / (1 - beta1^t), the bias correction of M / sqrt(V) after t updates."""
    if isinstance(t, Tensor):  # one number on the device; () widens nothing
        t = t.reshape(()).double()
        return (1 - beta2**t).sqrt() / (1 - beta1**t)
    return math.sqrt(1 - beta2**t) / (1 - beta1**t)


class BasisChange:
    """Base class: a change of basis of coordinates X (K, r, n).

    With C = P_new^T P_old, ``apply`` is C X and ``apply_squares`` (C*C) X. C is computed at the
    first call, since some policies need none.
    """

    permutes: ClassVar[bool] = False
    """Whether coordinates are moved or dropped, never mixed: then C*C = C and all rules agree."""

    def apply(self, X: Tensor) -> Tensor:
        """Coordinates X in the new basis, a new tensor."""
        raise NotImplementedError

    def apply_squares(self, X: Tensor) -> Tensor:
        """Variances X of uncorrelated coordinates in the new basis, a new tensor."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DenseBasisChange(BasisChange):
    """Change between two dense bases P (K, m, r), and Q (K, n, q) where both sides have one.

    With Q, D = Q_new^T Q_old, and X (K, r, q) becomes C X D^T and (C*C) X (D*D)^T.
    """

    P_old: Tensor
    P_new: Tensor
    Q_old: Tensor | None = None
    Q_new: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.Q_old is None) != (self.Q_new is None):
            raise ValueError("a change of basis needs both Q_old and Q_new, or neither")

    @cached_property
    def C(self) -> Tensor:
        """P_new^T P_old, (K, r, r), in the dtype of P_new."""
        return product(self.P_new.mT, self.P_old.to(self.P_new.dtype))

    @cached_property
    def D(self) -> Tensor | None:
        """Q_new^T Q_old, (K, q, q), or None for one side."""
        if self.Q_old is None or self.Q_new is None:
            return None
        return product(self.Q_new.mT, self.Q_old.to(self.Q_new.dtype))

    @override
    def apply(self, X: Tensor) -> Tensor:
        return self._apply_two_sided(self.C, X, self.D)

    @override
    def apply_squares(self, X: Tensor) -> Tensor:
        D_squares = None if self.D is None else self.D.square()
        return self._apply_two_sided(self.C.square(), X, D_squares)

    @staticmethod
    def _apply_two_sided(C: Tensor, X: Tensor, D: Tensor | None) -> Tensor:
        X = product(C, X.to(C.dtype))
        return X if D is None else product(X, D.mT)


@dataclass(frozen=True, eq=False)
class IndexBasisChange(BasisChange):
    """Change between two choices from one orthonormal system: C is a partial permutation of rows.

    Attributes:
        old: (K, r) integers, ascending: index of each row of X now.
        new: (K, r) integers: index of each row afterwards.
    """

    permutes: ClassVar[bool] = True
    old: Tensor
    new: Tensor

    @cached_property
    def source(self) -> Tensor:
        """(K, r) int64: the old row of each new index, -1 for an index that enters."""
        row = torch.searchsorted(self.old.contiguous(), self.new.contiguous())
        row.clamp_(max=self.old.shape[-1] - 1)
        return torch.where(self.old.gather(-1, row) == self.new, row, -1)

    @override
    def apply(self, X: Tensor) -> Tensor:
        """Rows of X (K, r, ...) of any dtype in their new order, zeros where an index enters."""
        row = self.source.clamp(min=0)
        enters = (self.source < 0).unsqueeze(-1)
        if len(X) == 1:  # faster for one matrix: rows are copied whole
            moved = X[0].index_select(0, row[0]).unsqueeze(0)
        else:
            moved = X.gather(-2, row.unsqueeze(-1).expand(-1, -1, X.shape[-1]))
        return moved.masked_fill_(enters, 0)

    @override
    def apply_squares(self, X: Tensor) -> Tensor:
        return self.apply(X)  # entries of C are 0 or 1, so C*C = C


def check_moment_policy(policy: str, permutes: bool) -> None:
    """Raise ValueError unless ``policy`` is known and has a meaning for such a change of basis."""
    if policy not in MOMENT_POLICIES:
        raise ValueError(f"moments must be one of {', '.join(MOMENT_POLICIES)}, got {policy!r}")
    if policy == "match" and not permutes:
        raise ValueError(
            "moments='match' moves rows of equal index and this projection has a dense basis "
            "without indices: use moments='rotate'"
        )


def carry_moments(
    policy: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    change: BasisChange,
    *,
    t: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Carry the moments M, V from an old basis to a new one, in place.

    "keep" leaves the moments (GaLore, arXiv 2403.03507), "reset" zeroes them, "rotate" applies the
    change of basis C = P_new^T P_old: M <- C M and V <- (C*C) V. This V is the second moment of
    the new coordinates if the old ones are uncorrelated, and is never negative. "ldadam" (LDAdam,
    arXiv 2410.16103) takes the old coordinates for independent with mean m = M / (1 - beta1^t) and
    variance v - m*m, v = V / (1 - beta2^t):

        M <- C M,    V <- (1 - beta2^t) | (C*C) (v - m*m) + (C m)*(C m) |

    absolute because v - m*m may be negative: the averages have different windows. "match" moves
    rows of equal index; where the change only permutes, rotate and ldadam are the same.

    Args:
        policy: One of MOMENT_POLICIES.
        exp_avg: (K, r, n), or (K, r, q) with two bases.
        exp_avg_sq: As exp_avg.
        change: Change from the old basis to the new one.
        t: For "ldadam": updates that the moments have seen (default: 0, which leaves them alone).
        betas: For "ldadam": decays of the moments (default: (0.9, 0.999)).

    Raises:
        ValueError: For an unknown policy, or "match" on a change that mixes coordinates.
    """
    check_moment_policy(policy, change.permutes)
    if policy == "reset":
        exp_avg.zero_()
        exp_avg_sq.zero_()
    elif policy == "ldadam" and not change.permutes:
        _carry_ldadam(exp_avg, exp_avg_sq, change, t, betas)
    elif policy != "keep":
        exp_avg.copy_(change.apply(exp_avg))
        exp_avg_sq.copy_(_overflowed(change.apply_squares(exp_avg_sq)))


def _carry_ldadam(
    M: Tensor, V: Tensor, change: BasisChange, t: int, betas: tuple[float, float]
) -> None:
    if t == 0:
        return
    c1, c2 = (1 - beta**t for beta in betas)
    work = torch.promote_types(M.dtype, torch.float32)
    m = M.to(work) / c1
    v = V.to(work) / c2
    new_m = change.apply(m)
    new_v = change.apply_squares(v.addcmul_(m, m, value=-1)).addcmul_(new_m, new_m)
    M.copy_(new_m.mul_(c1))
    V.copy_(_overflowed(new_v.abs_().mul_(c2)))


def _overflowed(V: Tensor) -> Tensor:
    """Second moments, infinite where a product with an infinite one made no number.

    So such a coordinate takes no step, as it did before and as in Adam.
    """
    return V.masked_fill_(V.isnan(), torch.inf)


def ema(buffer: Tensor, grad: Tensor, momentum: float, finite: Tensor | None = None) -> Tensor:
    """B <- B + (1 - momentum) (G - B), in place; returns B in the precision of G.

    A buffer of a narrower dtype is computed in G's dtype and rounded when it is stored. ``finite``
    is as in :func:`momentum_step`.
    """
    return momentum_step(buffer, grad, momentum, finite=finite)


def momentum_slots(momentum: float) -> dict[str, Slot]:
    """The slot of a momentum buffer shaped like the weight; none at 0, where it would be G."""
    return {"momentum_buffer": Slot("mn")} if momentum else {}


def ema_where_safe(
    average: Tensor, S: Tensor, decay: float, finite: Tensor | None = None
) -> Tensor:
    """As :func:`ema`, for every matrix of S (K, m, n) that is not too large to be added."""
    is_safe = largest_entries(S) <= max_safe_value(average, S)
    if S.device.type != "cpu" or not bool(is_safe.all()):
        S = torch.where(is_safe, S, average)
    return ema(average, S, decay, finite)


def max_safe_value(*Xs: Tensor) -> float:
    """A quarter of the smallest dtype maximum: sums and differences cannot overflow."""
    return min(torch.finfo(X.dtype).max for X in Xs) / 4


def momentum_step(
    buffer: Tensor,
    grad: Tensor,
    momentum: float,
    nesterov: bool = False,
    kind: str = "ema",
    finite: Tensor | None = None,
) -> Tensor:
    """Add a gradient to a momentum buffer, in place, and return the step, in one pass.

    Args:
        buffer: (K, m, n), changed in place.
        grad: (K, m, n), not changed.
        momentum: Decay of the buffer.
        nesterov: Whether the step is Nesterov's (default: False): G + momentum (B - G) for an
            average, G + momentum B for a sum.
        kind: ``"ema"`` for an average (default), or ``"sum"``.
        finite: None (default), or flags (K,), 0 where the buffer stays and the step means nothing.

    Returns:
        The buffer as :func:`ema` returns it, or for Nesterov the step as a new tensor.
    """
    step: Tensor
    step, _ = kernels.momentum_step_(
        buffer, grad, momentum, nesterov=nesterov, kind=kind, finite=finite
    )
    return step


def column_squares(X: Tensor) -> Tensor:
    """Sum of the squares of every column of X (K, m, n), any strides: (K, 1, n), at least fp32.

    The bits of one matrix do not depend on how many there are.
    """
    sums: Tensor = kernels.squares(X, -2)
    return sums


def largest_entries(X: Tensor) -> Tensor:
    """The largest magnitude in each matrix of X (K, m, n), as (K, 1, 1); 0 if there is no entry."""
    if X.numel() == 0:
        return X.new_zeros(len(X), 1, 1)
    return torch.maximum(-X.amin((-2, -1), keepdim=True), X.amax((-2, -1), keepdim=True))


def safe_square_scale(X: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
    """Choose a power of two c such that squares of c X neither overflow nor vanish; mostly 1.

    In float32 c is 2^-96 where the largest entry is above 2^48, and 2^96 where it is below 2^-48.
    A power of two leaves the digits of X, so a scale-invariant method keeps its bits.

    Args:
        X: (K, m, n), any strides.
        reductions: Reductions of the weight: all shards take the scale of its largest entry.

    Returns:
        (K, 1, 1), falling in the largest entry.
    """
    largest = reductions.most(largest_entries(X))
    e = 3 * math.frexp(torch.finfo(largest.dtype).max)[1] // 8
    c = torch.ones_like(largest).masked_fill_(largest > 2.0**e, 2.0 ** (-2 * e))
    return c.masked_fill_(largest < 2.0**-e, 2.0 ** (2 * e))
