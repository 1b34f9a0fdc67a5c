"""Norms of rows and columns, and the whole RowNorm step, in the interpreter."""

import importlib

import pytest
import torch
from helpers.operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    close,
    gaussian,
    holes,
    laid,
    nothing_beside,
    unchanged,
)
from helpers.problems import gradients, run, weight

from stiefel.kernels import reference as plain
from stiefel.kernels.triton import row_step
from stiefel.optimizers import Hybrid, RowNorm

rows = importlib.import_module("stiefel.kernels.triton.row_norm")

MODES = ["inverse_eps", "inverse", "relative"]
PATHS = [("inverse_eps", False), ("inverse_eps", True), ("relative", False), ("relative", True)]
LONG = (20, 300)
"""Rows that no program of the interpreter's tiles holds."""
OPS = torch.ops.stiefel
NAN = float("nan")


def normed(X, mode="inverse_eps", centred=False):
    return plain.row_norm(X.double(), 1e-8, mode, centred)


def bits(X):
    return X.contiguous().view(torch.int32 if X.dtype == torch.float32 else torch.int16)


# row_norm and column_norm -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, centred", PATHS)
def test_row_norm(mode, centred, dtype):
    for shape in [*SHAPES, (3, 20, 45), LONG]:
        X = gaussian(*shape, dtype=dtype)
        U = rows.row_norm(X, 1e-8, mode, centred)
        assert U.dtype == dtype
        if centred and shape[-2] == 1:
            assert not U.any()
        else:
            close(U, normed(X, mode, centred), dtype)
            if mode == "inverse_eps" and not centred and shape[-1] < 128:
                ours, theirs = U.float(), plain.row_norm(X, 1e-8).float()
                assert (ours - theirs).abs().max() <= (2e-7 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode, centred", PATHS[:2] + PATHS[3:])
def test_any_strides(mode, centred, layout):
    for shape in ((3, 20, 17), (5, 150)):
        dense = gaussian(*shape)
        X, buffer = laid(dense, layout)
        with nothing_beside((X, buffer)):
            U = rows.row_norm(X, 1e-8, mode, centred)
            V = rows.column_norm(X, 1e-8, mode, centred)
        close(U, normed(dense, mode, centred), torch.float32)
        close(V, normed(dense.mT, mode, centred).mT, torch.float32)
        assert torch.equal(X, dense)
        assert torch.equal(U, rows.row_norm(X, 1e-8, mode, centred))  # as in the first run
        if layout != "columns":
            assert torch.equal(U, rows.row_norm(dense, 1e-8, mode, centred))


def test_nothing_is_left_out_or_written_beside():
    for shape in ((33, 45), (20, 150)):
        for layout in LAYOUTS:
            X, (out, buffer) = gaussian(*shape), holes((1, *shape), layout=layout)
            with nothing_beside((out, buffer)):
                rows._normed(X[None], out, 1e-8, 0, False)
            close(out[0], normed(X), torch.float32)
            with nothing_beside((out, buffer)):
                rows._normed(X[None], out.fill_(NAN), 1e-8, 2, True)
            close(out[0], normed(X, "relative", True), torch.float32)


@pytest.mark.parametrize("shape", [(70, 33), LONG], ids=str)
def test_permuted_rows_give_permuted_results_bit_for_bit(shape):
    X, order = gaussian(*shape), torch.randperm(shape[0])
    for Y in (X, X.bfloat16()):
        assert torch.equal(rows.row_norm(Y[order]), rows.row_norm(Y)[order])


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_stay_zero(mode):
    for eps in (1e-8, 0.0):
        X = gaussian(2, 20, 33)
        X[:, 3] = 0.0
        U = rows.row_norm(X, eps, mode)
        assert not U[:, 3].any() and U.isfinite().all()
        close(U, plain.row_norm(X.double(), eps, mode), torch.float32)
        assert not rows.row_norm(torch.zeros(2, 20, 33), eps, mode).any()
        assert torch.equal(
            rows.column_norm(X.mT.contiguous(), eps, mode)[..., 3], torch.zeros(2, 33)
        )


def test_huge_and_subnormal_rows_are_those_of_the_reference():
    X = gaussian(7, 33)
    for row, scale in enumerate((1e30, 1e-30, 1e-42, 1e-20, 1e18, 1e-12)):
        X[row] *= scale
    for mode in ("inverse_eps", "inverse"):
        U, V = rows.row_norm(X, 1e-8, mode), plain.row_norm(X, 1e-8, mode)
        torch.testing.assert_close(U, V, rtol=1e-6, atol=0)
        assert not U[0].any()  # its squares are infinite


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_shows(bad):
    X = gaussian(2, 20, 33)
    X[1, 4, 5] = bad
    U = rows.row_norm(X)
    assert U[1, 4].isnan().any() and U[0].isfinite().all() and U[1, 5:].isfinite().all()
    for mode in MODES:
        assert rows.row_norm(X, 1e-8, mode, True)[1].isnan().any()
        assert torch.equal(U[0], rows.row_norm(X[:1])[0])


def test_a_stack_has_the_bits_of_its_matrices_and_a_ragged_one_those_of_the_padded():
    X = gaussian(3, 33, 45)
    for mode, centred in PATHS:
        U = rows.row_norm(X, 1e-8, mode, centred)
        for k in (0, 2):
            assert torch.equal(U[k], rows.row_norm(X[k], 1e-8, mode, centred))
    padded = torch.zeros(3, 48, 64)
    padded[:, :33, :45] = X
    assert torch.equal(rows.row_norm(padded)[:, :33, :45], rows.row_norm(X))


def test_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 5)):
        assert rows.row_norm(torch.empty(shape)).shape == shape
        assert rows.column_norm(torch.empty(shape)).shape == shape
    row_step.row_step_(*(torch.empty(0, 3, 4) for _ in "WMG"), 0.9, 1e-8, "unit", 1.0, -1.0)


def test_offsets_beyond_int32():
    """Matrices 2^30 entries apart, of which only the used ones exist: all at the same place."""
    X = gaussian(1, 20, 33)
    far = X.expand(5, 20, 33)
    for mode, centred in (("unit", False), ("relative", True)):
        U = rows.row_norm(far, 1e-8, mode, centred)
        assert torch.equal(U, rows.row_norm(X, 1e-8, mode, centred).expand(5, 20, 33))
    wide = torch.empty(3 * 2**30, dtype=torch.bfloat16)  # untouched pages take no memory
    Y = wide.as_strided((3, 4, 33), (2**30, 64, 1))
    Y.copy_(gaussian(3, 4, 33))
    assert torch.equal(rows.row_norm(Y), rows.row_norm(Y.contiguous()))
    Z = wide.as_strided((4, 33), (3 * 2**28, 1))
    Z.copy_(gaussian(4, 33))
    assert torch.equal(rows.row_norm(Z), rows.row_norm(Z.contiguous()))
    close(rows.column_norm(Z), normed(Z.float().mT).mT, torch.bfloat16)


def test_unknown_modes_are_refused():
    X = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="mode must be one of"):
        rows.row_norm(X, 1e-8, "twice")
    with pytest.raises(ValueError, match="needs the norms of all rows"):
        row_step.row_step_(X, X.clone(), X, 0.9, 1e-8, "relative", 1.0, -1.0)


# row_step_ ----------------------------------------------------------------------------------------


def stepped(W, M, G, mu, eps, mode, keep, alpha, nesterov):
    """The step in float64."""
    W, M, G = W.double(), M.double(), G.double()
    M = M + (1 - mu) * (G - M)
    U = G + mu * (M - G) if nesterov else M
    return keep * W + alpha * plain.row_norm(U, eps, mode), M


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_row_step(layout, nesterov):
    for shape in [(1, *s) for s in SHAPES] + [(3, 33, 45), (2, 5, 300)]:
        W, M, G = (gaussian(*shape, seed=s) for s in range(3))
        want, moment = stepped(W, M, G, 0.95, 1e-8, "inverse_eps", 0.9, -0.3, nesterov)
        (W, w), (M, b), (G, g) = (laid(X, layout) for X in (W, M, G))
        (kept,) = unchanged(G)
        with nothing_beside((W, w), (M, b), (G, g)):
            row_step.row_step_(W, M, G, 0.95, 1e-8, "inverse_eps", 0.9, -0.3, nesterov=nesterov)
        close(W, want, torch.float32)
        close(M, moment, torch.float32)
        assert torch.equal(G, kept)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("mode", ["inverse_eps", "inverse", "unit"])
def test_row_step_is_its_reference(mode, mu):
    for dtypes in [(torch.float32, torch.bfloat16, torch.float32),
                   (torch.bfloat16, torch.float32, torch.float16)]:  # fmt: skip
        for shape in ((2, 20, 33), (1, 4, 200)):
            W, M, G = (gaussian(*shape, seed=s, dtype=d) for s, d in enumerate(dtypes))
            V, N = W.clone(), M.clone()
            row_step.row_step_(W, M, G, mu, 1e-4, mode, 0.9, -0.3)
            plain.row_step_(V, N, G, mu, 1e-4, mode, 0.9, -0.3)
            for ours, theirs in ((W, V), (M, N)):
                close(ours, theirs, ours.dtype)
            if mu == 0.0:
                assert torch.equal(M.float(), G.to(M.dtype).float())


@pytest.mark.parametrize("n", [7, 300])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-15, 1e16, 1e22, 1e30, 1e37])
def test_a_step_of_rows_does_not_depend_on_their_size(size, n):
    """Without eps; in one tile and in several."""
    G = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).clamp(-3, 3)
    found = []
    for scale in (1.0, size):
        p = torch.nn.Parameter(torch.zeros(6, n))
        optimizer = RowNorm([p], lr=1.0, weight_decay=0.0)
        run(optimizer, [p], [[scale * G, scale * G.flip(0)]])
        found.append(p.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_row_step_obeys_its_control():
    for shape in ((3, 20, 33), (3, 5, 200)):
        W, M, G = (gaussian(*shape, seed=s) for s in range(3))
        V, N = W.clone(), M.clone()
        row_step.row_step_(V, N, G, 0.95, 1e-8, "unit", 0.9, -0.3)
        control = torch.stack([torch.ones(3), torch.full((3,), 0.9), torch.full((3,), -0.3)]).T
        for scalars in (control, control.contiguous()):
            A, B = W.clone(), M.clone()
            row_step.row_step_(A, B, G, 0.95, 1e-8, "unit", 7.0, 7.0, scalars)
            assert torch.equal(A, V) and torch.equal(B, N)
        G[1, 2, 3] = NAN
        W[1, 0, 0] = NAN
        control[1] = torch.tensor([0.0, NAN, NAN])
        A, B = W.clone(), M.clone()
        row_step.row_step_(A, B, G, 0.95, 1e-8, "unit", 7.0, 7.0, control)
        assert torch.equal(bits(A[1]), bits(W[1])) and torch.equal(bits(B[1]), bits(M[1]))
        for k in (0, 2):
            assert torch.equal(A[k], V[k]) and torch.equal(B[k], N[k])


def test_row_step_in_odd_cases():
    W, M, G = (gaussian(2, 20, 33, seed=s) for s in range(3))
    M[:, 4], G[:, 4], G[0, 5, 6] = 0.0, 0.0, NAN
    V, first = W.clone(), W.clone()
    for eps in (1e-8, 0.0):
        V, N = W.clone(), M.clone()
        row_step.row_step_(V, N, G, 0.95, eps, "inverse", 1.0, -0.3)
        assert torch.equal(V[:, 4], W[:, 4]) and not N[:, 4].any()
        assert V[0, 5].isnan().all() and V[0, 6:].isfinite().all()
    order = torch.randperm(20)
    A, B = W[:, order], M[:, order]
    row_step.row_step_(A, B, G[:, order], 0.95, 0.0, "inverse", 1.0, -0.3)
    assert torch.equal(bits(A), bits(V[:, order])) and torch.equal(bits(B), bits(N[:, order]))
    row_step.row_step_(first, M.clone(), G, 0.95, 0.0, "inverse", 1.0, -0.3)
    assert torch.equal(bits(first), bits(V))


# as operations of torch ---------------------------------------------------------------------------


def test_operations_are_what_torch_expects():
    check = {"test_utils": ("test_schema", "test_faketensor")}
    for X in (gaussian(2, 5, 9), gaussian(2, 9, 5).mT, gaussian(5, 9, dtype=torch.bfloat16)):
        torch.library.opcheck(OPS.row_norm.default, (X, 1e-8, 2, True), **check)
    for control in (None, torch.ones(2, 3)):
        given = [gaussian(2, 5, 9, seed=s) for s in range(3)]
        arguments = (*given, 0.9, 1e-8, 0, 1.0, -0.1, control, True, None, [])
        torch.library.opcheck(OPS.row_step_.default, arguments, **check)


def test_each_operation_is_one_node():
    found = []

    def recorded(graph, _):
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def all_of_it(W, M, G):
        row_step.row_step_(W, M, G, 0.9, 1e-8, "unit", 1.0, -0.1)
        return rows.row_norm(W, centred=True)

    given = [gaussian(2, 5, 9, seed=s) for s in range(3)]
    copies = [X.clone() for X in given]
    U = torch.compile(all_of_it, fullgraph=True, backend=recorded)(*given)
    assert torch.equal(U, all_of_it(*copies)) and torch.equal(given[0], copies[0])
    ours = [target for target in found if "stiefel" in str(target)]
    assert len(ours) == len(found) == 2


# through the driver -------------------------------------------------------------------------------

VARIANTS = {
    "step": (RowNorm, {}),
    "published": (RowNorm, {"adjust_lr_fn": "none", "row_mode": "unit"}),
    "columns": (RowNorm, {"axis": "cols"}),
    "relative": (RowNorm, {"row_mode": "relative"}),
    "centred": (RowNorm, {"centred": True}),
    "halves": (RowNorm, {"pair": "halves"}),
    "interleaved, centred": (RowNorm, {"pair": "interleaved", "centred": True}),
    "members": (RowNorm, {"pair": "members"}),
    "hybrid": (Hybrid, {"polar": "svd", "order": "polar_then_row", "centred": True}),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_optimizers_are_the_same_on_kernels(name, late, monkeypatch):
    cls, options = VARIANTS[name]
    shapes, found = [(10, 24), (10, 24), (140, 6), (140, 6)], {}
    for back_end in ("reference", "triton"):
        monkeypatch.setenv("STIEFEL_KERNELS", back_end)
        params = [weight(shape, i) for i, shape in enumerate(shapes)]
        optimizer = cls(params, lr=0.02, weight_decay=0.1, **options)
        optimizer._wait = not late
        grads = [gradients(shape, 3, i) for i, shape in enumerate(shapes)]
        if late:
            grads[0][1] = grads[0][1].clone().fill_(NAN)
        found[back_end] = run(optimizer, params, grads)[-1], optimizer.skipped
        moments = [optimizer.state[p]["momentum_buffer"] for p in params]
        found[back_end] += (moments,)
    plain_, ours = found["reference"], found["triton"]
    assert plain_[1] == ours[1] == ({0: 1} if late else {})
    for a, b in zip([*plain_[0], *plain_[2]], [*ours[0], *ours[2]], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-6)
