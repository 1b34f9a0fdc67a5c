"""Fira: GaLore's step, and the residual of its projection scaled as Adam scales the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ._core.rule import LOCAL_REDUCTIONS, Direction, Member, Scaled, Slot
from ._core.validation import check, check_choices, check_flags, check_numbers
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adam_scale import NORM_EPS, column_factors, matrix_factor, norm_growth_limiter
from ._toolkit.lowrank import LowRankRule
from ._toolkit.moments import column_squares, total

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class FiraRule(LowRankRule):
    """S = phi (G - P R), limited in growth, beside GaLore's P N; phi_i = |N_i| / |R_i|, bounded."""

    alpha: float = 0.25
    variant: str = "reference"
    scaling: str = "column"
    limiter: bool = True
    gamma: float = 1.01
    limiter_floor: float = NORM_EPS

    reads_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, variant=("reference", "paper"), scaling=("column", "matrix"))
        check_numbers(self, alpha="(-inf, inf)", gamma="[1, inf]", limiter_floor="[0, inf)")
        check_flags(self, "limiter")
        check(
            self.variant == "reference" or not self.published,
            "compat='reference' is the published code; it has variant='reference'",
        )

    @override
    def update(self, w: Member) -> Direction:
        """R = P^T G; N = adam(R); S = phi (G - a P R), limited; step along a P N + S.

        One lift makes both, since phi scales columns and so commutes with it:
        a P N + S = a P (N - phi R) + phi G.
        """
        assert w.grad is not None
        P = self.projector
        G = w.grad
        # (K, r, n) and (K, 1, n); with a basis on both sides R = P^T G Q is (K, r, r)
        R, G_squares = P.project_with_squares(w.state, G, w.reductions, w.squares)
        N, factor = self.direction(w, R)
        if factor != 1.0:
            N.mul_(factor)

        # the published code has alpha inside the residual, not before the sum of both parts
        in_paper = self.variant == "paper"
        a = 1.0 if in_paper else self.alpha
        lr_factor = self.alpha if in_paper else 1.0
        phi, S_norm = self.residual_scale(w, R, N, G_squares, a)
        if self.limiter:
            # the published code limits S before it corrects the bias
            norm = S_norm if in_paper else S_norm / self.bias_factor(w)
            floor = None if self.published else self.limiter_floor
            phi = phi / norm_growth_limiter(
                norm, w.state["limiter_norm"], self.gamma, floor, w.finite
            )

        lift = P.lift(w.state, N.addcmul_(R, phi, value=-1).mul_(a), w.m)
        return w.step(lift, Scaled(G, phi), lr_factor=lr_factor, decay_last=self.published)

    def residual_scale(
        self, w: Member, R: Tensor, N: Tensor, G_squares: Tensor, a: float
    ) -> tuple[Tensor, Tensor]:
        """Compute phi and |phi (G - a P R)|, by Pythagoras, so the difference is never formed.

        Args:
            w: The member, for its reductions.
            R: (K, r, n), the projected gradient.
            N: (K, r, n), Adam's direction.
            G_squares: (K, 1, n), squared norms of the columns of G.
            a: Factor of P R.

        Returns:
            phi: (K, 1, n), or (K, 1, 1) where the whole matrix has one factor.
            norm: (K, 1, 1).
        """
        both_sides = self.proj_type == "full"
        # a projection on both sides leaves R whole on every rank
        cols = LOCAL_REDUCTIONS.cols if both_sides else w.reductions.cols
        squares = (column_squares(N), column_squares(R), G_squares)
        _, R_squares, _ = squares
        totals = (
            cols(total(squares[0])),
            cols(total(R_squares)),
            w.reductions.cols(total(G_squares)),
        )
        if self.published:
            N_sums, R_sums, _ = squares if self.by_column else totals
            phi = N_sums.sqrt() / (R_sums.sqrt() + NORM_EPS)
        elif self.by_column:
            phi = column_factors(*squares, *totals, N.shape[-2], w.m, w.n)
        else:
            longest = w.reductions.most(G_squares.amax(-1, True)) if both_sides else G_squares
            N_count = N.shape[-2] * (N.shape[-1] if both_sides else w.n)
            phi = matrix_factor(*totals, longest, N_count, w.m * w.n)

        if both_sides or (self.published and not self.by_column):  # one factor for the matrix
            _, R_squares, G_squares = totals
            cols = LOCAL_REDUCTIONS.cols
        phi_squares = phi.square()
        S_total = cols(total(phi_squares * (G_squares - (2 * a - a * a) * R_squares)))
        phi_G_total = cols(total(phi_squares * G_squares))
        # a difference that cancelled is round-off, not a residual
        noise = 0.0 if self.published else 64 * torch.finfo(S_total.dtype).eps
        return phi, S_total.masked_fill(S_total < noise * phi_G_total, 0.0).sqrt()

    @property
    def by_column(self) -> bool:
        """Whether every column has a factor of its own."""
        return self.scaling == "column" and self.proj_type != "full"

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        slots = super().state(m, n)
        if self.limiter:
            slots["limiter_norm"] = Slot("11", fill=-1.0)  # below zero: no step yet
        return slots


class Fira(StackedOptimizer):
    """Fira: GaLore, and the residual of its projection at the scale that Adam gives the rest.

    For each matrix W with gradient G (m x n, transposed so that m <= n under ``"std"``)::

        R = P^T G;  psi = M / (sqrt(V) + eps) with Adam's moments of R, c its bias correction
        phi_i = |psi_i| / max(|R_i|, b |G_i|), a factor per column;  S = phi (G - alpha P R)
        S <- S / L,  L >= 1 so that |S| grows by at most gamma
        W <- (1 - lr * weight_decay) W - lr * c * (alpha P psi + S)

    b = sqrt(r) / min(3 sqrt(m), 96) bounds what a column that P nearly misses can add: the root
    mean square of phi_i G_i is at most 3 times that of psi_i, and |phi_i G_i| at most 96 times. So
    none of the first steps moves an entry by more than about 100 lr, whatever the scale of G. A
    column with no part in R takes the mean of |psi_i|^2 and |R_i|^2 over all columns for its own.

    Source: *Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?* arXiv 2410.01623.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
            Groups of the package ``fira`` work as they are: where some group names ``rank``, the
            groups without it are AdamW.
        lr: Learning rate (default: 1e-3).
        betas: Decays of the two moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: None). None is 1e-8, and 1e-6 under
            ``compat="reference"``.
        weight_decay: Decoupled weight decay (default: 0.0).
        rank: Columns r of P (default: 128). An int is a count, a float a fraction of the projected
            side; never more than the smaller side.
        update_proj_gap: Steps between two bases (default: 200).
        alpha: Size of the projected part (default: 0.25), see ``variant``.
        proj_type: Projected side, as in :class:`GaLore` (default: ``"std"``). ``"full"`` always has
            the scaling ``"matrix"``.
        variant: Published code or paper (default: ``"reference"``). ``"reference"`` is the
            algorithm above. ``"paper"`` has S = phi (G - P R) and N = c psi in place of psi, and W
            moves by lr * alpha * (P N + S).
        scaling: Which norms make phi (default: ``"column"``). ``"matrix"`` has one factor
            |psi| / |R|, bounded by norms of the whole matrix; a column that would be longer than
            96 times the root mean square of psi gets less.
        limiter: Whether the growth of |S| is limited (default: True).
        gamma: Largest growth of |S| in one step (default: 1.01).
        limiter_floor: A norm of S up to this does not limit the next step (default: 1e-8).
        projection: How P is found, as in :class:`GaLore` (default: ``"svd"``).
        moments: What a new basis does to the moments, as in :class:`GaLore` (default: ``"keep"``).
        correct_bias: Whether c is applied (default: True). False (c = 1) is allowed only under
            ``compat="reference"``; with betas (0, b) it is the published RMSProp form.
        compat: ``"reference"`` repeats the published code (default: None): its order, eps, decay
            after the step and LAPACK's signs, without the bounds of phi and the guards against
            round-off. It differs from the package ``fira`` where that takes norms along the wrong
            side, which it guesses from the shape of R: ``proj_type="left"`` of a square weight at
            full rank (here: columns, as ever). ``"full"`` and ``"reverse_std"`` with r >= n, which
            crash there, work.
        seed: Decides the draws of random projections (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range or settings that exclude each other.
        TypeError: For an unknown keyword.

    State of an m x n weight, m <= n: ``basis`` (m, r), ``exp_avg`` and ``exp_avg_sq`` (r, n),
    ``limiter_norm`` (1, 1). Under ``state_dtype="int8"`` moments and basis are stored, and the
    basis decoded, as in :class:`GaLore`. Peak temporary memory: buffers of r x n elements, and
    panels; in a refresh and with 8 bits as :class:`GaLore`.

    Caveat: paper and published code differ. In the code alpha shrinks what is subtracted but not S,
    so S contains 1 - alpha of the projected gradient and weighs 1 / alpha times more, and |S| is
    limited before c. Both agree at alpha = 1 without limiter. |S| comes from a difference of
    squares: unless ``compat`` is set, a norm below 0.3 % of |phi G| (in float32) counts as zero.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Fira
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Fira(model, lr=1e-2, rank=2, update_proj_gap=50)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _reference_key = "rank"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: str = "std",
        variant: str = "reference",
        scaling: str = "column",
        limiter: bool = True,
        gamma: float = 1.01,
        limiter_floor: float = NORM_EPS,
        projection: str = "svd",
        moments: str = "keep",
        correct_bias: bool = True,
        compat: str | None = None,
        seed: int = 0,
        **options: Unpack[Common],
    ) -> None:
        rule = FiraRule(
            betas=betas,
            eps=eps,
            rank=rank,
            update_proj_gap=update_proj_gap,
            alpha=alpha,
            proj_type=proj_type,
            variant=variant,
            scaling=scaling,
            limiter=limiter,
            gamma=gamma,
            limiter_floor=limiter_floor,
            projection=projection,
            moments=moments,
            correct_bias=correct_bias,
            compat=compat,
            seed=seed,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
