"""Examples in docstrings run, and every public class shows its paper and its algorithm.

What sections a docstring has, and that they fit the signature, is tested in test_house.py.
"""

import doctest
import importlib
import re

import pytest
from helpers.paths import ROOT

import stiefel.optimizers as package
from stiefel.optimizers import StackedOptimizer

MODULES = sorted(
    ".".join(("stiefel", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("optimizers", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text()
)
METHODS = [
    cls
    for cls in vars(package).values()
    if isinstance(cls, type) and issubclass(cls, StackedOptimizer) and cls is not StackedOptimizer
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_method_docstring_holds_paper_and_algorithm_box(cls):
    assert re.search(r"arXiv:? ?\d{4}\.\d{4,5}", cls.__doc__) and "::\n" in cls.__doc__
    assert ">>> optimizer.step()" in cls.__doc__ or ">>> optimizer = " in cls.__doc__


def test_everything_exported_is_documented():
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
