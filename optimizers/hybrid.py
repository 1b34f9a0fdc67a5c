"""Hybrid: rows of the momentum at one length and its singular values at one, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from ..kernels import row_norm
from ._core.rule import LOCAL_REDUCTIONS, Member
from ._core.validation import check_choices, check_eps
from ._driver.optimizer import StackedOptimizer
from ._toolkit.row_rules import (
    ROW_MODES,
    RowPolarRule,
    center,
    kernel_eps,
    row_factors,
    row_squares,
    unit_range,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

MAP_ORDERS = ("row_then_polar", "polar_then_row")
OLD_ROW_EPS = 1e-8
"""Added to row lengths under ``eps=None`` before the option ``row_eps`` existed."""


@dataclass(frozen=True)
class HybridRule(RowPolarRule):
    """M <- momentum M + (1 - momentum) G; U = polar(rownorm(M)) or rownorm(polar(M))."""

    order: str = "row_then_polar"
    row_mode: str = "inverse_eps"
    side: str = "right"
    row_eps: float | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, order=MAP_ORDERS, row_mode=ROW_MODES, side=("left", "right"))
        check_eps(self, "row_eps")

    @override
    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """Both maps of X (K, m, n), and nu^alpha where the second map does not undo it."""
        left = self.side == "left"
        if self.order == "row_then_polar":
            Y = self.normalize_rows(X, w)
            Y = center(Y, w.reductions, self.row_count(w), in_place=True) if self.centred else Y
            U = self.orthogonalize(Y, w, left, has_unit_rows=True)
            return U, self.nuclear_scale(Y, U, w)
        U = self.orthogonalize(X, w, left)
        # rows are normalized next, so this scale counts only beside row_eps
        scale = self.nuclear_scale(X, U, w)
        return self.normalize_rows(U if scale is None else U * scale, w), None

    def normalize_rows(self, X: Tensor, w: Member) -> Tensor:
        """Rows of X (K, m, n) at norm 1."""
        eps = self.eps if self.row_eps is None else self.row_eps
        X = unit_range([X], w.reductions)[0] if eps is None else X
        if w.reductions is LOCAL_REDUCTIONS:
            return row_norm(X, kernel_eps(eps), self.row_mode)
        squares = row_squares(X, w.reductions)
        return X * row_factors(squares, self.row_mode, eps, w.reductions, self.row_count(w))

    @classmethod
    @override
    def complete_saved(cls, group: dict[str, Any]) -> None:
        if "row_eps" not in group and group.get("eps") is None:
            group["row_eps"] = OLD_ROW_EPS


class Hybrid(StackedOptimizer):
    """Hybrid: row lengths and singular values of the momentum, both evened out in turn.

    For each matrix W (m x n) with gradient G, C X = X less the mean of its rows::

        M <- momentum M + (1 - momentum) G
        U  = polar(rownorm(M))   "row_then_polar",   rownorm(polar(M))   "polar_then_row"
        U  = C polar(C rownorm(C M)),                C rownorm(polar(C M))        if centred
        W <- (1 - lr * weight_decay) W         decay with the bare lr
        W <- W - lr * s * U                    s = 0.2 / rms of the rows of U that are not zero

    In both orders the map commutes with permutations of the rows and orthogonal maps of the
    columns. :class:`Spectral` commutes with rotations of the rows too, and of the two orders only
    the first ignores how long single rows are, as :class:`RowNorm` does.

    Source: *Symmetry-Compatible Principle for Optimizer Design: Embeddings, LM Heads, SwiGLU MLPs,
    and MoE Routers*, arXiv 2605.18106, whose published steps are tested (``polar="inverse_root",
    eps=1e-8, alpha=1, adjust_lr_fn="none"``). Experts are scaled each by itself; the published
    alpha sums over all experts of a stack.

    Args:
        params: A module, (named) parameters or groups; see :class:`RowNorm`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.0).
        momentum: Decay of the momentum average (default: 0.95).
        order: ``"row_then_polar"`` (default) or ``"polar_then_row"``.
        row_mode: How rows are normalized, see :class:`RowNorm` (default: ``"inverse_eps"``).
        side: ``"right"`` (default) or ``"left"``: the Gram matrix that ``polar="inverse_root"``
            takes where ``eps`` is a number.
        centred: Whether the mean row is taken off wherever it may have come back (default: False).
            A weight of one row then has no step.
        axis: ``"rows"`` (default), or ``"cols"``: columns of W take the part of rows, as neurons of
            a down projection do.
        pair: Gate and up with one row for each neuron, see :class:`RowNorm`; None (default): rows
            as they are.
        polar: As in :class:`Spectral` (default: ``"auto"``).
        ns_steps: As in :class:`Spectral` (default: None).
        eps: Damping of ``"inverse_root"``, see :class:`Spectral` (default: None).
        row_eps: Added to lengths of rows. None (default): ``eps`` and, where that is None too, the
            smallest normal number, so that the size of the gradient does not matter.
        alpha: Power of nu = <Y, polar(Y)> that multiplies U (default: 0.0). Published: 1, with
            which a 3072 x 1024 Gaussian moves by an RMS of 30 lr.
        adjust_lr_fn: ``"match_rms_adamw"`` (default), or ``"none"``: s = nu^alpha, as published.
        rms_target: Root mean square of a step under ``"match_rms_adamw"`` (default: 0.2).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, ``alpha`` without ``adjust_lr_fn="none"``, ``pair``
            with ``axis="cols"``, an unknown group key, or a parameter that is no matrix under
            ``rule="Hybrid"``.
        TypeError: For an unknown keyword.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Peak temporary memory: six matrices,
    for ``"inverse_root"`` ten.

    Caveat: the second map undoes some of the first: rows of a polar factor of a tall matrix differ
    in length again.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Hybrid
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Hybrid(model, lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        order: str = "row_then_polar",
        row_mode: str = "inverse_eps",
        side: str = "right",
        centred: bool = False,
        axis: str = "rows",
        pair: str | None = None,
        polar: str = "auto",
        ns_steps: int | None = None,
        eps: float | None = None,
        row_eps: float | None = None,
        alpha: float = 0.0,
        adjust_lr_fn: str = "match_rms_adamw",
        rms_target: float = 0.2,
        **options: Unpack[Common],
    ) -> None:
        rule = HybridRule(
            momentum=momentum,
            order=order,
            row_mode=row_mode,
            side=side,
            centred=centred,
            axis=axis,
            pair=pair,
            polar=polar,
            ns_steps=ns_steps,
            eps=eps,
            row_eps=row_eps,
            alpha=alpha,
            adjust_lr_fn=adjust_lr_fn,
            rms_target=rms_target,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
