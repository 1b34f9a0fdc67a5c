"""Moments of a large transposed weight lie in memory as it does, and nothing else changes."""

import copy
import io

import pytest
import torch

from stiefel.optimizers import APOLLO, FRUGAL, Fira, GaLore

TALL = (640, 136)
MAKERS = {
    "GaLore": lambda params, **kw: GaLore(params, rank=128, **kw),
    "GaLore lion": lambda params, **kw: GaLore(params, rank=128, inner="lion", **kw),
    "GaLore adafactor": lambda params, **kw: GaLore(params, rank=128, inner="adafactor", **kw),
    "GaLore rotate": lambda params, **kw: GaLore(params, rank=128, moments="rotate", **kw),
    "GaLore reference": lambda params, **kw: GaLore(params, rank=128, compat="reference", **kw),
    "Fira": lambda params, **kw: Fira(params, rank=128, **kw),
    "APOLLO": lambda params, **kw: APOLLO(params, rank=128, **kw),
    "FRUGAL": lambda params, **kw: FRUGAL(params, density=0.95, split="svd", **kw),
}
MOMENTS = ("exp_avg", "exp_avg_sq")
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def gradient(i, shape=TALL):
    return torch.randn(shape, generator=torch.Generator().manual_seed(i))


def built(make, W, **options):
    p = torch.nn.Parameter(W.clone())
    return p, make([p], lr=1e-2, **options)


def run(p, optimizer, first, last, transposes=False):
    for i in range(first, last):
        p.grad = gradient(i).T.contiguous() if transposes else gradient(i)
        optimizer.step()
    return p.detach().clone()


def moments(p, optimizer):
    return [X for key, X in optimizer.state[p].items() if key.split(".")[0] in MOMENTS]


@every_maker
def test_they_lie_as_the_weight_does_in_the_shape_of_before(make):
    p, optimizer = built(make, gradient(99))
    run(p, optimizer, 0, 2)
    found = moments(p, optimizer)
    assert found
    for X in found:
        r, n = X.shape
        assert n == TALL[0] and r * n >= 2**16
        assert X.stride() == (1, r)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "GaLore reference"])
def test_the_step_is_that_of_the_transposed_weight(name):
    """But under ``compat="reference"``, whose signs are LAPACK's of the matrix as it is stored."""
    make = MAKERS[name]
    gap = {"update_gap" if name == "FRUGAL" else "update_proj_gap": 3}
    tall = built(make, gradient(99), **gap)
    wide = built(make, gradient(99).T.contiguous(), **gap)
    W = run(*tall, 0, 5)
    V = run(*wide, 0, 5, transposes=True)
    torch.testing.assert_close(W, V.T, rtol=0, atol=2e-4)


@every_maker
@pytest.mark.parametrize("is_by_rows", [False, True])
def test_a_run_resumes_in_equal_bits(make, is_by_rows):
    """From a file whose moments lie row by row too, as those of before do."""
    p, optimizer = built(make, gradient(99))
    run(p, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    if is_by_rows:
        for entry in state["state"].values():
            for key, X in entry.items():
                if isinstance(X, torch.Tensor):
                    entry[key] = X.contiguous()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    q, resumed = built(make, p.detach())
    resumed.load_state_dict(torch.load(file, weights_only=False))
    want = run(p, optimizer, 3, 6)
    assert torch.equal(run(q, resumed, 3, 6), want)
    assert all(X.stride(0) == 1 for X in moments(q, resumed))


@every_maker
def test_a_copy_goes_on_in_equal_bits(make):
    p, optimizer = built(make, gradient(99))
    run(p, optimizer, 0, 3)
    q, copied = copy.deepcopy((p, optimizer))
    assert torch.equal(run(q, copied, 3, 6), run(p, optimizer, 3, 6))


@pytest.mark.parametrize(
    "shape, options", [((160, 640), {}), (TALL, {"state_dtype": "int8"}), ((96, 48), {})]
)
def test_wide_coded_and_small_ones_lie_by_rows(shape, options):
    p = torch.nn.Parameter(gradient(99, shape))
    optimizer = GaLore([p], rank=0.9, **options)
    for i in range(2):
        p.grad = gradient(i, shape)
        optimizer.step()
    assert all(X.is_contiguous() for X in moments(p, optimizer))
