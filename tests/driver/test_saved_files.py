"""Files that version 0.1 saved still load, and training goes on from them as it would have.

``fixtures/saved-0.1`` holds, for every case below, what a run of version 0.1 left after three
steps. Weights and gradients come from a formula, so no random number is needed to build the
optimizer again.
``python test_saved_files.py FOLDER`` records with the installed version.
"""

import io
import json
import lzma
import math
import os
import pathlib
import pickle
import platform
import sys
from functools import partial

import pytest
import torch
from torch import nn

from stiefel import optimizers
from stiefel.optimizers import (
    ARO,
    FRUGAL,
    AdaPreLoRA,
    AltLoRA,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    RowNorm,
    Spectral,
    SwitchLoRA,
    SymmetryStack,
    Trion,
    classify,
    lora_param_groups,
    memory_report,
    pairs_to_groups,
    polar_report,
)

FOLDERS = [parent / "fixtures" / "saved-0.1" for parent in pathlib.Path(__file__).parents]
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
SAVED_AFTER, STEPS = 3, 6
TOLERANCES = {"symmetrystack": 3e-5}
"""On another processor or torch, relative to the largest weight; 3e-6 where none is given.

On the same ones no bit differs. The stack's attention heads have nearly singular momenta, so that
their polar factors feel how products are rounded.
"""


# ------------------------------------------------------------------------- weights and gradients


def wave(shape, k, t):
    """Entries of a chirp whose rows fall like 1 / (row + 1), in multiples of 2^-12.

    A plain sine would be a matrix of rank two. The rounding hides the last bits of ``sin``.
    """
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    x = torch.sin(0.37 * i + 0.013 * i * i + 1.7 * t + 2.3 * k) / (1 + i // shape[-1])
    return (torch.round(4096 * x) / 4096).reshape(shape)


def fill(params):
    """Start weights, in place."""
    with torch.no_grad():
        for k, p in enumerate(params):
            p.copy_(wave(p.shape, k, 0))


def tensors_of(optimizer):
    """All parameters in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, first, last):
    """Steps `first` to `last`, counted from 1."""
    for t in range(first, last + 1):
        for k, p in enumerate(tensors_of(optimizer)):
            p.grad = wave(p.shape, k, t).to(p.dtype) if p.requires_grad else None
        optimizer.step()


def weights_of(optimizer):
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in tensors_of(optimizer)])


def set_weights(optimizer, vector):
    """The reverse of `weights_of`."""
    params = tensors_of(optimizer)
    parts = torch.split(vector, [p.numel() for p in params])
    with torch.no_grad():
        for p, part in zip(params, parts, strict=True):
            p.copy_(part.view_as(p))


# ------------------------------------------------------------------------------------- problems


def matrices(cls, *shapes, dtype=torch.float32, **options):
    """An optimizer on two weights and a vector, or on weights of other shapes and a vector."""
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes or ((6, 10), (10, 6))]
    params.append(nn.Parameter(torch.zeros(5, dtype=dtype)))
    fill(params)
    return cls(params, lr=0.02, **options)


def module(cls, make=None, **options):
    """An optimizer on a model, whose parameters have names and roles."""
    model = (make or small_model)()
    fill(model.parameters())
    return cls(model, lr=0.02, **options)


def pairs(cls, **options):
    """An optimizer on two LoRA pairs of different shapes, and a vector for AdamW."""
    tensors = [nn.Parameter(torch.zeros(s)) for s in ((2, 8), (6, 2), (2, 6), (8, 2), (5,))]
    fill(tensors)
    A1, B1, A2, B2, vector = tensors
    groups = [*pairs_to_groups([(A1, B1), (A2, B2)], scale=2.0)]
    return cls([*groups, {"params": [vector], "rule": "adamw"}], lr=0.02, **options)


def triples(cls, **options):
    """The same with base weights, which train by exchange."""
    tensors = [nn.Parameter(torch.zeros(s)) for s in ((2, 8), (6, 2), (6, 8))]
    fill(tensors)
    tensors[2].requires_grad_(False)
    return cls(pairs_to_groups([tensors], scale=0.5), lr=0.02, **options)


def adapters(cls, base_weight=False, **options):
    """An optimizer on what `lora_param_groups` finds in a model."""
    model = nn.ModuleDict({"up": Adapted(8, 6), "down": Adapted(6, 8), "norm": nn.LayerNorm(8)})
    fill(model.parameters())
    return cls(lora_param_groups(model, base_weight=base_weight), lr=0.02, **options)


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA pair, under the names of peft."""

    def __init__(self, n, m, r=2):
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False)})
        self.scaling = {"default": 2.0}


def small_model():
    return nn.ModuleDict({
        "up_proj": nn.Linear(6, 10, bias=False),
        "down_proj": nn.Linear(10, 6),
        "norm": nn.LayerNorm(6),
    })  # fmt: skip


def named_model():
    """One block of a language model: a role for every weight."""
    attention = {f"{name}_proj": nn.Linear(6, 6, bias=False) for name in "qkvo"}
    mlp = {
        "gate_proj": nn.Linear(6, 10),
        "up_proj": nn.Linear(6, 10),
        "down_proj": nn.Linear(10, 6),
    }
    block = {"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
    return nn.ModuleDict({
        "embed_tokens": nn.Embedding(12, 6),
        "layers": nn.ModuleList([nn.ModuleDict(block)]),
        "norm": nn.LayerNorm(6),
        "lm_head": nn.Linear(6, 12, bias=False),
    })  # fmt: skip


BIG = (12, 24)
"""More entries than one block of eight-bit values has."""
GAP = {"update_proj_gap": 4}
"""The first window ends after step 4, so the files are from its middle."""

CASES = {
    "muon": partial(matrices, Muon),
    "muon-module": partial(module, Muon),
    "muon-normuon": partial(matrices, Muon, second_moment="normuon"),
    "muon-adamuon": partial(matrices, Muon, second_moment="adamuon"),
    "muon-low-rank": partial(matrices, Muon, polar="low_rank", rank=3, oversample=1),
    "muon-torch": partial(matrices, Muon, compat="torch"),
    "muon-spike": partial(matrices, Muon, spike_ratio=1.5, clip_grad_rms=0.3, momentum_kind="sum"),
    "galore": partial(matrices, GaLore, rank=3, weight_decay=0.1, **GAP),
    "galore-module": partial(module, GaLore, rank=3, **GAP),
    "galore-dct": partial(matrices, GaLore, rank=3, projection="dct", **GAP),
    "galore-full": partial(matrices, GaLore, rank=3, proj_type="full", **GAP),
    "galore-int8": partial(matrices, GaLore, BIG, BIG, rank=11, state_dtype="int8", **GAP),
    "galore-bfloat16": partial(
        matrices, GaLore, rank=3, dtype=torch.bfloat16, write="nearest", **GAP
    ),
    "galore-lion": partial(matrices, GaLore, rank=3, inner="lion", stagger=True, **GAP),
    "fira": partial(matrices, Fira, rank=3, weight_decay=0.1, **GAP),
    "fira-module": partial(module, Fira, rank=3, **GAP),
    "frugal-columns": partial(matrices, FRUGAL, density=0.5, update_gap=4),
    "frugal-module": partial(module, FRUGAL, density=0.5, update_gap=4),
    "frugal-rows": partial(matrices, FRUGAL, density=0.5, update_gap=4, split="rows"),
    "frugal-changed": partial(matrices, FRUGAL, density=0.5, update_gap=4, reset="changed"),
    "frugal-block": partial(matrices, FRUGAL, density=0.5, update_gap=4, split="block"),
    "frugal-svd": partial(matrices, FRUGAL, density=0.5, update_gap=4, split="svd"),
    "dctadamw": partial(matrices, DCTAdamW, rank=3, weight_decay=0.1, **GAP),
    "dctadamw-module": partial(module, DCTAdamW, rank=3, **GAP),
    "dctadamw-int8": partial(matrices, DCTAdamW, BIG, BIG, rank=3, error_feedback="int8", **GAP),
    "trion": partial(matrices, Trion, rank=3, weight_decay=0.1),
    "trion-module": partial(module, Trion, rank=3),
    "auon": partial(matrices, AuON, weight_decay=0.1),
    "auon-module": partial(module, AuON),
    "auon-hybrid": partial(matrices, AuON, ns_steps=1),
    "aro": partial(matrices, ARO),
    "aro-module": partial(module, ARO),
    "aro-adam": partial(matrices, ARO, base="adam", rotation_every=2),
    "rownorm": partial(matrices, RowNorm, weight_decay=0.1),
    "rownorm-module": partial(module, RowNorm),
    "spectral": partial(matrices, Spectral, weight_decay=0.1),
    "spectral-module": partial(module, Spectral),
    "hybrid": partial(matrices, Hybrid, weight_decay=0.1),
    "hybrid-module": partial(module, Hybrid),
    "symmetrystack": partial(module, SymmetryStack, named_model, weight_decay=0.1),
    "symmetrystack-policy": partial(
        module, SymmetryStack, policy={"hidden": partial(GaLore, rank=2, update_proj_gap=4)}
    ),
    "altlora": partial(pairs, AltLoRA, weight_decay=0.1),
    "altlora-module": partial(adapters, AltLoRA),
    "altlora-plus": partial(pairs, AltLoRA, second_moment="elementwise", max_rel_step=0.1),
    "altlora-alternate": partial(pairs, AltLoRA, schedule="alternate", switch_every=2),
    "adaprelora": partial(pairs, AdaPreLoRA, weight_decay=0.1),
    "adaprelora-module": partial(adapters, AdaPreLoRA),
    "adaprelora-adamw": partial(pairs, AdaPreLoRA, variant="adamw", lr_ratio_b=2.0),
    "switchlora": partial(triples, SwitchLoRA, total_steps=20, interval0=2, freeze_steps=1),
    "switchlora-module": partial(
        adapters, SwitchLoRA, base_weight=True, total_steps=20, interval0=2, freeze_steps=1
    ),
}
"""Makers of an optimizer by name, which begins with the name of its file."""


def file_of(name):
    """galore for galore-int8: all cases of a class lie in one file."""
    return name.partition("-")[0]


FILES = list(dict.fromkeys(map(file_of, CASES)))


# -------------------------------------------------------------------------------------- records


def records():
    """What an optimizer or a report returns, by name."""
    model = named_model()
    M = wave((6, 10), 0, 0)
    return {
        "assignment": classify(model),
        "stack-assignment": SymmetryStack(model, lr=0.02).assignment(),
        "memory-report": memory_report(model, GaLore, rank=2),
        "polar-report": polar_report(M, M / torch.linalg.matrix_norm(M, 2)),
    }


def settings():
    """Values that a configuration may hold."""
    return {
        "partial": partial(GaLore, rank=2),
        "slot": optimizers.Slot("rn", r=3, fill=1.0),
        "place": optimizers.Place(1, 3),
        "dense": optimizers.Dense(wave((2, 3), 0, 0)),
        "factored": optimizers.Factored(wave((3, 2), 0, 0), wave((2, 3), 0, 0)),
    }


def environment():
    """What the last bits depend on."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    rows = dict(reversed([[x.strip() for x in line.partition(":")[::2]] for line in lines]))
    kind = [rows.get(key) for key in ("model name", "cpu family", "model", "stepping")]
    return {
        "torch": torch.__version__,
        "processor": kind if lines else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "MKL_CBWR": os.environ.get("MKL_CBWR"),
    }


def record(folder):
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        entries, whole = {}, {}
        for name in (name for name in CASES if file_of(name) == file):
            whole[name] = CASES[name]()
            train(whole[name], 1, SAVED_AFTER)
            whole[name].zero_grad()
            entry = {"state_dict": whole[name].state_dict(), "weights": weights_of(whole[name])}
            uninterrupted = CASES[name]()
            train(uninterrupted, 1, STEPS)
            entries[name] = {**entry, "weights_later": weights_of(uninterrupted)}
        write(folder / f"{file}.state_dicts.pt.xz", entries)
        write(folder / f"{file}.optimizers.pt.xz", whole)
    for name, value in records().items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(value, protocol=4))
    write(folder / "settings.pt.xz", settings())
    names = {name: getattr(optimizers, name) for name in optimizers.__all__}
    (folder / "names.pkl").write_bytes(pickle.dumps(names, protocol=4))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def write(path, value):
    """What torch.save writes, compressed."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=9))


def read(name, weights_only):
    """What a file holds."""
    data = lzma.decompress((FOLDER / name).read_bytes())
    return torch.load(io.BytesIO(data), weights_only=weights_only)


# ---------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def bits():
    """Whether the files were made by this torch on this processor."""
    return json.loads((FOLDER / "environment.json").read_text()) == environment()


def saved_by(name):
    return read(f"{file_of(name)}.state_dicts.pt.xz", weights_only=True)[name]


OTHER_ROUNDING = {
    *("aro", "aro-module", "aro-adam"),
    *("adaprelora", "adaprelora-module", "adaprelora-adamw"),
    *("muon", "muon-module", "muon-normuon", "muon-adamuon", "muon-spike", "fira"),
    *("frugal-changed", "dctadamw", "dctadamw-module", "dctadamw-int8", "auon", "auon-module"),
    *("auon-hybrid", "rownorm", "rownorm-module", "spectral", "spectral-module"),
    *("hybrid", "hybrid-module", "symmetrystack"),
}
"""What rounds otherwise than 0.1: ARO's QR rotation is more accurate, AdaPreLoRA multiplies sums of
small matrices, which shards can add, before large ones, and others add squares, invert Gram
matrices or step Adam in another order."""


def check_continuation(name, optimizer, saved, bits):
    """The weights now and three steps later are those of the run that was never interrupted."""
    bits = bits and name not in OTHER_ROUNDING
    assert torch.equal(weights_of(optimizer), saved["weights"])
    train(optimizer, SAVED_AFTER + 1, STEPS)
    found, wanted = weights_of(optimizer), saved["weights_later"]
    assert not torch.equal(wanted, saved["weights"])
    if bits:
        assert torch.equal(found, wanted)
    else:
        eps = 2.0**-8 if wanted.dtype == torch.bfloat16 else TOLERANCES.get(name, 3e-6)
        assert (found - wanted).abs().max() <= eps * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_dict_loads_into_a_fresh_optimizer(name, bits):
    saved = saved_by(name)
    optimizer = CASES[name]()
    set_weights(optimizer, saved["weights"])
    optimizer.load_state_dict(saved["state_dict"])
    check_continuation(name, optimizer, saved, bits)


def other_order(make):
    """A model whose children are registered in the reverse order, with the weights of ``make``."""
    model = make()
    fill(model.parameters())
    return nn.ModuleDict(reversed(list(model.items())))


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-module")])
def test_a_saved_state_dict_loads_into_a_model_of_another_order(name, bits):
    saved = saved_by(name)
    cls, options = CASES[name].args[0], dict(CASES[name].keywords)
    if CASES[name].func is adapters:
        base_weight = options.pop("base_weight", False)
        model = nn.ModuleDict({"norm": nn.LayerNorm(8), "down": Adapted(6, 8), "up": Adapted(8, 6)})
        params = lora_param_groups(model, base_weight=base_weight)
    else:
        params = model = other_order(small_model)
    optimizer = cls(params, lr=0.02, **options)
    named = dict(model.named_parameters())
    names = [key for group in saved["state_dict"]["param_groups"] for key in group["param_names"]]
    tensors = [named[key] for key in names]
    assert names != [key for group in optimizer.param_groups for key in group["param_names"]]
    parts = torch.split(saved["weights"], [p.numel() for p in tensors])
    with torch.no_grad():
        for p, part in zip(tensors, parts, strict=True):
            p.copy_(part.view_as(p))
    optimizer.load_state_dict(saved["state_dict"])
    for t in range(SAVED_AFTER + 1, STEPS + 1):
        for k, p in enumerate(tensors):
            p.grad = wave(p.shape, k, t).to(p.dtype) if p.requires_grad else None
        optimizer.step()
    found, wanted = torch.cat([p.detach().flatten() for p in tensors]), saved["weights_later"]
    if bits and name not in OTHER_ROUNDING:
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_has_the_keys_shapes_and_dtypes_that_were_saved(name):
    """And the parameters the order, so that positions in both are the same."""

    def layout(state_dict):
        state = {
            (i, key): (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
            for i, entry in state_dict["state"].items()
            for key, value in entry.items()
        }
        return state, [i for group in state_dict["param_groups"] for i in group["params"]]

    optimizer = CASES[name]()
    train(optimizer, 1, SAVED_AFTER)
    assert layout(optimizer.state_dict()) == layout(saved_by(name)["state_dict"])


@pytest.mark.parametrize("name", CASES)
def test_a_saved_optimizer_loads_as_a_whole(name, bits):
    optimizer = read(f"{file_of(name)}.optimizers.pt.xz", weights_only=False)[name]
    assert type(optimizer) is type(CASES[name]())
    check_continuation(name, optimizer, saved_by(name), bits)


def test_the_files_are_those_of_the_cases():
    names = set()
    for file in FILES:
        names |= read(f"{file}.state_dicts.pt.xz", weights_only=True).keys()
    assert names == CASES.keys()


def test_every_public_class_has_files():
    """And every public name that 0.1 had is one still, where its pickles look for it."""
    names = pickle.loads((FOLDER / "names.pkl").read_bytes())
    assert names and all(getattr(optimizers, name) is value for name, value in names.items())
    classes = {
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert classes - {optimizers.StackedOptimizer} == {type(make()) for make in CASES.values()}


@pytest.mark.parametrize("name", ["assignment", "stack-assignment"])
def test_a_saved_assignment_is_the_one_that_is_found_today(name):
    """Apart from its reasons, which are sentences."""

    def plain(table):
        return [
            {key: value for key, value in row.items() if key != "why"}
            for row in table.to_dict()["rows"]
        ]

    saved = pickle.loads((FOLDER / f"{name}.pkl").read_bytes())
    fresh = records()[name]
    assert type(saved) is type(fresh)
    assert plain(saved) == plain(fresh)
    assert type(saved).from_dict(saved.to_dict()) == saved
    assert "lm_head.weight" in str(saved) and "lm_head.weight" in saved.to_markdown()


def test_a_saved_memory_report_prints_as_today():
    saved = pickle.loads((FOLDER / "memory-report.pkl").read_bytes())
    fresh = records()["memory-report"]
    assert type(saved) is type(fresh)
    by_name = [sorted(report.rows, key=lambda row: row.name) for report in (saved, fresh)]
    assert by_name[0] == by_name[1]  # the groups of version 0.1 put matrices first
    lines = [sorted(str(report).splitlines()) for report in (saved, fresh)]
    assert lines[0] == lines[1]


def test_a_saved_polar_report_has_the_numbers_of_today():
    saved = pickle.loads((FOLDER / "polar-report.pkl").read_bytes())
    fresh = records()["polar-report"]
    assert type(saved) is type(fresh)
    assert vars(saved) == pytest.approx(vars(fresh), rel=1e-9, abs=1e-12)


def test_saved_settings_are_those_of_today():
    saved, fresh = read("settings.pt.xz", weights_only=False), settings()
    assert saved["partial"].func is GaLore and saved["partial"].keywords == {"rank": 2}
    assert saved["slot"] == fresh["slot"] and saved["place"] == fresh["place"]
    assert torch.equal(saved["dense"].U, fresh["dense"].U)
    assert torch.equal(saved["factored"].P, fresh["factored"].P)
    assert torch.equal(saved["factored"].N, fresh["factored"].N)


if __name__ == "__main__":
    record(pathlib.Path(sys.argv[1]))
