"""Every tensor that the package makes names its device and its dtype, read from the sources.

A factory without them follows ``torch.set_default_device`` and ``torch.set_default_dtype``, which
belong to the user's model. ``tests/driver/test_foreign_defaults.py`` runs every class under both.
"""

import ast

import pytest
from helpers.paths import ROOT

SOURCES = sorted([*ROOT.glob("optimizers/**/*.py"), *ROOT.glob("kernels/**/*.py")])
FACTORIES = {
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "range"),
    *("rand", "randn", "randint", "randperm", "normal", "empty_strided", "empty_permuted"),
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "tril_indices", "triu_indices"),
    *("hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window"),
}
"""Functions of torch that follow the default device, the default dtype or both."""
ALLOWED: dict[str, str] = {}
"""Calls that may leave something open, as "file: source", each with its reason."""


def name_of(path):
    return str(path.relative_to(ROOT))


def torch_calls(path):
    """(name, call) of every call of a function of torch in one file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith("torch.") and name.count(".") == 1:
                yield name.removeprefix("torch."), node


def is_number(node):
    """Whether an expression is a number by its look, such as -1.0 or math.inf."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("math.inf", "math.nan")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_factory_names_its_device_and_its_dtype(path):
    for name, call in torch_calls(path):
        if name not in FACTORIES or f"{name_of(path)}: {ast.unparse(call)}" in ALLOWED:
            continue
        missing = {"device", "dtype"} - {keyword.arg for keyword in call.keywords}
        assert not missing, f"{name_of(path)}:{call.lineno} leaves {sorted(missing)} open"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_generator_names_its_device(path):
    for name, call in torch_calls(path):
        if name == "Generator":
            assert call.args or call.keywords, f"{name_of(path)}:{call.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_choice_between_two_numbers_takes_the_default_dtype(path):
    for name, call in torch_calls(path):
        if name == "where" and len(call.args) == 3:
            both = all(map(is_number, call.args[1:]))
            assert not both, f"{name_of(path)}:{call.lineno}: {ast.unparse(call)}"


def test_every_allowed_call_still_exists():
    found = {
        f"{name_of(path)}: {ast.unparse(call)}" for path in SOURCES for _, call in torch_calls(path)
    }
    assert set(ALLOWED) <= found
