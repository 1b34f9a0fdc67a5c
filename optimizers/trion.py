"""Trion: Dion with cosines for a basis, so that the small factor alone is orthogonalized."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..kernels import POLAR_METHODS, add_product_, polar_factor
from ._core.rule import Direction, Factored, Member, Rule, Slot
from ._core.validation import (
    check_choices,
    check_coefficients,
    check_count_or_share,
    check_ints,
    check_numbers,
    naming,
    resolve_rank,
)
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.index_projectors import DCT_BASES
from ._toolkit.moments import momentum_step
from ._toolkit.norm_floor import norm_floor
from ._toolkit.polar_waits import polar_obstacle
from ._toolkit.projectors import DctProjector, take_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

ADJUST_LR_FNS = ("match_rms_adamw", "kj", "dion", "kimi", "none")


@dataclass(frozen=True)
class TrionRule(Rule):
    """S = D^T (M + G); I its r largest rows, A = S[I]; M - (1 - mu) D_I A stays; D_I polar(A)."""

    handles_nonfinite: ClassVar[bool] = True
    splits = frozenset(("cols",))
    needs_full_matrix = True

    momentum: float = 0.95
    rank: int | float = 0.25
    adjust_lr_fn: str = "match_rms_adamw"
    norm: str = "l1"
    basis: str = "dct2"
    polar: str = "ns5"
    ns_steps: int | None = None
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        # eps is not 0, since the norm of a zero momentum is replaced by it
        check_numbers(self, momentum="[0, 1]", eps="(0, inf) or None")
        check_ints(self, ns_steps="[1, 99] or None")
        check_coefficients(self, "ns_coefficients")
        check_choices(self, adjust_lr_fn=ADJUST_LR_FNS, polar=("auto", *POLAR_METHODS))
        check_choices(self, norm=("l1", "l2"), basis=DCT_BASES)
        check_count_or_share(self, "rank")
        with naming("ns_steps", "ns_coefficients"):  # raises here for what the kernel refuses
            self.orthogonalize(torch.empty(1, 0, 1, dtype=torch.float32, device="cpu"))

    @property
    def cosines(self) -> DctProjector:
        """The cosines D, which all matrices of a size share."""
        return DctProjector(norm=self.norm, basis=self.basis)

    def transpose(self, m: int, n: int) -> bool:
        """Whether the weight is transposed: its shorter side goes on the rows, which D transforms.

        A square is transposed, as published.
        """
        return m >= n

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The buffer alone: D follows from the size, ``norm`` and ``basis``."""
        return {"momentum_buffer": Slot("mn")}

    def capture_obstacle(self) -> str | None:
        """None but for a polar method that waits."""
        return polar_obstacle(self.polar)

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """Bytes of the cosines."""
        return self.cosines.shared(m)

    def update(self, w: Member) -> Direction:
        """One step of K equal weights; the host never waits for the choice of I."""
        assert w.grad is not None
        B, G = w.state["momentum_buffer"], w.grad
        D, r = self.cosines, resolve_rank(self.rank, w.m)
        # (K, m, n), B itself where its dtype is as wide as G's
        M = momentum_step(B, G, 1.0, kind="sum", finite=w.finite)
        S, row_scores = D.spectrum(M)  # (K, m, n)
        index = D.choose(S, r, reductions=w.reductions, row_scores=row_scores)  # (K, r), ascending
        A = take_rows(S, index)  # (K, r, n)
        del S  # before the iteration needs room
        P = D.selected_columns(index, w.m, M.dtype)  # (K, m, r)
        _subtract_(M, P, w.where_finite(A, 0.0), 1 - self.momentum)
        if M is not B:
            B.copy_(w.where_finite(M, B))
        sides = (w.n, w.m) if w.transposed else (w.m, w.n)
        O = w.reductions.on_full_matrix(self.orthogonalize, A)
        return w.step(Factored(P, O), lr_factor=self.lr_factor(*sides, r))

    def orthogonalize(self, A: Tensor) -> Tensor:
        """The polar factor O of every matrix of A (K, r, n); the factor of D_I A is D_I O."""
        return polar_factor(
            A,
            self.polar,
            steps=self.ns_steps,
            coefficients=self.ns_coefficients,
            eps=norm_floor(self.eps, A.dtype),
        )

    def lr_factor(self, rows: int, columns: int, r: int) -> float:
        """Factor of lr in the update; weight decay takes the bare lr."""
        return adjust_lr(self.adjust_lr_fn, rows, columns, r)


def _subtract_(M: Tensor, P: Tensor, A: Tensor, share: float) -> None:
    """M <- M - share P A in place, along the memory of M."""
    if M.stride(-1) != 1 and M.stride(-2) == 1:
        add_product_(M.mT, A.mT, P.mT, alpha=-share)
    else:
        add_product_(M, P, A, alpha=-share)


class Trion(StackedOptimizer):
    """Trion: orthogonalized momentum of rank r, in cosines chosen anew at every step.

    For each matrix W with gradient G (m x n, transposed so that m <= n; a square is transposed)::

        M <- M + G
        S  = D^T M;  I = the r rows of S with the largest norm, A = S[I]      r x n
        M <- M - (1 - momentum) D_I A          what was chosen decays, the rest is kept whole
        O  = polar(A)                          D_I O is the polar factor of D_I A
        W <- (1 - lr * weight_decay) W - lr * ratio * D_I O

    Source: *FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
    Language Models*, arXiv 2505.17967; Dion, arXiv 2504.05295.

    Args:
        params: A module, (named) parameters or groups, those with ``use_muon`` too; see
            :class:`StackedOptimizer`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        momentum: Share that chosen coefficients keep per step (default: 0.95).
        weight_decay: Decoupled weight decay (default: 0).
        rank: Number of cosines r, a count or a fraction of the shorter side (default: 0.25).
        adjust_lr_fn: ratio for R rows and C columns: ``"match_rms_adamw"`` (default)
            0.2 sqrt(R C / r), so that an exact factor of rank r moves W by RMS 0.2 lr; ``"dion"``
            sqrt(R / C); ``"kj"`` sqrt(max(1, R / C)); ``"kimi"`` 0.2 sqrt(max(R, C)); ``"none"`` 1.
        norm: Score of a row of S: ``"l1"`` (default), as published, or ``"l2"``, which captures
            the most of M, at least the share r / m.
        basis: ``"dct2"`` (default), the transform of a row is its DCT-II; ``"dct3"``, its inverse,
            as in the published product path.
        polar: Method of the polar factor, ``"auto"`` or a name of
            :func:`stiefel.kernels.polar_factor` (default: ``"ns5"``, as published).
        ns_steps: Iterations of a polynomial method (default: None, the method's own number).
        ns_coefficients: Coefficients (a, b, c) of a polynomial method, or one triple for each step
            (default: None, the method's own).
        eps: Smallest norm to divide by (default: None, the smallest normal number of the dtype;
            published is 1e-7).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range or unknown; the text names it.
        TypeError: If a keyword is unknown.

    State: ``momentum_buffer`` (like W, float32) and ``step``; neither indices nor a basis. One D
    (m x m) per shorter side is kept for all matrices. Peak temporary memory: S (m x n) and P, A, or
    with S gone six matrices r x n.

    Caveat: cosines capture as much of M as singular vectors where neighbouring rows are alike, and
    elsewhere as little as any fixed vectors; what they miss waits in M, without decay, until it is
    the largest. The time grows with the rank once the iteration outweighs the transform. ``"ns5"``
    leaves singular values between 0.7 and 1.2.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Trion
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Trion(model, lr=1e-3, rank=2)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _reference_key = "use_muon"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rank: int | float = 0.25,
        adjust_lr_fn: str = "match_rms_adamw",
        norm: str = "l1",
        basis: str = "dct2",
        polar: str = "ns5",
        ns_steps: int | None = None,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
        eps: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = TrionRule(
            momentum=momentum,
            rank=rank,
            adjust_lr_fn=adjust_lr_fn,
            norm=norm,
            basis=basis,
            polar=polar,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            eps=eps,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
