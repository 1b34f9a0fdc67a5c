"""Files whose 8-bit state has one scale for 256 numbers of the flat tensor, as it was once, load.

``fixtures/int8-flat.pt.xz`` holds, for every case below, what a run of that version left after
three steps, and how far the weights moved in three more. Weights and gradients come from a formula.
``python test_int8_files.py FILE`` records with the installed version.
"""

import io
import lzma
import math
import pathlib
import sys
from functools import partial

import torch
from torch import nn

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
        print(name, {k: (tuple(v.shape), v.dtype) for e in state_dict["state"].values() for k, v in e.items() if isinstance(v, torch.Tensor)})
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    pathlib.Path(path).write_bytes(lzma.compress(buffer.getvalue(), preset=9))


if __name__ == "__main__":
    record(sys.argv[1])
