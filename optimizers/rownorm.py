"""RowNorm: momentum whose rows are brought to one length, if wanted centred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import row_norm
from ._core.rule import LOCAL_REDUCTIONS, Direction, Member, Scaled, Term
from ._core.validation import check, check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.row_rules import (
    ROW_MODES,
    RowRule,
    RowStep,
    join_pairs,
    row_factors,
    row_squares,
    split_pairs,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class RowNormRule(RowRule):
    """M <- mu M + (1 - mu) G; U_i = M_i / |M_i|; centred: less the mean row, before and after."""

    row_mode: str = "inverse_eps"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, row_mode=ROW_MODES)
        check(self.eps >= 0.0, f"Invalid epsilon value: {self.eps}")

    @property
    def squares(self) -> str | None:  # type: ignore[override]
        """Row norms come with the momentum."""
        return None if self.centred else "rows"

    def update(self, *members: Member) -> tuple[Direction, ...]:
        """One step for a stack, by one kernel where rows do not depend on each other."""
        w = members[0]
        G, M = w.grad, w.state["momentum_buffer"]
        rows_independent = not self.centred and self.pair is None and self.row_mode != "relative"
        if not rows_independent or w.reductions is not LOCAL_REDUCTIONS or G is None:
            return super().update(*members)
        matches_rms = self.adjust_lr_fn == "match_rms_adamw"
        length = self.rms_target * self.row_entries(w) ** 0.5 if matches_rms else 1.0
        return (w.step(RowStep(M, G, self.momentum, self.eps, self.row_mode, length, w.finite)),)

    def terms(
        self, ws: Sequence[Member], Ms: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> list[Term]:
        """Without centring the buffer itself is scaled, so nothing of its size is made."""
        if self.centred:
            return super().terms(ws, Ms, squares)
        w, layout = ws[0], self.pair
        pair_squares = [join_pairs(s, layout) for s in squares if s is not None]
        by = self.row_scales(torch.cat(pair_squares, -1).sum(-1, keepdim=True), w)  # (K, m, 1)
        if self.adjust_lr_fn == "match_rms_adamw":
            by = by * (self.rms_target * self.row_entries(w, len(ws)) ** 0.5)
        if layout in ("halves", "interleaved"):  # one for the gate's row, one for the up row
            by = split_pairs(by.expand(-1, -1, 2), layout)
        return [Scaled(M, by) for M in Ms]

    def centered_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """One operation, but for the sums of shards."""
        if w.reductions is not LOCAL_REDUCTIONS:
            return super().centered_map(X, w)
        return row_norm(X, self.eps, self.row_mode, self.centred), None

    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """Rows of X (K, m, n) at norm 1; only asked for where rows are centred."""
        return X.mul_(self.row_scales(row_squares(X, w.reductions), w)), None

    def row_scales(self, squares: Tensor, w: Member) -> Tensor:
        """What rows of these squared norms (K, m, 1) are multiplied by."""
        return row_factors(squares, self.row_mode, self.eps, w.reductions, self.row_count(w))


class RowNorm(StackedOptimizer):
    """RowNorm: every row of the momentum at one length; AdamW for what is no matrix.

    For each matrix W (m x n) with gradient G, C X = X less the mean of its rows::

        M <- momentum M + (1 - momentum) G
        U_i = M_i / (|M_i| + eps)              row i = 1 ... m
        U   = C rownorm(C M)                   if centred: before and after, see below
        W <- (1 - lr * weight_decay) W         decay with the bare lr
        W <- W - lr * s * U                    s = 0.2 / rms of the rows of U that are not zero

    What it commutes with: permutations of the rows, bit for bit unless centred, and orthogonal maps
    of the columns; positive scaling of single rows leaves U as it is, unless centred. So it fits
    rows that are tokens, neurons or experts, which may change places, over a residual stream, which
    may be rotated. ``centred`` fits rows to which one vector can be added without a change of the
    loss, as those of a softmax: U then never moves their mean. Centring once would not do, since
    rows of equal length have a mean again.

    Sources: *Symmetry-Compatible Principle for Optimizer Design: Embeddings, LM Heads, SwiGLU MLPs,
    and MoE Routers*, arXiv 2605.18106, whose published steps are tested (``adjust_lr_fn="none"``).
    ``"relative"`` and the match of the RMS are additions.

    Args:
        params: A module, (named) parameters or groups. Where a module or names send embeddings
            and heads to AdamW, a group with ``rule="RowNorm"``, or :class:`SymmetryStack`, brings
            them here.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0).
        momentum: Decay of the momentum average (default: 0.95).
        row_mode: ``"inverse_eps"`` (default) as above; ``"inverse"`` or ``"unit"``: divide by
            max(|M_i|, eps); ``"relative"``: by |M_i| + 0.01 times the root mean square length,
            so that rows which got no gradient for long fade, instead of moving at full speed until
            eps stops them hundreds of steps later.
        centred: Take the mean row off M and off U (default: False).
        axis: ``"rows"`` (default), or ``"cols"``: columns of W take the part of rows.
        pair: One row for each neuron of gate and up together: ``"members"``, two parameters in turn
            in the group; ``"halves"``, one parameter with the gate's rows first;
            ``"interleaved"``, one with their rows in turn. None (default): rows as they are.
        eps: Added to |M_i| (default: 1e-8).
        adjust_lr_fn: ``"match_rms_adamw"`` (default), or ``"none"``: s = 1, as published.
        rms_target: That root mean square (default: 0.2).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Peak temporary memory: half a matrix,
    two if centred, three if centred pairs.

    What it is not: aware of how rows lie to each other; rows that all point one way are not
    spread. A zero row stays, every other row moves by the same length, however small its gradient.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import RowNorm
        >>> table = torch.nn.Embedding(10, 4)
        >>> optimizer = RowNorm([{"params": table.parameters(), "rule": "RowNorm"}], lr=1e-3)
        >>> table(torch.tensor([1, 2])).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        row_mode: str = "inverse_eps",
        centred: bool = False,
        axis: str = "rows",
        pair: str | None = None,
        eps: float = 1e-8,
        adjust_lr_fn: str = "match_rms_adamw",
        rms_target: float = 0.2,
        **options: Unpack[Common],
    ) -> None:
        rule = RowNormRule(momentum, centred, axis, pair, adjust_lr_fn, rms_target, row_mode, eps)
        super().__init__(params, rule, lr, weight_decay, **options)
