"""APOLLO: the gradient itself, scaled by what Adam makes of a random projection of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ._core.rule import Direction, Member, Scaled, Slot
from ._core.validation import check, check_choices, check_flags, check_numbers, shown
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adam_scale import NORM_EPS, column_factors, matrix_factor, norm_growth_limiter
from ._toolkit.lowrank import LowRankRule
from ._toolkit.moments import column_squares, total

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

BY_COLUMN, BY_MATRIX = ("channel", "column"), ("tensor", "matrix")
BLIND = ("random", "gaussian")


@dataclass(frozen=True)
class APOLLORule(LowRankRule):
    """Step along phi G, limited in growth; phi_i = |N_i| / |R_i| with N = adam(R), R = P^T G."""

    eps: float | None = 1e-8
    rank: int | float = 0.25
    projection: str = "random"
    scaling: str = "channel"
    scale: float | str = 1.0
    scale_front: bool = False
    limiter: bool = True
    gamma: float = 1.01
    limiter_floor: float = NORM_EPS

    lifts: ClassVar[bool] = False
    reads_squares: ClassVar[bool] = True
    published_projections: ClassVar[tuple[tuple[str, ...], str]] = (
        (*BLIND, "svd", "svd_full"),
        "a Gaussian projection or an exact SVD",
    )

    def __post_init__(self) -> None:
        check_choices(self, proj_type=("std", "reverse_std", "right", "left"))
        super().__post_init__()
        check_choices(self, scaling=(*BY_COLUMN, *BY_MATRIX))
        if isinstance(self.scale, str):
            known = self.scale == "auto"
            check(known, f"scale must be 'auto' or a number from 0, got {shown(self.scale)}")
        else:
            check_numbers(self, scale="[0, inf)")
        check_numbers(self, gamma="[1, inf]", limiter_floor="[0, inf)")
        check_flags(self, "scale_front", "limiter")

    @property
    @override
    def projector_kind(self) -> str:
        """The published code's random projection is Gaussian."""
        if self.published and self.projection in BLIND:
            return "gaussian"
        return super().projector_kind

    @override
    def update(self, w: Member) -> Direction:
        """R = P^T G; N = adam(R); step along phi G with phi = |N| / |R|, limited."""
        assert w.grad is not None
        G = w.grad
        # (K, r, n) and (K, 1, n), from one read of G
        R, G_squares = self.projector.project_with_squares(w.state, G, w.reductions, w.squares)
        N, factor = self.direction(w, R)
        r = N.shape[-2]
        phi, norm = self.scale_factors(w, column_squares(N), column_squares(R), G_squares, r)
        root = math.sqrt(self.gain(w.m, r) if isinstance(self.scale, str) else self.scale)
        if self.limiter:
            # the published code limits before it corrects the bias
            norm = norm if self.published else norm / self.bias_factor(w)
            stored = w.state["limiter_norm"]
            floor = None if self.published else self.limiter_floor
            norm = norm * root if self.scale_front else norm
            phi = phi / norm_growth_limiter(norm, stored, self.gamma, floor, w.finite)
        return w.step(Scaled(G, phi), lr_factor=root * factor, decay_last=self.published)

    def scale_factors(
        self, w: Member, N_squares: Tensor, R_squares: Tensor, G_squares: Tensor, r: int
    ) -> tuple[Tensor, Tensor]:
        """Compute phi and |phi G|, from sums of squares alone.

        Args:
            w: The member, for its sides and reductions.
            N_squares: (K, 1, n), squared norms of the columns of Adam's direction.
            R_squares: The same of the projected gradient.
            G_squares: The same of the gradient.
            r: Rows of the projected gradient.

        Returns:
            phi: (K, 1, n), or (K, 1, 1) where the whole matrix has one factor.
            norm: (K, 1, 1).
        """
        squares = N_squares, R_squares, G_squares
        # (K, 1, 3): one sum, and one call of other ranks
        totals = w.reductions.cols(total(torch.cat(squares)).view(3, 1, -1).permute(2, 1, 0))
        N_total, R_total, G_total = torch.split(totals, 1, -1)
        by_column, gain = self.scaling in BY_COLUMN, self.gain(w.m, r)
        if self.published:
            N_sums, R_sums = (N_squares, R_squares) if by_column else (N_total, R_total)
            phi = N_sums.sqrt() / (R_sums.sqrt() + NORM_EPS)
        elif by_column:
            sums = N_total, R_total, G_total
            phi = column_factors(*squares, *sums, r, w.m, w.n, gain=gain, most=math.inf)
        else:
            counts = r * w.n, w.m * w.n
            phi = matrix_factor(N_total, R_total, G_total, None, *counts, gain=gain)
        if not by_column:
            return phi, phi * G_total.sqrt()
        return phi, w.reductions.cols(total(phi.square().mul_(G_squares))).sqrt()

    def gain(self, m: int, r: int) -> float:
        """E|P^T g|^2 over that of an orthonormal P, which ``scale="auto"`` undoes."""
        return 1.0 if self.projector.is_orthonormal else m / r

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        slots = super().state(m, n)
        if self.limiter:
            slots["limiter_norm"] = Slot("11", fill=-1.0)  # below zero: no step yet
        return slots


class APOLLO(StackedOptimizer):
    """APOLLO: steps along the gradient, each column as long as Adam on a projection says.

    For each matrix W with gradient G (m x n, transposed so that m <= n under ``"std"``)::

        every T steps:  P <- random, blind to G                             m x r
        R  = P^T G;  M, V <- Adam's moments of R                            r x n
        N  = M / (sqrt(V) + eps), c its bias correction
        phi_i = |N_i| / |R_i|, a factor per column (or one per matrix);  S = phi G
        S <- S / L,  L >= 1 so that |S| grows by at most gamma
        W <- (1 - lr * weight_decay) W - lr * sqrt(scale) * c * S

    Nothing is lifted: the step has the rank of G, and P is never factorized beyond its own columns.
    phi_i is bounded: the root mean square of phi_i G_i is at most 3 times what the norm of N_i and
    the mean of |R_i| / |G_i| give, so that a column that P nearly misses makes no step of any size.
    APOLLO-Mini is ``APOLLO(params, rank=1, scaling="tensor", projection="gaussian", scale=128)``.

    Source: *APOLLO: SGD-like Memory, AdamW-level Performance*, arXiv 2412.05270, whose published
    steps are tested under ``compat="reference"``. Orthonormal draws and the bounds are additions;
    with both it is :class:`Fira` with ``alpha=0, projection="random"``, less a product.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
            Groups of apollo-torch work as they are: where some group names ``rank``, the groups
            without it are AdamW; ``scale_type`` is read as ``scaling``, ``proj`` as ``projection``
            with ``"random"`` as ``"gaussian"``, which it is there.
        lr: Learning rate (default: 1e-3). AdamW's carries over while ``scale`` fits ``projection``.
        betas: Decays of the two moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: 1e-8). Published: 1e-6, which None means
            under ``compat="reference"``, else 1e-8.
        weight_decay: Decoupled weight decay (default: 0.0).
        rank: Columns r of P (default: 0.25). An int is a count, a float a fraction of the projected
            side; never more than the smaller side.
        update_proj_gap: Steps T between two draws of P (default: 200).
        scaling: Which norms make phi (default: ``"channel"``). ``"tensor"`` has one factor
            |N| / |R| for the matrix. ``"column"`` and ``"matrix"``, as in Fira, are the same.
        projection: How P is found (default: ``"random"``). ``"random"`` has orthonormal columns;
            ``"gaussian"``, as published, entries N(0, 1/r); all kinds of :class:`GaLore` work.
        scale: Its root multiplies the step (default: 1.0). Under ``"gaussian"`` phi is smaller than
            AdamW's scale by sqrt(r / m), which m / r undoes: the published 128 is 4096 / 32.
            ``"auto"`` is m / r under ``"gaussian"``, else 1.
        scale_front: Whether the limiter sees the scaled step (default: False). As the limiter
            compares norms with each other, this changes little.
        proj_type: Projected side (default: ``"std"``), as in :class:`GaLore` but for ``"full"``.
        limiter: Whether the growth of |S| is limited (default: True).
        gamma: Largest growth of |S| in one step (default: 1.01).
        limiter_floor: A norm of S up to this does not limit the next step (default: 1e-8).
        moments: What a new P does to the moments (default: ``"keep"``, as published), as in
            :class:`GaLore`. ``"reset"`` starts them anew. ``"gaussian"`` takes these two.
        correct_bias: Whether c is applied (default: True). False (c = 1) is allowed only under
            ``compat="reference"``.
        compat: ``"reference"`` repeats the published code (default: None): its order, eps on the
            uncorrected root, decay after the step, ``projection="random"`` for ``"gaussian"``, no
            bound of phi, and no floor of the limiter, which a first gradient of zero then stops for
            thousands of steps. ``"left"`` and ``"right"``, where it raises an error, work.
        seed: Decides the draws (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range or settings that exclude each other.
        TypeError: For an unknown keyword.

    State of an m x n weight, m <= n: ``basis`` (m, r), ``exp_avg`` and ``exp_avg_sq`` (r, n),
    ``limiter_norm`` (1, 1), ``step`` and ``refreshed``: for Mini m + 2 n + 1 numbers. Under
    ``state_dtype="int8"`` moments and orthonormal bases are stored as in :class:`GaLore`, a
    ``"gaussian"`` one in float32. Peak temporary memory: two buffers of r x n elements, and panels.

    Caveat: moments that were kept belong to the P before. All entries of a column share one factor,
    so a column with few large entries moves these by up to sqrt(m) times AdamW's step.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import APOLLO
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = APOLLO(model, lr=1e-2, rank=2, update_proj_gap=50)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _reference_key = "rank"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.25,
        update_proj_gap: int = 200,
        scaling: str = "channel",
        projection: str = "random",
        scale: float | str = 1.0,
        scale_front: bool = False,
        proj_type: str = "std",
        limiter: bool = True,
        gamma: float = 1.01,
        limiter_floor: float = NORM_EPS,
        moments: str = "keep",
        correct_bias: bool = True,
        compat: str | None = None,
        seed: int = 0,
        **options: Unpack[Common],
    ) -> None:
        rule = APOLLORule(
            betas=betas,
            eps=eps,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scaling=scaling,
            projection=projection,
            scale=scale,
            scale_front=scale_front,
            proj_type=proj_type,
            limiter=limiter,
            gamma=gamma,
            limiter_floor=limiter_floor,
            moments=moments,
            correct_bias=correct_bias,
            compat=compat,
            seed=seed,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have the keys of apollo-torch."""
        known = isinstance(param_group, Mapping)
        super().add_param_group(with_our_keys(param_group) if known else param_group)


def with_our_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the keys of apollo-torch under our names, which win where both are given."""
    group = dict(group)
    if "scale_type" in group:
        group.setdefault("scaling", group.pop("scale_type"))
    if "proj" in group:
        kind = group.pop("proj")
        group.setdefault("projection", "gaussian" if kind == "random" else kind)
    return group
