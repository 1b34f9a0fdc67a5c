"""What the updates of one row per token, neuron or expert share: sizes, centring, pairs, scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import POLAR_METHODS, Stack, gram_polar, polar_factor, product
from ...kernels import ROW_MODES as ROW_MODES
from ...kernels import row_factors as factors
from .._core.rule import (
    Deferred,
    Dense,
    Direction,
    Member,
    Reductions,
    Rule,
    Scaled,
    Slot,
    Term,
    WriteScalars,
)
from .._core.validation import check, check_choices
from .moments import total

PAIR_LAYOUTS = (None, "members", "halves", "interleaved")


def row_squares(X: Tensor, reductions: Reductions) -> Tensor:
    """Sum of the squares of every row of X (K, m, n), as (K, m, 1)."""
    squares_found: Tensor = kernels.squares(X, -1)
    return reductions.cols(squares_found)


def center(X: Tensor, reductions: Reductions, m: int, in_place: bool = False) -> Tensor:
    """X (K, m, n) minus the mean of its rows: (I - 1 1^T / m) X, in X itself if that is `own`."""
    mean = reductions.rows(product(X.new_ones(len(X), 1, X.shape[-2]), X)).div_(m)
    return X.sub_(mean) if in_place else X - mean


def row_factors(squares: Tensor, mode: str, eps: float, reductions: Reductions, m: int) -> Tensor:
    """What brings rows of these squared norms (K, m, 1) to norm 1; zero rows stay zero.

    Args:
        squares: (K, m, 1).
        mode: ``"inverse_eps"`` 1 / (s + eps); ``"inverse"`` or ``"unit"`` 1 / max(s, eps);
            ``"relative"`` 1 / (s + 0.01 rms of all s), which lets rows fade that have become small.
        eps: See mode.
        reductions: Sums over the weight's indices.
        m: Rows of the whole weight.
    """
    rms = reductions.rows(total(squares.mT)).div_(m).sqrt_() if mode == "relative" else None
    return factors(squares, mode, eps, rms)


def rms_factor(U: Tensor, target: float, reductions: Reductions, n: int) -> Tensor:
    """What brings the rows of U (K, m, n) that are not zero to this root mean square: (K, 1, 1)."""
    squares = row_squares(U, reductions)
    rows = reductions.rows((squares > 0).to(U.dtype).sum(-2, keepdim=True))
    size = reductions.rows(total(squares.mT))
    return torch.where(size > 0, target * (rows * n / size).sqrt_(), 0.0)


def join_pairs(X: Tensor, layout: str | None) -> Tensor:
    """Rows of gate and up (K, 2 r, d) as one row for each neuron (K, r, 2 d).

    Args:
        X: Whatever has such rows.
        layout: ``"halves"``, gate rows before up rows; ``"interleaved"``, in turn; else X itself.
    """
    if layout == "halves":
        return X.reshape(*X.shape[:-2], 2, -1, X.shape[-1]).transpose(-3, -2).flatten(-2)
    if layout == "interleaved":
        return X.reshape(*X.shape[:-2], X.shape[-2] // 2, 2, X.shape[-1]).flatten(-2)
    return X


def split_pairs(Y: Tensor, layout: str | None) -> Tensor:
    """The rows that :func:`join_pairs` had, from (K, r, 2 d)."""
    if layout not in ("halves", "interleaved"):
        return Y
    parts = Y.reshape(*Y.shape[:-1], 2, Y.shape[-1] // 2)
    return (parts.transpose(-3, -2) if layout == "halves" else parts).flatten(-3, -2)


@dataclass(frozen=True, eq=False)
class RowStep(Deferred):
    """Rows of the momentum at one length, still to be made: M moves while the weight is written.

    Attributes:
        M: (K, m, n), the buffer.
        G: (K, m, n), the gradient.
        momentum: Decay of M.
        eps: See :func:`row_factors`.
        mode: See :func:`row_factors`, but not ``"relative"``.
        length: Norm of the rows.
        finite: None, or flags (K,): where one is 0, M stays.
    """

    accepts_list: ClassVar[bool] = True
    M: Tensor
    G: Tensor
    momentum: float
    eps: float
    mode: str
    length: float = 1.0
    finite: Tensor | None = None

    @override
    def materialize(self) -> Scaled:
        U, squares = kernels.momentum_step_(
            self.M, self.G, self.momentum, squares="rows", finite=self.finite
        )
        by = factors(squares, self.mode, self.eps)
        return Scaled(U, by if self.length == 1.0 else by * self.length)

    @override
    def fused_write_(self, W: Stack, by: WriteScalars, other: Term | None = None) -> bool:
        """Where rows lie across the memory their sums come first.

        So they do where W is a list: M is read twice then, but W is not copied into a stack.
        """
        if other is not None:
            return False
        is_column_major = self.G.stride(-1) != 1 or self.M.stride(-1) != 1
        if is_column_major or not isinstance(W, Tensor):
            return self.materialized.fused_write_(W, by)
        scalars = (self.momentum, self.eps, self.mode, *by.scale_alpha(self.length))
        kernels.row_step_(W, self.M, self.G, *scalars)
        return True


@dataclass(frozen=True)
class RowRule(Rule, abstract=True):
    """M <- mu M + (1 - mu) G, one row per neuron; U = map(M), centred before and after if told."""

    handles_nonfinite: ClassVar[bool] = True

    momentum: float = 0.95
    centred: bool = False
    axis: str = "rows"
    pair: str | None = None
    adjust_lr_fn: str = "match_rms_adamw"
    rms_target: float = 0.2

    squares: ClassVar[str | None] = None
    """Set to "rows" where ``terms`` takes the squared norms of the rows of M."""

    def __post_init__(self) -> None:
        check(0.0 <= self.momentum <= 1.0, f"momentum must be in [0, 1], got {self.momentum}")
        check(self.rms_target > 0.0, f"rms_target must be positive, got {self.rms_target}")
        check_choices(
            self, axis=("rows", "cols"), pair=PAIR_LAYOUTS, adjust_lr_fn=("match_rms_adamw", "none")
        )
        check(
            self.axis == "rows" or self.pair is None,
            "gate and up are paired by rows; leave axis='cols' out",
        )

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        """Two parameters whose rows belong together, or one."""
        return ("gate", "up") if self.pair == "members" else ("W",)

    def transpose(self, m: int, n: int) -> bool:
        """Columns are rows of the turned weight."""
        return self.axis == "cols"

    def slots(self, sides: tuple[tuple[int, int], ...]) -> tuple[dict[str, Slot], ...]:
        """The buffer of each member, and whether their rows can be taken together."""
        m = sides[0][0]
        check(
            self.pair not in ("halves", "interleaved") or m % 2 == 0,
            f"pair={self.pair!r} needs an even number of rows, got {m}",
        )
        check(len(set(sides)) == 1, f"gate and up must have one shape, got {sides}")
        return tuple({"momentum_buffer": Slot("mn")} for _ in sides)

    def update(self, *members: Member) -> tuple[Direction, ...]:
        """One step for a stack; a half of a pair without a gradient sits out."""
        ws, Ms, squares_found = [], [], []
        for w in members:
            if w.grad is not None:
                M = w.state["momentum_buffer"]
                U, squares = kernels.momentum_step_(
                    M, w.grad, self.momentum, squares=self.squares, finite=w.finite
                )
                ws.append(w)
                Ms.append(U)  # (K, m, n), the new momentum
                squares_found.append(squares if squares is None else w.reductions.cols(squares))
        terms = self.terms(ws, Ms, squares_found)
        return tuple(w.step(term) for w, term in zip(ws, terms, strict=True))

    def row_count(self, w: Member) -> int:
        """Rows of the whole weight, one for each neuron."""
        return w.m // 2 if self.pair in ("halves", "interleaved") else w.m

    def row_entries(self, w: Member, count: int = 1) -> int:
        """Entries of such a row."""
        return count * (2 * w.n if self.pair in ("halves", "interleaved") else w.n)

    def terms(
        self, ws: Sequence[Member], Ms: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> list[Term]:
        """The step of every member; its squared row norms (K, m, 1) are there if asked for."""
        w, layout = ws[0], self.pair
        X = join_pairs(torch.cat(list(Ms), -1) if len(Ms) > 1 else Ms[0], layout)
        U, by = self.centered_map(X, w)
        if self.adjust_lr_fn == "match_rms_adamw":
            by = rms_factor(U, self.rms_target, w.reductions, self.row_entries(w, len(ws)))
        U = split_pairs(U, layout)
        parts = [U] if len(ws) == 1 else torch.split(U, w.n, -1)
        return [Dense(V) if by is None else Scaled(V, by) for V in parts]

    def centered_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """The map of X, with what centring there is around it."""
        X = center(X, w.reductions, self.row_count(w)) if self.centred else X
        U, by = self.base_map(X, w)
        return center(U, w.reductions, self.row_count(w), in_place=True) if self.centred else U, by

    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """The map of X (K, m, n), a new tensor, and what multiplies it as published (K, 1, 1).

        X is there to be used up where rows are centred, which made it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RowPolarRule(RowRule, abstract=True):
    """The polar factor among them, and its published scale."""

    alpha: float = 0.0
    polar: str = "auto"
    ns_steps: int | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("auto", "inverse_root", *(name for name in POLAR_METHODS if name != "turbo"))
        check(
            self.polar in known,  # rows scaled first, as turbo does, are no equivariant map
            f"polar must be one of {', '.join(known)}, got {self.polar!r}",
        )
        steps = self.ns_steps
        check(steps is None or 1 <= steps < 100, f"ns_steps must be in [1, 99], got {steps}")
        check(self.eps is None or self.eps >= 0.0, f"Invalid epsilon value: {self.eps}")
        if self.polar != "inverse_root":  # what the kernel refuses is refused here
            polar_factor(torch.empty(1, 0, 1), self.polar, steps=steps)
        check(
            self.alpha == 0.0 or self.adjust_lr_fn == "none",
            "alpha scales a whole update, which match_rms_adamw does by itself; set "
            "adjust_lr_fn='none' to use it",
        )

    def orthogonalize(self, X: Tensor, w: Member, left: bool) -> Tensor:
        """Polar factor of X (K, m, n); the side only tells what an absolute eps is added to."""
        steps = self.ns_steps
        if self.polar == "inverse_root":
            left = X.shape[-2] <= X.shape[-1] if self.eps is None else left
            return w.reductions.on_full_matrix(
                lambda Y: gram_polar(Y, left, steps or 5, self.eps), X
            )
        return w.reductions.on_full_matrix(lambda Y: polar_factor(Y, self.polar, steps=steps), X)

    def nuclear_scale(self, X: Tensor, U: Tensor, w: Member) -> Tensor | None:
        """nu^alpha (K, 1, 1) with nu = <X, U>, the nuclear norm of X if U is its polar factor."""
        if self.alpha == 0.0:
            return None
        nu = w.reductions.both(total(product(X.new_ones(len(X), 1, X.shape[-2]), X * U)))
        return nu.clamp_(min=1e-8 if self.eps is None else self.eps) ** self.alpha
