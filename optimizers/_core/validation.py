"""Checks of hyper-parameters: each raises ValueError with one sentence that names the parameter."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_eps(eps: float | None) -> None:
    """Refuse a negative eps, with torch's text; None is the method's own."""
    check(eps is None or eps >= 0.0, f"Invalid epsilon value: {eps}")


def check_momentum(momentum: float) -> None:
    """Refuse a decay of a momentum average outside [0, 1]."""
    check(0.0 <= momentum <= 1.0, f"momentum must be in [0, 1], got {momentum}")


def check_adam(
    betas: tuple[float, float], eps: float | None, *, eps_may_be_unset: bool = False
) -> None:
    """Refuse betas outside [0, 1) and a negative eps, in the words of ``torch.optim.AdamW``."""
    check(eps is not None or eps_may_be_unset, f"Invalid epsilon value: {eps}")
    check_eps(eps)
    for i, beta in enumerate(betas):
        check(0.0 <= beta < 1.0, f"Invalid beta parameter at index {i}: {beta}")


def check_positive(rule: Any, *names: str) -> None:
    """Refuse fields that are neither None nor above 0."""
    for name in names:
        x = getattr(rule, name)
        check(x is None or x > 0.0, f"{name} must be positive, got {x!r}")


def check_choices(rule: Any, **choices: tuple[str | None, ...]) -> None:
    """Refuse fields of a rule whose value is not among the given choices."""
    for name, known in choices.items():
        value = getattr(rule, name)
        check(value in known, f"{name} must be one of {known}, got {value!r}")


def check_decays(rule: Any, *names: str) -> None:
    """Refuse fields that are neither None nor the decay of a running average, in [0, 1)."""
    for name in names:
        beta = getattr(rule, name)
        check(beta is None or 0.0 <= beta < 1.0, f"{name} must be in [0, 1), got {beta}")


def check_at_least(rule: Any, kind: type, **minimums: int) -> None:
    """Refuse fields that are below a minimum or of another type.

    Args:
        rule: The rule.
        kind: ``int``, or ``object`` for any number, and for None, which leaves the choice to the
            method.
        **minimums: Name of a field and its smallest value.
    """
    for name, minimum in minimums.items():
        x, what = getattr(rule, name), "an int of " if kind is int else ""
        is_kind = isinstance(x, kind) and not isinstance(x, bool)
        valid = (kind is object and x is None) or (is_kind and bool(x >= minimum))
        check(valid, f"{name} must be {what}at least {minimum}, got {x!r}")


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
