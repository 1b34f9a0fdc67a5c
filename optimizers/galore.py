"""GaLore: Adam inside the leading singular subspace of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._core.rule import Direction, Member
from ._core.validation import check, check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.base_optimizers import BaseOptimizer, make_base_optimizer
from ._toolkit.lowrank import LowRankRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class GaLoreRule(LowRankRule):
    """P <- top left singular vectors of G every T steps; step along P N, N = adam(P^T G)."""

    scale: float = 0.25
    inner: str = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, inner=("adamw", "adafactor", "lion"))
        plain, mixes = self.inner == "adamw", self.moments in ("rotate", "ldadam")
        check(plain or not self.published, "compat='reference' has inner='adamw'")
        check(
            not (self.inner == "adafactor" and self.proj_type == "full" and mixes),
            f"inner='adafactor' has averages per side that moments={self.moments!r} cannot turn on "
            "both sides: use moments='keep' or 'reset' with proj_type='full'",
        )

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The optimizer that runs on R."""
        return make_base_optimizer(self.inner, self.betas, self.adam_eps())

    def update(self, w: Member) -> Direction:
        """One step for a stack; after turning, rows are projected."""
        assert w.grad is not None
        P = self.projector
        R = P.project(w.state, w.grad, w.reductions)  # (K, r, n); P^T G Q is (K, r, r)
        lift, factor = self.lifted_term(w, R)  # P N; P N Q^T
        return w.step(lift, lr_factor=self.scale * factor, decay_last=self.published)


class GaLore(StackedOptimizer):
    """GaLore: Adam's moments in a low-rank subspace of the gradient, weights in full rank.

    For each matrix W with gradient G (m x n, turned so that m <= n under ``"std"``)::

        every T steps:  P <- r leading left singular vectors of G           m x r
        R  = P^T G                                                          r x n
        M, V <- Adam's moments of R;   N = Mhat / (sqrt(Vhat) + eps)
        W <- (1 - lr * weight_decay) W
        W <- W - lr * scale * P N

    Source: *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*,
    arXiv 2403.03507.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`. The groups
            of galore-torch work as they are: where some group names ``rank``, the others are AdamW.
        lr: Learning rate (default: 1e-3). Projected weights move by lr * scale, others by lr.
        betas: Decays of the moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root; None: 1e-8, under ``compat`` 1e-6.
        weight_decay: Decoupled weight decay (default: 0).
        rank: Columns of P: an int is a count, a float a fraction of the projected side
            (default: 128). Never more than the smaller side.
        update_proj_gap: Steps between two bases, T (default: 200).
        scale: Multiplies lr for projected weights (default: 0.25).
        proj_type: Which side is projected: ``"std"`` the shorter one (the right one of a square),
            ``"reverse_std"`` the longer one (less state), ``"right"``, ``"left"``, or ``"full"``
            both.
        projection: How P is found: ``"svd"`` (Gram matrix and eigh, signs fixed), ``"svd_full"``
            (thin SVD), ``"range"``, ``"power"``, ``"random"``, or rows ``"randk"``, ``"topk"`` and
            cosines ``"dct"``, which store r numbers and no basis; see ``projectors``.
        moments: At a new basis: ``"keep"`` them as published, ``"reset"`` them and their clock,
            ``"rotate"`` them into it, the same by ``"ldadam"``'s second moment, or ``"match"``
            rows of equal index (randk, topk and dct only; there all three agree).
        inner: What runs on R: ``"adamw"`` (default); ``"lion"``, whose own betas are (0.9, 0.99),
            with an lr some ten times smaller; or ``"adafactor"``, which keeps averages of R*R per
            row and column and, unless the first beta is 0, a first moment.
        correct_bias: False only under ``compat="reference"``.
        compat: ``"reference"`` has the order of the published code: eps on the uncorrected root,
            decay after the step, LAPACK's signs.
        seed: Decides the draws of range, power, random and randk (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State of an m x n weight, m <= n, in elements: ``basis`` m r, ``exp_avg`` and ``exp_avg_sq``
    r n each (float32), ``step`` and ``refreshed``; ``"full"``: r (m + n) + 2 r^2. randk, topk and
    dct keep ``index``, r int32, for the basis. Lion has no ``exp_avg_sq``; Adafactor has
    ``exp_avg_sq_row`` r and ``exp_avg_sq_col`` n for it. AdamW keeps 2 m n.
    Peak temporary memory: buffers r x n and panels.

    What it is not: a change of the gradient's or the weight's memory. Kept moments are read in new
    coordinates after a refresh, as published; ``"rotate"`` mends that.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import GaLore
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = GaLore(model, lr=1e-2, rank=2, update_proj_gap=50)
        >>> loss = model(torch.ones(2, 8)).square().mean()
        >>> loss.backward()
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
        rank: int | float = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projection: str = "svd",
        moments: str = "keep",
        correct_bias: bool = True,
        compat: str | None = None,
        seed: int = 0,
        inner: str = "adamw",
        **options: Unpack[Common],
    ) -> None:
        rule = GaLoreRule(
            betas,
            eps,
            rank,
            update_proj_gap,
            proj_type,
            projection,
            moments,
            correct_bias,
            compat,
            seed,
            scale,
            inner,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
