"""The operations of kernels/: one name in every package, one place that rounds weights."""

import ast
import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import torch

from stiefel import kernels
from stiefel.kernels import dispatch, ops, reference
from stiefel.kernels.reference import write

FOLDER = Path(kernels.__file__).parent
TORCH_ONLY = {"hashing", "matmul", "rounding", "write"}
"""Plain torch on every device: products, hashes, and what `_write` is among the kernels."""
WRITERS = ("adam_lift", "lift", "row_step", "scaled_add", "split_step")
BETAS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
OPERATIONS = [
    name for name, op in vars(ops).items()
    if inspect.isfunction(op) and op.__module__ == ops.__name__
]  # fmt: skip


def public_files(folder):
    return {path.stem for path in (FOLDER / folder).glob("[!_]*.py")}


def parameters(function):
    return [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]


# names --------------------------------------------------------------------------------------------


def test_a_reference_and_its_kernel_have_one_file_name():
    assert public_files("reference") - TORCH_ONLY == public_files("triton")
    assert TORCH_ONLY <= public_files("reference")


def test_both_back_ends_have_the_same_functions():
    triton = pytest.importorskip("stiefel.kernels.triton")
    assert set(reference.__all__) == set(triton.__all__) and len(reference.__all__) > 20
    for name in reference.__all__:
        plain, fast = getattr(reference, name), getattr(triton, name)
        assert parameters(plain) == parameters(fast), name
        assert inspect.signature(plain).return_annotation is not inspect.Signature.empty
        file = Path(inspect.getsourcefile(plain)).stem
        assert getattr(importlib.import_module(f"{triton.__name__}.{file}"), name) is fast


def test_every_operation_that_dispatches_is_the_reference_in_words():
    assert len(OPERATIONS) > 15 and set(OPERATIONS) <= set(kernels.__all__)
    for name in OPERATIONS:
        if name != "fuses_passes":
            op, plain = getattr(ops, name), getattr(reference, name)
            assert parameters(op) == parameters(plain), name
            assert inspect.getdoc(op) == inspect.getdoc(plain), name
            assert getattr(kernels, name) is op


def test_all_public_names_are_there_and_old_ones_warn():
    assert all(hasattr(kernels, name) for name in kernels.__all__)
    for stem in ("quantise_blocks", "dequantise_blocks", "quantise_rows", "dequantise_rows"):
        with pytest.warns(DeprecationWarning, match=stem.replace("ise", "ize")):
            found = getattr(kernels, stem)
        assert found is getattr(kernels, stem.replace("ise", "ize"))
    with pytest.raises(AttributeError, match="normalise_blocks"):
        kernels.normalise_blocks  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module("stiefel.kernels.quantize"))


def test_passes_are_fused_where_the_back_end_is_not_plain_torch(monkeypatch):
    monkeypatch.delenv("STIEFEL_KERNELS", raising=False)
    X = torch.empty(128, 64)
    assert not kernels.fuses_passes(X) and not kernels.fuses_passes([X, X])
    fast = object()
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "is_supported_gpu", lambda index: True)
    monkeypatch.setattr(dispatch, "triton_backend", lambda: fast)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for shape, expected in (((64, 64), True), ((63, 64), False), ((3, 64, 64), True)):
            G = torch.empty(shape, device="cuda")
            assert kernels.fuses_passes(G) is expected
            assert kernels.fuses_passes([G, G]) is expected


# the place that rounds weights --------------------------------------------------------------------


def test_update_weight_changes_the_weight_itself_or_rounds_once():
    W, seen = torch.randn(3, 4), []
    kernels.update_weight_(W, lambda X: seen.append(X) or X.mul_(2))
    assert seen[0] is W
    half, expected = W.bfloat16(), (W.bfloat16().float() * 1.01 + 0.003).bfloat16()
    kernels.update_weight_(half, lambda X: seen.append(X) or X.mul_(1.01).add_(0.003))
    assert seen[1].dtype == torch.float32 and torch.equal(half, expected)
    kernels.update_weight_(half, lambda X: seen.append(X), torch.float64)
    assert seen[2].dtype == torch.float64 and torch.equal(half, expected)
    view = torch.zeros(4, 6, dtype=torch.float16)[::2, 1::2]
    kernels.update_weight_(view, lambda X: X.add_(1), panel=(slice(1), slice(2, 3)))
    assert view.sum() == view[0, 2] == 1
    kernels.update_weight_(view.zero_(), lambda X: X.add_(1))
    assert torch.equal(view, torch.ones_like(view)) and view._base.sum() == view.numel()


def steps(control, listed):
    """Every operation that writes a weight, by its name."""
    K, m, n, r = 2, 6, 8, 3
    G, P, N = torch.randn(K, m, n), torch.randn(K, m, r), torch.randn(K, r, n)
    M, V = torch.zeros(K, r, n), torch.zeros(K, r, n)
    index = torch.tensor([[0, 2], [1, 5]], dtype=torch.int32)
    a, b = torch.zeros(K, m, 2), torch.zeros(K, m, 2)
    factor = torch.rand(K, m, 1)
    return {
        "scaled_add_": lambda W: reference.scaled_add_(
            list(W) if listed else W, list(G) if listed else G, factor, 0.9, -0.5, control
        ),
        "lift_": lambda W: reference.lift_(W, P, N, 0.9, -0.5, X=G, by=factor, control=control),
        "adam_lift_": lambda W: reference.adam_lift_(
            W, P, N, M, V, 1, 0.9, -0.5, **BETAS, X=G, free=0.1, control=control
        ),
        "split_step_": lambda W: reference.split_step_(
            W, G, index, -1, a, b, 1, 0.9, -0.5, **BETAS, control=control
        ),
        "row_step_": lambda W: reference.row_step_(
            W, torch.zeros(K, m, n), G, 0.9, 1e-8, "unit", 0.9, -0.5, control
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("name", list(steps(None, False)))
def test_no_reference_writes_a_weight_but_by_update_weight(name, controlled, dtype, monkeypatch):
    control = torch.tensor([[1.0, 0.9, -0.5], [0.0, 0.9, -0.5]]) if controlled else None
    for listed in (False, True):
        W = torch.randn(2, 6, 8).to(dtype)
        before = W.clone()
        steps(control, listed)[name](W)
        assert not torch.equal(W[0], before[0])
        assert torch.equal(W[1], before[1]) is controlled
        with monkeypatch.context() as patch:
            patch.setattr(write, "_round_into_", lambda target, change, dtype, rounding: None)
            W, calls = before.clone(), steps(control, listed)
            calls[name](W)
            assert torch.equal(W, before), f"{name} wrote by itself"


@pytest.mark.parametrize("name", WRITERS)
def test_no_kernel_stores_a_weight_but_by_store_weight(name):
    """In every kernel pointers that come from W go to `store_weight`, never to `tl.store`."""
    tree = ast.parse((FOLDER / "triton" / f"{name}.py").read_text())
    kernel = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(x.arg == "W" for x in node.args.args)
        and any("jit" in ast.unparse(x) for x in node.decorator_list)
    ]  # fmt: skip
    assert len(kernel) == 1
    pointers, stores, writes = {"W"}, [], 0
    for node in ast.walk(kernel[0]):
        if isinstance(node, ast.Assign) and "tl.load" not in ast.unparse(node.value):
            used = {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)}
            if used & {"W"}:
                pointers |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    for node in ast.walk(kernel[0]):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "tl.store":
                stores += [x.id for x in ast.walk(node.args[0]) if isinstance(x, ast.Name)]
            elif ast.unparse(node.func) == "store_weight":
                first = {x.id for x in ast.walk(node.args[0]) if isinstance(x, ast.Name)}
                assert first & pointers
                writes += 1
    assert writes and not set(stores) & pointers


def test_only_writing_kernels_have_weights():
    users = {
        path.stem for path in (FOLDER / "triton").glob("*.py")
        if "store_weight(" in path.read_text() and path.stem != "_write"
    }  # fmt: skip
    assert users == set(WRITERS)


# the plainest polar factor ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (1, 5), (8, 8)])
def test_the_naive_iteration_is_ns5(shape):
    G = torch.randn(shape, dtype=torch.float64)
    expected = kernels.polar_factor(G, "ns5")
    assert torch.allclose(kernels.newton_schulz(G), expected, atol=1e-12)
    few = kernels.polar_factor(G, "ns5", steps=2)
    assert torch.allclose(kernels.newton_schulz(G, 2), few, atol=1e-12)
    assert torch.equal(kernels.newton_schulz(torch.zeros(shape)), torch.zeros(shape))
