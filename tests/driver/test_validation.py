"""Checks of hyper-parameters: what passes, what is refused, and the sentence that says so."""

from types import SimpleNamespace

import pytest

from stiefel.optimizers._core.validation import check_at_least, describe_unknown
from stiefel.optimizers.aro import ARORule
from stiefel.optimizers.frugal import FRUGALRule


@pytest.mark.parametrize(
    ("kind", "x", "text"),
    [
        (int, 1, None),
        (int, 0, "x must be an int of at least 1, got 0"),
        (int, True, "x must be an int of at least 1, got True"),
        (int, 2.0, "x must be an int of at least 1, got 2.0"),
        (int, None, "x must be an int of at least 1, got None"),
        (object, 1.5, None),
        (object, None, None),
        (object, 0.5, "x must be at least 1, got 0.5"),
        (object, float("nan"), "x must be at least 1, got nan"),
        (object, True, "x must be at least 1, got True"),
    ],
)
def test_numbers_have_a_minimum(kind, x, text):
    rule = SimpleNamespace(x=x)
    if text is None:
        check_at_least(rule, kind, x=1)
        return
    with pytest.raises(ValueError) as error:
        check_at_least(rule, kind, x=1)
    assert str(error.value) == text


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
