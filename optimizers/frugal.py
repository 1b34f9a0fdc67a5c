"""FRUGAL: a known optimizer on part of the gradient, signs of the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from ._core.rule import BlockPosition, Direction, Member, PanelTerm, Rule, Slot, Term
from ._core.validation import (
    check,
    check_adam,
    check_choices,
    check_count_or_share,
    check_ints,
    check_numbers,
    naming,
    shown,
)
from ._driver.optimizer import StackedOptimizer
from ._frugal.block_schedule import (
    BLOCK_ORDERS,
    BlockSchedule,
    assign_block_numbers,
    block_labels,
    check_blocks,
    numbered_blocks,
)
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

RESET_POLICIES = {"all": "reset", "changed": "rotate", "none": "keep"}
"""Values of ``reset`` in the words of :func:`carry_moments`."""


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
        check_adam(self)
        check_choices(
            self,
            state_free=STATE_FREE_KINDS,
            reset=tuple(RESET_POLICIES),
            proj_type=PROJ_TYPES,
            inner=("adamw", "lion", "sgdm"),
            block_order=BLOCK_ORDERS,
            compat=(None, "reference"),
        )
        check_blocks(self.block_of)
        check_ints(self, update_gap="[1, inf)", seed="[0, inf)")
        check_numbers(
            self,
            state_free_lr_scale="[0, inf)",
            proj_lr_scale="[0, inf)",
            sign_threshold="[0, inf)",
        )
        check_count_or_share(self, "density", may_be_zero=True)
        self._check_split()
        with naming("split" if self.projection is None else "projection"):
            self.gradient_split  # noqa: B018  building it refuses unknown projections

    def _check_split(self) -> None:
        """Refuse values of density, split and reset that do not go together."""
        for name in ("split", "projection"):
            x = getattr(self, name)
            is_name = isinstance(x, str) or (x is None and name == "projection")
            check(is_name, f"{name} must be the name of a subspace, got {shown(x)}")
        check(
            self.split == "block" or self.block_of == "tensor",
            f"split={self.split!r} has no blocks: leave blocks out, or use split='block'",
        )
        check(
            self.projection is None or self.split == "svd",
            f"projection={self.projection!r} needs split='svd', got split={self.split!r}",
        )
        check(
            self.projection not in ("block", *COORDINATE_KINDS),
            f"projection={self.projection!r} is no subspace here: name it in split",
        )
        known = dict.fromkeys(("block", *COORDINATE_KINDS, *PROJECTION_KINDS))
        split = self.projection or self.split
        check(
            split.partition(":")[0] in known,
            f"split must be one of {', '.join(known)}, got {split!r}",
        )
        check(
            split in known or split.partition(":")[0] in PROJECTION_KINDS,
            f"split {split!r}: {split.partition(':')[0]!r} takes no options",
        )
        check(
            self.split != "block" or self.reset != "none",
            "split='block' frees state, so reset='none' has nothing to keep: use 'changed'",
        )
        check(
            self.compat is None or self.reset != "changed",
            "compat='reference' has reset='all' or 'none', not 'changed'",
        )

    @override
    def refresh(self, w: Member) -> None:
        """Choose another part of G, every T steps, and carry or zero the moments."""
        if w.state:
            rng = StackRNG(self.seed, w.indices, w.t)
            policy = RESET_POLICIES[self.reset]
            self.gradient_split.reselect(w, rng, self.base_optimizer, policy)

    @override
    def update(self, w: Member) -> Direction:
        """Step along s (up(N) + f sign(G - up(g))), with g = down(G) and N = inner(g)."""
        assert w.grad is not None
        G = w.grad
        state_free = make_state_free(
            w, self.state_free, self.state_free_lr_scale, self.sign_threshold
        )
        terms: tuple[Term, ...] = ()
        if w.state:
            t = w.count(since_refresh=self.reset == "all")  # after a reset Adam counts from 1
            terms = self.gradient_split.terms(w, self.base_optimizer, t, state_free)
        elif state_free.kind != "no":  # an inactive block, or density 0
            terms = (PanelTerm(lambda k, i, j: state_free(G[k, i, j], k)),)
        return w.step(*terms, lr_factor=self.proj_lr_scale)

    @override
    def capture_obstacle(self) -> str | None:
        if self.compat is not None:
            return f"compat={self.compat!r}, whose step has the bias correction of the host's clock"
        return "split='block', whose state comes and goes" if self.split == "block" else None

    @property
    def gradient_split(self) -> GradientSplit:
        """The division of G that ``split`` and the fields beside it describe."""
        keeps_unchanged = self.reset == "changed"
        if self.split == "block":
            return BlockSchedule(
                order=self.block_order,
                share=self.density,
                gap=self.update_gap,
                seed=self.seed,
                keeps_state=keeps_unchanged,
            )
        if self.split in COORDINATE_KINDS:
            return CoordinateSplit(
                kind=self.split,
                share=self.density,
                ordered=self.reset != "none",
                ages=keeps_unchanged and self.inner == "adamw",
            )
        return SubspaceSplit(
            kind=self.projection or self.split,
            share=self.density,
            proj_type=self.proj_type,
            published=self.compat == "reference",
        )

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The optimizer of the state-full part."""
        return make_base_optimizer(self.inner, self.betas, self.eps)

    @property
    @override
    def refresh_interval(self) -> int:
        """Updates between two choices; 0 for blocks, which ``state_since_at`` chooses."""
        return 0 if self.split == "block" or self.density == 0 else self.update_gap

    @property
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """The sides along which nothing is chosen; none in the published order."""
        return frozenset() if self.compat == "reference" else self.gradient_split.splits

    @property
    @override
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        return self.compat is None and self.inner in self.gradient_split.handles_nonfinite

    @override
    def transpose(self, m: int, n: int) -> bool:
        """Only a subspace transposes; columns stay, so that panels run along the memory."""
        return self.gradient_split.transpose(m, n)

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        return self.gradient_split.slots(m, n, self.base_optimizer)

    @override
    def index_counts(self, sides: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        split, (m, n) = self.gradient_split, sides[0]
        return {"index": split.length(m, n) if isinstance(split, CoordinateSplit) else m}

    @override
    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        return self.gradient_split.shared(m)

    @property
    @override
    def refresh_in_lockstep(self) -> bool:  # type: ignore[override]
        return self.split == "block"

    @override
    def block_labels(self, names: Sequence[str | None]) -> Sequence[Hashable]:
        return block_labels(self.block_of, names)

    @override
    def state_since_at(self, position: BlockPosition, t: int) -> int:
        """Blocks have state in the windows in which they are active, all else always."""
        split = self.gradient_split
        if isinstance(split, BlockSchedule):
            return split.state_since(position.number, position.count, t)
        return 1


class FRUGAL(StackedOptimizer):
    """FRUGAL: a known optimizer on a small part of the gradient, signs of the rest, nothing lost.

    For each matrix W with gradient G; down takes the chosen part of G, up puts it back in place::

        every T steps:  choose another part;  M, V <- 0, t <- 0
        W <- (1 - lr * weight_decay) W
        g = down(G);  M, V <- Adam's moments of g;  N = Mhat / (sqrt(Vhat) + eps)
        W <- W - lr * s * (up(N) + f * sign(G - up(g)))

    Source: *FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
    Training*, arXiv 2411.07837.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
        lr: Learning rate (default: 1e-3).
        betas: Decays of the two moments (default: (0.9, 0.999)). Lion's authors use (0.9, 0.99).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled weight decay of all entries (default: 0.0).
        density: State-full part (default: 0.25): of columns, rows or entries rounded down, of a
            basis's side or of blocks rounded half to even. An int is a count: 1 is one column, 1.0
            all of them, which is AdamW; 0 is signSGD.
        split: What the parts are (default: ``"columns"``). ``"rows"``, ``"randk"`` (single
            entries), ``"block"`` (whole tensors), or a subspace by any name that ``projection`` of
            :class:`GaLore` takes: ``"svd"``, ``"random"``, ``"range"``, ``"power"``, ``"topk"``,
            ``"dct"``.
        update_gap: Steps T between two choices (default: 200).
        state_free: Step of the rest (default: ``"sign_sgd"``). ``"sgd"`` is the rest itself,
            ``"no"`` leaves it out.
        state_free_lr_scale: The factor f of the rest (default: 1.0). 0.1 is usual in fine-tuning.
        proj_lr_scale: The factor s of both parts (default: 1.0).
        reset: What a new choice does to the moments (default: ``"all"``). ``"all"`` zeroes them and
            restarts their clock; ``"changed"`` lets what stays chosen keep moments and clock, and
            carries those of a subspace into the new basis; ``"none"`` leaves them in their slots,
            as published, though these mean other coordinates from then on.
        seed: Decides all draws (default: 0), on every device and rank alike.
        compat: ``"reference"`` repeats the published code (default: None): LAPACK's SVD and signs,
            and signs of round-off at full rank.
        inner: Optimizer of the state-full part (default: ``"adamw"``). Or ``"lion"``, ``"sgdm"``.
        proj_type: Side that a subspace projects, as in :class:`GaLore` (default: ``"std"``).
        block_order: Order of the blocks (default: ``"random"``). ``"ascending"``,
            ``"descending"``, or ``"mirror"``, which takes as many from the front as from the back
            and so needs an even number.
        blocks: What ``"block"`` chooses from (default: ``"tensor"``). ``"layer"`` groups tensors by
            the first number in their names; lists of tensors must contain every matrix. Blocks are
            numbered in the optimizer's order; the group key is ``block_of``.
        sign_threshold: Entries up to this multiple of G's root mean square have the sign 0
            (default: 0.0).
        projection: Subspace of ``split="svd"`` by the name that :class:`GaLore` gives it
            (default: None, which is ``"svd"``).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, settings that exclude each other, or a matrix that is
            in none of the lists in ``blocks``.
        TypeError: For an unknown keyword.

    State of an m x n weight, in elements (``exp_avg`` and, for adamw, ``exp_avg_sq``; sgdm:
    ``momentum_buffer``): columns 2 m c, rows 2 n c, randk 2 c, with ``index`` and under
    ``"changed"`` ``age``, c int32 each; a subspace as :class:`GaLore`; a block 2 m n while it is
    active, else none. Density 0 stores none. Peak temporary memory: panels; buffers of r x n
    elements for a subspace, with ``"topk"`` up to 4.3 matrices more, as
    rows anywhere are written whole, and up to 5.3 in a refresh; one matrix for an active block,
    on devices, and for a weight that is not stored row by row.

    Caveat: FRUGAL saves memory, not loss. ``"block"`` counts tensors, not elements, so its memory
    varies. A gradient of zeros at a new choice leaves the old choice for one more window. With a
    subspace the sign of the rest leaves the complement, as published. Entries outside the chosen
    part move by lr * s * f whatever the size of their gradient: only the schedule anneals them.

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
        *,
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
            listed = numbered_blocks(blocks)
            is_split = isinstance(split, str) and split == "block"
            check(is_split, f"lists of blocks need split='block', got split={shown(split)}")
            self._listed_blocks = listed
            # the group key block_of gets the numbers: a checkpoint holds plain values, no tensors
            blocks = "tensor"
        rule = FRUGALRule(
            betas=betas,
            eps=eps,
            density=density,
            split=split,
            update_gap=update_gap,
            state_free=state_free,
            state_free_lr_scale=state_free_lr_scale,
            proj_lr_scale=proj_lr_scale,
            reset=reset,
            seed=seed,
            compat=compat,
            inner=inner,
            proj_type=proj_type,
            block_order=block_order,
            block_of=blocks,
            sign_threshold=sign_threshold,
            projection=projection,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    @override
    def _prepare_group(self, param_group: dict[str, Any]) -> dict[str, Any]:
        group = super()._prepare_group(param_group)
        if self._listed_blocks is not None and isinstance(group, dict):
            assign_block_numbers(group, self.defaults, self._listed_blocks)
        return group
