"""What a method needs that works in a rotated frame: whose rotation it is, of which side, and when.

A unit is one weight, a run of weights or all of a group; its members are turned so that the side
they share lies on the rows, and the rotation (m x m) is kept with the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import eigenbasis, nearest_rotation, rotated
from .groups import routed, rule_of
from .lowrank import check_known
from .moments import ema
from .rule import Member, Rule, Slot, check
from .units import units_of

ROTATIONS = ("qr", "polar", "eigh", "none")
SHARINGS = ("per_param", "chain", "global")
SIDES = ("auto", "rows", "cols")


def check_counts(rule: Rule, *names: str) -> None:
    """Refuse fields that are no ints of at least 1."""
    for name in names:
        count = getattr(rule, name)
        fits = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        check(fits, f"{name} must be an int of at least 1, got {count!r}")


def check_decays(rule: Rule, *names: str) -> None:
    """Refuse fields that are no decay of a running average, nor None."""
    for name in names:
        beta = getattr(rule, name)
        check(beta is None or 0.0 <= beta < 1.0, f"{name} must be in [0, 1), got {beta}")


def check_units(groups: list[dict[str, Any]], first: int, own: type[Rule]) -> None:
    """Refuse and take out groups from a first one on if weights cannot share their rotations."""
    try:
        for i, group in enumerate(groups[first:], first):
            rule = rule_of(group, own)
            if rule is None:
                continue
            matrices = {p: (j, p) for j, p in routed(group, rule, 0)[0]}  # a double counts once
            for unit in units_of(i, group, rule, list(matrices.values())):
                check_stacks([block.k for block in unit.blocks])
    except ValueError:
        del groups[first:]
        raise


def check_stacks(counts: Sequence[int]) -> None:
    """Refuse members of one unit that are stacks of different numbers of matrices."""
    check(
        len({*counts}) == 1,
        f"weights that share a rotation are stacks of {list(counts)} matrices, which must be as "
        "many each; set view or rotation_sharing",
    )


def most(*Xs: Tensor) -> float:
    """What all of these dtypes hold, and a difference of two such."""
    return min(torch.finfo(X.dtype).max for X in Xs) / 4


@dataclass(frozen=True)
class FrameRule(Rule, abstract=True):
    """The fields that say how a rotation is found and shared; ARO's docstring explains them."""

    rotation: str = "qr"
    rotation_every: int = 1
    rotation_sharing: str = "per_param"
    layer: int = 1
    side: str | Sequence[str] = "auto"
    init: str = "identity"
    gram_beta: float | None = None

    def __post_init__(self) -> None:
        check_known(self, rotation=ROTATIONS, rotation_sharing=SHARINGS, init=("identity", "svd"))
        check_counts(self, "rotation_every", "layer")
        check_decays(self, "gram_beta")
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
        check(
            self.side in SIDES
            if isinstance(self.side, str)
            else self.rotation_sharing != "per_param" and {*self.side} <= {"rows", "cols"},
            f"side must be one of {SIDES}, or 'rows' or 'cols' for each weight that shares a "
            f"rotation, got {self.side!r}",
        )

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        """One weight, the weights of a layer, or all of the group (empty)."""
        if self.rotation_sharing == "chain":
            return tuple(f"W{i}" for i in range(self.layer))
        return ("W",) if self.rotation_sharing == "per_param" else ()

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        """Where no factorisation has to wait, and no average of gradients is kept beside M."""
        waits = self.rotation not in ("qr", "none") or self.init == "svd"
        return not waits and self.gram_beta is None

    @property
    def every(self) -> int:
        """A rotation of every step needs no refresh, for which the host would wait."""
        return 0 if self.rotation_every == 1 else self.rotation_every

    def turns(self, sides: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """Bring the side that is rotated to the rows: of all that share it the shortest."""
        if not isinstance(self.side, str):
            fits = len(self.side) == len(sides)
            check(fits, f"side has {len(self.side)} entries for the {len(sides)} weights of a unit")
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
        """Slots of the members; see :meth:`Rule.state`."""
        if isinstance(sides[0], int):
            return self.tensors(True)
        rows = sorted({m for m, _ in sides})
        check(len(rows) == 1, f"one rotation cannot turn sides of {rows}; set side or layer")
        return tuple(self.tensors(i == 0) for i in range(len(sides)))

    def tensors(self, first: bool) -> dict[str, Slot]:
        """Slots of one member; the rotation lies with the first."""
        slots = {"momentum_buffer": Slot("mn")}
        if first and self.rotation != "none":
            slots["rotation"] = Slot("mm", "full", fill="eye")  # turns what it touches
        if first and self.gram_beta is not None:
            slots["gram"] = Slot("mm")
        return slots

    def due_now(self, first: Member) -> bool:
        """Whether the rotation of this unit is found anew in this update."""
        return self.rotation != "none" and (self.every == 0 or first.age == 0)

    def averaged(self, gram: Tensor, S: Tensor) -> Tensor:
        """The average of G G^T moved by S (K, m, m), unless that is too large to be added."""
        assert self.gram_beta is not None
        top = torch.maximum(-S.amin((-2, -1)), S.amax((-2, -1))).view(-1, 1, 1)
        return ema(gram, torch.where(top <= most(gram, S), S, gram), self.gram_beta)

    def next_rotation(self, A: Tensor, R: Tensor) -> Tensor:
        """The rotation that A (K, m, m) asks for; R (K, m, m) where it leaves it open."""
        if self.rotation == "eigh":
            return eigenbasis(A, R)
        if self.rotation == "polar":
            return nearest_rotation(A, R)
        return rotated(A, R, wait=self.every > 0)
