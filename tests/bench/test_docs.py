"""Examples in docstrings run, and every public class says what it must."""

import doctest
import importlib
import re

import pytest

import stiefel.optimizers as package
from stiefel.optimizers import StackedOptimizer

MODULES = [
    "stiefel.optimizers.adaprelora",
    "stiefel.optimizers.altlora",
    "stiefel.optimizers.aro",
    "stiefel.optimizers.auon",
    "stiefel.optimizers._driver.changes",
    "stiefel.optimizers.dctadamw",
    "stiefel.optimizers.fira",
    "stiefel.optimizers.frugal",
    "stiefel.optimizers.galore",
    "stiefel.optimizers.hybrid",
    "stiefel.optimizers._toolkit.base_optimizers",
    "stiefel.optimizers._lora.pair_groups",
    "stiefel.optimizers._driver.memory",
    "stiefel.optimizers.muon",
    "stiefel.optimizers._roles.classify",
    "stiefel.optimizers.rownorm",
    "stiefel.optimizers.spectral",
    "stiefel.optimizers._lora.switching",
    "stiefel.optimizers.switchlora",
    "stiefel.optimizers.symmetry",
    "stiefel.optimizers.trion",
    "stiefel.kernels.polar.methods",
    "stiefel.kernels.polar.report",
]
METHODS = [
    cls
    for cls in vars(package).values()
    if isinstance(cls, type) and issubclass(cls, StackedOptimizer) and cls is not StackedOptimizer
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_method_docstring_holds_source_algorithm_arguments_state_and_example(cls):
    text = cls.__doc__
    assert re.search(r"arXiv \d{4}\.\d{4,5}", text) and "Args:" in text and ">>>" in text
    assert "State" in text and "::" in text and "What it is not" in text
    names = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
    missing = [name for name in names if f"        {name}:" not in text]
    assert not missing, missing


def test_everything_exported_is_documented():
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
