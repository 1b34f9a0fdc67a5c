"""RowNorm: momentum whose rows are brought to one length, optionally centred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .. import kernels
from ..kernels import Stack, row_norm
from ._core.rule import (
    LOCAL_REDUCTIONS,
    Deferred,
    Direction,
    Member,
    Scaled,
    Term,
    WriteScalars,
)
from ._core.validation import check_choices, check_eps
from ._driver.optimizer import StackedOptimizer
from ._toolkit.row_rules import (
    ROW_MODES,
    RowRule,
    averaged,
    in_range,
    join_pairs,
    kernel_eps,
    largest_of_rows,
    range_scale,
    row_factors,
    split_pairs,
    unit_range,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class RowNormRule(RowRule):
    """M <- momentum M + (1 - momentum) G; U_i = M_i / |M_i|; centred: U = C rownorm(C M)."""

    row_mode: str = "inverse_eps"
    eps: float | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, row_mode=ROW_MODES)
        check_eps(self)

    @override
    def update(self, *members: Member) -> tuple[Direction, ...]:
        """One step for a stack, by one kernel where rows do not depend on each other."""
        w = members[0]
        G, M = w.grad, w.state.get("momentum_buffer")  # (K, m, n)
        if not (self.rows_are_independent and w.reductions.has_whole_rows) or G is None:
            return super().update(*members)
        matches_rms = self.adjust_lr_fn == "match_rms_adamw"
        length = self.rms_target * self.row_entries(w) ** 0.5 if matches_rms else 1.0
        return (w.step(RowStep(M, G, self.momentum, self.eps, self.row_mode, length, w.finite)),)

    @property
    def rows_are_independent(self) -> bool:
        """Whether the step of a row of the weight takes nothing from other rows."""
        return not self.centred and self.pair is None and self.row_mode != "relative"

    @property
    def squares(self) -> str | None:  # type: ignore[override]
        """Row norms come with the momentum, unless the mean row has to be taken off first."""
        return None if self.centred else "rows"

    @override
    def terms(
        self, ws: Sequence[Member], Ms: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> list[Term]:
        """Without centring the buffer itself is scaled, so nothing of its size is made."""
        if self.centred:
            return super().terms(ws, Ms, squares)
        w, layout = ws[0], self.pair
        found: Sequence[Tensor] = [s for s in squares if s is not None]
        if w.reductions is not LOCAL_REDUCTIONS:  # so no pairs
            M, scale = self.rows_on_shards(Ms[0], w, found[0])
            if self.adjust_lr_fn == "match_rms_adamw":
                scale = scale * (self.rms_target * self.row_entries(w) ** 0.5)
            return [Scaled(M, scale)]
        if self.eps is None:
            Ms, found = with_exact_squares(Ms, found)
        pair_squares = torch.cat([join_pairs(s, layout) for s in found], -1)
        scale = self.row_scales(pair_squares.sum(-1, keepdim=True), w)  # (K, m, 1)
        if self.adjust_lr_fn == "match_rms_adamw":
            scale = scale * (self.rms_target * self.row_entries(w, len(ws)) ** 0.5)
        if layout in ("halves", "interleaved"):  # one for the gate's row, one for the up row
            scale = split_pairs(scale.expand(-1, -1, 2), layout)
        return [Scaled(M, scale) for M in Ms]

    def rows_on_shards(
        self, M: Tensor, w: Member, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """M (K, m, n), and the factors (K, m, 1) that bring its rows to norm 1.

        Squares of float32 numbers are summed in float64, which holds them all, since ranks that
        scale by their own largest entries would add numbers of different units.

        Args:
            M: What this rank holds.
            w: The member, for its reductions.
            squares: Squared norms of the parts of rows in M, where they are known.
        """
        if self.eps is not None:
            squares = kernels.squares(M, -1) if squares is None else squares
            return M, self.row_scales(w.reductions.cols(squares), w)
        norms = torch.linalg.vector_norm(M, dim=-1, keepdim=True, dtype=torch.float64)
        factors = self.row_scales(w.reductions.cols(norms.square()), w)
        dtype = torch.promote_types(M.dtype, torch.float32)
        sizes = torch.where(factors > 0, 1 / factors, 0.0).clamp(max=torch.finfo(dtype).max)
        scale = range_scale(sizes.to(dtype))
        return (M, factors.to(dtype)) if scale is None else (M * scale, (factors / scale).to(dtype))

    @override
    def centered_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """One operation for both centrings and the norms, unless rows lie on several shards."""
        if w.reductions is not LOCAL_REDUCTIONS:
            return super().centered_map(X, w)
        if self.eps is None and X.device.type == "cpu":
            X = unit_range([X])[0]
        return row_norm(X, kernel_eps(self.eps), self.row_mode, self.centred), None

    @override
    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """Rows of X (K, m, n) at norm 1: only centred rows on shards come here."""
        X, factors = self.rows_on_shards(X, w)
        return X * factors, None

    def row_scales(self, squares: Tensor, w: Member) -> Tensor:
        """Factors (K, m, 1) that bring rows of these squared norms (K, m, 1) to norm 1."""
        return row_factors(squares, self.row_mode, self.eps, w.reductions, self.row_count(w))


class RowNorm(StackedOptimizer):
    """RowNorm: every row of the momentum at one length; AdamW for everything that is not a matrix.

    For each matrix W (m x n) with gradient G, C X = X less the mean of its rows::

        M <- momentum M + (1 - momentum) G
        U_i = M_i / (|M_i| + eps)              row i = 1 ... m
        U   = C rownorm(C M)                   if centred: before and after, see below
        W <- (1 - lr * weight_decay) W         decay with the bare lr
        W <- W - lr * s * U                    s = 0.2 / rms of the rows of U that are not zero

    The map commutes with permutations of the rows, bit for bit unless centred, and with orthogonal
    maps of the columns; positive scaling of single rows leaves U as it is, unless centred. So the
    method fits rows that are tokens, neurons or experts, which may change places, over a residual
    stream, which may be rotated. ``centred`` fits rows to which one vector can be added without a
    change of the loss, as those of a softmax: U then never moves their mean. Centring once would
    not do, since rows of equal length have a mean again.

    Source: *Symmetry-Compatible Principle for Optimizer Design: Embeddings, LM Heads, SwiGLU MLPs,
    and MoE Routers*, arXiv 2605.18106, whose published steps are tested (``eps=1e-8,
    adjust_lr_fn="none"``). ``"relative"`` and the match of the RMS are additions.

    Args:
        params: A module, (named) parameters or groups. Where a module or names send embeddings
            and heads to AdamW, a group with ``rule="RowNorm"``, or :class:`SymmetryStack`, brings
            them here.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.0).
        momentum: Decay of the momentum average (default: 0.95).
        row_mode: ``"inverse_eps"`` (default) as above; ``"inverse"`` or ``"unit"``: divide by
            max(|M_i|, eps); ``"relative"``: by |M_i| + 0.01 times the root mean square length,
            so that rows which got no gradient for long fade, instead of moving at full speed.
        centred: Whether the mean row is taken off M and off U (default: False). A weight of one
            row then has no step.
        axis: ``"rows"`` (default), or ``"cols"``: columns of W take the part of rows.
        pair: One row for each neuron of gate and up together: ``"members"``, two parameters in turn
            in the group; ``"halves"``, one parameter with the gate's rows first;
            ``"interleaved"``, one with their rows in turn. None (default): rows as they are.
        eps: Added to |M_i|. None (default): the smallest normal number of the dtype of the norms,
            so that the size of the gradient does not matter. Published: 1e-8, which stops rows
            whose gradients are that small.
        adjust_lr_fn: ``"match_rms_adamw"`` (default), or ``"none"``: s = 1, as published.
        rms_target: Root mean square of a step under ``"match_rms_adamw"`` (default: 0.2).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, ``pair`` with ``axis="cols"``, an unknown group key,
            or a parameter that is no matrix under ``rule="RowNorm"``.
        TypeError: For an unknown keyword.

    State: ``momentum_buffer`` (like W, float32; none at ``momentum=0``) and ``step``. Peak
    temporary memory: half a matrix, two if centred, three if centred pairs.

    Caveat: rows are scaled each by itself, so rows that all point one way stay alike. A zero row
    stays; every other row moves by the same length, however small its gradient. On an accelerator
    a row whose squares vanish (float32: length below 1e-19) counts as zero; on a CPU it does so
    beside larger rows of its matrix, and only if ``centred``, ``"relative"`` or with ``pair``.

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
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        row_mode: str = "inverse_eps",
        centred: bool = False,
        axis: str = "rows",
        pair: str | None = None,
        eps: float | None = None,
        adjust_lr_fn: str = "match_rms_adamw",
        rms_target: float = 0.2,
        **options: Unpack[Common],
    ) -> None:
        rule = RowNormRule(
            momentum=momentum,
            row_mode=row_mode,
            centred=centred,
            axis=axis,
            pair=pair,
            eps=eps,
            adjust_lr_fn=adjust_lr_fn,
            rms_target=rms_target,
        )
        super().__init__(params, rule, lr, weight_decay, **options)


@dataclass(frozen=True, eq=False)
class RowStep(Deferred):
    """Rows of the momentum at one length, computed only when the weight is written; M moves then.

    Attributes:
        M: (K, m, n), the buffer, or None where momentum is 0.
        G: (K, m, n), the gradient.
        momentum: Decay of M.
        eps: See :func:`row_factors`.
        mode: See :func:`row_factors`, but not ``"relative"``, which needs all rows first.
        length: Norm of the rows.
        finite: None, or flags (K,): where one is 0, M stays.
    """

    accepts_list: ClassVar[bool] = True
    M: Tensor | None
    G: Tensor
    momentum: float
    eps: float | None
    mode: str
    length: float = 1.0
    finite: Tensor | None = None

    @override
    def materialize(self) -> Scaled:
        U, scale = self.unit_rows()
        return Scaled(U, scale if self.length == 1.0 else scale * self.length)

    def unit_rows(self) -> tuple[Tensor, Tensor]:
        """The new momentum U (K, m, n), and the factors (K, m, 1) that bring its rows to norm 1."""
        U, squares = averaged(self.M, self.G, self.momentum, "rows", self.finite)
        assert squares is not None
        if self.eps is None and squares.device.type == "cpu":
            tiny = torch.finfo(squares.dtype).tiny
            if in_range(squares, *exact_squares(squares.dtype)):  # no row is zero, tiny or huge
                return U, kernels.row_factors(squares, self.mode, tiny)
            U, squares = times_scale(U, squares, range_scale(largest_of_rows(U)))
        return U, kernels.row_factors(squares, self.mode, kernel_eps(self.eps))

    @override
    def fused_write_(self, W: Stack, by: WriteScalars, other: Term | None = None) -> bool:
        """One pass over M, or two where W is a list or rows lie across the memory.

        In two passes the sums of rows come first; W is not copied into a stack.
        """
        if other is not None:
            return False
        M = self.M
        is_column_major = self.G.stride(-1) != 1 or (M is not None and M.stride(-1) != 1)
        if M is None or is_column_major or not isinstance(W, Tensor):
            return self.materialized.fused_write_(W, by)
        keep, alpha, control, rounding = by.scale_alpha(self.length)
        if self.eps is None and not kernels.fuses_passes(W):
            U, row_scales = self.unit_rows()
            kernels.scaled_add_(W, U, row_scales, keep, alpha, control, rounding=rounding)
            return True
        eps = kernel_eps(self.eps)
        kernels.row_step_(
            W,
            M,
            self.G,
            self.momentum,
            eps,
            self.mode,
            keep,
            alpha,
            control,
            rounding=rounding,
        )
        return True


@lru_cache
def exact_squares(dtype: torch.dtype) -> tuple[float, float]:
    """Between which bounds a sum of squares in this dtype has lost nothing.

    The upper one leaves room for sums over as many rows as there may be.
    """
    info = torch.finfo(dtype)
    return info.tiny / info.eps**2, info.max * info.eps


def with_exact_squares(
    Ms: Sequence[Tensor], squares: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Momentum (K, m, n) and its squared row norms (K, m, 1), scaled where squares leave the range.

    Squares of float32 entries below 1e-19 lose bits and those above 1e19 overflow, but the
    direction of a row does not depend on its scale. An accelerator would have to wait for the
    answer, so there nothing is scaled.
    """
    if squares[0].device.type != "cpu" or squares[0].numel() == 0:
        return Ms, squares
    largest = reduce(torch.maximum, (s.amax(-2) for s in squares))
    if in_range(largest, *exact_squares(largest.dtype)):
        return Ms, squares
    Ms = unit_range(Ms)
    return Ms, [kernels.squares(M, -1) for M in Ms]


def times_scale(M: Tensor, squares: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """M (K, m, n) and its squared row norms (K, m, 1), times powers of two where they are not 1."""
    if scale is None:
        return M, squares
    scaled = M * scale
    return scaled, torch.where(scale == 1, squares, kernels.squares(scaled, -1))
