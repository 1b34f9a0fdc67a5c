"""Checks of hyper-parameters: each raises ValueError with one sentence that names the parameter.

A check of a rule's fields also stores what it accepts as plain Python values, so that a scalar of
numpy or a dtype never reaches a group or a checkpoint. Ranges are written as in a textbook:
``"[0, 1)"``, ``"(0, inf)"``, ``"[1, 99] or None"``; infinity itself is in none of them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_EXACT_INT = 2**53
"""Largest int that a float holds exactly; a larger hyper-parameter becomes a float."""
INT_LIMIT = 2**63


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


# single values ------------------------------------------------------------------------------------


class Range(NamedTuple):
    """An interval, and whether None is a value too."""

    low: float
    high: float
    is_open_below: bool
    is_open_above: bool
    may_be_none: bool

    def contains(self, x: float) -> bool:
        """Whether a number lies in the interval; NaN never does, infinity where it is an end."""
        above = x > self.low if self.is_open_below else x >= self.low
        below = x < self.high if self.is_open_above else x <= self.high
        return above and below and x > -math.inf

    def words(self, *, whole: bool = False) -> str:
        """The allowed values in words, to follow "must be"."""
        low, high = (f"{x:g}" for x in (self.low, self.high))
        if self.high < math.inf:
            start, end = "(" if self.is_open_below else "[", ")" if self.is_open_above else "]"
            text = f"an int from {low} to {high}" if whole else f"in {start}{low}, {high}{end}"
        elif whole:
            text = f"an int of at least {low}"
        elif self.low == -math.inf:
            text = "a finite number"
        else:
            finite = " and finite" if self.is_open_above else ""
            text = f"at least {low}{finite}"
            if self.is_open_below:
                text = f"positive{finite}" if self.low == 0 else f"above {low}{finite}"
        return f"{text}, or None" if self.may_be_none else text


@lru_cache
def parse_range(text: str) -> Range:
    """Read an interval such as ``"[0, 1)"``, with " or None" behind it where None is allowed."""
    interval, _, none = text.partition(" or ")
    low, high = interval[1:-1].split(",")
    return Range(float(low), float(high), interval[0] == "(", interval[-1] == ")", none == "None")


def shown(x: Any) -> str:
    """A value in one short line of a message; a tensor is named and not read."""
    if isinstance(x, Tensor):
        return "a nested tensor" if x.is_nested else f"a {x.dtype} tensor of size {x.numel()}"
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def function_name(x: Any) -> str:
    """The name of a function by module, that of its class for any other callable."""
    if isinstance(x, partial):
        return f"partial({function_name(x.func)})"
    named = x if hasattr(x, "__qualname__") else type(x)
    return f"{named.__module__}.{named.__qualname__}"


def is_number(x: Any, kind: type = numbers.Real) -> bool:
    """Whether x is a real number (or whole, ``numbers.Integral``), numpy's too, but no bool."""
    return isinstance(x, kind) and not isinstance(x, bool)


def plain_number(x: Any) -> float:
    """The int or float that equals x; infinity for an int that no float reaches."""
    if type(x) is float:
        return x
    if isinstance(x, numbers.Integral) and abs(int(x)) <= MAX_EXACT_INT:
        return int(x)
    try:
        return float(x)
    except OverflowError:
        return math.inf


def number(name: str, x: Any, allowed: str, refusal: str = "") -> float | None:
    """A real number in a range, as a plain int or float.

    Args:
        name: The keyword.
        x: Its value.
        allowed: The range, see the module.
        refusal: How the message begins in torch's words (default: no such words).

    Raises:
        ValueError: If x is no number of the range.
    """
    interval = parse_range(allowed)
    if x is None and interval.may_be_none:
        return None
    value = plain_number(x) if is_number(x) else math.nan
    if not interval.contains(value):
        words = f"{name} must be {interval.words()}"
        got = f"{words}, got {shown(x)}"
        raise ValueError(f"{refusal}: {shown(x)}; {words}" if refusal else got)
    return value


def whole_number(name: str, x: Any, allowed: str) -> int | None:
    """A whole number in a range and below 2**63, as an int.

    Raises:
        ValueError: If x is none.
    """
    interval = parse_range(allowed)
    if x is None and interval.may_be_none:
        return None
    value = int(x) if is_number(x, numbers.Integral) else None
    if value is None or not -INT_LIMIT <= value < INT_LIMIT or not interval.contains(value):
        limit = " and below 2**63" if value is not None and value >= INT_LIMIT else ""
        raise ValueError(f"{name} must be {interval.words(whole=True)}{limit}, got {shown(x)}")
    return value


def flag(name: str, x: Any, *, may_be_none: bool = False) -> bool | None:
    """True or False, numpy's too, as a plain bool.

    Raises:
        ValueError: If x is something else.
    """
    if x is None and may_be_none:
        return None
    allowed = "None, True or False" if may_be_none else "True or False"
    check(isinstance(x, (bool, np.bool_)), f"{name} must be {allowed}, got {shown(x)}")
    return bool(x)


def two_decays(name: str, x: Any, refusal: str) -> tuple[float, float]:
    """Two decays of running averages, in [0, 1), as a tuple of plain numbers.

    Args:
        name: The keyword.
        x: Its value.
        refusal: The words for one that is out of range, before the index and the value.

    Raises:
        ValueError: If x is no pair of such numbers.
    """
    is_pair = isinstance(x, (tuple, list)) and len(x) == 2 and all(map(is_number, x))
    check(is_pair, f"{name} must be two numbers in [0, 1), got {shown(x)}")
    for i, beta in enumerate(x):
        check(
            0.0 <= plain_number(beta) < 1.0,
            f"{refusal} at index {i}: {shown(beta)}; {name} must be two numbers in [0, 1)",
        )
    return plain_number(x[0]), plain_number(x[1])


def choice(name: str, x: Any, known: Iterable[str | None]) -> str | None:
    """One of some names.

    Raises:
        ValueError: If x is none of them.
    """
    is_known = (x is None or isinstance(x, str)) and x in known
    check(is_known, f"{name} must be one of {tuple(known)}, got {shown(x)}")
    result: str | None = x
    return result


def dtype_name(x: Any) -> Any:
    """The name of a dtype, such as ``"bfloat16"``, for the dtype or its name; else x itself."""
    if isinstance(x, torch.dtype):
        x = str(x)
    return x.removeprefix("torch.") if isinstance(x, str) else x


# fields of a rule ---------------------------------------------------------------------------------


def _store(rule: Any, name: str, value: Any) -> None:
    """Set a field of a frozen rule, which only its own checks may do."""
    if getattr(rule, name) is not value:
        object.__setattr__(rule, name, value)


def check_numbers(rule: Any, **ranges: str) -> None:
    """Refuse fields that are no numbers of their range; see :func:`number`."""
    for name, allowed in ranges.items():
        _store(rule, name, number(name, getattr(rule, name), allowed))


def check_ints(rule: Any, **ranges: str) -> None:
    """Refuse fields that are no whole numbers of their range; see :func:`whole_number`."""
    for name, allowed in ranges.items():
        _store(rule, name, whole_number(name, getattr(rule, name), allowed))


def check_flags(rule: Any, *names: str) -> None:
    """Refuse fields that are neither True nor False."""
    for name in names:
        _store(rule, name, flag(name, getattr(rule, name)))


def check_choices(rule: Any, **choices: Iterable[str | None]) -> None:
    """Refuse fields of a rule whose value is not among the given choices."""
    for name, known in choices.items():
        choice(name, getattr(rule, name), known)


def check_eps(rule: Any, name: str = "eps", *, may_be_none: bool = True) -> None:
    """Refuse what is no eps, with torch's text; None is the method's own."""
    allowed = "[0, inf) or None" if may_be_none else "[0, inf)"
    _store(rule, name, number(name, getattr(rule, name), allowed, "Invalid epsilon value"))


def check_adam(rule: Any, *, eps_may_be_none: bool = False) -> None:
    """Refuse betas outside [0, 1) and a negative eps, in the words of ``torch.optim.AdamW``."""
    _store(rule, "betas", two_decays("betas", rule.betas, "Invalid beta parameter"))
    check_eps(rule, may_be_none=eps_may_be_none)


def check_count_or_share(rule: Any, name: str, *, may_be_zero: bool = False) -> None:
    """Refuse a field that is neither a count nor a share of all; an int is a count, a float not.

    Args:
        rule: The rule.
        name: The field.
        may_be_zero: Whether 0 and 0.0 are values.
    """
    x, least = getattr(rule, name), 0 if may_be_zero else 1
    if is_number(x, numbers.Integral):
        valid = least <= x < INT_LIMIT
    else:
        valid = is_number(x) and 0.0 <= x <= 1.0 and (may_be_zero or x > 0.0)
    counts = f"a count (an int) of at least {least}" if may_be_zero else "a positive int"
    interval = "[0, 1]" if may_be_zero else "(0, 1]"
    check(valid, f"{name} must be {counts} or a fraction in {interval}, got {name}={shown(x)}")
    _store(rule, name, plain_number(x) if not isinstance(x, numbers.Integral) else int(x))


def check_coefficients(rule: Any, name: str) -> None:
    """Refuse what is neither None, nor three numbers, nor rows of three numbers."""

    def triple(row: Any) -> tuple[float, ...]:
        is_row = isinstance(row, (tuple, list)) and len(row) == 3 and all(map(is_number, row))
        check(is_row and all(map(math.isfinite, map(plain_number, row))), message)
        return tuple(map(plain_number, row))

    x = getattr(rule, name)
    message = (
        f"{name} must be None, a tuple of exactly 3 values or a sequence of such tuples, such as "
        f"(3.4445, -4.7750, 2.0315), got {shown(x)}"
    )
    if x is not None:
        check(isinstance(x, (tuple, list)) and len(x) > 0, message)
        is_single = not isinstance(x[0], (tuple, list))
        rows = [triple(x)] if is_single else [*map(triple, x)]
        _store(rule, name, rows[0] if is_single else tuple(rows))
        steps = getattr(rule, "ns_steps", None)
        own = steps if isinstance(steps, int) else None
        _check_bounded(name, rows, min(own or (5 if is_single else len(rows)), 99))


def _check_bounded(name: str, rows: Sequence[tuple[float, ...]], steps: int) -> None:
    """Refuse odd polynomials a x + b x^3 + c x^5 under which a singular value up to 1 explodes.

    Args:
        name: The keyword.
        rows: (a, b, c) of each step; the last one serves all further steps.
        steps: Number of steps.
    """
    for start in (0.03125 * i for i in range(1, 33)):
        x = start
        for i in range(steps):
            a, b, c = rows[min(i, len(rows) - 1)]
            x = x * (a + x * x * (b + x * x * c)) if abs(x) < 1e4 else math.inf
        check(
            abs(x) < 1e4,
            f"{name} {shown(rows)} diverge: a singular value of {start:g} grows beyond 1e4 in "
            f"{steps} steps; choose polynomials that keep values near 1",
        )


@contextmanager
def naming(*names: str) -> Iterator[None]:
    """Let a ValueError of a kernel name the options that the user knows, not the kernel's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from None


def check_rank(r: int, largest: int) -> None:
    """Refuse a number of basis vectors below 1 or above the largest that a matrix has."""
    check(1 <= r <= largest, f"rank must be from 1 to {largest}, got {r}")


def resolve_rank(rank: int | float, d: int) -> int:
    """Turn the option ``rank`` into a number of columns r, 1 <= r <= d.

    Args:
        rank: An int is a count, a float a fraction of d: 1 is rank one, 1.0 is all of d.
        d: Size of the projected dimension.

    Raises:
        ValueError: If rank is no number, a bool, not positive, or a fraction above 1.
    """
    if isinstance(rank, numbers.Integral) and not isinstance(rank, bool) and rank > 0:
        return min(int(rank), d)
    if isinstance(rank, float) and 0.0 < rank <= 1.0:
        return min(max(1, round(rank * d)), d)
    raise ValueError(f"rank must be a positive int or a fraction in (0, 1], got rank={rank!r}")


def misspelt_option(name: str, options: Iterable[str]) -> str | None:
    """The option, of at least five letters, of which a name is a misspelling by one letter.

    One letter is missing, added or replaced, or two neighbours have changed places.
    """
    for option in sorted(options):
        if len(option) >= 5 and name != option and _is_near(name, option):
            return option
    return None


def _is_near(a: str, b: str) -> bool:
    """Whether one edit makes b of a."""
    if abs(len(a) - len(b)) > 1:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest, other = a[i:], b[i:]
    swapped = len(rest) > 1 and rest[1::-1] + rest[2:] == other
    return swapped or rest[1:] == other[1:] or rest[1:] == other or rest == other[1:]


def describe_unknown(names: Iterable[str], known: Iterable[str], what: str) -> str | None:
    """A sentence about the first unknown name, for the caller's exception; None if all are known.

    Args:
        names: Names that a user gave.
        known: Names that exist; one that differs by one letter is suggested.
        what: What the names are, e.g. "policy key".
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            near = misspelt_option(name, known)
            hint = f"; did you mean {near!r}?" if near else f"; known are {', '.join(known)}"
            return f"{what} {name!r} is unknown{hint}"
    return None
