"""FRUGAL: a known optimizer on part of the gradient, signs on the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._core.rule import BlockPosition, Direction, Member, PanelTerm, Rule, Slot, Term
from ._core.validation import check, check_adam, check_at_least, check_choices
from ._driver.optimizer import StackedOptimizer
from ._frugal.block_schedule import BLOCK_ORDERS, BlockSchedule, assign_block_numbers, block_labels
from ._frugal.coordinates import COORDINATE_KINDS, CoordinateSplit
from ._frugal.gradient_split import STATE_FREE_KINDS, GradientSplit, make_state_free
from ._frugal.subspace import SubspaceSplit
from ._toolkit.base_optimizers import BaseOptimizer, make_base_optimizer
from ._toolkit.lowrank import PROJ_TYPES
from ._toolkit.projectors import PROJECTION_KINDS
from ._toolkit.random_keys import StackRNG

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

RESET_POLICIES = {
    "all": "reset",
    "changed": "rotate",
    "none": "keep",
}  # as BaseOptimizer.carry_state calls them


@dataclass(frozen=True)
class FRUGALRule(Rule):
    """W <- W - lr (N + sign(G - g)) with N = inner(g), g a part of G, another every T steps."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    density: float = 0.25
    split: str = "columns"
    update_gap: int = 200
    state_free: str = "sign_sgd"
    state_free_lr_scale: float = 1.0
    proj_lr_scale: float = 1.0
    reset: str = "all"
    seed: int = 0
    compat: str | None = None
    inner: str = "adamw"
    proj_type: str = "std"
    block_order: str = "random"
    block_of: str | Sequence[int] = "tensor"
    sign_threshold: float = 0.0
    projection: str | None = None

    def __post_init__(self) -> None:
        check_adam(self.betas, self.eps)
        check_choices(
            self,
            state_free=STATE_FREE_KINDS,
            reset=tuple(RESET_POLICIES),
            proj_type=PROJ_TYPES,
            inner=("adamw", "lion", "sgdm"),
            block_order=BLOCK_ORDERS,
            compat=(None, "reference"),
        )
        if isinstance(self.block_of, str):
            check_choices(self, block_of=("tensor", "layer"))
        x = self.density
        check(
            isinstance(x, int | float) and (0 <= x if isinstance(x, int) else 0.0 <= x <= 1.0),
            f"density must be a count (an int) or a part between 0.0 and 1.0, got {x!r}",
        )
        check_at_least(self, int, update_gap=1, seed=0)
        check_at_least(self, object, state_free_lr_scale=0, proj_lr_scale=0, sign_threshold=0)
        check(
            self.split == "block" or self.block_of == "tensor",
            f"split={self.split!r} has no blocks: leave them out, or use split='block'",
        )
        check(
            self.projection is None or self.split == "svd",
            f"projection={self.projection!r} needs split='svd', got split={self.split!r}",
        )
        check(
            self.projection not in ("block", *COORDINATE_KINDS),
            f"projection={self.projection!r} is no subspace here: name it in split",
        )
        self.gradient_split  # noqa: B018  which refuses what does not go together

    @property
    def gradient_split(self) -> GradientSplit:
        """How G is divided."""
        return make_split(
            self.projection or self.split,
            self.density,
            self.reset,
            self.inner,
            proj_type=self.proj_type,
            published=self.compat == "reference",
            order=self.block_order,
            gap=self.update_gap,
            seed=self.seed,
        )

    @property
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """Where the terms take flags."""
        return self.compat is None and self.inner in self.gradient_split.handles_nonfinite

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The state-full rule."""
        return make_base_optimizer(self.inner, self.betas, self.eps)

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """What a subspace keeps for all weights with as many rows."""
        return self.gradient_split.shared(m)

    def update(self, w: Member) -> Direction:
        """One step for a stack: N of what is chosen, and the rest of G by the state-free rule."""
        assert w.grad is not None
        G, terms = w.grad, tuple[Term, ...]()
        state_free = make_state_free(
            w, self.state_free, self.state_free_lr_scale, self.sign_threshold
        )
        if w.state:
            t = w.age + 1 if self.reset == "all" else w.t  # moments that were reset count anew
            terms = self.gradient_split.terms(w, self.base_optimizer, t, state_free)
        elif state_free.kind != "no":  # an inactive block, or density 0
            terms = (PanelTerm(lambda k, i, j: state_free(G[k, i, j], k)),)
        return w.step(*terms, lr_factor=self.proj_lr_scale)

    def refresh(self, w: Member) -> None:
        """A new choice, and what becomes of the moments."""
        if w.state:
            rng = StackRNG(self.seed, w.indices, w.t)
            self.gradient_split.reselect(w, rng, self.base_optimizer, RESET_POLICIES[self.reset])

    @property
    def refresh_interval(self) -> int:
        """Updates between two choices; blocks are chosen by `state_since_at`."""
        return 0 if self.split == "block" or self.density == 0 else self.update_gap

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """What tells the chosen part, and the moments of it."""
        return self.gradient_split.slots(m, n, self.base_optimizer)

    def transpose(self, m: int, n: int) -> bool:
        """The side of a basis; columns are not turned, so that panels run along the memory."""
        return self.gradient_split.transpose(m, n)

    @property
    def refresh_in_lockstep(self) -> bool:  # type: ignore[override]
        """All blocks take turns at once."""
        return self.split == "block"

    def state_since_at(self, position: BlockPosition, t: int) -> int:
        """Blocks have state in the windows in which they are active."""
        gradient_split = self.gradient_split
        return (
            gradient_split.state_since(position.number, position.count, t)
            if isinstance(gradient_split, BlockSchedule)
            else 1
        )

    def block_labels(self, names: Sequence[str | None]) -> Sequence[Hashable]:
        """What takes turns."""
        return block_labels(self.block_of, names)


def make_split(
    split: str,
    share: float,
    reset: str,
    inner: str,
    *,
    proj_type: str,
    published: bool,
    order: str,
    gap: int,
    seed: int,
) -> GradientSplit:
    """The way that a user names in ``split=``; the others say how it goes.

    Raises:
        ValueError: Unknown name, or settings that do not go together.
    """
    known = ("block", *COORDINATE_KINDS, *PROJECTION_KINDS)
    check(
        split.partition(":")[0] in known,
        f"split must be one of {', '.join(dict.fromkeys(known))}, got {split!r}",
    )
    check(
        split != "block" or reset != "none",
        "split='block' frees state, so reset='none' has nothing to keep: use 'changed'",
    )
    check(
        not published or reset != "changed",
        "compat='reference' has reset='all' or 'none', not 'changed'",
    )
    changed = reset == "changed"
    if split == "block":
        return BlockSchedule(order, share, gap, seed, changed)
    if split in COORDINATE_KINDS:
        return CoordinateSplit(split, share, reset != "none", changed and inner == "adamw")
    return SubspaceSplit(split, share, proj_type, published)


class FRUGAL(StackedOptimizer):
    """FRUGAL: a known optimizer on a small part of the gradient, signs of the rest, nothing lost.

    For each matrix W with gradient G, down and up the way into the chosen part and back::

        every T steps:  choose another part;  M, V <- 0, t <- 0
        W <- (1 - lr * weight_decay) W
        g = down(G);  M, V <- Adam's moments of g;  N = Mhat / (sqrt(Vhat) + eps)
        W <- W - lr * s * (up(N) + f * sign(G - up(g)))

    Source: arXiv 2411.07837, *Memory-Efficient Optimization by Reducing State Overhead*.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
        lr: Learning rate (default: 1e-3).
        betas: Decays of the moments (default: (0.9, 0.999)); Lion's authors use (0.9, 0.99).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled weight decay of all entries (default: 0).
        density: Part that is state-full (default: 0.25): of columns, rows or entries rounded
            down, of a basis's side or of blocks rounded half to even. An int is a count: 1 is one
            column, 1.0 all of them, which is AdamW; 0 is signSGD.
        split: ``"columns"`` (default), ``"rows"``, ``"randk"`` (single entries), ``"block"``
            (whole tensors), or a subspace by any name of ``projectors``: ``"svd"``, ``"random"``,
            ``"range"``, ``"power"``, ``"topk"``, ``"dct"``, ...
        update_gap: Steps between two choices, T (default: 200).
        state_free: ``"sign_sgd"`` (default), ``"sgd"`` (the rest itself), ``"no"`` (nothing).
        state_free_lr_scale: f (default: 1.0; 0.1 is usual in fine-tuning).
        proj_lr_scale: s, of both parts (default: 1.0).
        reset: At a new choice, ``"all"`` moments begin anew; ``"changed"``: what stays keeps them
            and its clock, in a basis they are turned into the new one; ``"none"``: they stay in
            their slots, as published, though these mean other coordinates then.
        seed: Decides all draws (default: 0): nothing else does, on any device or rank.
        compat: ``"reference"``: LAPACK's SVD and signs, and signs of round-off at full rank.
        inner: State-full rule: ``"adamw"`` (default), ``"lion"`` or ``"sgdm"``.
        proj_type: Side that a subspace projects, as in :class:`GaLore` (default: ``"std"``).
        block_order: ``"random"`` (default), ``"ascending"``, ``"descending"``, or ``"mirror"`` (as
            many from the front as from the back, so an even number).
        blocks: What ``"block"`` chooses from: ``"tensor"`` (default), ``"layer"`` (by the first
            number in a parameter's name), or lists of tensors, in which all matrices must occur.
            They are numbered as the optimizer has them; group key: ``block_of``.
        sign_threshold: Signs up to this multiple of G's root mean square are 0 (default: 0.0).
        projection: With ``"svd"``, the subspace as :class:`GaLore` names it; None: ``"svd"``.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State of an m x n weight, in elements (``exp_avg`` and, for adamw, ``exp_avg_sq``; sgdm:
    ``momentum_buffer``): columns 2 m c, rows 2 n c, randk 2 c, with ``index`` and under
    ``"changed"`` ``age``, c int32 each; a subspace as :class:`GaLore`; a block 2 m n while it is
    active, else none, and only the seed tells which. Density 0 keeps none. Peak temporary memory:
    panels; r x n buffers for a subspace; a matrix for an active block, for a device, and for what
    is not stored row by row.

    What it is not: AdamW at less cost in loss; it buys memory. ``"block"`` counts tensors, not
    elements, so its memory varies. A gradient of zeros at a new choice leaves the old one for a
    window. In a basis the sign of the rest leaves its complement, as
    published. Entries outside move by lr * s * f whatever their gradient: nothing anneals them.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import FRUGAL
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = FRUGAL(model, lr=1e-2, density=0.25, update_gap=50)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _listed_blocks: dict[Tensor, int] | None = None  # block of every tensor in the user's lists

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        split: str = "columns",
        update_gap: int = 200,
        state_free: str = "sign_sgd",
        state_free_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        reset: str = "all",
        seed: int = 0,
        compat: str | None = None,
        inner: str = "adamw",
        proj_type: str = "std",
        block_order: str = "random",
        blocks: str | Sequence[Sequence[Tensor]] = "tensor",
        sign_threshold: float = 0.0,
        projection: str | None = None,
        **options: Unpack[Common],
    ) -> None:
        if not isinstance(blocks, str):
            self._listed_blocks = {p: i for i, block in enumerate(blocks) for p in block}
            check(split == "block", "lists of blocks need split='block'")
            blocks = "tensor"  # numbers per group take its place: a checkpoint holds plain values
        rule = FRUGALRule(
            betas,
            eps,
            density,
            split,
            update_gap,
            state_free,
            state_free_lr_scale,
            proj_lr_scale,
            reset,
            seed,
            compat,
            inner,
            proj_type,
            block_order,
            blocks,
            sign_threshold,
            projection,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    def _prepare_groups(self, param_group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group with the numbers of its blocks, if the user has listed them."""
        groups = super()._prepare_groups(param_group)
        if self._listed_blocks is not None:
            assign_block_numbers(groups, self.defaults, self._listed_blocks)
        return groups
