"""Base of the rules that treat rows (tokens, neurons, experts) alike: norms, centring, pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import POLAR_METHODS, gram_polar, polar_factor, product
from ...kernels import ROW_MODES as ROW_MODES
from .._core.rule import (
    LOCAL_REDUCTIONS,
    Dense,
    Direction,
    Member,
    Reductions,
    Rule,
    Scaled,
    Slot,
    Term,
)
from .._core.validation import (
    check,
    check_choices,
    check_eps,
    check_flags,
    check_ints,
    check_numbers,
    naming,
    shown,
)
from .moments import largest_entries, momentum_slots, total
from .polar_waits import polar_obstacle

PAIR_LAYOUTS = (None, "members", "halves", "interleaved")


@dataclass(frozen=True)
class RowRule(Rule, abstract=True):
    """M <- momentum M + (1 - momentum) G; U = base_map(M), a map of rows, centred if wanted."""

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
        check_numbers(self, momentum="[0, 1]", rms_target="(0, inf)")
        check_flags(self, "centred")
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

    @property
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """None of a pair, whose rows are joined to a matrix that is laid out in another way."""
        return frozenset(("rows", "cols")) if self.pair is None else frozenset()

    @override
    def transpose(self, m: int, n: int) -> bool:
        return self.axis == "cols"

    @override
    def capture_obstacle(self) -> str | None:
        return polar_obstacle(getattr(self, "polar", "auto"))

    @override
    def slots(self, sides: tuple[tuple[int, int], ...]) -> tuple[dict[str, Slot], ...]:
        m = sides[0][0]
        check(
            self.pair not in ("halves", "interleaved") or m % 2 == 0,
            f"pair={self.pair!r} needs an even number of rows, got {m}",
        )
        check(len(set(sides)) == 1, f"gate and up must have one shape, got {sides}")
        return tuple(momentum_slots(self.momentum) for _ in sides)

    @property
    def spare_state(self) -> frozenset[str]:  # type: ignore[override]
        """The buffer that files of version 0.2 hold where momentum is 0."""
        return frozenset(() if self.momentum else ("momentum_buffer",))

    @override
    def update(self, *members: Member) -> tuple[Direction, ...]:
        """One step for a stack; a member of a pair without a gradient is left out."""
        ws, Ms, squares_found = [], [], []
        for w in members:
            if w.grad is not None:
                U, squares = averaged(
                    w.state.get("momentum_buffer"), w.grad, self.momentum, self.squares, w.finite
                )
                ws.append(w)
                Ms.append(U)  # (K, m, n), the new momentum
                squares_found.append(squares)
        terms = self.terms(ws, Ms, squares_found)
        return tuple(w.step(term) for w, term in zip(ws, terms, strict=True))

    def terms(
        self, ws: Sequence[Member], Ms: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> list[Term]:
        """The step of every member.

        Args:
            ws: Members with a gradient.
            Ms: Their new momentum, (K, m, n) each.
            squares: Squared norms (K, m, 1) of the rows that are here, or None where ``squares``
                asks for none.
        """
        w, layout = ws[0], self.pair
        X = join_pairs(torch.cat(list(Ms), -1) if len(Ms) > 1 else Ms[0], layout)
        U, scale = self.centered_map(X, w)
        if self.adjust_lr_fn == "match_rms_adamw":
            scale = rms_factor(U, self.rms_target, w.reductions, self.row_entries(w, len(ws)))
        U = split_pairs(U, layout)
        parts = [U] if len(ws) == 1 else torch.split(U, w.n, -1)
        return [Dense(V) if scale is None else Scaled(V, scale) for V in parts]

    def centered_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """``base_map`` of X, with the mean row taken off before and after it if centred."""
        X = center(X, w.reductions, self.row_count(w)) if self.centred else X
        U, scale = self.base_map(X, w)
        U = center(U, w.reductions, self.row_count(w), in_place=True) if self.centred else U
        return U, scale

    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """The map of X (K, m, n) as a new tensor, and the published scale (K, 1, 1) or None.

        Where rows are centred X is a copy, which the map may overwrite.
        """
        raise NotImplementedError

    def row_count(self, w: Member) -> int:
        """Rows of the whole weight, one for each neuron."""
        return w.m // 2 if self.pair in ("halves", "interleaved") else w.m

    def row_entries(self, w: Member, count: int = 1) -> int:
        """Entries of one row of the whole weight, of ``count`` members side by side."""
        return count * (2 * w.n if self.pair in ("halves", "interleaved") else w.n)


@dataclass(frozen=True)
class RowPolarRule(RowRule, abstract=True):
    """A row rule whose map has a polar factor in it, and the published scale nu^alpha."""

    alpha: float = 0.0
    polar: str = "auto"
    ns_steps: int | None = None
    eps: float | None = None

    needs_full_matrix = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("auto", "inverse_root", *(name for name in POLAR_METHODS if name != "turbo"))
        check(
            # turbo scales rows first, which is no equivariant map
            isinstance(self.polar, str) and self.polar in known,
            f"polar must be one of {', '.join(known)}, got {shown(self.polar)}",
        )
        check_ints(self, ns_steps="[1, 99] or None")
        check_numbers(self, alpha="[-8, 8]")
        check_eps(self)
        if self.polar != "inverse_root":
            with naming("ns_steps"):  # raises here for what the kernel refuses
                empty = torch.empty(1, 0, 1, dtype=torch.float32, device="cpu")
                polar_factor(empty, self.polar, steps=self.ns_steps)
        check(
            self.alpha == 0.0 or self.adjust_lr_fn == "none",
            "alpha scales a whole update, which match_rms_adamw does by itself; set "
            "adjust_lr_fn='none' to use it",
        )

    def orthogonalize(
        self, X: Tensor, w: Member, left: bool, has_unit_rows: bool = False
    ) -> Tensor:
        """Polar factor of X (K, m, n).

        Args:
            X: Not changed.
            w: The member, for its reductions.
            left: Which Gram matrix an absolute ``eps`` is added to; without one the smaller Gram
                matrix is taken, as both give the same factor.
            has_unit_rows: Whether X is known to be neither tiny nor huge.
        """

        def factor(Y: Tensor) -> Tensor:
            if self.eps is None and not has_unit_rows:
                (Y,) = unit_range([Y])
            if self.polar != "inverse_root":
                floor = 1e-7 if self.eps is not None else 2.0 ** -(SAFE_EXPONENT + 1)
                return polar_factor(Y, self.polar, steps=self.ns_steps, eps=floor)
            on_left = left if self.eps is not None else Y.shape[-2] <= Y.shape[-1]
            return gram_polar(Y, on_left, self.ns_steps or 5, self.eps)

        return w.reductions.on_full_matrix(factor, X)

    def nuclear_scale(self, X: Tensor, U: Tensor, w: Member) -> Tensor | None:
        """nu^alpha (K, 1, 1) with nu = <X, U>, the nuclear norm of X if U is its polar factor."""
        if self.alpha == 0.0:
            return None
        nu = w.reductions.both(total(product(X.new_ones(len(X), 1, X.shape[-2]), X * U)))
        floor = torch.finfo(nu.dtype).tiny if self.eps is None else self.eps
        # a negative power of the floor may be more than a float holds, and 0 times it no number
        largest = torch.finfo(nu.dtype).max / 1024
        return (nu.clamp_(min=floor) ** self.alpha).clamp_(max=largest)


# momentum -----------------------------------------------------------------------------------------


def averaged(
    M: Tensor | None, G: Tensor, momentum: float, squares: str | None, finite: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The new momentum (K, m, n), G itself without a buffer, and the squared norms of its rows.

    Args:
        M: The buffer, or None where momentum is 0.
        G: (K, m, n), the gradient, not changed.
        momentum: Decay of M.
        squares: ``"rows"`` where the squares are wanted, else None.
        finite: None, or flags (K,): where one is 0, M stays.
    """
    if M is not None:
        U, found = kernels.momentum_step_(M, G, momentum, squares=squares, finite=finite)
        return U, found
    U = G.to(torch.promote_types(G.dtype, torch.float32))
    return U, None if squares is None else kernels.squares(U, -1)


# rows ---------------------------------------------------------------------------------------------


def row_squares(X: Tensor, reductions: Reductions) -> Tensor:
    """Sum of the squares of every row of X (K, m, n), as (K, m, 1)."""
    squares_found: Tensor = kernels.squares(X, -1)
    return reductions.cols(squares_found)


def row_factors(
    squares: Tensor, mode: str, eps: float | None, reductions: Reductions, m: int
) -> Tensor:
    """Factors (K, m, 1) that bring rows of these squared norms to norm 1; zero rows stay zero.

    Args:
        squares: (K, m, 1).
        mode: ``"inverse_eps"`` 1 / (s + eps); ``"inverse"`` or ``"unit"`` 1 / max(s, eps);
            ``"relative"`` 1 / (s + 0.01 rms of all s), which lets rows fade that have become small.
        eps: See mode; None for the smallest normal number, see :func:`kernel_eps`.
        reductions: Sums over the weight's indices.
        m: Rows of the whole weight.
    """
    rms = reductions.rows(total(squares.mT)).div_(m).sqrt_() if mode == "relative" else None
    return kernels.row_factors(squares, mode, kernel_eps(eps), rms)


def rms_factor(U: Tensor, target: float, reductions: Reductions, n: int) -> Tensor:
    """Factor (K, 1, 1) that brings the nonzero rows of U (K, m, n) to this root mean square."""
    squares = row_squares(U, reductions)
    rows = (squares > 0).to(squares.dtype).sum(-2, keepdim=True)
    both = reductions.rows(torch.cat([rows, total(squares.mT)], -1))  # (K, 1, 2), in one call
    rows, square_sum = both[..., :1], both[..., 1:]
    ratio = rows * n / square_sum
    # a subnormal sum, as a given eps leaves of tiny gradients, makes the quotient infinite
    ratio = torch.where(ratio.isinf(), (rows * n).sqrt() / square_sum.sqrt(), ratio.sqrt())
    return torch.where(square_sum > 0, target * ratio, 0.0)


def center(X: Tensor, reductions: Reductions, m: int, in_place: bool = False) -> Tensor:
    """X (K, m, n) minus the mean of its m rows: (I - 1 1^T / m) X, in X itself if ``in_place``."""
    mean = reductions.rows(product(X.new_ones(len(X), 1, X.shape[-2]), X)).div_(m)
    return X.sub_(mean) if in_place else X - mean


# small numbers ------------------------------------------------------------------------------------

SAFE_EXPONENT = 40
"""Powers of two up to which squares of float32 entries keep all bits, also of far smaller ones."""


def kernel_eps(eps: float | None) -> float:
    """The eps that kernels get for an option ``eps``; 0 for None.

    The root of a sum of squares is 0 or far above the smallest normal number, so adding that
    number changes no bit. Under 0 the kernels give a row whose squares vanish no step; divided by
    the smallest normal number such a row would make a huge one.
    """
    return 0.0 if eps is None else eps


def in_range(numbers: Tensor, least: float, most: float) -> bool:
    """Whether all numbers lie from least to most; with a 0 among them the answer is False."""
    if numbers.numel() == 0:
        return True
    low, high = torch.aminmax(numbers)
    return least <= float(low) and float(high) <= most


def unit_range(Xs: Sequence[Tensor], reductions: Reductions = LOCAL_REDUCTIONS) -> Sequence[Tensor]:
    """Matrices of Xs (K, m, n) times a power of two, where squares of entries may leave the range.

    Then the largest entry comes to [1/2, 1), or as near as a normal power of two brings it, and no
    bit is lost. Matrices at one place of the stack share the power, shards that of the whole
    matrix; zero matrices stay.
    """
    largest = reductions.most(reduce(torch.maximum, map(largest_entries, Xs)))  # (K, 1, 1)
    scale = range_scale(largest)
    return Xs if scale is None else [X * scale for X in Xs]


def range_scale(largest: Tensor) -> Tensor | None:
    """Powers of two for entries up to these, 1 from 2^-40 to 2^40; None where all are known as 1.

    Shards that agree on the largest entries have equal answers.
    """
    low, high = 2.0**-SAFE_EXPONENT, 2.0**SAFE_EXPONENT
    is_safe = (largest == 0) | ((largest >= low) & (largest <= high))
    # an accelerator would have to wait for the answer
    if largest.device.type == "cpu" and bool(is_safe.all()):
        return None
    exponent = torch.frexp(largest).exponent
    limit = 1 - math.frexp(torch.finfo(largest.dtype).tiny)[1]
    exponent = (-exponent).clamp(-limit, limit).masked_fill(is_safe, 0).to(largest.dtype)
    return torch.full_like(largest, 2.0) ** exponent  # ldexp takes its powers in float32


def largest_of_rows(X: Tensor) -> Tensor:
    """The largest magnitude in each row of X (K, m, n), as (K, m, 1); 0 if there is no entry."""
    if X.numel() == 0:
        return X.new_zeros(*X.shape[:-1], 1)
    return torch.maximum(X.amax(-1, keepdim=True), -X.amin(-1, keepdim=True))


# gate and up --------------------------------------------------------------------------------------


def join_pairs(X: Tensor, layout: str | None) -> Tensor:
    """Rows of gate and up (K, 2 r, d) as one row for each neuron (K, r, 2 d).

    Args:
        X: The weight, or anything else with such rows.
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
