"""The group key ``weight_norm``: words that steer the norm of a weight, and their closed form.

Every word leaves W in the span of W and the step U, row by row: W <- A W - B U. A and B are numbers
per matrix or per row, which need nothing but the row sums of W^2, U W and U^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.rule import RowNorms, Rule, Slot, Slots
from .._core.validation import check, is_number, number, plain_number, shown
from .layout import local
from .write_modes import RESIDUAL, with_residuals

RADIUS = "weight_radius"
"""State key of the radius on which ``sphere`` keeps a weight; also the group key that gives it."""
DRIVER_SLOTS = frozenset((RADIUS, RESIDUAL))
"""Slots that belong to the driver: no rule sees them, and they stay where a rule drops its own."""
NOT_MEASURED = -1.0
"""A stored radius that the next update sets to what the group gives, else measures."""
RESCALED = -2.0
"""A stored radius that the next update measures, whatever the group gives."""
RESET_BY = {RADIUS: RESCALED, "row_norm": NOT_MEASURED}
"""State keys of norms of a weight, and what has the next update measure them anew."""
SMALLEST_SQUARE = 1e-30
"""Squares of norms up to this count as zero."""
ROWS, MATRIX, WHOLE = "rows", "matrix", "whole"
KNOWN = (
    *("relative", "floor:k", "rowfloor:k", "sphere", "brake:out,in", "pin:out,in", "hyperball"),
    *("a size and a radius joined by '+'", "suffixes ':rows' and ':whole'"),
)
Number = float | Tensor


class _Word(NamedTuple):
    """What a word may be followed by.

    Attributes:
        is_size: Whether it changes the size of the step, else it steers the radius.
        numbers: Its numbers where none are given.
        high: The largest number.
        scopes: Suffixes that it takes.
    """

    is_size: bool
    numbers: tuple[float, ...]
    high: str
    scopes: tuple[str, ...]


_WORDS = {
    "relative": _Word(True, (), "", (ROWS, WHOLE)),
    "floor": _Word(True, (0.35,), "inf)", (WHOLE,)),
    "rowfloor": _Word(True, (0.3825,), "inf)", ()),
    "sphere": _Word(False, (), "", (ROWS, WHOLE)),
    "brake": _Word(False, (0.5, 1.0), "1]", (ROWS, WHOLE)),
    "pin": _Word(False, (0.5, 1.0), "1]", (WHOLE,)),
}


@dataclass(frozen=True)
class NormControl:
    """What the words of ``weight_norm`` ask for.

    Attributes:
        size: ``"relative"``: the step is as large as the weight. ``"floor"``: it is at least
            ``kappa`` times as large. None: as the rule makes it.
        kappa: The share of ``floor``.
        size_scope: Of what norms are taken for it: each row, each matrix, the whole parameter.
        radius: ``"sphere"``: the norm stays what it is. ``"brake"``: it changes less than the
            step would have it. ``"pin"``: it follows the radial part of the step, which is damped.
            None: it is not steered.
        outward: Of ``brake`` and ``pin``: the share of a movement outward.
        inward: The same inward.
        radius_scope: Of what norms are taken for it.
    """

    size: str | None = None
    kappa: float = 1.0
    size_scope: str = MATRIX
    radius: str | None = None
    outward: float = 1.0
    inward: float = 1.0
    radius_scope: str = MATRIX

    @property
    def keeps_radius(self) -> bool:
        """Whether the radius is state, so that plain decay has no effect."""
        return self.radius == "sphere"

    @property
    def has_rows(self) -> bool:
        """Whether norms of single rows are needed."""
        return ROWS in (self.size_scope, self.radius_scope)

    @property
    def is_whole(self) -> bool:
        """Whether norms of whole parameters are needed."""
        return WHOLE in (self.size_scope, self.radius_scope)


# words --------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def parse(text: str) -> NormControl:
    """What a value of ``weight_norm`` asks for.

    Raises:
        ValueError: For a word that is not known, two of one kind, or a number out of range.
    """
    control, kinds = NormControl(), set[bool]()
    for part in text.split("+"):
        name, *options = part.split(":")
        for word in ("relative", "sphere") if name == "hyperball" else (name,):
            check(word in _WORDS, _unknown(text, part))
            is_size = _WORDS[word].is_size
            check(
                is_size not in kinds,
                f"weight_norm takes one word of a size (relative, floor, rowfloor) and one of a "
                f"radius (sphere, brake, pin), got {shown(text)}",
            )
            kinds.add(is_size)
            control = _with_word(control, word, options, text)
    return control


def _unknown(value: Any, part: str = "") -> str:
    got = f"{shown(part)} in {shown(value)}" if part and part != value else shown(value)
    return f"weight_norm must be None or one of {', '.join(KNOWN)}, got {got}"


def _with_word(control: NormControl, name: str, options: list[str], text: str) -> NormControl:
    """The control with one more word."""
    word = _WORDS[name]
    given = [x for x in options if x not in (ROWS, WHOLE)]
    scopes = [x for x in options if x in (ROWS, WHOLE)]
    check(
        options == given + scopes and len(given) <= bool(word.numbers) and len(scopes) <= 1,
        _unknown(text, ":".join((name, *options))),
    )
    check(
        {*scopes} <= {*word.scopes},
        f"weight_norm {name!r} takes {' or '.join(map(repr, word.scopes)) or 'no suffix'}, got "
        f"{shown(text)}",
    )
    numbers = _numbers(name, given[0].split(",") if given else [], text)
    scope = scopes[0] if scopes else ROWS if name == "rowfloor" else MATRIX
    if word.is_size:
        size = "floor" if name == "rowfloor" else name
        kappa = numbers[0] if numbers else 1.0
        return replace(control, size=size, kappa=kappa, size_scope=scope)
    outward, inward = numbers or (1.0, 1.0)
    return replace(control, radius=name, outward=outward, inward=inward, radius_scope=scope)


def _numbers(name: str, given: list[str], text: str) -> tuple[float, ...]:
    """The numbers of a word, its own where none are given."""
    word = _WORDS[name]
    if not given:
        return word.numbers
    check(
        len(given) == len(word.numbers),
        f"weight_norm {name!r} takes {len(word.numbers)} numbers, got {shown(text)}",
    )
    found = []
    for x in given:
        try:
            value = float(x)
        except ValueError:
            raise ValueError(_unknown(text)) from None
        found.append(number(f"the numbers of weight_norm {name!r}", value, f"[0, {word.high}"))
    return tuple(float(x) for x in found if x is not None)


def weight_norm_value(name: str, x: Any) -> str | None:
    """A checked value of ``weight_norm``."""
    check(x is None or isinstance(x, str), _unknown(x))
    if x is not None:
        parse(x)
    value: str | None = x
    return value


def control_of(group: Mapping[str, Any]) -> NormControl | None:
    """What a group asks for; None for nothing."""
    text = group.get("weight_norm")
    return None if text is None else parse(text)


def decays(group: Mapping[str, Any]) -> bool:
    """Whether weight decay has an effect on matrices of a group: a sphere undoes plain decay."""
    control = control_of(group)
    return control is None or not control.keeps_radius or bool(group.get("cautious"))


def norm_text(group: Mapping[str, Any]) -> str:
    """The words of a group with the radius that it gives, for a table; "" for none."""
    text, radius = group.get("weight_norm"), group.get(RADIUS)
    return (text or "") + (f" at {radius:g}" if text and radius is not None else "")


def check_weight_norm(group: Mapping[str, Any], rule: Rule | None) -> None:
    """Raise where ``weight_norm`` does not go with a group's rule; AdamW groups ignore it.

    Args:
        group: A group whose values were checked.
        rule: Its rule; None for an AdamW group.

    Raises:
        ValueError: With what is in the way.
    """
    if rule is None:
        return
    control = control_of(group)
    check(
        group.get(RADIUS) is None or (control is not None and control.keeps_radius),
        "weight_radius is the radius of weight_norm='sphere' or 'hyperball'; set that, or leave "
        "weight_radius out",
    )
    obstacle = None if control is None else rule.weight_norm_obstacle()
    check(
        obstacle is None,
        f"weight_norm={shown(group.get('weight_norm'))} does not go with {obstacle}; leave "
        "weight_norm out",
    )


def driver_slots(
    slots: Sequence[Slots],
    writes: Sequence[str],
    control: NormControl | None,
    transposed: Sequence[bool],
) -> tuple[Slots, ...]:
    """Slots of every member with those of the driver.

    Args:
        slots: Slots of the rule.
        writes: How each member is written.
        control: How its norm is steered; None: it is not.
        transposed: Whether the rule sees it transposed.
    """
    found = with_residuals(slots, writes)
    if control is None or not control.keeps_radius:
        return found
    axes = ("m1", "1n") if control.radius_scope == ROWS else ("11", "11")
    return tuple(
        {**own, RADIUS: Slot(axes[is_turned], dtype="full", fill=NOT_MEASURED)}
        for own, is_turned in zip(found, transposed, strict=True)
    )


def is_to_measure(stored: Tensor, given: float | None) -> Tensor:
    """Where the next update takes the norm of the weight as its radius.

    Args:
        stored: The stored radii.
        given: The group's ``weight_radius``.
    """
    return stored < (0.0 if given is None else NOT_MEASURED)


def radii_of(groups: Iterable[Mapping[str, Any]]) -> list[float | None]:
    """The radius that each group gives; no number, which checks refuse, counts as none."""
    given = (group.get(RADIUS) for group in groups)
    return [plain_number(x) if is_number(x) else None for x in given]


def follow_radii(
    groups: Sequence[Mapping[str, Any]],
    before: Sequence[float | None],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> list[float | None]:
    """Have the next update take the radii that groups give now and did not give before.

    A radius that stays given is not taken again: weights may have been rescaled since.

    Args:
        groups: The groups.
        before: What this function returned last.
        state: The optimizer's state, changed in place.

    Returns:
        The radii that the groups give.
    """
    now = radii_of(groups)
    for group, old, new in zip(groups, before, now, strict=False):
        if new is None or new == old:
            continue
        for p in group["params"]:
            for key, radius in state.get(p, {}).items():
                if key.partition(".")[0] == RADIUS:
                    local(radius).fill_(NOT_MEASURED)
    return now


def has_zero(squares: Tensor) -> bool:
    """Whether one of some squares of norms counts as zero; the host reads it."""
    return bool((squares <= SMALLEST_SQUARE).any())


def zero_weight(text: str) -> str:
    """The refusal of a weight that words name."""
    return (
        f"{text} is to keep its norm (weight_norm), but its norm is zero; give weight_radius, "
        "initialise it, or move it to a group with rule='adamw'"
    )


# closed form --------------------------------------------------------------------------------------


class RowSums(NamedTuple):
    """Row sums, or over whole matrices where no norm of a row is needed.

    Attributes:
        WW: Those of W^2, (K, m, 1) or (K, 1, 1).
        UW: Those of U W.
        UU: Those of U^2.
        over: Takes a scope and such sums, and adds them up for it.
    """

    WW: Tensor
    UW: Tensor
    UU: Tensor
    over: Callable[..., tuple[Tensor, ...]]


class Multipliers(NamedTuple):
    """W <- A W - B U.

    Attributes:
        A: (K, m, 1), (K, 1, 1) or (1, 1, 1).
        B: Likewise.
        h: W's share of U that was taken out of it, likewise, or 0.
        cancels: None, or where the step leaves so little of W that sums are too coarse.
    """

    A: Tensor
    B: Tensor
    h: Number
    cancels: Tensor | None = None


def multipliers(
    control: NormControl, sums: RowSums, lr: Number, keep: Number, radius: Tensor | None
) -> Multipliers:
    """The closed form of all words.

    Args:
        control: The words.
        sums: Those of W before the step, and of U with all its scale factors.
        lr: Learning rate, a number or (K, 1, 1).
        keep: What plain decay leaves of W, likewise.
        radius: Radius of the sphere, in the scope of the radius; None for other words.
    """
    WW, UW, UU, over = sums
    h: Number = 0.0
    if control.radius == "pin":
        all_WW, all_UW = over(control.radius_scope, WW, UW)
        damped = 1.0 - _share(all_UW < 0, control, all_UW)
        h = torch.where(all_WW > SMALLEST_SQUARE, damped * all_UW / all_WW, 0.0)
        UW, UU = UW - h * WW, (UU - 2 * h * UW + h * h * WW).clamp(min=0.0)
    s = _size(control, WW, UU, over, keep, radius)
    if control.radius is None:
        return Multipliers(s * 0 + keep, s * lr, h)
    WW, UW, UU = over(control.radius_scope, WW, s * UW, s * s * UU)
    square = keep * keep * WW - 2 * keep * lr * UW + lr * lr * UU
    f = _projection(control, square, WW, UW, lr, keep, radius)
    cancels = ~(square >= 1e-2 * keep * keep * WW) & (WW > SMALLEST_SQUARE)
    return Multipliers(f * (keep + lr * s * h), f * lr * s, h, cancels)


def _size(
    control: NormControl,
    WW: Tensor,
    UU: Tensor,
    over: Callable[..., tuple[Tensor, ...]],
    keep: Number,
    radius: Tensor | None,
) -> Tensor:
    """What multiplies U."""
    if control.size is None:
        return torch.ones_like(WW)
    WW, UU = over(control.size_scope, WW, UU)
    size, moves = keep * WW.sqrt(), UU > SMALLEST_SQUARE
    if control.size == "floor":
        return torch.where(moves, (control.kappa * size / UU.sqrt()).clamp(min=1.0), 1.0)
    if radius is not None and control.size_scope == control.radius_scope:
        size = radius
    else:
        moves = moves & (WW > SMALLEST_SQUARE)
    return torch.where(moves, size / UU.sqrt(), 1.0)


def _projection(
    control: NormControl,
    square: Tensor,
    WW: Tensor,
    UW: Tensor,
    lr: Number,
    keep: Number,
    radius: Tensor | None,
) -> Tensor:
    """What multiplies the weight after the step, of norm x = sqrt(square)."""
    x, w, moves = square.clamp(min=0.0).sqrt(), WW.sqrt(), square > 0
    if control.radius == "sphere":
        assert radius is not None
        target, moves = radius, moves & (radius * radius > SMALLEST_SQUARE)
    elif control.radius == "brake":
        before = keep * w
        target = before + _share(x > before, control, x) * (x - before)
    else:  # to first order: the tangent part of a step leaves the norm as it is
        target, moves = keep * w - lr * UW / w, moves & (WW > SMALLEST_SQUARE)
    return torch.where(moves, target / x, 1.0)


def _share(is_outward: Tensor, control: NormControl, like: Tensor) -> Tensor:
    """The share of a radial movement that is left, by its direction."""
    return torch.full_like(like, control.inward).masked_fill(is_outward, control.outward)


class NewNorms(NamedTuple):
    """What a step along directions of rows makes of W = g v / |v|.

    Attributes:
        A: (K, m, 1), of W <- A W - B U.
        B: Likewise.
        g: The new norms of the rows of W.
        v: The new norms of the rows of v.
    """

    A: Tensor
    B: Tensor
    g: Tensor
    v: Tensor


def reparametrized(
    sums: RowSums, norms: RowNorms, lr: Number, keep: Number, cautious: Number
) -> NewNorms:
    """V <- v - lr U, g <- keep (g - lr change), and W <- g v / |v|, by rows.

    Args:
        sums: Row sums of W before the step, and of U with all its scale factors.
        norms: g, |v| and the change of g.
        lr: Learning rate, a number or (K, 1, 1).
        keep: What decay leaves of g, likewise.
        cautious: 1 where g decays only where its change does not oppose it, else 0, likewise.
    """
    WW, UW, UU, _ = sums
    g, v, change = (x.to(WW.dtype) for x in norms)
    has_row = WW > SMALLEST_SQUARE
    a = torch.where(has_row, v / WW.sqrt(), 0.0)  # v = a W
    square = torch.where(has_row, v * v, 0.0) - 2 * lr * a * UW + lr * lr * UU
    moves, x = square > SMALLEST_SQUARE, square.clamp(min=0.0).sqrt()
    decays = (change * g >= 0) | (torch.zeros_like(g) + cautious == 0)
    new = (g - lr * change) * torch.where(decays, torch.ones_like(g) * keep, 1.0)
    # a row that v leaves where it is keeps its bits, unless g moves
    moves &= lr * lr * UU > 0
    A = torch.where(moves, new * a / x, torch.where(g == 0, 1.0, new / g))
    return NewNorms(A, torch.where(moves, new * lr / x, 0.0), new, torch.where(moves, x, v))
