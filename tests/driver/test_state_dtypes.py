"""Every method with every dtype of state that the driver takes."""

import pytest
import torch
from helpers.methods import METHODS
from helpers.problems import gradients, run, tensors, weight

from stiefel.optimizers import FRUGAL, GaLore, SwitchLoRA, pairs_to_groups

SHAPES = [(24, 10), (10, 24), (24, 10), (40, 40)]


def by_switchlora(params, **options):
    """The weights as W0 of triples whose factors train."""
    triples = []
    for i, W in enumerate(params):
        m, n = W.shape
        A, B = weight((4, n), 10 + i, W.dtype), weight((m, 4), 20 + i, W.dtype)
        triples.append((A, B, W.requires_grad_(False)))
    groups = pairs_to_groups(triples, scale=2.0)
    return SwitchLoRA(groups, lr=0.02, total_steps=9, interval0=4, freeze_steps=1, **options)


CLASSES = {**METHODS, "switchlora": by_switchlora}


@pytest.mark.covering
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("state_dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_method_steps_with_every_dtype_of_state(name, state_dtype, dtype):
    params = [weight(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    optimizer = CLASSES[name](params, state_dtype=state_dtype)
    trained = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    grads = [gradients(p.shape, 4, i, dtype) for i, p in enumerate(trained)]
    run(optimizer, trained, grads)
    for p, was in zip(trained, before, strict=True):
        assert p.dtype == dtype and bool(p.isfinite().all()) and not torch.equal(p, was)
    if state_dtype == "float64":
        narrow = [X for X in tensors(optimizer).values() if isinstance(X, torch.Tensor)
                  and X.dtype in (torch.bfloat16, torch.float16)]  # fmt: skip
        assert name == "switchlora" or not narrow


INNER = {
    **{f"galore-{kind}": (GaLore, {"inner": kind}) for kind in ("lion", "adafactor")},
    **{
        f"frugal-{kind}-{split}": (FRUGAL, {"inner": kind, "split": split})
        for kind in ("adamw", "lion", "sgdm")
        for split in ("columns", "rows", "randk", "svd", "block")
    },
}


@pytest.mark.parametrize("state_dtype", ["float64", "bfloat16", "int8"])
@pytest.mark.parametrize(("cls", "options"), INNER.values(), ids=INNER)
def test_every_inner_optimizer_steps_with_every_dtype_of_state(cls, options, state_dtype):
    params = [weight(shape, i) for i, shape in enumerate(SHAPES)]
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, state_dtype=state_dtype, lr=0.01, **options)
    run(optimizer, params, [gradients(shape, 3, i) for i, shape in enumerate(SHAPES)])
    for p, was in zip(params, before, strict=True):
        assert bool(p.isfinite().all()) and not torch.equal(p, was)
