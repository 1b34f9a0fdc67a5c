"""Files whose 8-bit state has one scale for 256 numbers of the flat tensor, as it was once, load.

``fixtures/int8-flat.pt.xz`` holds, for every case below, what a run of that version left after
three steps, and how far the weights moved in three more. Weights and gradients come from a formula.
``python test_int8_files.py FILE`` records with the installed version.
"""

import io
import lzma
import math
import pathlib
import pickle
import sys
from functools import partial

import pytest
import torch
from helpers.problems import same
from torch import nn

from stiefel.kernels import blockwise_levels, dequantize_basis, dequantize_blocks
from stiefel.optimizers import Fira, GaLore, Muon

FILES = [parent / "fixtures" / "int8-flat.pt.xz" for parent in pathlib.Path(__file__).parents]
FILE = next((file for file in FILES if file.is_file()), FILES[0])
SAVED_AFTER, STEPS = 3, 6


def wave(shape, k, t):
    """Entries of a chirp whose rows fall like 1 / (row + 1), in multiples of 2^-12."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    x = torch.sin(0.37 * i + 0.013 * i * i + 1.7 * t + 2.3 * k) / (1 + i // shape[-1])
    return (torch.round(4096 * x) / 4096).reshape(shape).float()


def matrices(cls, *shapes, **options):
    params = [nn.Parameter(wave(shape, k, 0)) for k, shape in enumerate(shapes)]
    return cls(params, lr=0.02, state_dtype="int8", **options)


CASES = {
    "muon": partial(matrices, Muon, (16, 300), (1030, 4)),
    "muon-conv": partial(matrices, Muon, (9, 60, 3, 3)),
    "galore": partial(matrices, GaLore, (65, 80), (80, 65), rank=64, update_proj_gap=4),
    "galore-full": partial(
        matrices, GaLore, (65, 80), rank=65, proj_type="full", update_proj_gap=4
    ),
    "galore-rows": partial(matrices, GaLore, (70, 68), rank=64, view="rows:66,4"),
    "galore-batch": partial(matrices, GaLore, (3, 20, 80), rank=20, update_proj_gap=4),
    "fira": partial(matrices, Fira, (65, 80), rank=64, update_proj_gap=4),
}


def tensors_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, first, last):
    for t in range(first, last + 1):
        for k, p in enumerate(tensors_of(optimizer)):
            p.grad = wave(p.shape, k, t)
        optimizer.step()


def record(path):
    saved = {}
    for name, make in CASES.items():
        optimizer = make()
        train(optimizer, 1, SAVED_AFTER)
        weights = [p.detach().clone() for p in tensors_of(optimizer)]
        state_dict = optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save({"state_dict": state_dict}, buffer)
        saved[name] = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        train(optimizer, SAVED_AFTER + 1, STEPS)
        saved[name]["moved"] = [
            (p.detach() - W).half() for p, W in zip(tensors_of(optimizer), weights, strict=True)
        ]
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    pathlib.Path(path).write_bytes(lzma.compress(buffer.getvalue(), preset=9))


# ---------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def saved():
    """The file, loaded anew for each use, as tests change what they get."""
    data = lzma.decompress(FILE.read_bytes())
    return lambda: torch.load(io.BytesIO(data), weights_only=True)


def flat_values(codes, scales):
    """What the flat layout stands for, by its own words."""
    levels = blockwise_levels(codes.dtype == torch.int8)
    size = torch.cat([torch.zeros(1).double(), levels])[codes.int().abs().flatten().long()]
    x = size * scales.double().repeat_interleave(256)[: size.numel()]
    x = x.square() if codes.dtype == torch.uint8 else x * codes.flatten().sign()
    return x.view(codes.shape)


def values(optimizer, p, key):
    """A live state tensor in floats."""
    entry = optimizer.state[p]
    name, dot, tag = key.partition(".")
    scale = entry.get(f"{name}_scale{dot}{tag}")
    if scale is None:
        return entry[key].double()
    decode = dequantize_basis if name.startswith("basis") else dequantize_blocks
    return decode(entry[key][None], scale[None])[0].double()


def check_values_and_training(name, optimizer, saved):
    old = saved["state_dict"]["state"]
    for i, p in enumerate(tensors_of(optimizer)):
        new = optimizer.state[p]
        for key, X in old[i].items():
            if not isinstance(X, torch.Tensor) or "_scale" in key:
                continue
            tag = key.partition(".")[2]
            scale = old[i].get(f"{key.partition('.')[0]}_scale" + (f".{tag}" if tag else ""))
            wanted = X.double() if scale is None else flat_values(X, scale)
            found = values(optimizer, p, key)
            tolerance = 0.01 if X.dtype.is_floating_point else 0.03
            assert float((found - wanted).norm()) <= tolerance * float(wanted.norm()), key
            if X.dtype == torch.uint8:
                assert torch.equal(found > 0, wanted > 0)
            is_short = X.dim() == 2 and X.shape[1] < 8
            if scale is not None:
                assert new[key].dtype == (torch.float32 if is_short else X.dtype)
    before = [p.detach().clone() for p in tensors_of(optimizer)]
    train(optimizer, SAVED_AFTER + 1, STEPS)
    for p, start, moved in zip(tensors_of(optimizer), before, saved["moved"], strict=True):
        found, wanted = p.detach() - start, moved.float()
        # right after a refresh of two bases R is diagonal, and Adam steps along what is round-off
        tolerance = 0.5 if name == "galore-full" else 0.15
        assert float((found - wanted).norm()) < tolerance * float(wanted.norm())
    optimizer.load_state_dict(optimizer.state_dict())  # what it is now loads as it is


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_the_flat_layout_loads(name, saved):
    one, optimizer = saved()[name], CASES[name]()
    untouched = saved()[name]["state_dict"]
    optimizer.load_state_dict(one["state_dict"])
    assert same(tensors_in(one["state_dict"]), tensors_in(untouched))
    fresh = CASES[name]()
    fresh.init_state()
    for p, q in zip(tensors_of(optimizer), tensors_of(fresh), strict=True):
        layouts = [
            {k: (X.shape, X.dtype) for k, X in entry.items() if isinstance(X, torch.Tensor)}
            for entry in (optimizer.state[p], fresh.state[q])
        ]
        assert layouts[0] == layouts[1]
    check_values_and_training(name, optimizer, one)


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_of_the_flat_layout_loads(name, saved):
    one, optimizer = saved()[name], CASES[name]()
    optimizer.load_state_dict(one["state_dict"])
    for i, p in enumerate(tensors_of(optimizer)):
        optimizer.state[p] = dict(one["state_dict"]["state"][i])
    check_values_and_training(name, pickle.loads(pickle.dumps(optimizer)), one)


def tensors_in(state_dict):
    return [
        X
        for entry in state_dict["state"].values()
        for X in entry.values()
        if isinstance(X, torch.Tensor)
    ]


@pytest.mark.parametrize("what", ["nan", "negative", "length", "basis"])
def test_a_bad_file_of_the_flat_layout_is_refused_and_changes_nothing(what, saved):
    state_dict, optimizer = saved()["galore"]["state_dict"], CASES["galore"]()
    train(optimizer, 1, 2)
    before = [X.clone() for X in tensors_in(optimizer.state_dict())]
    entry = state_dict["state"][1]
    if what == "nan":
        entry["exp_avg_scale"][3] = torch.nan
    elif what == "negative":
        entry["exp_avg_sq_scale"][3] = -1.0
    elif what == "length":
        entry["exp_avg_scale"] = entry["exp_avg_scale"][:-1].clone()
    else:
        entry["basis"][3, 4] = torch.inf
    text = {"nan": "finite", "negative": "below 0", "length": "shape", "basis": "finite"}[what]
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state_dict)
    assert same(before, tensors_in(optimizer.state_dict()))


def test_an_infinite_sum_of_the_flat_layout_stays_infinite_and_its_zeros_zero(saved):
    state_dict, optimizer = saved()["galore"]["state_dict"], CASES["galore"]()
    entry = state_dict["state"][0]
    entry["exp_avg_sq_scale"][0] = torch.inf
    entry["exp_avg_sq"][0, 3] = 0
    optimizer.load_state_dict(state_dict)
    p = tensors_of(optimizer)[0]
    assert optimizer.state[p]["exp_avg_sq_scale"][0, 0] == torch.inf
    assert optimizer.state[p]["exp_avg_sq"][0, 3] == 0


if __name__ == "__main__":
    record(sys.argv[1])
