"""Moments on stacks of matrices: Adam, an average of gradients, and what a new basis does to them.

Pure tensor functions on (K, m, n). They change the moments in place and nothing else, and a stack
gives the bits of its matrices taken one at a time.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import product
from ...kernels import row_total as total
from ...kernels import update_moments_ as average
from .._core.rule import LOCAL_REDUCTIONS, Reductions

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
    """Moves both moments and returns the direction; see :func:`stiefel.kernels.adam`."""
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
    """Moves both moments as the published GaLore code does: eps on the uncorrected root.

    Source: the AdamW that accompanies GaLore, arXiv 2403.03507. Arguments as in :func:`adam`.

    Returns:
        N: (K, m, n), M / (sqrt(V) + eps).
        factor: sqrt(1 - beta2^t) / (1 - beta1^t), by which the learning rate is multiplied
            where the bias is corrected.
    """
    M, V = average(R, exp_avg, exp_avg_sq, beta1, beta2)
    return M / V.sqrt().add_(eps), bias_correction(t, beta1, beta2)


def bias_correction(t: int, beta1: float, beta2: float) -> float:
    """sqrt(1 - beta2^t) / (1 - beta1^t): what corrects M / sqrt(V) after t updates."""
    return math.sqrt(1 - beta2**t) / (1 - beta1**t)


class BasisChange:
    """A change of basis as the moments see it: coordinates X (K, r, n) turned into new ones.

    With C = P_new^T P_old, ``apply`` is C X and ``apply_squares`` (C*C) X; computed when asked for.
    """

    permutes: ClassVar[bool] = False
    """Whether coordinates are moved or dropped, never mixed: then C*C = C and all rules agree."""

    def apply(self, X: Tensor) -> Tensor:
        """The coordinates X in the new basis, a new tensor."""
        raise NotImplementedError

    def apply_squares(self, X: Tensor) -> Tensor:
        """Variances X of uncorrelated coordinates in the new basis, a new tensor."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DenseBasisChange(BasisChange):
    """Between two dense bases P (K, m, r), on both sides if there are Q (K, n, q) too.

    Then D = Q_new^T Q_old, and X (K, r, q) turns to C X D^T and (C*C) X (D*D)^T.
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
        """Q_new^T Q_old, (K, q, q), if there are two sides."""
        if self.Q_old is None or self.Q_new is None:
            return None
        return product(self.Q_new.mT, self.Q_old.to(self.Q_new.dtype))

    @override
    def apply(self, X: Tensor) -> Tensor:
        return self._apply_two_sided(self.C, X, self.D)

    @override
    def apply_squares(self, X: Tensor) -> Tensor:
        return self._apply_two_sided(
            self.C.square(), X, None if self.D is None else self.D.square()
        )

    @staticmethod
    def _apply_two_sided(C: Tensor, X: Tensor, D: Tensor | None) -> Tensor:
        X = product(C, X.to(C.dtype))
        return X if D is None else product(X, D.mT)


@dataclass(frozen=True, eq=False)
class IndexBasisChange(BasisChange):
    """Between two choices of one orthonormal system: C is a partial permutation, so rows move.

    Attributes:
        old: (K, r) integers, ascending: what the rows of X belong to.
        new: (K, r) integers: what they shall belong to.
    """

    permutes: ClassVar[bool] = True
    old: Tensor
    new: Tensor

    @cached_property
    def source(self) -> Tensor:
        """(K, r) int64: the old place of each new index, -1 for one that enters."""
        at = torch.searchsorted(self.old.contiguous(), self.new.contiguous())
        at.clamp_(max=self.old.shape[-1] - 1)
        return torch.where(self.old.gather(-1, at) == self.new, at, -1)

    def apply(self, X: Tensor) -> Tensor:
        """Rows of X (K, r, ...) of any dtype in their new places, zeros where an index enters."""
        at, entering = self.source.clamp(min=0), (self.source < 0).unsqueeze(-1)
        if len(X) == 1:  # rows are copied whole
            return X[0].index_select(0, at[0]).unsqueeze(0).masked_fill_(entering, 0)
        return X.gather(-2, at.unsqueeze(-1).expand(-1, -1, X.shape[-1])).masked_fill_(entering, 0)

    @override
    def apply_squares(self, X: Tensor) -> Tensor:
        """The same as ``apply``."""
        return self.apply(X)


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
    """Takes the moments M, V from an old basis to a new one, in place.

    "keep" leaves them (GaLore, arXiv 2403.03507), "reset" zeroes them, "rotate" turns them by the
    change of basis C = P_new^T P_old: M <- C M and V <- (C*C) V. The second is the second moment
    of the turned coordinates if the old ones are uncorrelated, and is never negative. "ldadam"
    (LDAdam, arXiv 2410.16103) takes the old ones for independent with mean m = M / (1 - beta1^t)
    and variance v - m*m, v = V / (1 - beta2^t):

        M <- C M,    V <- (1 - beta2^t) | (C*C) (v - m*m) + (C m)*(C m) |

    absolute because v - m*m may be negative: the averages have different windows. "match" moves
    rows of equal index; where the change only moves, rotate and ldadam are the same.

    Args:
        policy: one of CARRY_POLICIES.
        exp_avg: (K, r, n), or (K, r, q) with two bases.
        exp_avg_sq: as exp_avg.
        change: from the old basis to the new one.
        t: for "ldadam": updates that the moments have seen; 0 leaves them alone.
        betas: for "ldadam": their decays.

    Raises:
        ValueError: unknown policy, or "match" on a change that mixes coordinates.
    """
    check_moment_policy(policy, change.permutes)
    if policy == "reset":
        exp_avg.zero_()
        exp_avg_sq.zero_()
    elif policy == "ldadam" and not change.permutes:
        _carry_ldadam(exp_avg, exp_avg_sq, change, t, betas)
    elif policy != "keep":
        exp_avg.copy_(change.apply(exp_avg))
        exp_avg_sq.copy_(change.apply_squares(exp_avg_sq))


def _carry_ldadam(
    M: Tensor, V: Tensor, change: BasisChange, t: int, betas: tuple[float, float]
) -> None:
    if t == 0:
        return
    c1, c2 = (1 - beta**t for beta in betas)
    work = torch.promote_types(M.dtype, torch.float32)
    m, v = M.to(work) / c1, V.to(work) / c2
    mean = change.apply(m)
    v = change.apply_squares(v.addcmul_(m, m, value=-1)).addcmul_(mean, mean)
    M.copy_(mean.mul_(c1))
    V.copy_(v.abs_().mul_(c2))


def ema(buffer: Tensor, grad: Tensor, momentum: float, finite: Tensor | None = None) -> Tensor:
    """B <- B + (1 - momentum) (G - B), in place; returns B in the precision of G.

    A buffer of a narrower dtype is worked on in G's and rounded when it is stored; ``finite`` is
    that of :func:`momentum_step`.
    """
    return momentum_step(buffer, grad, momentum, finite=finite)


def momentum_step(
    buffer: Tensor,
    grad: Tensor,
    momentum: float,
    nesterov: bool = False,
    kind: str = "ema",
    finite: Tensor | None = None,
) -> Tensor:
    """Takes a gradient into an average or a sum, in place, and gives the step of both, in one pass.

    Args:
        buffer: (K, m, n), changed in place.
        grad: (K, m, n), not changed.
        momentum: Decay of the buffer.
        nesterov: Whether the result is G + momentum (B - G), or G + momentum C, a new tensor.
        kind: ``"ema"`` or ``"sum"``.
        finite: None, or flags (K,): where one is 0 the buffer stays, and the result means nothing.

    Returns:
        The buffer as :func:`ema` returns it, or the step.
    """
    step: Tensor
    step, _ = kernels.momentum_step_(
        buffer, grad, momentum, nesterov=nesterov, kind=kind, finite=finite
    )
    return step


def column_squares(X: Tensor) -> Tensor:
    """Sum of the squares of every column of X (K, m, n), any strides: (K, 1, n), at least fp32.

    Nothing depends on how many matrices there are.
    """
    sums: Tensor = kernels.squares(X, -2)
    return sums


def safe_square_scale(X: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
    """A power of two times which the squares of X neither overflow nor vanish; 1 for most X.

    In float32 it is 2^-96 where the largest entry is above 2^48, and 2^96 where it is below 2^-48:
    X times it has the digits of X, so that a method that knows no scale keeps its bits.

    Args:
        X: (K, m, n), any strides.
        reductions: Reductions of the weight: all shards take the scale of its largest entry.

    Returns:
        (K, 1, 1), falling in the largest entry.
    """
    largest = torch.maximum(-X.amin((-2, -1), keepdim=True), X.amax((-2, -1), keepdim=True))
    largest = reductions.most(largest)
    e = 3 * math.frexp(torch.finfo(largest.dtype).max)[1] // 8
    c = torch.ones_like(largest).masked_fill_(largest > 2.0**e, 2.0 ** (-2 * e))
    return c.masked_fill_(largest < 2.0**-e, 2.0 ** (2 * e))
