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

from .. import kernels
from ..kernels import product
from ..kernels import row_total as total
from ..kernels import update_moments_ as average
from .rule import Sums

__all__ = [
    "CARRY_POLICIES",
    "Change",
    "Match",
    "Turn",
    "adam",
    "adam_reference",
    "bias_correction",
    "blend",
    "carry",
    "check_policy",
    "column_squares",
    "ema",
    "entry_correction",
    "growth_limit",
    "heavy_tail_schedule",
    "row_correction",
    "spike_factor",
    "square_scale",
    "total",
]

CARRY_POLICIES = ("keep", "reset", "rotate", "match", "ldadam")


def adam(
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int | Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    ok: Tensor | None = None,
) -> Tensor:
    """Moves both moments and returns the direction; see :func:`stiefel.kernels.adam`."""
    return kernels.adam(R, exp_avg, exp_avg_sq, t, beta1=beta1, beta2=beta2, eps=eps, finite=ok)


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


class Change:
    """A change of basis as the moments see it: coordinates X (K, r, n) turned into new ones.

    With C = P_new^T P_old, ``turn`` is C X and ``turn_squares`` (C*C) X; computed when asked for.
    """

    moves: ClassVar[bool] = False
    """Whether coordinates are moved or dropped, never mixed: then C*C = C and all rules agree."""

    def turn(self, X: Tensor) -> Tensor:
        """The coordinates X in the new basis, a new tensor."""
        raise NotImplementedError

    def turn_squares(self, X: Tensor) -> Tensor:
        """Variances X of uncorrelated coordinates in the new basis, a new tensor."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Turn(Change):
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

    def turn(self, X: Tensor) -> Tensor:
        """See :class:`Change`."""
        return self._apply(self.C, X, self.D)

    def turn_squares(self, X: Tensor) -> Tensor:
        """See :class:`Change`."""
        return self._apply(self.C.square(), X, None if self.D is None else self.D.square())

    @staticmethod
    def _apply(C: Tensor, X: Tensor, D: Tensor | None) -> Tensor:
        X = product(C, X.to(C.dtype))
        return X if D is None else product(X, D.mT)


@dataclass(frozen=True, eq=False)
class Match(Change):
    """Between two choices of one orthonormal system: C is a partial permutation, so rows move.

    Attributes:
        old: (K, r) integers, ascending: what the rows of X belong to.
        new: (K, r) integers: what they shall belong to.
    """

    moves: ClassVar[bool] = True
    old: Tensor
    new: Tensor

    @cached_property
    def source(self) -> Tensor:
        """(K, r) int64: the old place of each new index, -1 for one that enters."""
        at = torch.searchsorted(self.old.contiguous(), self.new.contiguous())
        at.clamp_(max=self.old.shape[-1] - 1)
        return torch.where(self.old.gather(-1, at) == self.new, at, -1)

    def turn(self, X: Tensor) -> Tensor:
        """Rows of X (K, r, ...) of any dtype in their new places, zeros where an index enters."""
        at, gone = self.source.clamp(min=0), (self.source < 0).unsqueeze(-1)
        if len(X) == 1:  # rows are copied whole
            return X[0].index_select(0, at[0]).unsqueeze(0).masked_fill_(gone, 0)
        return X.gather(-2, at.unsqueeze(-1).expand(-1, -1, X.shape[-1])).masked_fill_(gone, 0)

    def turn_squares(self, X: Tensor) -> Tensor:
        """See :class:`Change`; the same as ``turn``."""
        return self.turn(X)


def check_policy(policy: str, moves: bool) -> None:
    """Raise ValueError unless ``policy`` is known and has a meaning for such a change of basis."""
    if policy not in CARRY_POLICIES:
        raise ValueError(f"moments must be one of {', '.join(CARRY_POLICIES)}, got {policy!r}")
    if policy == "match" and not moves:
        raise ValueError(
            "moments='match' moves rows of equal index and this projection has a dense basis "
            "without indices: use moments='rotate'"
        )


def carry(
    policy: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    change: Change,
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
    check_policy(policy, change.moves)
    if policy == "reset":
        exp_avg.zero_()
        exp_avg_sq.zero_()
    elif policy == "ldadam" and not change.moves:
        _carry_ldadam(exp_avg, exp_avg_sq, change, t, betas)
    elif policy != "keep":
        exp_avg.copy_(change.turn(exp_avg))
        exp_avg_sq.copy_(change.turn_squares(exp_avg_sq))


def _carry_ldadam(M: Tensor, V: Tensor, change: Change, t: int, betas: tuple[float, float]) -> None:
    if t == 0:
        return
    c1, c2 = (1 - beta**t for beta in betas)
    work = torch.promote_types(M.dtype, torch.float32)
    m, v = M.to(work) / c1, V.to(work) / c2
    mean = change.turn(m)
    v = change.turn_squares(v.addcmul_(m, m, value=-1)).addcmul_(mean, mean)
    M.copy_(mean.mul_(c1))
    V.copy_(v.abs_().mul_(c2))


def ema(buffer: Tensor, grad: Tensor, momentum: float, ok: Tensor | None = None) -> Tensor:
    """B <- B + (1 - momentum) (G - B), in place; returns B in the precision of G.

    A buffer of a narrower dtype is worked on in G's and rounded when it is stored; ``ok`` is that
    of :func:`blend`.
    """
    return blend(buffer, grad, momentum, ok=ok)


def blend(
    buffer: Tensor, grad: Tensor, momentum: float, nesterov: bool = False, kind: str = "ema",
    ok: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Takes a gradient into an average or a sum, in place, and gives the step of both, in one pass.

    Args:
        buffer: (K, m, n), changed in place.
        grad: (K, m, n), not changed.
        momentum: Decay of the buffer.
        nesterov: Whether the result is G + momentum (B - G), or G + momentum C, a new tensor.
        kind: ``"ema"`` or ``"sum"``.
        ok: None, or flags (K,): where one is 0 the buffer stays, and the result means nothing.

    Returns:
        The buffer as :func:`ema` returns it, or the step.
    """
    step: Tensor
    step, _ = kernels.momentum_step_(
        buffer, grad, momentum, nesterov=nesterov, kind=kind, finite=ok
    )
    return step


def column_squares(X: Tensor) -> Tensor:
    """Sum of the squares of every column of X (K, m, n), any strides: (K, 1, n), at least fp32.

    Nothing depends on how many matrices there are.
    """
    sums: Tensor = kernels.squares(X, -2)
    return sums


def square_scale(X: Tensor) -> Tensor:
    """A power of two times which the squares of X neither overflow nor vanish; 1 for most X.

    In float32 it is 2^-96 where the largest entry is above 2^48, and 2^96 where it is below 2^-48:
    X times it has the digits of X, so that a method that knows no scale keeps its bits.

    Args:
        X: (K, m, n), any strides.

    Returns:
        (K, 1, 1), falling in the largest entry.
    """
    top = torch.maximum(-X.amin((-2, -1), keepdim=True), X.amax((-2, -1), keepdim=True))
    e = 3 * math.frexp(torch.finfo(top.dtype).max)[1] // 8
    c = torch.ones_like(top).masked_fill_(top > 2.0**e, 2.0 ** (-2 * e))
    return c.masked_fill_(top < 2.0**-e, 2.0 ** (2 * e))


def growth_limit(
    norm: Tensor, stored: Tensor, gamma: float = 1.01, floor: float | None = 1e-8,
    ok: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a quantity is divided by so that its norm grows by gamma per step at most.

    L = max(norm / (stored + 1e-8), gamma) / gamma, and the limited norm / L is stored. A stored
    norm below zero is absent: then L = 1. Source: Fira, arXiv 2410.01623.

    Args:
        norm: (K, 1, 1) norms of this step. One that is not finite gives L = inf and is not stored.
        stored: (K, 1, 1) limited norms of the last step, changed in place.
        gamma: At least 1.
        floor: A stored norm up to it is absent too: L would hold the next ones down for long. None:
            as published.
        ok: None, or flags (K,): where one is 0 nothing is stored.

    Returns:
        (K, 1, 1), at least 1.
    """
    last = stored.to(norm.dtype)
    absent, good = last < 0 if floor is None else last <= floor, norm.isfinite()
    L = (norm / (last + 1e-8)).div_(gamma).clamp_(min=1.0).masked_fill_(absent, 1.0)
    moved = good if ok is None else good & (ok.view(-1, 1, 1) != 0)
    stored.copy_(torch.where(moved, norm / L, last))
    return L.masked_fill_(~good, math.inf)


def spike_factor(
    norm: Tensor, stored: Tensor, ratio: float, beta: float = 0.9, ok: Tensor | None = None
) -> Tensor:
    """What a gradient is multiplied by so that its norm is at most ratio times their average.

    Args:
        norm: (K, 1, 1) norms of this step.
        stored: (K, 1, 1) the average of the limited norms, changed in place; 0: none yet. A norm
            that is not finite is not stored.
        ratio: Above 1.
        beta: Decay of the average.
        ok: None, or flags (K,): where one is 0 nothing is stored.

    Returns:
        (K, 1, 1), at most 1.
    """
    last = stored.to(norm.dtype)
    seen, limit = last > 0, ratio * last
    kept = torch.where(seen, torch.minimum(norm, limit), norm)
    moved = torch.where(seen, last.lerp(kept, 1 - beta), kept)
    good = kept.isfinite() if ok is None else kept.isfinite() & (ok.view(-1, 1, 1) != 0)
    stored.copy_(torch.where(good, moved, last))
    return torch.where(seen & (norm > limit), limit / norm, 1.0)


def heavy_tail_schedule(T: int, alpha: float | None = None) -> tuple[float, float]:
    """Learning rate multiplier and momentum for T steps of gradients with heavy-tailed noise.

    Of noise only the moment E ||noise||^alpha is finite, 1 < alpha <= 2. What balances the drift,
    bias and noise terms lr / (1 - mu) + (1 - mu)^((alpha - 1) / alpha) + 1 / (lr T) is

        1 - mu = T^(-alpha / (3 alpha - 2)),    lr ~ T^(-(2 alpha - 1) / (3 alpha - 2)).

    The balance is our own, the rate T^(-(alpha - 1) / (3 alpha - 2)) that of arXiv 2605.06884.

    Args:
        T: Number of steps, at least 1.
        alpha: The moment; None: not known, then the exponents are 1/2 and 3/4, which are those of
            alpha = 2, at the rate T^(-(alpha - 1) / (2 alpha)).

    Returns:
        (what the learning rate is multiplied by, momentum).

    Raises:
        ValueError: T or alpha is out of range.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    if alpha is None:
        alpha = 2.0
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"alpha must lie in (1, 2], got {alpha}: pass None if it is not known")
    d = 3 * alpha - 2
    return T ** (-(2 * alpha - 1) / d), 1 - T ** (-alpha / d)


def row_correction(
    O: Tensor, second_moment: Tensor, beta2: float, sums: Sums, n: int, eps: float = 1e-10,
    ok: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """NorMuon's: rows of O divided by their own running size, ||O||_F kept.

    v <- beta2 v + (1 - beta2) mean over columns of O*O; O' = O / (sqrt(v) + eps), then scaled to
    the norm of O. A bias of v is one factor for all rows, so it cancels. Both norms come from the
    squares of the rows of O. Source: NorMuon, arXiv 2510.05491.

    Args:
        O: (K, m, n), not changed.
        second_moment: v, (K, m, 1), changed in place.
        beta2: Decay of v.
        sums: Sums over the weight's indices.
        n: Columns of the whole weight.
        eps: Added to the root and to the norm of O'.
        ok: As for :func:`blend`.

    Returns:
        (K, m, 1), by which the rows of O are multiplied.
    """
    squares = sums.cols(column_squares(O.mT).mT)
    by = ema(second_moment, squares / n, beta2, ok).sqrt().add(eps).reciprocal()
    old, new = (sums.rows(total(x.mT)).sqrt() for x in (squares, squares * by * by))
    return by * (old / (new + eps))


def entry_correction(
    O: Tensor, second_moment: Tensor, beta2: float, sums: Sums, norm: float, eps: float = 1e-8,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """AdaMuon's: entries of O divided by their own running size, then scaled to a given norm.

    V <- beta2 V + (1 - beta2) O*O; O' = O / (sqrt(V) + eps), without bias correction, which would
    cancel. Source: AdaMuon, arXiv 2507.11005.

    Args:
        O: (K, m, n), not changed.
        second_moment: V, (K, m, n), changed in place.
        beta2: Decay of V.
        sums: Sums over the weight's indices.
        norm: The Frobenius norm to scale to.
        eps: Added to the root and to the norm of O'.
        ok: As for :func:`blend`.

    Returns:
        O' (K, m, n), a new tensor, and what it is to be multiplied by, (K, 1, 1).
    """
    V = ema(second_moment, O.square(), beta2, ok)
    scaled = O / V.sqrt().add_(eps)
    size = sums.both(total(column_squares(scaled))).sqrt()
    return scaled, norm / (size + eps)
