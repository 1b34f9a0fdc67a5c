"""A method that the package exports takes part in the examples and benchmarks by itself."""

import inspect
import sys

import pytest
from helpers.paths import BENCH, EXAMPLES

import stiefel.optimizers
from stiefel.optimizers import AltLoRA, GaLore

sys.path.insert(0, str(BENCH))
sys.path.insert(0, str(EXAMPLES))

import cases
import methods
import synthetic


class NewMethod(GaLore):
    """GaLore by another name."""


class NewPairs(AltLoRA):
    """AltLoRA by another name."""


@pytest.fixture(autouse=True)
def exported(monkeypatch):
    for cls in (NewMethod, NewPairs):
        monkeypatch.setattr(stiefel.optimizers, cls.__name__, cls, raising=False)
    names = [*stiefel.optimizers.__all__, "NewMethod", "NewPairs"]
    monkeypatch.setattr(stiefel.optimizers, "__all__", names)


def test_examples_train_a_new_method_with_its_defaults():
    assert methods.available_methods()["newmethod"] is NewMethod
    assert methods.default_lr("newmethod") == inspect.signature(NewMethod).parameters["lr"].default
    assert methods.method_options("newmethod", 64, {})["rank"] == 16
    assert "newmethod" in synthetic.known_optimizers()


def test_examples_know_methods_of_pairs_from_methods_of_matrices():
    assert "newpairs" not in methods.available_methods()
    found = methods.exported_methods(pairs=True)
    assert found["newpairs"] is NewPairs and "newmethod" not in found


def test_the_bench_times_a_new_method_and_its_refreshes():
    entrant = cases.entrants(rank=2)["NewMethod"]
    assert entrant.refresh is not None and entrant.gap == 200
