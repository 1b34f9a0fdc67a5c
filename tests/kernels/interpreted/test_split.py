"""One pass with Adam on some columns, rows or entries, against the reference and float64."""

import pytest
import torch
from helpers.operands import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    close,
    gaussian,
    laid,
    nothing_beside,
)

from stiefel.kernels import reference
from stiefel.kernels.triton import split_step as split
from stiefel.kernels.triton import split_step_
from stiefel.optimizers import FRUGAL

SET = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
DIMS = pytest.mark.parametrize("dim", [-1, -2, None], ids=["columns", "rows", "entries"])


def numbers(K, length, c, seed=0, ascending=True):
    """Different numbers (K, c) int32."""
    generator = torch.Generator(DEVICE).manual_seed(seed + length)
    drawn = [torch.randperm(length, generator=generator)[:c] for _ in range(K)]
    drawn = [x.sort().values if ascending else x for x in drawn]
    return torch.stack(drawn).int()


class Weight:
    """What the operation takes, in some layout."""

    def __init__(self, shape, dim, w=torch.float32, g=torch.float32, layout="rows", share=0.4):
        K, m, n = self.shape = shape if len(shape) == 3 else (1, *shape)
        length = {-1: n, -2: m, None: m * n}[dim]
        c = max(1, round(share * length)) if share else 0
        self.dim, self.index = dim, numbers(K, length, c)
        inside = {-1: (K, m, c), -2: (K, c, n), None: (K, 1, c)}[dim]
        tensors = {
            "W": gaussian(K, m, n, dtype=w), "G": gaussian(K, m, n, seed=1, dtype=g),
            "M": gaussian(*inside, seed=2) / 4, "V": gaussian(*inside, seed=3).square() / 8,
        }  # fmt: skip
        self.pairs = [laid(X, layout) for X in tensors.values()]
        self.W, self.G, self.M, self.V = (view for view, _ in self.pairs)

    def copy(self, dtype=None):
        """The same numbers elsewhere, dense."""
        other = object.__new__(Weight)
        other.__dict__ |= self.__dict__
        for name in "WGMV":
            X = getattr(self, name)
            setattr(other, name, X.contiguous().to(dtype or X.dtype, copy=True))
        return other

    def step(self, fn=split_step_, t=3, keep=0.9, alpha=-0.05, **given):
        fn(self.W, self.G, self.index, self.dim, self.M, self.V, t, keep, alpha, **SET, **given)
        return self

    def all(self):
        return [self.W, self.M, self.V]

    def clone(self):
        return [X.clone() for X in self.all()]


def same(A, B):
    return all(torch.equal(a, b) for a, b in zip(A, B, strict=True))


def compare(x, **given):
    """The kernel on x against the reference on x in float64 and in x's own dtypes."""
    exact = x.copy(torch.float64).step(reference.split_step_, **given)
    plain = x.copy().step(reference.split_step_, **given)
    x.step(**given)
    for name in "WMV":
        ours, best = getattr(x, name), getattr(exact, name)
        close(ours, best, ours.dtype)
        if ours.numel():
            close(ours, getattr(plain, name).double(), ours.dtype)


@DIMS
@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 13), (2, 1, 5)], ids=str)
def test_equals_the_reference(shape, dim):
    compare(Weight(shape, dim))


@pytest.mark.parametrize("w", DTYPES, ids=str)
@pytest.mark.parametrize("g", DTYPES, ids=str)
def test_dtypes(w, g):
    compare(Weight((9, 40), -1, w, g))


@DIMS
@pytest.mark.parametrize("free", ["sign_sgd", "sgd", "no"])
def test_free_directions(dim, free):
    compare(Weight((2, 6, 37), dim), free=free, free_scale=0.3)


@DIMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_nothing_beside(layout, dim):
    x = Weight((2, 7, 35), dim, layout=layout)
    dense = x.copy().step()
    with nothing_beside(*x.pairs):
        x.step()
    if layout == "columns":
        assert all(torch.allclose(a, b) for a, b in zip(x.all(), dense.all(), strict=True))
    else:
        assert same(x.all(), dense.all())


@DIMS
def test_clocks_and_floor(dim):
    x = Weight((2, 5, 33), dim)
    t = torch.arange(1, x.index.numel() + 1, dtype=torch.int32).view(x.index.shape)
    compare(x, t=t, floor=torch.tensor([0.5, 1.0]).view(2, 1, 1))
    same_clock = torch.full_like(t, 3)
    a, b = Weight((2, 5, 33), dim).step(t=3), Weight((2, 5, 33), dim).step(t=same_clock)
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(a.all(), b.all(), strict=True))


@DIMS
def test_control(dim):
    scalars = torch.tensor([[1.0, 0.9, -0.05], [0.0, 0.9, -0.05], [1.0, 0.5, 0.25]])
    for control in (scalars, torch.empty(3, 6)[:, ::2].copy_(scalars), scalars.T.contiguous().T):
        x, y = Weight((3, 5, 18), dim), Weight((3, 5, 18), dim)
        x.G[1, 2, 3] = float("nan")
        old = x.clone()
        compare(x, control=control)
        x.step(control=control)
        assert all(torch.equal(now[1], was[1]) for now, was in zip(x.all(), old, strict=True))
        x = Weight((3, 5, 18), dim).step(control=control)
        y.step(keep=0.9, alpha=torch.tensor(-0.05).item())
        assert all(torch.equal(p[0], q[0]) for p, q in zip(x.all(), y.all(), strict=True))


def test_nothing_chosen_all_chosen_and_any_order():
    compare(Weight((4, 35), -1, share=0))
    compare(Weight((4, 35), -1, share=1.0))
    x = Weight((4, 35), -1)
    y = x.copy()
    turn = torch.randperm(x.index.shape[1], generator=torch.Generator(DEVICE).manual_seed(0))
    y.index, y.M, y.V = x.index[:, turn], x.M[..., turn].clone(), x.V[..., turn].clone()
    x.step(), y.step()
    assert torch.equal(x.W, y.W) and torch.equal(x.M[..., turn], y.M)


@DIMS
def test_a_stack_and_a_larger_matrix_have_the_bits_of_one(dim):
    x = Weight((3, 5, 33), dim)
    ones = [x.copy() for _ in range(3)]
    x.step()
    for k, one in enumerate(ones):
        for name in ("W", "G", "M", "V", "index"):
            setattr(one, name, getattr(one, name)[k : k + 1])
        one.step()
        assert all(torch.equal(a[k], b[0]) for a, b in zip(x.all(), one.all(), strict=True))
    a, b = Weight((5, 33), -1), Weight((5, 33), -1)
    wide = torch.zeros(1, 16, 64)
    for name in "WG":
        padded = wide.clone()
        padded[:, :5, :33] = getattr(b, name)
        setattr(b, name, padded)
    for name in "MV":
        setattr(b, name, torch.cat([getattr(b, name), torch.zeros(1, 11, b.index.shape[1])], 1))
    a.step(), b.step()
    assert torch.equal(a.W, b.W[:, :5, :33]) and torch.equal(a.V, b.V[:, :5])


def test_nan_inf_and_repeats():
    x, again = Weight((6, 33), -1), Weight((6, 33), -1)
    assert same(x.step().all(), again.step().all())
    x, first = Weight((6, 33), -1), None
    first = int(x.index[0, 0])
    x.G[0, 1, first], x.G[0, 2, first] = float("nan"), float("inf")
    x.step()
    assert x.W[0, 1, first].isnan() and x.M[0, 1, 0].isnan() and x.M[0, 2, 0].isinf()
    assert int((~x.W.isfinite()).sum()) == 2


def test_empty_stacks_and_sides():
    for shape in ((0, 3, 4), (2, 0, 4)):
        x = Weight((2, 3, 4), -1)
        x.W, x.G = torch.empty(shape), torch.empty(shape)
        x.step()
    none = Weight((2, 3, 4), -1)
    none.W = none.G = torch.empty(2, 3, 0)
    none.step()


def test_offsets_beyond_int32():
    """A stride of 2^32 elements that stays in memory, as there is one row, or that row again."""
    memory = torch.zeros(64)
    x = Weight((1, 20), -1)
    y = x.copy().step()
    for name in "WGMV":
        X = getattr(x, name)
        view = memory.clone()[: X.shape[-1]].copy_(X[0, 0])
        setattr(x, name, view.as_strided(X.shape, (2**40, 2**34, 1)))
    x.step()
    assert same(x.all(), y.all())
    tall = Weight((40, 1), -1)
    tall.G = tall.G[:, :1].expand(1, 40, 1)  # one row read 40 times
    compare(tall)


def test_registration():
    x = Weight((2, 5, 18), -1)
    args = (
        x.W, x.G, x.index, 0, x.M, x.V, 3.0, None, 0.9, -0.1, 0.9, 0.99, 1e-8, 2, 1.0, None, None,
        None, [],
    )  # fmt: skip
    torch.library.opcheck(split._split_step, args, test_utils=("test_schema", "test_faketensor"))
    graphs = []

    def record(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    y = x.copy()
    torch.compile(x.step, fullgraph=True, backend=record)()
    y.step()
    assert same(x.all(), y.all()) and len(graphs) == 1 and len(graphs[0]) == 1


@pytest.mark.parametrize("kind", ["columns", "rows", "randk"])
@pytest.mark.parametrize("reset", ["all", "changed", "none"])
def test_frugal_writes_by_it(kind, reset, monkeypatch):
    """The optimizer on kernels walks as it does on plain torch, late flags included."""
    ends, calls = [], []
    step_ = split.split_step_
    monkeypatch.setattr(
        "stiefel.kernels.triton.split_step_", lambda *a, **k: calls.append(1) or step_(*a, **k)
    )
    for back_end in ("reference", "triton"):
        monkeypatch.setenv("STIEFEL_KERNELS", back_end)
        for transposed in (False, True):
            W = gaussian(12, 20)
            p = torch.nn.Parameter((W.T.contiguous().T if transposed else W).clone())
            optimizer = FRUGAL(
                [p], lr=0.05, weight_decay=0.1, split=kind, reset=reset, update_gap=2
            )
            optimizer._wait = False
            for t in range(5):
                p.grad = gaussian(12, 20, seed=7 * t)
                p.grad[3, 4] = float("nan") if t == 3 else 1.0
                optimizer.step()
            state = optimizer.state[p]
            copies = [state[name].clone() for name in ("exp_avg_sq", "age") if name in state]
            ends.append([p.detach().clone(), *copies])
    assert calls
    for ours, plain in zip(ends[2:], ends[:2], strict=True):
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
