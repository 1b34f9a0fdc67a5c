"""GaLore: Adam inside the leading singular subspace of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import StackedOptimizer
from .moments import adam, adam_reference, carry, check_policy
from .projectors import Draws, Projector, projector, rank_of
from .rule import Direction, Member, Rule, Slot, check, check_adam

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .groups import Common

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


@dataclass(frozen=True)
class GaLoreRule(Rule):
    """P <- top left singular vectors of G every T steps; R = P^T G; step along P adam(R)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    rank: int | float = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    projection: str = "svd"
    moments: str = "keep"
    correct_bias: bool = True
    compat: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_adam(self.betas, self.eps)
        rank_of(self.rank, 2**62)  # raises for what is neither a count nor a fraction
        for name, value, known in (
            ("proj_type", self.proj_type, PROJ_TYPES),
            ("compat", self.compat, (None, "reference")),
        ):
            check(value in known, f"{name} must be one of {known}, got {value!r}")
        for name, least in (("update_proj_gap", 1), ("seed", 0)):
            value = getattr(self, name)
            check(
                isinstance(value, int) and value >= least,
                f"{name} must be an int of at least {least}, got {value!r}",
            )
        check_policy(self.moments, self.projector.moves)
        check(
            self.compat is None or self.projection in ("svd", "svd_full"),
            f"compat='reference' has an exact SVD, not projection={self.projection!r}",
        )
        check(
            self.correct_bias or self.compat == "reference",
            "correct_bias=False exists only under compat='reference'",
        )

    @property
    def projector(self) -> Projector:
        """How P is found, stored and used."""
        both, exact = self.proj_type == "full", self.compat == "reference"
        return projector("svd_full" if exact else self.projection, both=both, lapack_signs=exact)

    @property
    def every(self) -> int:
        """Updates between two bases."""
        return self.update_proj_gap

    def transpose(self, m: int, n: int) -> bool:
        """The right side is projected by turning the weight: then it is the rows, always."""
        right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False, "full": False}
        return right[self.proj_type]

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """What the projector keeps, and the moments inside."""
        full = self.proj_type == "full"
        r = min(rank_of(self.rank, min(m, n) if full else m), m, n)
        moment = Slot("rr" if full else "rn", r=r)
        return {**self.projector.slots(m, r), "exp_avg": moment, "exp_avg_sq": moment}

    def refresh(self, w: Member) -> None:
        """A new basis from this gradient, and what becomes of the moments."""
        assert w.grad is not None
        old = self.projector.held(w.state)
        draws = Draws(self.seed, w.indices, w.t)
        find = partial(self.projector.find, draws=draws, turned=w.turned)
        new = w.sums.once(find, w.grad, *old)
        if not w.fresh:
            M, V = w.state["exp_avg"], w.state["exp_avg_sq"]
            change = self.projector.overlap(old, new)
            carry(self.moments, M, V, change, t=w.t - 1, betas=self.betas)
        self.projector.install(w.state, new)

    def update(self, w: Member) -> Direction:
        """One step for a stack; after turning, rows are projected."""
        assert w.grad is not None
        P, M, V = self.projector, w.state["exp_avg"], w.state["exp_avg_sq"]
        R = P.down(w.state, w.grad, w.sums)  # (K, r, n); P^T G Q is (K, r, r)
        t = w.age + 1 if self.moments == "reset" else w.t
        (beta1, beta2), eps, scale = self.betas, self.epsilon(), self.scale
        if self.compat == "reference":
            N, factor = adam_reference(R, M, V, t, beta1=beta1, beta2=beta2, eps=eps)
            scale *= factor if self.correct_bias else 1.0
        else:
            N = adam(R, M, V, t, beta1=beta1, beta2=beta2, eps=eps)
        lift = P.lift(w.state, N, w.m)  # P N; P N Q^T
        return w.step(lift, scale=scale, decay_last=self.compat == "reference")

    def epsilon(self) -> float:
        """Adam's eps; unset it is torch's 1e-8, or the published code's 1e-6."""
        return self.eps if self.eps is not None else 1e-6 if self.compat else 1e-8

    def adamw_order(self) -> tuple[bool, float] | None:
        """The published code treats unprojected parameters alike."""
        return (self.correct_bias, self.epsilon()) if self.compat == "reference" else None


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
        correct_bias: False only under ``compat="reference"``.
        compat: ``"reference"`` has the order of the published code: eps on the uncorrected root,
            decay after the step, LAPACK's signs.
        seed: Decides the draws of range, power, random and randk (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State of an m x n weight, m <= n, in elements: ``basis`` m r, ``exp_avg`` and ``exp_avg_sq``
    r n each (float32), ``step`` and ``refreshed``; ``"full"``: r (m + n) + 2 r^2. randk, topk and
    dct keep ``index``, r int32, for the basis. AdamW keeps 2 m n.
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
        **options: Unpack[Common],
    ) -> None:
        rule = GaLoreRule(
            betas, eps, rank, update_proj_gap, scale, proj_type, projection, moments,
            correct_bias, compat, seed,
        )  # fmt: skip
        super().__init__(params, rule, lr, weight_decay, **options)
