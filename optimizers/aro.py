"""ARO: momentum in a rotated frame, where a cheap map of rows, columns or entries is applied.

Read :meth:`ARORule.update` beside the algorithm in :class:`ARO`. :class:`RotationRule` says which
weights share a rotation, on which side, and how the rotation is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import (
    eigenbasis,
    equal_rows,
    left_basis,
    nearest_rotation,
    product,
    rotated,
    sinkhorn,
)
from ._core.rule import Dense, Direction, Factored, Member, Rule, Slot
from ._core.validation import (
    check,
    check_choices,
    check_eps,
    check_flags,
    check_ints,
    check_numbers,
    shown,
)
from ._driver.optimizer import StackedOptimizer
from ._driver.param_groups import parts_of, rule_of
from ._driver.units import units_of
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.moments import (
    column_squares,
    ema_where_safe,
    max_safe_value,
    momentum_slots,
    momentum_step,
    safe_square_scale,
    total,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

BASE_MAPS = ("sinkhorn", "row_norm", "sign", "adam")
ROTATIONS = ("qr", "polar", "eigh", "none")
ROTATION_SHARINGS = ("per_param", "chain", "global")
ROTATED_SIDES = ("auto", "rows", "cols")


@dataclass(frozen=True)
class RotationRule(Rule, abstract=True):
    """The fields that say how a rotation is found and shared; ARO's docstring explains them."""

    rotation: str = "qr"
    rotation_every: int = 1
    rotation_sharing: str = "per_param"
    layer: int = 1
    side: str | Sequence[str] = "auto"
    init: str = "identity"
    gram_beta: float | None = None

    def __post_init__(self) -> None:
        check_choices(
            self, rotation=ROTATIONS, rotation_sharing=ROTATION_SHARINGS, init=("identity", "svd")
        )
        check_ints(self, rotation_every="[1, inf)", layer="[1, 10000]")
        check_numbers(self, gram_beta="[0, 1) or None")
        check(
            self.rotation != "none"
            or (self.rotation_sharing == "per_param" and self.init == "identity"),
            "rotation='none' has no rotation to share or to start; leave rotation_sharing and init "
            "unset",
        )
        check(
            self.layer == 1 or self.rotation_sharing == "chain",
            "layer counts the weights of a chain; set rotation_sharing='chain'",
        )
        check(
            self.gram_beta is None or self.rotation == "eigh",
            "gram_beta averages what rotation='eigh' takes; leave it out",
        )
        sides = self.side
        is_list = isinstance(sides, (tuple, list)) and all(
            isinstance(s, str) and s in ("rows", "cols") for s in sides
        )
        check(
            sides in ROTATED_SIDES
            if isinstance(sides, str)
            else is_list and len(sides) > 0 and self.rotation_sharing != "per_param",
            f"side must be one of {ROTATED_SIDES}, or 'rows' or 'cols' for each weight that shares "
            f"a rotation, got {shown(sides)}",
        )

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        """One weight, the weights of a layer, or all of the group (empty)."""
        if self.rotation_sharing == "chain":
            return tuple(f"W{i}" for i in range(self.layer))
        return ("W",) if self.rotation_sharing == "per_param" else ()

    @property
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """False where a factorization that waits, or ``gram``, would read a bad gradient."""
        factorization_waits = self.rotation not in ("qr", "none") or self.init == "svd"
        return not factorization_waits and self.gram_beta is None

    @property
    def refresh_interval(self) -> int:
        """Updates between rotations; 0 for one in every step, since the host waits in a refresh."""
        return 0 if self.rotation_every == 1 else self.rotation_every

    def transposed_members(self, sides: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """Whether each member is transposed, so that the side to rotate lies on the rows.

        Under ``side="auto"`` this is the shortest side that all members share.
        """
        if not isinstance(self.side, str):
            valid = len(self.side) == len(sides)
            check(
                valid, f"side has {len(self.side)} entries for the {len(sides)} weights of a unit"
            )
            return tuple(side == "cols" for side in self.side)
        if self.side != "auto":
            return (self.side == "cols",) * len(sides)
        shared = set(sides[0]).intersection(*sides)
        check(
            bool(shared),
            f"weights of shapes {list(sides)} share no side to rotate; with rotation_sharing="
            f"{self.rotation_sharing!r} give every unit weights that do",
        )
        return tuple(m != min(shared) for m, _ in sides)

    def state(self, *sides: Any) -> Any:
        """Slots of the members of a unit, whose rotated sides must be equal."""
        if isinstance(sides[0], int):
            return self.member_slots(True)
        rows = sorted({m for m, _ in sides})
        check(len(rows) == 1, f"one rotation cannot turn sides of {rows}; set side or layer")
        return tuple(self.member_slots(i == 0) for i in range(len(sides)))

    def member_slots(self, first: bool) -> dict[str, Slot]:
        """Slots of one member; the rotation lies with the first."""
        slots: dict[str, Slot] = {}
        if first and self.rotation != "none":
            # full precision, since its rounding would enter M and the step
            slots["rotation"] = Slot("mm", "full", fill="eye")
        if first and self.gram_beta is not None:
            slots["gram"] = Slot("mm")
        return slots

    def rotation_due(self, first: Member) -> bool:
        """Whether this update computes a new rotation for the unit."""
        return self.rotation != "none" and (self.refresh_interval == 0 or first.age == 0)

    def updated_gram(self, gram: Tensor, S: Tensor) -> Tensor:
        """The average of G G^T moved towards S (K, m, m), or left where S is too large to add."""
        assert self.gram_beta is not None
        return ema_where_safe(gram, S, self.gram_beta)

    def next_rotation(self, A: Tensor, R: Tensor) -> Tensor:
        """The rotation R(A) (K, m, m); where a singular A leaves directions open, the old R.

        A is a new tensor, and may be changed.
        """
        if self.rotation == "eigh":
            return eigenbasis(A, R)
        if self.rotation == "polar":
            return nearest_rotation(A, R)
        return rotated(A, R, wait=self.refresh_interval > 0, overwrite=True)


@dataclass(frozen=True)
class ARORule(RotationRule):
    """A = sum of M f(R^T M)^T over the unit; R <- Q factor of A; each W along R f(R^T M)."""

    momentum: float = 0.95
    base: str = "sinkhorn"
    rms_target: float | None = 0.2
    nesterov: bool = False
    iterations: int = 5
    beta2: float = 0.95
    eps: float = 1e-8
    adjust_lr_fn: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, base=BASE_MAPS, adjust_lr_fn=(None, "match_rms_adamw"))
        check_numbers(self, momentum="[0, 1)", beta2="[0, 1)", rms_target="(0, inf) or None")
        check_ints(self, iterations="[1, 1000]")
        check_flags(self, "nesterov")
        check_eps(self, may_be_none=False)
        check(
            self.rms_target is None or self.adjust_lr_fn is None,
            "rms_target scales the update already; set it to None to use adjust_lr_fn",
        )

    def member_slots(self, first: bool) -> dict[str, Slot]:
        """Slots of one member; Adam's second moment stays as it is when the frame rotates."""
        second = {"exp_avg_sq": Slot("mn")} if self.base == "adam" else {}
        return momentum_slots(self.momentum) | super().member_slots(first) | second

    @property
    def spare_state(self) -> frozenset[str]:  # type: ignore[override]
        """The buffer that files of version 0.2 hold where momentum is 0."""
        return frozenset(() if self.momentum else ("momentum_buffer",))

    def update(self, *members: Member) -> Iterator[Direction]:
        """One step of K equal units; a member without a gradient is left out."""
        known = (next(iter(w.state.values()), w.grad) for w in members)  # (K, ...) each
        check_equal_stacks([len(X) for X in known if X is not None])
        ws = [w for w in members if w.grad is not None]
        Ms = [self.momentum_of(w) for w in ws]  # (K, m, n) each
        R, cs = None, [M.new_ones(()) for M in Ms]
        if self.rotation != "none":
            # (K, 1, 1) each, so that products with c M do not overflow
            cs = [safe_square_scale(M, w.reductions) for w, M in zip(ws, Ms, strict=True)]
            R = self.current_rotation(members[0], ws, Ms, cs)  # (K, m, m)
        for w, M, c in zip(ws, Ms, cs, strict=True):
            F = self.base_map(w, M, R, c, store_moment=True)
            if self.rms_target is not None:  # the mean square of R F is that of F
                mean = w.reductions.both(total(column_squares(F))).div_(w.m * w.n)
                F.mul_(torch.where(mean > 0, self.rms_target * mean.rsqrt(), 0.0))
            lr_factor = adjust_lr(self.adjust_lr_fn or "none", w.m, w.n, min(w.m, w.n))
            yield w.step(Dense(F) if R is None else Factored(R, F), lr_factor=lr_factor)

    def momentum_of(self, w: Member) -> Tensor:
        """The momentum M (K, m, n) of this step."""
        assert w.grad is not None
        if not self.momentum:  # M is G, so there is no buffer
            return w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        return momentum_step(
            w.state["momentum_buffer"], w.grad, self.momentum, self.nesterov, finite=w.finite
        )

    def current_rotation(
        self, first: Member, ws: Sequence[Member], Ms: Sequence[Tensor], cs: Sequence[Tensor]
    ) -> Tensor:
        """The rotation R (K, m, m) of this step, computed anew where that is due."""
        stored = first.state["rotation"]
        R = stored.to(Ms[0].dtype)
        if self.init == "svd" and first.t == 1:
            R = first.reductions.from_full_matrix(left_basis, torch.cat(list(Ms), -1))
        if self.gram_beta is not None:  # averaged in every step
            Gs = [w.grad for w in ws if w.grad is not None]
            A = self.updated_gram(
                first.state["gram"], _cross_gram_sum(ws, zip(Gs, Gs, strict=True))
            )
        if self.rotation_due(first):
            c = reduce(torch.minimum, cs)  # that of the largest M: R ignores the scale of A
            if self.rotation != "eigh":
                Fs = (self.base_map(w, M, R, k) for w, M, k in zip(ws, Ms, cs, strict=True))
                A = _cross_gram_sum(ws, ((M, scaled(F, c)) for M, F in zip(Ms, Fs, strict=True)))
            elif self.gram_beta is None:
                A = _cross_gram_sum(ws, ((N, N) for N in (M * c for M in Ms)))
            R = first.reductions.on_one_rank(self.next_rotation, A, R)
        if R is not stored:
            stored.copy_(first.where_finite(R, stored))
        return R

    def base_map(
        self, w: Member, M: Tensor, R: Tensor | None, c: Tensor, store_moment: bool = False
    ) -> Tensor:
        """F = f(R^T M) (K, m, n), a new tensor; ``store_moment`` stores the new second moment."""
        X = M if R is None else w.reductions.rows(product(scaled(R, c).mT, M))
        if self.base != "adam":
            if self.base == "sinkhorn":
                return w.reductions.on_full_matrix(partial(sinkhorn, iterations=self.iterations), X)
            return w.reductions.on_full_matrix(torch.sign if self.base == "sign" else equal_rows, X)
        if R is not None:
            X.div_(c)  # Adam's V depends on the scale
        stored = w.state["exp_avg_sq"]
        V = stored.to(X.dtype, copy=not store_moment or w.finite is not None).mul_(self.beta2)
        V.add_((X * X).mul_(1 - self.beta2))  # addcmul_ rounds by layout, stacks would differ
        V.clamp_(max=max_safe_value(stored, V))
        if store_moment and V is not stored:
            stored.copy_(w.where_finite(V, stored))
        bound = 2 / math.sqrt(1 - self.beta2)  # F is within half of it, where V could follow X
        return (X / V.sqrt().add_(self.eps)).clamp_(-bound, bound)


def scaled(X: Tensor, c: Tensor) -> Tensor:
    """The product c X for factors c (K, 1, 1), or X itself where the host can see that all are 1.

    Args:
        X: (K, m, n).
        c: What :func:`safe_square_scale` returns.
    """
    return X if c.device.type == "cpu" and bool((c == 1).all()) else X * c


def _cross_gram_sum(ws: Sequence[Member], pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of M F^T (K, m, m) over the members and their pairs (M, F)."""
    parts = (w.reductions.cols(product(M, F.mT)) for w, (M, F) in zip(ws, pairs, strict=True))
    return reduce(Tensor.add_, parts)


def check_shared_rotations(
    groups: list[dict[str, Any]], first: int, default_rule: type[Rule]
) -> None:
    """Raise if weights cannot share their rotations, and remove the groups from ``first`` on."""
    try:
        for i, group in enumerate(groups[first:], first):
            rule = rule_of(group, default_rule)
            if rule is None:
                continue
            for part in parts_of(group, rule, 0)[0]:
                weights = {w.param: w for w in part.weights}  # given twice, counts once
                for unit in units_of(i, group, part._replace(weights=[*weights.values()])):
                    check_equal_stacks([view.k for view in unit.views])
    except BaseException:
        del groups[first:]
        raise


def check_equal_stacks(counts: Sequence[int]) -> None:
    """Refuse members of one unit that are stacks of different numbers of matrices."""
    check(
        len({*counts}) == 1,
        f"weights that share a rotation are stacks of {list(counts)} matrices, which must be as "
        "many each; set view or rotation_sharing",
    )


class ARO(StackedOptimizer):
    """ARO: a cheap map in a rotated frame, which the map itself rotates.

    For each matrix W with gradient G (m x n, transposed so that the side to rotate is the rows)::

        M <- M + (1 - momentum) (G - M)
        A  = M f(R^T M)^T                     m x m: how the mapped momentum lies to the momentum
        R <- Q factor of A                    with a positive diagonal; the identity at first
        D  = R f(R^T M), scaled to RMS 0.2    f: rows and columns to equal norms in turn
        W <- (1 - lr * weight_decay) W - lr * D

    Sources: *ARO: A New Lens On Matrix Optimization For Large Models*, arXiv 2602.09006, known from
    summaries: the idea, A and R, ``"adam"``, the RMS, sharing, sides. Maps, momentum and the order
    of steps are those of a third-party implementation (``microsoft/dion``), whose recorded steps
    are tested; Sinkhorn, arXiv 2502.06742. Relative clamps, the treatment of a singular A, ``init``
    and ``gram_beta`` are additions. ``base="adam", rotation="eigh", gram_beta=...`` is a one-sided
    relative of :class:`SOAP`, which turns its moments with the bases.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        momentum: Decay of the momentum average (default: 0.95).
        weight_decay: Decoupled weight decay (default: 0.1).
        base: f: ``"sinkhorn"`` (default); ``"row_norm"``, rows to norm sqrt(n); ``"sign"``;
            ``"adam"``, X / (sqrt(V) + eps) with the running average V of X * X.
        rotation: R(A): ``"qr"`` (default); ``"polar"``, the orthogonal factor of A; ``"eigh"``,
            eigenvectors of M M^T; ``"none"``, R = I. ``"eigh"`` and ``"polar"`` wait for a device.
        rotation_every: Updates between two rotations (default: 1).
        rotation_sharing: ``"per_param"`` (default); ``"chain"``, one rotation for every ``layer``
            consecutive weights of a group, by the sum of their A; ``"global"``, one for a group.
        rms_target: Root mean square of D (default: 0.2). None: as f leaves it, 1 for most.
        layer: Weights of a chain (default: 1).
        side: Side of a weight that is rotated: ``"rows"``, ``"cols"`` or ``"auto"`` (default), the
            shorter one, or the one that all weights of a unit have; of equal sides the rows. Best
            is the residual stream: ``"rows"`` for what writes to it, ``"cols"`` for what reads it
            (nn.Linear). Shared rotations take a list, one side per weight. Under ``"auto"`` a
            model tells it for every weight of which it is known, unless the other one is shorter.
        nesterov: Look ahead by one gradient (default: False).
        init: First R: ``"identity"`` (default) or ``"svd"``, left singular vectors of the first M.
        iterations: Rounds of ``"sinkhorn"`` (default: 5).
        beta2: Decay of V, for ``"adam"`` (default: 0.95).
        eps: Added to sqrt(V), for ``"adam"`` (default: 1e-8).
        gram_beta: For ``"eigh"``: decay of an average of G G^T that takes the place of M M^T
            (default: None, no average).
        adjust_lr_fn: With ``rms_target=None``: ``"match_rms_adamw"`` multiplies D by
            0.2 sqrt(max(m, n)), as published for maps of another scale (default: None, by 1).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range, unknown, or excluded by another one, or if
            weights of a unit share no side to rotate; the text names it.
        TypeError: If a keyword is unknown.

    State: ``momentum_buffer`` (like W; none at ``momentum=0``), ``rotation`` (m x m; with the first
    weight that shares it), for ``"adam"`` ``exp_avg_sq`` (like W, in the rotated frame), with
    ``gram_beta`` ``gram`` (m x m), and ``step``; float32. Peak temporary memory: two m x n and
    three m x m matrices.

    Caveat: <M, D> may fall from step to step. On a steady M ``"polar"`` keeps it from falling for
    an exact f (all but ``"adam"``), ``"qr"`` often lets it fall; with ``"row_norm"`` R tends to
    singular vectors, where <M, D> is smallest and ARO is Muon. Savings over AdamW and Muon were
    not reproduced. A side m > n leaves R open in m - n directions, in which R stays as it was, up
    to rounding.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import ARO
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = ARO(model, lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        base: str = "sinkhorn",
        rotation: str = "qr",
        rotation_every: int = 1,
        rotation_sharing: str = "per_param",
        rms_target: float | None = 0.2,
        layer: int = 1,
        side: str | Sequence[str] = "auto",
        nesterov: bool = False,
        init: str = "identity",
        iterations: int = 5,
        beta2: float = 0.95,
        eps: float = 1e-8,
        gram_beta: float | None = None,
        adjust_lr_fn: str | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = ARORule(
            rotation=rotation,
            rotation_every=rotation_every,
            rotation_sharing=rotation_sharing,
            layer=layer,
            side=side,
            init=init,
            gram_beta=gram_beta,
            momentum=momentum,
            base=base,
            rms_target=rms_target,
            nesterov=nesterov,
            iterations=iterations,
            beta2=beta2,
            eps=eps,
            adjust_lr_fn=adjust_lr_fn,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; weights that cannot share a rotation are refused."""
        count = len(self.param_groups)
        super().add_param_group(param_group)
        check_shared_rotations(self.param_groups, count, self._default_rule)
