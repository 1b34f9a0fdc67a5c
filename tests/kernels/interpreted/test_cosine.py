"""The pieces of a cosine transform in the interpreter against the reference and float64."""

import pytest
import torch
from helpers.operands import DTYPES, LAYOUTS, close, gaussian, laid, nothing_beside

from stiefel.kernels import dct, idct, reference
from stiefel.kernels import triton as ours
from stiefel.kernels.triton import _dct_back as cosine_back
from stiefel.kernels.triton import _dct_forward as cosine
from stiefel.kernels.triton import _dct_select as chosen
from stiefel.optimizers import DCTAdamW

LENGTHS = [1, 2, 3, 4, 13, 32, 37, 70]
DIMS = pytest.mark.parametrize("dim", [-1, -2])


def stack(K, lines, n, dim, dtype=torch.float32, seed=0):
    """K matrices with so many lines across dim, n along it."""
    return gaussian(K, *((lines, n) if dim == -1 else (n, lines)), seed=seed, dtype=dtype)


def spectrum(v):
    return torch.fft.rfft(v)


@DIMS
@pytest.mark.parametrize("n", LENGTHS)
def test_all_pieces_equal_the_reference(n, dim):
    X = stack(3, 10, n, dim)
    v, plain = ours.dct_reorder(X, dim), reference.dct_reorder(X, dim)
    assert torch.equal(v, plain) and v.is_contiguous()
    assert torch.equal(ours.dct_restore(v, dim), X)
    V = spectrum(v)
    for norm in (None, "l1", "l2"):
        S, sums = ours.dct_twiddle(V, n, dim, norm)
        exact, best = reference.dct_twiddle(V.to(torch.complex128), n, dim, norm)
        close(S, exact, torch.float32)
        assert (sums is None) == (norm is None)
        if norm is not None:
            close(sums, best, torch.float32)
    back = ours.dct_untwiddle(S, dim)
    exact = reference.dct_untwiddle(S.double(), dim)
    close(torch.view_as_real(back), torch.view_as_real(exact), torch.float32)


@DIMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_operands_are_widened(dtype, dim):
    X = stack(2, 5, 33, dim, dtype)
    v = ours.dct_reorder(X, dim)
    assert torch.equal(v, reference.dct_reorder(X, dim)) and v.dtype == torch.float32
    V = ours.dct_untwiddle(X, dim)
    exact = reference.dct_untwiddle(X.double(), dim)
    close(torch.view_as_real(V), torch.view_as_real(exact), torch.float32)


@DIMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_nothing_beside(layout, dim):
    dense = stack(2, 7, 19, dim)
    X, buffer = laid(dense, layout)
    index = torch.tensor([[0, 3, 18], [1, 2, 5]], dtype=torch.int32)
    with nothing_beside((X, buffer)):
        v, V = ours.dct_reorder(X, dim), ours.dct_untwiddle(X, dim)
        taken, R = ours.dct_take(X, index, dim), ours.dct_project(X, index, dim)
    assert torch.equal(v, ours.dct_reorder(dense, dim)) and torch.equal(X, dense)
    assert torch.equal(V, ours.dct_untwiddle(dense, dim))
    assert torch.equal(taken, reference.dct_take(dense, index, dim))
    assert torch.equal(R, ours.dct_project(dense, index, dim))


@DIMS
def test_runs_with_gaps(dim):
    """What torch.fft gives need not be dense, nor what is restored."""
    v, buffer = laid(gaussian(2, 9, 21), "padded")
    with nothing_beside((v, buffer)):
        x = ours.dct_restore(v, dim)
    assert torch.equal(x, reference.dct_restore(v, dim))
    V = torch.complex(gaussian(2, 11, 9), gaussian(2, 11, 9, seed=1))
    for W in (V.mT, torch.cat([V, V], -1)[..., :9].mT, torch.cat([V.mT, V.mT], -1)[..., :11]):
        S, _ = ours.dct_twiddle(W, 20, dim)
        close(S, reference.dct_twiddle(W.to(torch.complex128), 20, dim)[0], torch.float32)


@DIMS
@pytest.mark.parametrize("n", [1, 7, 37, 45])
@pytest.mark.parametrize("path", ["fft", "matmul"])
def test_transforms_are_the_same_on_both_back_ends(n, path, dim, monkeypatch):
    X = stack(2, 9, n, dim)
    monkeypatch.setenv("STIEFEL_KERNELS", "triton")
    S = dct(X, dim, path)
    close(S, dct(X.double(), dim, "matmul"), torch.float32)
    close(idct(S, dim, path), X.double(), torch.float32, 2)
    close(dct(X[0], dim, path), S[0].double(), torch.float32)
    close(idct(S[0], dim, path), X[0].double(), torch.float32, 2)
    assert torch.equal(dct(X, dim, path), S)
    assert dct(X.double(), dim, path).dtype == torch.float64


@DIMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take(dtype, dim):
    X = stack(3, 9, 40, dim, dtype)
    for index in (torch.arange(0, 40, 2).repeat(3, 1), torch.tensor([[39, 0, 7]])):
        index = index.int()
        got = ours.dct_take(X, index, dim)
        assert torch.equal(got, reference.dct_take(X, index, dim)) and got.dtype == dtype
    assert ours.dct_take(X, torch.zeros(3, 0, dtype=torch.int32), dim).numel() == 0
    unset = torch.full((1, 2), -1, dtype=torch.int32)
    assert not ours.dct_take(X, unset, dim).any()


@DIMS
@pytest.mark.parametrize("n", [1, 2, 31, 37, 70])
def test_project_makes_the_basis_itself(n, dim):
    X = stack(2, 9, n, dim)
    r = max(1, n // 2)
    index = torch.stack([torch.randperm(n)[:r].sort().values for _ in range(2)]).int()
    R = ours.dct_project(X, index, dim)
    close(R, reference.dct_project(X.double(), index, dim), torch.float32, 0.5)
    one = ours.dct_project(X, index[:1], dim)
    assert torch.equal(one[0], R[0])
    close(one[1:], reference.dct_project(X[1:].double(), index[:1], dim), torch.float32, 0.5)


def test_generated_cosines_are_exact_to_rounding_where_products_pass_the_mantissa_of_float32():
    n = 3001  # (2 j + 1) k goes up to 1.8e7; rows of the identity show entries of the basis
    rows = torch.tensor([0, 1, 1500, 2998, 3000])
    index = torch.tensor([[0, 1, 2, 1499, 1501, 2999, 3000]], dtype=torch.int32)
    cut = torch.zeros(1, len(rows), n)
    cut[0, torch.arange(len(rows)), rows] = 1.0
    R = ours.dct_project(cut, index, -1)[0].double()
    j, k = rows.double()[:, None], index[0].double()[None]
    phase = ((2 * j + 1) * k) % (4 * n)
    D = torch.cos(phase * torch.pi / (2 * n)) * (2 / n) ** 0.5
    D[:, 0] = n**-0.5
    assert (R - D).abs().max() <= 1e-7 * (2 / n) ** 0.5


@DIMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_of_narrow_gradients(dtype, dim):
    X = stack(1, 20, 33, dim, dtype)
    index = torch.tensor([[0, 5, 32]], dtype=torch.int32)
    R = ours.dct_project(X, index, dim)
    assert R.dtype == torch.float32
    close(R, reference.dct_project(X.double(), index, dim), torch.float32, 0.5)


@DIMS
def test_nan_and_inf_stay_in_their_line(dim):
    X = stack(1, 6, 33, dim)
    line = (0, 2) if dim == -1 else (0, slice(None), 2)
    X[0, 2, 3] = float("nan") if dim == -1 else X[0, 2, 3]
    X[0, 3, 2] = float("nan") if dim == -2 else X[0, 3, 2]
    v = ours.dct_reorder(X, dim)
    assert int(v.isnan().sum()) == 1
    S, sums = ours.dct_twiddle(spectrum(v), 33, dim, "l2")
    assert bool(S[line].isnan().all()) and int(S.isnan().sum()) == 33 and bool(sums.isnan().all())
    R = ours.dct_project(X, torch.tensor([[0, 4]], dtype=torch.int32), dim)
    assert int(R.isnan().sum()) == 2


@DIMS
def test_stacks_repeats_and_empty_ones(dim):
    X = stack(3, 5, 21, dim)
    v = ours.dct_reorder(X, dim)
    V = spectrum(v)
    S, sums = ours.dct_twiddle(V, 21, dim, "l2")
    for k in range(3):
        alone = ours.dct_twiddle(V[k : k + 1], 21, dim, "l2")
        assert torch.equal(alone[0][0], S[k]) and torch.equal(alone[1][0], sums[k])
    again = ours.dct_twiddle(V, 21, dim, "l2")
    assert torch.equal(again[0], S) and torch.equal(again[1], sums)
    for shape in ((0, 5, 21), (2, 0, 21)):
        empty = torch.empty(shape) if dim == -1 else torch.empty(shape).mT
        v = ours.dct_reorder(empty, dim)
        assert v.shape == shape
        V = torch.empty(*shape[:2], 11, dtype=torch.complex64)
        S, sums = ours.dct_twiddle(V, 21, dim, "l1")
        assert S.shape == empty.shape and sums.shape == (shape[0], 21) and not sums.any()
        assert ours.dct_untwiddle(empty, dim).shape == V.shape
        assert ours.dct_restore(v, dim).shape == empty.shape
        index = torch.zeros(shape[0], 2, dtype=torch.int32)
        assert ours.dct_project(empty, index, dim).shape == ours.dct_take(empty, index, dim).shape


def test_offsets_beyond_int32():
    memory = gaussian(1, 40)[0]
    for strides in ((2**40, 2**34, 1), (2**40, 1, 2**34)):
        shape = (1, 1, 40) if strides[2] == 1 else (1, 40, 1)
        X, dense = memory.as_strided(shape, strides), memory.view(shape)
        for dim in (-1, -2):
            assert torch.equal(ours.dct_reorder(X, dim), ours.dct_reorder(dense, dim))
            assert torch.equal(ours.dct_untwiddle(X, dim), ours.dct_untwiddle(dense, dim))
            index = torch.zeros(1, 1, dtype=torch.int32)
            assert torch.equal(ours.dct_take(X, index, dim), ours.dct_take(dense, index, dim))
            assert torch.equal(ours.dct_project(X, index, dim), ours.dct_project(dense, index, dim))


def test_registration():
    X, index = gaussian(2, 6, 9), torch.tensor([[1, 3]], dtype=torch.int32)
    V = spectrum(ours.dct_reorder(X, -1))
    calls = [
        (cosine._reorder, (X, -2)), (cosine_back._restore, (X, -1)),
        (cosine_back._restore, (X, -2)),
        (cosine._twiddle, (V, 9, -2, 0)), (cosine._twiddle, (V, 9, -1, 2)),
        (cosine_back._untwiddle, (X, -2)), (chosen._take, (X, index, -1)),
        (chosen._project, (X, index, -2)),
    ]  # fmt: skip
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    graphs = []

    def record(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    def work(X, index):
        V = ours.dct_untwiddle(X, -1)
        S, sums = ours.dct_twiddle(V, 9, -1, "l1")
        x = ours.dct_restore(ours.dct_reorder(S, -2), -2)
        return ours.dct_take(x, index, -1), ours.dct_project(x, index, -2), sums

    torch._dynamo.reset()
    got = torch.compile(work, fullgraph=True, backend=record)(X, index)
    for a, b in zip(got, work(X, index), strict=True):
        assert torch.equal(a, b)
    assert sum("stiefel" in name for name in graphs[0]) == 6


@pytest.mark.parametrize("shape", [(16, 9), (9, 16)], ids=str)
@pytest.mark.parametrize("fed", [None, "full"])
def test_dct_adamw_walks_alike_on_both_back_ends(shape, fed, monkeypatch):
    ends = []
    for back_end in ("reference", "triton"):
        monkeypatch.setenv("STIEFEL_KERNELS", back_end)
        p = torch.nn.Parameter(gaussian(*shape))
        optimizer = DCTAdamW(
            [p], lr=0.05, rank=3, update_proj_gap=2, transform="fft", error_feedback=fed
        )
        for t in range(4):
            p.grad = gaussian(*shape, seed=5 * t + 1)
            optimizer.step()
        ends.append((p.detach().clone(), optimizer.state[p]["index"].clone()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
