"""Second moments in 8 bits: which random bits round them, and what they follow."""

import pytest
import torch
from helpers.problems import run, same, tensors, weight

from stiefel.kernels import dequantize_blocks
from stiefel.optimizers import Fira, GaLore
from stiefel.optimizers._driver import units


def series(shape, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(steps)]


def squares(optimizer, p, key="exp_avg_sq"):
    name, dot, tag = key.partition(".")
    entry = optimizer.state[p]
    return dequantize_blocks(entry[key][None], entry[f"{name}_scale{dot}{tag}"][None])[0]


def pair(seed=0, **options):
    """Codes of two weights with equal values and gradients."""
    params = [weight((64, 80)) for _ in range(2)]
    options = {"lr": 0.02, "rank": 64, "state_dtype": "int8", "seed": seed, **options}
    optimizer = GaLore(params, **options)
    run(optimizer, params, [series((64, 80), 3)] * 2)
    return [optimizer.state[p]["exp_avg_sq"] for p in params]


def test_parameters_and_seeds_have_bits_of_their_own():
    one, two = pair()
    assert not torch.equal(one, two)
    assert same([one, two], pair())
    assert not torch.equal(one, pair(seed=1)[0])


def test_the_published_order_rounds_to_nearest():
    one, two = pair(compat="reference", eps=1e-6)
    assert torch.equal(one, two)


def test_names_are_the_keys_of_bits():
    """Whatever the order of the parameters, and whatever wraps the model."""

    def codes(names):
        torch.manual_seed(0)
        params = {name: weight((64, 80)) for name in names}
        optimizer = GaLore([*params.items()], lr=0.02, rank=64, state_dtype="int8")
        run(optimizer, [*params.values()], [series((64, 80), 3)] * len(names))
        return {name: optimizer.state[p]["exp_avg_sq"] for name, p in params.items()}

    first, second = codes(["a", "b"]), codes(["module.b", "module.a"])
    assert same(first["a"], second["module.a"]) and same(first["b"], second["module.b"])
    assert not torch.equal(first["a"], first["b"])


@pytest.mark.parametrize("view", ["rows:64,64", "batch"])
def test_views_of_one_weight_have_bits_of_their_own(view):
    shape = (2, 64, 80) if view == "batch" else (128, 80)
    p = weight(shape)
    optimizer = GaLore([p], lr=0.02, rank=64, view=view, state_dtype="int8")
    grads = [torch.cat([G, G]).view(shape) for G in series((64, 80), 3)]
    run(optimizer, [p], [grads])
    entry = optimizer.state[p]
    found = entry["exp_avg_sq"] if view == "batch" else [entry[f"exp_avg_sq.{i}"] for i in (0, 1)]
    assert not torch.equal(found[0], found[1])
    scales = (
        entry["exp_avg_sq_scale"]
        if view == "batch"
        else [entry[f"exp_avg_sq_scale.{i}"] for i in (0, 1)]
    )
    assert scales[0].shape == (64, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("write", ["nearest", "auto"])
def test_stack_and_alone_agree_for_every_dtype_and_write(dtype, write, monkeypatch):
    monkeypatch.setattr(units, "MIN_QUANTIZED_NUMEL", 16)
    shape, options = (12, 20), {"lr": 0.02, "rank": 8, "state_dtype": "int8", "write": write}
    params = [weight(shape, i, dtype) for i in range(3)]
    stack = Fira(params, **options)
    grads = [series(shape, 4, i) for i in range(3)]
    run(stack, params, grads)
    pads = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    p = weight(shape, 2, dtype)
    alone = Fira([*pads, p], **options)
    run(alone, [*pads, p], [[None] * 4, [None] * 4, grads[2]])
    found = [{k: v for (i, k), v in tensors(o).items() if i == 2} for o in (stack, alone)]
    assert same(*found) and same(params[2].detach(), p.detach())


@pytest.mark.parametrize("cls", [GaLore, Fira])
def test_squares_follow_gradients_that_fall_100_fold_in_500_steps(cls):
    """Within 10 % of those of float32, where a part of the gradient falls and where all does."""
    for part in (False, True):
        found = []
        for state_dtype in ("int8", None):
            p = weight((16, 512))
            optimizer = cls(
                [p], lr=1e-5, rank=16, projection="topk", update_proj_gap=10**6,
                state_dtype=state_dtype,
            )  # fmt: skip
            g = torch.Generator().manual_seed(0)
            for t in range(700):
                G = torch.randn(16, 512, generator=g)
                G[:, :: 2 if part else 1] *= 10 ** (-2 * max(0, t - 200) / 500)
                p.grad = G
                optimizer.step()
            V = squares(optimizer, p) if state_dtype else optimizer.state[p]["exp_avg_sq"]
            found.append(V[:, ::2].double())
        coded, exact = found
        assert abs(float(coded.sum() / exact.sum()) - 1) < 0.02
        assert abs(float((coded / exact).mean()) - 1) < 0.02
        assert part or float((coded - exact).norm()) < 0.1 * float(exact.norm())
