"""Checks of hyper-parameters: what passes, what is refused, and the sentence that says so."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stiefel.optimizers import ARO, Hybrid, Muon, Spectral
from stiefel.optimizers._core.validation import (
    check_coefficients,
    check_count_or_share,
    check_flags,
    check_ints,
    check_numbers,
    describe_unknown,
    dtype_name,
    number,
    shown,
)
from stiefel.optimizers.aro import ARORule
from stiefel.optimizers.frugal import FRUGALRule


def outcome(check, x):
    """What a check leaves in the field x of a rule, or the sentence of its refusal."""
    rule = SimpleNamespace(x=x)
    try:
        check(rule)
    except ValueError as error:
        return str(error)
    return rule.x


def is_outcome(check, x, expected):
    found = outcome(check, x)
    return found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("allowed", "x", "expected"),
    [
        ("[1, inf)", 1, 1),
        ("[1, inf)", np.int32(2), 2),
        ("[1, inf)", 0, "x must be an int of at least 1, got 0"),
        ("[1, inf)", True, "x must be an int of at least 1, got True"),
        ("[1, inf)", 2.0, "x must be an int of at least 1, got 2.0"),
        ("[1, inf)", None, "x must be an int of at least 1, got None"),
        ("[1, inf)", 2**63, f"x must be an int of at least 1 and below 2**63, got {2**63}"),
        ("[0, 99]", 100, "x must be an int from 0 to 99, got 100"),
        ("[0, 99] or None", None, None),
        ("[0, 99] or None", "x", "x must be an int from 0 to 99, or None, got 'x'"),
    ],
)
def test_whole_numbers_have_a_range(allowed, x, expected):
    assert is_outcome(lambda rule: check_ints(rule, x=allowed), x, expected)


@pytest.mark.parametrize(
    ("allowed", "x", "expected"),
    [
        ("[0, 1)", 0.5, 0.5),
        ("[0, 1)", 0, 0),
        ("[0, 1)", np.float32(0.5), 0.5),
        ("[0, 1)", np.float64(0.5), 0.5),
        ("[0, 1)", Fraction(1, 2), 0.5),
        ("[0, 1)", 1.0, "x must be in [0, 1), got 1.0"),
        ("[0, 1)", True, "x must be in [0, 1), got True"),
        ("[0, 1)", "half", "x must be in [0, 1), got 'half'"),
        ("[0, 1)", torch.tensor(0.5), "x must be in [0, 1), got a torch.float32 tensor of size 1"),
        ("(0, 1]", 0, "x must be in (0, 1], got 0"),
        ("(0, inf)", 0.0, "x must be positive and finite, got 0.0"),
        ("(1, inf)", 1, "x must be above 1 and finite, got 1"),
        ("[1, inf)", math.nan, "x must be at least 1 and finite, got nan"),
        ("[1, inf)", math.inf, "x must be at least 1 and finite, got inf"),
        ("(-inf, inf)", -math.inf, "x must be a finite number, got -inf"),
        ("(-inf, inf)", 2**70, 2.0**70),
        ("(0, inf) or None", None, None),
        ("(0, inf) or None", [1], "x must be positive and finite, or None, got [1]"),
    ],
)
def test_numbers_have_a_range(allowed, x, expected):
    assert is_outcome(lambda rule: check_numbers(rule, x=allowed), x, expected)


def test_an_int_beyond_all_floats_is_no_finite_number():
    with pytest.raises(ValueError, match=r"^x must be a finite number, got 1000*\.\.\.$"):
        number("x", 10**400, "(-inf, inf)")


def test_what_is_shown_of_a_value_is_one_short_line():
    assert shown(torch.ones(2, 3)) == "a torch.float32 tensor of size 6"
    assert shown(np.ones((3, 3))) == "array([[1., 1., 1.], [1., 1., 1.], [1., 1., 1.]])"
    assert len(shown("x" * 1000)) == 80


@pytest.mark.parametrize(
    ("x", "expected"), [(True, True), (np.bool_(False), False), (1, None), (None, None)]
)
def test_flags_are_true_or_false(x, expected):
    text = f"x must be True or False, got {x}"
    expected = text if expected is None else expected
    assert is_outcome(lambda rule: check_flags(rule, "x"), x, expected)


@pytest.mark.parametrize("x", [3, 0.5, 1.0, np.int64(3), np.float32(0.5)])
def test_an_int_is_a_count_and_a_float_a_share(x):
    found = outcome(lambda rule: check_count_or_share(rule, "x"), x)
    assert found == x and type(found) is (int if isinstance(x, (int, np.integer)) else float)


@pytest.mark.parametrize("x", [0, 0.0, 1.5, -1, True, "x", None, math.nan, 2**63, [1]])
def test_what_is_neither_a_count_nor_a_share_is_refused(x):
    text = "x must be a positive int or a fraction in (0, 1], got x="
    assert outcome(lambda rule: check_count_or_share(rule, "x"), x).startswith(text)
    zero = outcome(lambda rule: check_count_or_share(rule, "x", may_be_zero=True), x)
    assert zero == 0 if x in (0, 0.0) else zero.startswith("x must be a count (an int) of at least")


def test_coefficients_are_triples_of_plain_numbers():
    def checked(x):
        return outcome(lambda rule: check_coefficients(rule, "x"), x)

    assert checked([1, np.float32(0.5), -0.5]) == (1, 0.5, -0.5)
    assert checked([[1, 2, 3], (4, 5, 6)]) is not None and checked(None) is None
    assert checked([[1, 2, -3], (2, -1, 0)]) == ((1, 2, -3), (2, -1, 0))
    for bad in ((), (1, 2), ((1, 2),), (1, 2, math.nan), (1, 2, "x"), 3, "abc", [[]], [None] * 3):
        assert checked(bad).startswith("x must be None, a tuple of exactly 3 values or a sequence")


def test_dtypes_and_their_names_are_one():
    for x in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert dtype_name(x) == "bfloat16"
    assert dtype_name(None) is None and dtype_name(3) == 3


@pytest.mark.parametrize("name", ["update_gap", "seed"])
def test_true_is_no_count(name):
    with pytest.raises(ValueError, match=f"{name} must be an int"):
        FRUGALRule(**{name: True})
    with pytest.raises(ValueError, match="iterations must be an int"):
        ARORule(iterations=True)


def test_an_unknown_name_is_described_with_the_nearest_known_one():
    known = {"momentum", "lr"}
    assert describe_unknown(["lr"], known, "key") is None
    assert describe_unknown(["lr", "momentun"], known, "key") == (
        "key 'momentun' is unknown; did you mean 'momentum'?"
    )
    assert describe_unknown(["x"], known, "key") == "key 'x' is unknown; known are lr, momentum"


LOW_RANK, BAD_COUNTS = {"polar": "low_rank"}, [-1, 2.5, math.nan, "x"]
BESIDE = [
    (ARO, {"rotation": "eigh"}, "gram_beta", [-0.1, 1.0, 1.5, math.nan, "x"]),
    (ARO, {"rotation_sharing": "chain"}, "layer", [0, *BAD_COUNTS]),
    (Spectral, {"adjust_lr_fn": "none"}, "alpha", [math.nan, math.inf, "x"]),
    (Hybrid, {"adjust_lr_fn": "none"}, "alpha", [math.nan, math.inf, "x"]),
    (Muon, LOW_RANK, "oversample", BAD_COUNTS),
    (Muon, LOW_RANK, "power", BAD_COUNTS),
    (Muon, LOW_RANK, "rank", [0, -1, math.nan, "x"]),
]


@pytest.mark.parametrize(("cls", "needed", "key", "values"), BESIDE)
def test_options_are_checked_beside_those_that_they_need(cls, needed, key, values):
    for value in values:
        with pytest.raises(ValueError, match=key):
            cls([torch.nn.Parameter(torch.ones(4, 3))], **needed, **{key: value})
