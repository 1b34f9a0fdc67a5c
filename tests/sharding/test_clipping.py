"""clip_grad_norm_: torch's on plain tensors, and one norm over any mix of tensors and meshes."""

import inspect
import math

import pytest
import torch
from helpers.ranks import pool
from helpers.sharded import difference, lay, meshes, whole
from helpers.wrapped import recorded
from torch import nn

from stiefel.optimizers import clip_grad_norm_

ORDERS = [2.0, 1.0, 3.5, 0.5, math.inf, "inf", -math.inf, 0.0, -1.0]


def parameters(dtypes=("float32",), seed=0):
    """Parameters with gradients of several sizes; one has none."""
    draw, found = torch.Generator().manual_seed(seed), []
    for k, shape in enumerate([(5, 3), (7,), (2, 3, 4), (1, 1), (6, 2)]):
        p = nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtypes[k % len(dtypes)])))
        p.grad = torch.randn(shape, generator=draw).mul(10.0 ** (k - 2)).to(p.dtype)
        found.append(p)
    found[4].grad = None
    return found


def twice(params, *args, **options):
    """What ours and torch's say of equal parameters: the norm or error, and gradients."""
    outcomes = []
    for clip, form in ((clip_grad_norm_, params()), (nn.utils.clip_grad_norm_, params())):
        tensors = [form] if isinstance(form, torch.Tensor) else list(form)
        given = form if isinstance(form, torch.Tensor | list) else iter(tensors)
        try:
            said = clip(given, *args, **options)
        except RuntimeError as error:
            said = str(error)
        outcomes.append((said, [p.grad for p in tensors]))
    return outcomes


def check_alike(ours, theirs):
    (said, grads), (expected, others) = ours, theirs
    assert type(said) is type(expected)
    if isinstance(said, torch.Tensor):
        assert type(said) is torch.Tensor and not said.requires_grad
        assert said.dtype == expected.dtype and said.shape == expected.shape
        torch.testing.assert_close(said, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert said == expected
    for G, H in zip(grads, others, strict=True):
        torch.testing.assert_close(G, H, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16", "float64", "float32")], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_plain_tensors_have_the_bits_of_torch(order, dtypes):
    for max_norm in (1e-3, 5, 1e9):
        check_alike(*twice(lambda: parameters(dtypes), max_norm, order))


def test_every_form_and_option_of_torch():
    check_alike(*twice(lambda: parameters()[0], 0.1))
    check_alike(*twice(lambda: tuple(parameters()), 0.1))
    check_alike(*twice(lambda: [], 1.0))
    check_alike(*twice(lambda: parameters()[4:], 1.0))
    for foreach in (True, False):
        check_alike(*twice(parameters, max_norm=0.1, norm_type=2, foreach=foreach))
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in ()), 1.0)
    mine = list(inspect.signature(clip_grad_norm_).parameters.values())[1:]
    theirs = list(inspect.signature(nn.utils.clip_grad_norm_).parameters.values())[1:]
    assert [(x.name, x.default) for x in mine] == [(x.name, x.default) for x in theirs]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("strict", [False, True])
def test_a_norm_that_is_not_finite(value, strict):
    def bad():
        params = parameters()
        params[0].grad[0, 0] = value
        return params

    check_alike(*twice(bad, 1.0, 2.0, strict))


# over ranks ---------------------------------------------------------------------------------------


def parameter(G, mesh, dims, kind):
    """A parameter whose gradient is whole, cut, not there, or a sum that is not taken yet."""
    from torch.distributed.tensor import DTensor, Partial

    make = torch.clone if mesh is None else lambda X: lay(X.clone(), mesh, *dims)
    p = nn.Parameter(make(torch.zeros_like(G)))
    if kind == "partial" and mesh is not None:
        p.grad = DTensor.from_local(G / 2, mesh, [Partial()], run_check=False)
    elif kind != "missing":
        p.grad = make(G)
    return p


def over_meshes(rank, world, dtypes, orders):
    """Plain, replicated, cut, empty and missing gradients of five meshes, against one process."""
    found = meshes(world)
    ways = [
        *((None, ()), (found["all"], (0,)), (found["square"], (0, 1)), (found["b"], (0,))),
        *((found["square"], (None, 0)), (found["b"], (None,)), (found["all"], (0,))),
        *((found["square"], (0, 0)), (found["a"], (1,)), (found["b"], (0,))),
    ]
    shapes = [(3, 2), (5, 3), (3, 5), (2, 2), (7,), (3, 3), (1, 4), (5, 1), (2, 2), (6, 2)]
    kinds = {3: "partial", 9: "missing"}
    draw, outcomes = torch.Generator().manual_seed(3), []
    grads = [torch.randn(s, generator=draw).mul(2.0 ** (i % 4)) for i, s in enumerate(shapes)]
    grads = [G.to(getattr(torch, dtypes[i % len(dtypes)])) for i, G in enumerate(grads)]
    for order in orders:
        cut = [parameter(G, *ways[i], kinds.get(i, "")) for i, G in enumerate(grads)]
        one = [parameter(G, None, (), kinds.get(i, "")) for i, G in enumerate(grads)]
        total = clip_grad_norm_(iter(cut), 1.5, order)
        expected = nn.utils.clip_grad_norm_(one, 1.5, order)
        far = max(difference(whole(p.grad), q.grad) for p, q in zip(cut[:9], one[:9], strict=True))
        same = cut[9].grad is None and type(total) is torch.Tensor and total.dtype == expected.dtype
        outcomes.append((float(total), float(expected), far, same))
    return outcomes


@pytest.mark.parametrize(
    "dtypes, bound", [(("float32",), 1e-6), (("float32", "bfloat16"), 1e-2)], ids=["32", "mixed"]
)
def test_the_norm_over_plain_tensors_and_meshes_is_that_of_one_process(dtypes, bound):
    orders = [2.0, 1.0, "inf", -math.inf, 3.5, 0.0, -1.0]
    found = pool(4).run(over_meshes, dtypes, orders)
    for outcomes in found:
        assert [x[0] for x in outcomes] == [x[0] for x in found[0]], "ranks differ"
        for order, (total, expected, far, same) in zip(orders, outcomes, strict=True):
            assert same, order
            assert abs(total - expected) <= bound * abs(expected), order
            assert far <= bound, order


def strict_over_ranks(rank, world):
    """A NaN in one shard with and without ``error_if_nonfinite``; nothing; calls of a clipping."""
    mesh = meshes(world)["all"]
    params = [nn.Parameter(lay(torch.zeros(5, 3), mesh, 0)) for _ in range(3)]
    plain = nn.Parameter(torch.zeros(2))
    empty = clip_grad_norm_([*params, plain], 1.0)
    for p in params:
        p.grad = lay(torch.ones(5, 3), mesh, 0)
    plain.grad = torch.ones(2)
    with recorded() as calls:
        total = clip_grad_norm_([*params, plain], 100.0)
    if rank == world - 1:
        params[1].grad.to_local().fill_(float("nan"))
    try:
        clip_grad_norm_([*params, plain], 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        text = str(error)
    else:
        text = "no error"
    kept = bool((plain.grad == 1).all()) and bool((whole(params[0].grad) == 1).all())
    bad = clip_grad_norm_([*params, plain], 1.0)
    return float(empty), float(total), len(calls), text, kept, float(bad)


def test_faults_over_ranks():
    for empty, total, calls, text, kept, bad in pool(3).run(strict_over_ranks):
        assert empty == 0.0
        assert total == pytest.approx(math.sqrt(47), rel=1e-6)
        assert calls == 1, "one reduction for a mesh"
        assert "norm of order 2.0" in text and "non-finite" in text
        assert kept
        assert math.isnan(bad)
