"""GaLore: Adam inside the leading singular subspace of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from ._core.rule import Direction, Member
from ._core.validation import check, check_choices, check_numbers
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
        check_numbers(self, scale="(-inf, inf)")
        check_choices(self, inner=("adamw", "adafactor", "lion"))
        check(
            self.inner == "adamw" or not self.published,
            "compat='reference' has inner='adamw'",
        )
        check(
            self.inner != "adafactor"
            or self.proj_type != "full"
            or self.moments not in ("rotate", "ldadam"),
            f"inner='adafactor' has averages per side that moments={self.moments!r} cannot carry "
            "on both sides: use moments='keep' or 'reset' with proj_type='full'",
        )

    @property
    @override
    def base_optimizer(self) -> BaseOptimizer:
        return make_base_optimizer(self.inner, self.betas, self.adam_eps())

    @override
    def update(self, w: Member) -> Direction:
        """R = P^T G; N = adam(R); step along scale * P N. The basis P is made by ``refresh``."""
        assert w.grad is not None
        # (K, r, n); with a basis on both sides R = P^T G Q is (K, r, r)
        R = self.projector.project(w.state, w.grad, w.reductions)
        PN, factor = self.lifted_term(w, R)
        return w.step(PN, lr_factor=self.scale * factor, decay_last=self.published)


class GaLore(StackedOptimizer):
    """GaLore: Adam's moments in a low-rank subspace of the gradient, weights in full rank.

    For each matrix W with gradient G (m x n, transposed so that m <= n under ``"std"``)::

        every T steps:  P <- r leading left singular vectors of G           m x r
        R  = P^T G                                                          r x n
        M, V <- Adam's moments of R;   N = Mhat / (sqrt(Vhat) + eps)
        W <- (1 - lr * weight_decay) W
        W <- W - lr * scale * P N

    Source: *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*,
    arXiv 2403.03507.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
            Groups of galore-torch work as they are: where some group names ``rank``, the groups
            without it are AdamW.
        lr: Learning rate (default: 1e-3). Projected weights move by lr * scale, others by lr.
        betas: Decays of the two moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: None). None is 1e-8, and 1e-6 under
            ``compat="reference"``.
        weight_decay: Decoupled weight decay (default: 0.0).
        rank: Columns r of P (default: 128). An int is a count, a float a fraction of the projected
            side; never more than the smaller side.
        update_proj_gap: Steps T between two bases (default: 200).
        scale: Multiplies lr for projected weights (default: 0.25).
        proj_type: Projected side (default: ``"std"``). ``"std"`` is the shorter side (the right one
            of a square), ``"reverse_std"`` the longer one (less state), ``"right"`` and ``"left"``
            are fixed, ``"full"`` is both.
        projection: How P is found (default: ``"svd"``). ``"svd"`` is the Gram matrix and eigh with
            fixed signs, ``"svd_full"`` the thin SVD; ``"range"``, ``"power"`` and ``"random"`` draw
            random numbers; ``"randk"`` and ``"topk"`` choose rows and ``"dct"`` chooses cosines,
            which store r numbers and no basis.
        moments: What a new basis does to the moments (default: ``"keep"``). ``"keep"`` leaves them,
            as published; ``"reset"`` zeroes them and restarts their clock; ``"rotate"`` carries
            them into the new basis, ``"ldadam"`` does so by LDAdam's rule for the second moment;
            ``"match"`` moves rows of equal index (randk, topk and dct only, where the last three
            are the same).
        inner: Optimizer of R (default: ``"adamw"``). ``"lion"`` has betas (0.9, 0.99) in its paper
            and needs an lr some ten times smaller; ``"adafactor"`` keeps averages of R*R per row
            and column and, unless the first beta is 0, a first moment.
        correct_bias: Whether the moments are bias-corrected (default: True). False is allowed only
            under ``compat="reference"``.
        compat: ``"reference"`` repeats the published code (default: None): eps on the uncorrected
            root, decay after the step, LAPACK's signs.
        seed: Decides the draws of range, power, random and randk (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range or settings that exclude each other.
        TypeError: For an unknown keyword.

    State of an m x n weight, m <= n, in elements: ``basis`` m r, ``exp_avg`` and ``exp_avg_sq``
    r n each (float32), ``step`` and ``refreshed``; ``"full"``: r (m + n) + 2 r^2. randk, topk and
    dct store ``index``, r int32, in place of the basis. Lion has no ``exp_avg_sq``; Adafactor has
    ``exp_avg_sq_row`` r and ``exp_avg_sq_col`` n in its place. AdamW stores 2 m n.
    On a CPU moments of a large transposed weight lie column by column, as the weight itself does.
    ``state_dtype="int8"``: moments take r n bytes each, a basis of 4096 entries or more m r (not
    under ``compat``); their float32 scales one for 256 entries of a row, of the basis of a column.
    Each step uses the decoded basis, that of a refresh too: columns have norm 1 and are orthogonal
    but for the loss |P^T P - I|, 0.004 for random bases and at most 0.015 for any that was tried.
    Peak temporary memory: buffers of r x n elements, and panels; with 8 bits one m r more, the
    decoded basis (two with ``"full"``), and the decoded moments. A refresh adds, in elements and
    with m <= n, m^2 for ``"svd"``, m n + m^2 for ``"svd_full"``, and for all but the random kinds
    two panels of 2^20, ``"range"`` four, ``"dct"`` five. A bfloat16 or float16 weight adds one
    float32 matrix, its gradient.

    Caveat: only the state shrinks; gradients and weights keep their full size. After a refresh kept
    moments are read in the new basis, as published; ``moments="rotate"`` carries them over.

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
        *,
        rank: int | float = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projection: str = "svd",
        moments: str = "keep",
        inner: str = "adamw",
        correct_bias: bool = True,
        compat: str | None = None,
        seed: int = 0,
        **options: Unpack[Common],
    ) -> None:
        rule = GaLoreRule(
            betas=betas,
            eps=eps,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projection=projection,
            moments=moments,
            inner=inner,
            correct_bias=correct_bias,
            compat=compat,
            seed=seed,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
