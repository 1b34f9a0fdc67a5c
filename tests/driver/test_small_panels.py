"""Panels that only large weights reach: small ones must change nothing but the order of sums.

Every constant that cuts work into panels is set so low here that small weights are cut as well,
and each method must do what it does on a whole matrix. Weights are neither stacked nor square.
"""

import ast
import importlib
from functools import partial

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat, pair_gradients
from helpers.paths import ROOT
from helpers.problems import gradients, run, tensors, weight

from stiefel.kernels import quantize
from stiefel.kernels.reference import reductions, symmetric
from stiefel.optimizers import FRUGAL, DCTAdamW, Fira, GaLore, Muon, dctadamw
from stiefel.optimizers._driver import units, write
from stiefel.optimizers._frugal import coordinates
from stiefel.optimizers._lora import switching, vector_pools
from stiefel.optimizers._toolkit import index_projectors, power_sums, svd
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS

# the package has a function of this name, which hides the module
quantize_basis = importlib.import_module("stiefel.kernels.quantize_basis")

PANELS = {
    (write, "WRITE_PANEL"): 35,
    (power_sums, "POWER_SUM_PANEL"): 30,
    (index_projectors, "SPECTRUM_PANEL"): 60,
    (svd, "_GRAM_PANEL"): 64,
    (svd, "_GRAM_ROWS"): 4,
    (dctadamw, "QUANTIZE_PANEL"): 50,
    (coordinates, "SPLIT_PANEL"): 45,
    (quantize, "_QUANTIZE_PANEL"): 256,
    (quantize_basis, "_PANEL"): 256,
    (symmetric, "GRAM_PANEL_ROWS"): 4,
    (reductions, "_SUM_PANEL_ROWS"): 3,
    (reductions, "_SUM_PANEL_ENTRIES"): 16,
    (switching, "SUM_PANEL"): 7,
    (vector_pools, "DRAW_PANEL"): 16,
}
"""Every constant and its small value, which divides no side of a weight below."""
NOT_PANELS = {"WRITE_PANEL_ACCELERATOR", "SPECTRUM_PANEL_ACCELERATOR", "_PANEL_DEVICES"}
SHAPES, STEPS = [(29, 17), (17, 29), (22, 21)], 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2}
DRAWN = ("muon-kaczmarz", "muon-low-rank")
"""A sketch of columns drawn by their norms turns one unit of round-off into another column."""
CASES = {
    **{name: make for name, make in METHODS.items() if name not in DRAWN},
    **{
        f"{cls.__name__}-{kind}": lambda params, cls=cls, kind=kind, **kw: cls(
            params, lr=0.02, rank=5, update_proj_gap=2, projection=kind, **kw
        )
        for cls in (GaLore, Fira)
        for kind in PROJECTION_KINDS
    },
    **{
        f"frugal-{split}-{reset}-{free}": partial(
            FRUGAL, lr=0.02, density=0.4, update_gap=2, weight_decay=0.1,
            split=split, reset=reset, state_free=free,
        )
        for split in ("columns", "rows", "randk")
        for reset in ("all", "changed", "none")
        for free in ("sign_sgd", "sgd", "no")
    },
    **{
        f"dctadamw-{feedback}-{norm}": lambda params, feedback=feedback, norm=norm: DCTAdamW(
            params, lr=0.02, rank=5, update_proj_gap=2, error_feedback=feedback, norm=norm
        )
        for feedback in ("full", "int8", "int4")
        for norm in ("l1", "l2")
    },
    # P^T G Q is diagonal in a fresh basis: without eps Adam gives its round-off a full step
    "galore-full": lambda params: METHODS["galore-full"](params, eps=1e-3),
    "muon-decay": lambda params: Muon(params, lr=0.02, weight_decay=0.1, nesterov=False),
}  # fmt: skip


def shrink(monkeypatch):
    for (module, name), value in PANELS.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


def difference(X, Y):
    """The largest difference, relative to the largest entry."""
    size = Y.double().abs().max().clamp(min=1e-30)
    return float((X.double() - Y.double()).abs().max() / size) if X.numel() else 0.0


def both(make, made, grads, monkeypatch, quantized=()):
    """Weights, changes and state without and with small panels, each within the tolerance."""
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    results = []
    for change in (lambda patch: None, shrink):
        change(monkeypatch)
        params = made()
        optimizer = make(params)
        before = [p.detach().clone() for p in params]
        run(optimizer, params, grads)
        moves = [p.detach() - W for p, W in zip(params, before, strict=True)]
        results.append((moves, tensors(optimizer)))
    (whole, state), (cut, cut_state) = results
    tolerance = TOLERANCE[whole[0].dtype]
    assert any(bool(X.any()) for X in whole)
    for X, Y in zip(cut, whole, strict=True):
        assert difference(X, Y) <= tolerance
    assert state.keys() == cut_state.keys()
    for key, Y in state.items():
        if isinstance(Y, torch.Tensor) and not any(name in key[1] for name in quantized):
            assert difference(cut_state[key], Y) <= tolerance, key


@pytest.mark.covering
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_method_does_in_panels_what_it_does_on_a_whole_weight(name, dtype, monkeypatch):
    grads = [gradients(shape, STEPS, i, dtype) for i, shape in enumerate(SHAPES)]
    codes = ("error",) if "int4" in name or "int8" in name else ()
    made = lambda: [weight(shape, i, dtype) for i, shape in enumerate(SHAPES)]  # noqa: E731
    both(CASES[name], made, grads, monkeypatch, codes)


@pytest.mark.parametrize("name", CASES)
def test_stacks_are_written_a_few_matrices_at_once_in_the_bits_of_one_by_one(name, monkeypatch):
    results = []
    for size in (48, 2 * 48, 5 * 48):
        monkeypatch.setattr(write, "WRITE_PANEL", size)
        params = [weight((6, 8), i, torch.float32) for i in range(5)]
        run(CASES[name](params), params, [gradients((6, 8), 2, i) for i in range(5)])
        results.append(torch.stack([p.detach() for p in params]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", PAIRS)
def test_every_method_of_pairs_does_so(name, monkeypatch):
    shapes = [(29, 17, 3), (17, 29, 4)]
    dtype = torch.float64
    grads = flat(pair_gradients(*shape, STEPS, i, dtype) for i, shape in enumerate(shapes))
    made = lambda: flat(factors(*shape, i, dtype) for i, shape in enumerate(shapes))  # noqa: E731
    make = lambda params: PAIRS[name](list(zip(params[::2], params[1::2], strict=True)))  # noqa: E731
    both(make, made, grads, monkeypatch)


@pytest.mark.parametrize("reset", ["all", "changed", "none"])
@pytest.mark.parametrize("split", ["rows", "randk", "columns"])
def test_frugal_writes_a_large_low_precision_weight_in_panels(split, reset, monkeypatch):
    """700 x 400 is cut by the sizes as they are, where numbers are stored in their order or not."""
    shape, dtype = (700, 400), torch.bfloat16
    results = []
    for size in (write.WRITE_PANEL, 2**30):
        monkeypatch.setattr(write, "WRITE_PANEL", size)
        monkeypatch.setattr(coordinates, "SPLIT_PANEL", max(size, coordinates.SPLIT_PANEL))
        p = weight(shape, 1, dtype)
        optimizer = FRUGAL([p], lr=0.02, density=0.3, update_gap=2, split=split, reset=reset)
        run(optimizer, [p], [gradients(shape, 3, 1, dtype)])
        results.append((p.detach().clone(), tensors(optimizer)))
    (W, state), (V, whole) = results
    assert torch.equal(W, V)
    assert all(torch.equal(x, whole[key]) for key, x in state.items() if not isinstance(x, int))


def test_every_constant_that_names_a_panel_is_made_small_here():
    names = set()
    for path in [*ROOT.glob("optimizers/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        if path.parent.name == "triton":
            continue
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names |= {x.id for x in targets if isinstance(x, ast.Name) and "PANEL" in x.id}
    assert names - NOT_PANELS <= {name for _, name in PANELS}


def test_panels_of_pools_and_base_weights_change_nothing(monkeypatch):
    def made():
        draw = torch.Generator().manual_seed(3)
        pools = torch.empty(9, 11), torch.empty(9, 5)
        vector_pools.fill_pools_(*pools, 2, 1.5, draw)
        return pools, switching.base_sums(weight((9, 11)))

    pools, sums = made()
    for module, name in ((switching, "SUM_PANEL"), (vector_pools, "DRAW_PANEL")):
        monkeypatch.setattr(module, name, PANELS[module, name])
    small_pools, small_sums = made()
    assert all(map(torch.equal, pools, small_pools))
    assert small_sums == pytest.approx(sums, rel=1e-12)
