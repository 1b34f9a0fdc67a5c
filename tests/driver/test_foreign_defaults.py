"""A user's default device and default dtype, which are for models, change no bit of an optimizer.

Every class takes its steps under ``torch.device("meta")``, where a tensor that does not name its
device has no values, and under default dtypes of float64 and bfloat16.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from helpers.foreign import foreign, forget
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat, pair_gradients
from helpers.problems import gradients, same, tensors, weight

from stiefel import kernels
from stiefel.kernels.polar.low_rank import SKETCHES
from stiefel.optimizers import (
    APOLLO,
    ARO,
    FRUGAL,
    DCTAdamW,
    Fira,
    GaLore,
    Muon,
    Muown,
    RowNorm,
    SinkGD,
    SwitchLoRA,
    SymmetryStack,
    Trion,
    classify,
    lora_param_groups,
    memory_report,
    pairs_to_groups,
    switchlora_init_,
)
from stiefel.optimizers._driver import units
from stiefel.optimizers._lora.switching import fold_into_weight_
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS

STEPS, SHAPES = 4, [(24, 10), (10, 24), (10, 24), (7,)]
DTYPES = [torch.float64, torch.bfloat16]


def by(cls, **settings):
    return lambda params: cls(params, **{"lr": 0.02, **settings})


def by_rank(cls, **settings):
    return by(cls, **{"rank": 3, "update_proj_gap": 2, **settings})


CASES = {
    **METHODS,
    **{f"muon-{name}": by(Muon, polar=name) for name in kernels.POLAR_METHODS},
    **{
        f"muon-{sketch}": by(Muon, polar="low_rank", rank=3, sketch=sketch) for sketch in SKETCHES
    },
    **{
        f"muon-norm-{norm}": by(Muon, polar="ns5", polar_norm=norm)
        for norm in ("power:2", "schatten4", "rowsum", "aol")
    },
    "muon-reports": by(Muon, report_steps=1),
    **{f"galore-{kind}": by_rank(GaLore, projection=kind) for kind in PROJECTION_KINDS},
    **{f"fira-{kind}": by_rank(Fira, projection=kind) for kind in PROJECTION_KINDS},
    **{f"apollo-{kind}": by_rank(APOLLO, projection=kind) for kind in ("random", "gaussian")},
    "sinkgd": by(SinkGD, momentum=0.5),
    "muown": by(Muown, momentum=0.5),
    **{
        f"galore-{moments}": by_rank(GaLore, moments=moments, projection="power")
        for moments in ("keep", "rotate", "ldadam", "reset")
    },
    "galore-match": by_rank(GaLore, moments="match", projection="topk"),
    **{
        f"galore-{inner}": by_rank(GaLore, inner=inner)
        for inner in ("lion", "adafactor")
    },
    **{f"frugal-{inner}": by(FRUGAL, update_gap=2, inner=inner) for inner in ("lion", "sgdm")},
    **{
        f"fira-{variant}": by_rank(Fira, variant=variant, scaling=scaling)
        for variant, scaling in (("paper", "matrix"), ("reference", "column"))
    },
    "frugal": by(FRUGAL, update_gap=2),
    **{
        f"frugal-{split}": by(FRUGAL, update_gap=2, density=0.5, split=split)
        for split in ("columns", "rows", "randk", "svd", "random", "block")
    },
    "frugal-blocks": by(FRUGAL, update_gap=2, split="block", density=0.5),
    **{f"trion-{basis}": by(Trion, rank=3, basis=basis) for basis in ("dct2", "dct3")},
    **{
        f"dctadamw-{feedback}": by_rank(DCTAdamW, error_feedback=feedback)
        for feedback in ("full", "int8", "int4")
    },
    **{f"aro-{name}": by(ARO, rotation=name) for name in ("qr", "eigh", "polar", "none")},
    "rownorm-relative": by(RowNorm, axis="cols", row_mode="relative"),
    "symmetrystack-as-shipped": by(SymmetryStack),
}  # fmt: skip
"""Every class of plain parameters, with every option that makes tensors of its own."""
QUANTIZED = ["muon", "galore", "fira", "frugal", "dctadamw", "auon", "aro-adam", "muon-adamuon"]


def trained(make, params, grads, around):
    """Weights and state after steps with a load and a copy in between, all inside ``around``."""
    forget()
    with around:
        optimizer = make(params)
        step(optimizer, params, grads, range(STEPS // 2))
        loaded = make(params)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(loaded, params, grads, range(STEPS // 2, STEPS))
        copied = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
        assert same(tensors(copied), tensors(loaded))
        str(loaded.assignment())
    return [p.detach().clone() for p in params], tensors(loaded)


def step(optimizer, params, grads, at):
    for t in at:
        for p, series in zip(params, grads, strict=True):
            p.grad = None if series[t] is None else series[t].clone()
        optimizer.step()


def check(make, made, grads, dtype):
    """A plain run and a foreign one agree; AdamW's clocks follow the default dtype, as torch's."""
    W, state = trained(make, made(), grads, contextlib.nullcontext())
    V, foreign_state = trained(make, made(), grads, foreign(dtype))
    assert same(W, V)
    assert state.keys() == foreign_state.keys()
    for key, value in state.items():
        other = foreign_state[key]
        if key[1] == "step" and isinstance(value, torch.Tensor):
            value, other = float(value), float(other)
        assert same(value, other), key


def plain_parameters(dtype=torch.float32):
    return [weight(shape, i, dtype) for i, shape in enumerate(SHAPES)]


def plain_gradients(dtype=torch.float32):
    return [
        [torch.ones(shape, dtype=dtype)] * STEPS
        if len(shape) == 1
        else gradients(shape, STEPS, i, dtype)
        for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.covering
@pytest.mark.parametrize("default", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_method_ignores_default_device_and_default_dtype(name, default):
    check(CASES[name], plain_parameters, plain_gradients(), default)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_weights_of_other_dtypes_ignore_them_too(name, dtype):
    check(
        METHODS[name],
        lambda: plain_parameters(dtype),
        plain_gradients(dtype),
        torch.bfloat16 if dtype == torch.float64 else torch.float64,
    )


@pytest.mark.parametrize("default", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_state_in_eight_bits_ignores_them(name, default, monkeypatch):
    monkeypatch.setattr(units, "MIN_QUANTIZED_NUMEL", 16)
    check(
        lambda params: (
            CASES[name](params, state_dtype="int8")
            if name in METHODS
            else FRUGAL(params, lr=0.02, state_dtype="int8")
        ),
        plain_parameters,
        plain_gradients(),
        default,
    )


@pytest.mark.covering
@pytest.mark.parametrize("default", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_flags_that_arrive_late_ignore_them(name, default):
    def make(params):
        optimizer = METHODS[name](params)
        optimizer._wait = False
        return optimizer

    grads = plain_gradients()
    grads[1][1] = torch.full_like(grads[1][1], torch.nan)
    check(make, plain_parameters, grads, default)


@pytest.mark.parametrize("default", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_every_method_of_pairs_ignores_them(name, default):
    shapes = [(10, 7, 3), (6, 9, 4), (6, 9, 4)]
    grads = flat(pair_gradients(*shape, STEPS, i) for i, shape in enumerate(shapes))

    def make(params):
        return PAIRS[name](list(zip(params[::2], params[1::2], strict=True)))

    check(make, lambda: flat(factors(*s, i) for i, s in enumerate(shapes)), grads, default)


@pytest.mark.parametrize("default", DTYPES, ids=str)
def test_switching_ignores_them(default):
    settings = {"interval0": 2, "freeze_steps": 1, "ratio": None}
    grads = flat([*pair_gradients(10, 7, 3, STEPS, i), [None] * STEPS] for i in range(2))

    def made():
        W0s = [weight((10, 7), 90 + i).requires_grad_(False) for i in range(2)]
        return flat((*factors(10, 7, 3, i), W0) for i, W0 in enumerate(W0s))

    def make(params):
        triples = list(zip(params[::3], params[1::3], params[2::3], strict=True))
        return SwitchLoRA(pairs_to_groups(triples, scale=0.5), lr=0.02, **settings)

    check(make, made, grads, default)


class Adapter(torch.nn.Module):
    """A linear layer with factors, as adapters name them."""

    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(8, 6, bias=False)
        self.lora_A = torch.nn.Linear(8, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 6, bias=False)
        self.scaling = 0.5


@pytest.mark.parametrize("default", DTYPES, ids=str)
def test_helpers_of_models_ignore_them(default):
    def adapted(around):
        forget()
        draw = torch.Generator().manual_seed(3)
        model = torch.nn.Sequential(Adapter())
        model[0].base_layer.requires_grad_(False)
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw))
        with around:
            groups = lora_param_groups(model, base_weight=True)
            A, B, W0 = (p for _, p in groups[0]["params"])
            switchlora_init_(W0, A, B, 0.5, torch.Generator("cpu").manual_seed(1))
            optimizer = SwitchLoRA(groups, lr=0.01, ratio=None)
            for p in (A, B):
                p.grad = torch.ones_like(p)
            optimizer.step()
            saved = optimizer.merged()
            fold_into_weight_(W0, B, A, 0.5)
        return [p.detach().clone() for p in (A, B, W0)], saved

    assert same(adapted(contextlib.nullcontext()), adapted(foreign(default)))


def test_reports_ignore_them():
    """But for AdamW's clocks, which are float64 where that is the default dtype, as torch's are."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))
    plain = str(classify(model)), [str(memory_report(model, cls)) for cls in (Muon, GaLore, FRUGAL)]
    with foreign(torch.bfloat16):
        text = str(classify(model))
        assert plain == (text, [str(memory_report(model, cls)) for cls in (Muon, GaLore, FRUGAL)])
