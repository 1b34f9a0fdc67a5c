"""Passes over memory in the interpreter against their references and float64."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers.operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    close,
    gaussian,
    laid,
    nothing_beside,
    unchanged,
)

from stiefel.kernels import reference as plain
from stiefel.kernels import triton as kernels
from stiefel.kernels.triton import _pointer_lists as lists
from stiefel.optimizers import AuON, Muon

SIDES = ["rows", "cols", "all"]
OPS = torch.ops.stiefel
NAN = float("nan")


def momentum_of(M, G, mu, nesterov, kind):
    """The buffer and the step in float64."""
    M, G = M.double(), G.double()
    M = mu * M + G if kind == "sum" else M + (1 - mu) * (G - M)
    if not nesterov:
        return M, M
    return M, G + mu * M if kind == "sum" else G + mu * (M - G)


def summed(X, side):
    dims = {"rows": -1, "cols": -2, "all": (-2, -1)}[side]
    return X.double().square().sum(dims, keepdim=True)


def listed(X):
    """The matrices of a stack, each in memory of its own and laid out as in the stack."""
    if X.stride(-1) != 1 and X.stride(-2) == 1:
        return [x.mT.clone().mT for x in X]
    return [x.clone() for x in X]


def kinds(K, m, n):
    """A factor of every form."""
    return [
        None, *(gaussian(*s, seed=3) for s in (
            (K, 1, 1), (1, 1, 1), (K, m, 1), (1, m, 1), (K, 1, n), (1, 1, n), (K, m, n), (1, m, n)
        ))
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 45)], ids=str)
def test_blend_is_its_formula(shape):
    shape = shape if len(shape) == 3 else (1, *shape)
    for i, (nesterov, kind) in enumerate([(a, b) for a in (False, True) for b in ("ema", "sum")]):
        M, G = gaussian(*shape), gaussian(*shape, seed=1)
        want, step = momentum_of(M, G, 0.95, nesterov, kind)
        side = [None, *SIDES][i]
        U, found = kernels.momentum_step_(M, G, 0.95, nesterov=nesterov, kind=kind, squares=side)
        close(M, want, torch.float32)
        close(U, step, torch.float32)
        assert (U is M) == (not nesterov) and (found is None) == (side is None)
        if side:
            close(found, summed(step, side), torch.float32, 4)


@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16], ids=str)
def test_blend_in_every_precision(buffer, grad):
    for kind in ("ema", "sum"):
        M, G = gaussian(2, 20, 37, dtype=buffer), gaussian(2, 20, 37, seed=1, dtype=grad)
        (kept,), work = unchanged(G), torch.promote_types(buffer, grad)
        for nesterov in (False, True):
            other = M.clone()
            U, s = kernels.momentum_step_(M, G, 0.9, nesterov=nesterov, kind=kind, squares="all")
            V, t = plain.momentum_step_(other, G, 0.9, nesterov=nesterov, kind=kind, squares="all")
            assert U.dtype == V.dtype == work and (U is M) == (V is other)
            close(M, other.double(), buffer)
            close(U, V.double(), work)
            close(s, t.double(), torch.float32, 2000 if work == torch.bfloat16 else 4)
        assert torch.equal(G, kept)


def test_blend_in_bfloat16_rounds_as_torch_does():
    M = gaussian(1, 33, 45, dtype=torch.bfloat16)
    G = gaussian(1, 33, 45, seed=1, dtype=torch.bfloat16)
    other = M.clone()
    U, _ = kernels.momentum_step_(M, G, 0.95, nesterov=True)
    other.lerp_(G, 1 - 0.95)
    # all but what lies in the middle between two numbers, where the last bit of float32 decides
    assert (M != other).sum() <= 3 and (U != G.lerp(other, 0.95)).sum() <= 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blend_takes_any_strides_and_touches_nothing_else(layout):
    for K in (1, 3):
        dense, grad = gaussian(K, 20, 37), gaussian(K, 20, 37, seed=1)
        (M, buffer), (G, other) = laid(dense, layout), laid(grad, layout)
        with nothing_beside((M, buffer), (G, other)):
            U, found = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="rows")
        V, expected = kernels.momentum_step_(dense, grad, 0.9, nesterov=True, squares="rows")
        assert torch.equal(M, dense) and torch.equal(U, V) and torch.equal(G, grad)
        close(found, expected.double(), torch.float32)
        assert (U.stride(-2) == 1) == (layout == "columns")
        crossed = gaussian(K, 20, 37).mT.contiguous().mT
        kernels.momentum_step_(crossed, grad, 0.9)
        assert torch.equal(crossed, dense)


def test_flags_leave_every_byte_and_what_is_bad_is_only_in_its_matrix():
    M, G = gaussian(3, 20, 37), gaussian(3, 20, 37, seed=1)
    G[1, 3, 4] = NAN
    old, free = M.clone(), M.clone()
    ok = torch.tensor([1.0, 9.0, 0.0, 9.0, 1.0, 9.0])[::2]
    for nesterov in (False, True):
        U, _ = kernels.momentum_step_(M, G, 0.9, nesterov=nesterov, finite=ok)
        kernels.momentum_step_(free, G, 0.9)
        assert torch.equal(M[1], old[1]) and torch.equal(M[::2], free[::2])
        assert U.isnan().sum() == (1 if nesterov else 0)
    assert free[1].isnan().sum() == 1
    other = old.clone()
    plain.momentum_step_(other, G, 0.9, finite=ok)
    assert torch.equal(other[1], old[1])
    norm, found = kernels.momentum_power_sums_(M, G, 0.9, 3, finite=ok)
    assert norm.flatten().isfinite().tolist() == [True, False, True] and found[::2].isfinite().all()
    assert torch.equal(M[1], old[1])
    kept = M.clone()
    kernels.momentum_step_(M, G, 0.9, finite=torch.tensor([0.0, 9.0, 9.0])[:1])  # one for all
    assert torch.equal(M, kept)


@pytest.mark.parametrize("transposed", [False, True])
def test_lists_have_the_bits_of_stacks(transposed):
    def stack(seed, K, m, n):
        return gaussian(K, n, m, seed=seed).mT if transposed else gaussian(K, m, n, seed=seed)

    for shape in ((2, 33, 20), (3, 5, 7)):
        M, G = stack(0, *shape), stack(1, *shape).bfloat16()
        Ms, Gs = listed(M), listed(G)
        U, found = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="cols")
        V, alike = kernels.momentum_step_(Ms, Gs, 0.9, nesterov=True, squares="cols")
        assert torch.equal(U, V) and U.stride() == V.stride() and torch.equal(found, alike)
        assert all(map(torch.equal, Ms, M))
        assert kernels.momentum_step_(Ms, G, 0.9)[0] is Ms  # a list beside a stack
        kernels.momentum_step_(M, Gs, 0.9)
        assert all(map(torch.equal, Ms, M))
        W, by = stack(2, *shape).bfloat16(), gaussian(shape[0], shape[1], 1)
        Ws = listed(W)
        kernels.scaled_add_(W, M, by, 0.9, -0.1, Y=G)
        kernels.scaled_add_(Ws, Ms, by, 0.9, -0.1, Y=Gs)
        assert all(map(torch.equal, Ws, W))
        for dim in (-1, -2, None):
            assert torch.equal(kernels.squares(Ms, dim), kernels.squares(M, dim))
        assert all(map(torch.equal, kernels.power_sums(Ms, 3), kernels.power_sums(M, 3)))
        assert all(
            map(torch.equal, kernels.cast_stack(Gs, torch.float32, True), (G, torch.ones(len(G))))
        )


def test_many_small_matrices():
    M, G = gaussian(37, 5, 7), gaussian(37, 5, 7, seed=1, dtype=torch.bfloat16)
    Ms, Gs = listed(M), listed(G)
    U, found = kernels.momentum_step_(Ms, Gs, 0.9, nesterov=True, squares="rows")
    want, step = momentum_of(M, G, 0.9, True, "ema")
    close(torch.stack(Ms), want, torch.float32)
    close(U, step, torch.float32)
    close(found, summed(step, "rows"), torch.float32, 2)
    stack, flags = kernels.cast_stack(Gs, torch.float32, True)
    assert torch.equal(stack, G.float()) and flags.tolist() == [1.0] * 37
    kernels.scaled_add_(Ms, stack, None, 1.0, 0.5)
    close(torch.stack(Ms), want + 0.5 * stack, torch.float32)


def test_tables_of_addresses_are_kept_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(lists, "MAX_TABLES", 2)
    monkeypatch.setattr(lists, "_TABLES", {})
    kept = [listed(gaussian(2, 3, 4, seed=i)) for i in range(4)]
    for _ in range(2):
        for Xs in kept:
            assert torch.equal(kernels.squares(Xs, None), kernels.squares(torch.stack(Xs), None))
            assert len(lists._TABLES) <= 2
    (first, *_), (again, *_) = (of_streams[0] for of_streams in lists._TABLES.values())
    kernels.squares(kept[-1], None)
    kept = [of_streams[0][0] for of_streams in lists._TABLES.values()]
    assert any(table is again for table in kept) and first is not again


def test_a_graph_reads_tables_that_were_there_before(monkeypatch):
    monkeypatch.setattr(lists, "_TABLES", {})
    monkeypatch.setattr(lists, "_CAPTURED", [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="once with the same tensors before the capture"):
        lists._table((16, 32), device)
    made = torch.tensor([16, 32]), torch.tensor([16, 32])
    lists._TABLES[(16, 32), device] = {3: made}  # of another stream, as a warm-up's is
    assert lists._table((16, 32), device) is made[0] and lists._CAPTURED == [made]


def test_a_stack_has_the_bits_of_its_matrices():
    M, G = gaussian(3, 33, 70), gaussian(3, 33, 70, seed=1)
    Ms = [x[None].clone() for x in M]
    U, found = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="all")
    for k in range(3):
        V, alone = kernels.momentum_step_(Ms[k], G[k : k + 1], 0.9, nesterov=True, squares="all")
        assert torch.equal(V[0], U[k]) and torch.equal(alone[0], found[k])
    again = kernels.momentum_power_sums_(M.clone(), G, 0.9, 3)
    assert all(map(torch.equal, again, kernels.momentum_power_sums_(M.clone(), G, 0.9, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 45)], ids=str)
def test_squares(shape, dtype):
    X = gaussian(*(shape if len(shape) == 3 else (1, *shape)), dtype=dtype)
    for side, dim in zip(SIDES, (-1, -2, None), strict=True):
        found = kernels.squares(X, dim)
        close(found, summed(X, side), torch.float32, 2)
        close(plain.squares(X, dim), summed(X, side), torch.float32, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_take_any_strides_and_touch_nothing_else(layout):
    dense = gaussian(3, 33, 45)
    X, buffer = laid(dense, layout)
    with nothing_beside((X, buffer)):
        for side, dim in zip(SIDES, (-1, -2, None), strict=True):
            close(kernels.squares(X, dim), summed(dense, side), torch.float32, 2)
        out, flags = kernels.cast_stack(X, torch.bfloat16, True)
        norm, _ = kernels.power_sums(X, 1)
    assert torch.equal(out, dense.bfloat16()) and flags.tolist() == [1.0] * 3
    assert torch.equal(X, dense) and (out.stride(-2) == 1) == (layout == "columns")
    torch.testing.assert_close(norm, summed(dense, "all").sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e30, 3e38, 1e-30, 1e-36, 0.0])
def test_power_sums_neither_overflow_nor_vanish(size):
    X = gaussian(2, 33, 45).clamp(-1, 1) * size
    norm, found = kernels.power_sums(X, 6)
    expected, wanted = plain.power_sums(X, 6)
    exact = X.double().square().sum((-2, -1), keepdim=True).sqrt()
    assert norm.dtype == found.dtype == torch.float64
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(norm, exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(found, wanted, rtol=4e-6, atol=0)
    assert kernels.power_sums(X.clone().fill_(NAN), 2)[0].isnan().all()


def test_flags_of_a_cast_see_what_is_not_finite_and_nothing_else():
    Xs = [gaussian(5, 7, dtype=torch.bfloat16) for _ in range(6)]
    Xs[1][4, 6], Xs[2][0, 0], Xs[3][2, 2] = NAN, float("inf"), -float("inf")
    Xs[4][:] = 3e38
    for form in (Xs, torch.stack(Xs)):
        out, flags = kernels.cast_stack(form, torch.float32, True)
        assert flags.tolist() == [1, 0, 0, 0, 1, 1] and flags.dtype == torch.float32
        torch.testing.assert_close(out, torch.stack(Xs).float(), rtol=0, atol=0, equal_nan=True)
        again, none = kernels.cast_stack(form, torch.float32)
        assert none is None and torch.equal(again.nan_to_num(), out.nan_to_num())
    X = gaussian(2, 3, 4)
    assert plain.cast_stack(X, torch.float32)[0].data_ptr() != X.data_ptr()
    assert kernels.cast_stack(X, torch.float32)[0].data_ptr() != X.data_ptr()


@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 70, 33), (2, 20, 45), (2, 45, 1)], ids=str)
def test_scaled_add(shape, weight):
    for i, by in enumerate(kinds(*shape)):
        W, X = gaussian(*shape, dtype=weight), gaussian(*shape, seed=1, dtype=DTYPES[i % 3])
        want = 0.9 * W.double() - 0.3 * X.double() * (1.0 if by is None else by.double())
        old, V, (kept,) = W.clone(), W.clone(), unchanged(X)
        kernels.scaled_add_(W, X, by, 0.9, -0.3)
        plain.scaled_add_(V, X, by, 0.9, -0.3)
        close(W, want, weight)
        close(V, want, weight)
        assert torch.equal(X, kept)
        control = torch.tensor([[1.0, 0.9, -0.3]]).repeat(len(W), 1)
        control[-1, 0] = 0.0
        again, other = old.clone(), old.clone()
        kernels.scaled_add_(again, X, by, 0.5, 7.0, control.mT.contiguous().mT)
        plain.scaled_add_(other, X, by, 0.5, 7.0, control)
        assert torch.equal(again[:-1], W[:-1]) and torch.equal(again[-1], old[-1])
        assert torch.equal(other[-1], old[-1])
        close(other[:-1], W[:-1].double(), weight)


def test_scaled_add_of_two_terms_is_rounded_once():
    W, X, Y = (gaussian(2, 20, 37, seed=i) for i in range(3))
    by, other = gaussian(2, 1, 1), gaussian(2, 20, 1)
    want = 0.9 * W.double() - 0.3 * (X.double() * by + Y.double() * other)
    for dtype in DTYPES:
        V, U = W.to(dtype, copy=True), W.to(dtype, copy=True)
        kernels.scaled_add_(V, X, by, 0.9, -0.3, Y=Y, by_Y=other)
        plain.scaled_add_(U, X, by, 0.9, -0.3, Y=Y, by_Y=other)
        close(V, want, dtype)
        close(V, U.double(), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_add_takes_any_strides_and_touches_nothing_else(layout):
    for K in (1, 3):
        dense, term = gaussian(K, 20, 37), gaussian(K, 20, 37, seed=1)
        (W, buffer), (X, other) = laid(dense, layout), laid(term, layout)
        for by in kinds(K, 20, 37):
            with nothing_beside((W, buffer), (X, other)):
                kernels.scaled_add_(W, X, by, 0.9, 0.1)
            kernels.scaled_add_(dense, term, by, 0.9, 0.1)
            assert torch.equal(W, dense)


def test_ragged_results_are_the_crop_of_padded_ones():
    M, G = (torch.zeros(2, 48, 64) for _ in range(2))
    M[:, :45, :50], G[:, :45, :50] = gaussian(2, 45, 50), gaussian(2, 45, 50, seed=1)
    small = M[:, :45, :50].clone()
    U, found = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="rows")
    V, crop = kernels.momentum_step_(
        small, G[:, :45, :50].clone(), 0.9, nesterov=True, squares="rows"
    )
    assert torch.equal(V, U[:, :45, :50]) and torch.equal(crop, found[:, :45])


def test_offsets_beyond_int32():
    """A stack of stride 2^31 + 8 in memory that is never touched between its matrices."""
    far = 2**31 + 8
    whole = torch.empty(far + 64, dtype=torch.bfloat16)
    X = whole.as_strided((2, 4, 8), (far, 8, 1))
    X.copy_(gaussian(2, 4, 8))
    G = gaussian(2, 4, 8, seed=1)
    dense = X.clone()
    assert torch.equal(kernels.squares(X, None), kernels.squares(dense, None))
    kernels.momentum_step_(X, G, 0.9)
    kernels.momentum_step_(dense, G, 0.9)
    assert torch.equal(X, dense)
    same = gaussian(1, 4, 8).expand(3, 4, 8)
    assert torch.equal(kernels.squares(same, -2), kernels.squares(same.clone(), -2))


def test_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        X = torch.ones(shape)
        U, found = kernels.momentum_step_(X, X.clone(), 0.9, nesterov=True, squares="rows")
        assert U.shape == shape and found.shape == (*shape[:2], 1) and not found.any()
        assert kernels.squares(X, -2).shape == (shape[0], 1, shape[2])
        norm, powers = kernels.power_sums(X, 3)
        assert norm.shape == (shape[0], 1, 1) and powers.shape == (shape[0], 3)
        assert not norm.any() and not powers.any()
        out, flags = kernels.cast_stack(X, torch.bfloat16, True)
        assert out.shape == shape and flags.tolist() == [1.0] * shape[0]
        kernels.scaled_add_(X, X.clone(), None, 0.9, 0.1)


def test_float64_goes_to_the_reference():
    M, G = gaussian(2, 5, 7).double(), gaussian(2, 5, 7, seed=1).double()
    other = M.clone()
    U, found = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="rows")
    V, expected = plain.momentum_step_(other, G, 0.9, nesterov=True, squares="rows")
    assert torch.equal(U, V) and torch.equal(found, expected) and U.dtype == torch.float64
    assert kernels.squares(M, None).dtype == torch.float64


def test_what_does_not_fit_is_named():
    X = gaussian(2, 5, 7)
    with pytest.raises(ValueError, match="kind must be"):
        kernels.momentum_step_(X, X, 0.9, kind="mean")
    with pytest.raises(ValueError, match="squares must be"):
        kernels.momentum_step_(X, X, 0.9, squares="columns")
    with pytest.raises(ValueError, match="dim must be"):
        kernels.squares(X, 0)
    with pytest.raises(ValueError, match="G must have the shape"):
        kernels.momentum_step_(X, gaussian(2, 5, 8), 0.9)
    with pytest.raises(ValueError, match="by must broadcast"):
        kernels.scaled_add_(X, X.clone(), gaussian(1, 5, 2), 1.0, 1.0)
    with pytest.raises(ValueError, match="matrices of X must agree in shape"):
        kernels.squares([gaussian(2, 3), gaussian(3, 2)], None)
    with pytest.raises(ValueError, match="matrices of X must agree in dtype"):
        kernels.squares([gaussian(2, 3), gaussian(2, 3).bfloat16()], None)


def test_operations_are_declared_as_they_are():
    X, M, ok = gaussian(2, 5, 7), gaussian(2, 7, 5).mT, torch.ones(2)
    tests = ("test_schema", "test_faketensor")
    opcheck = torch.library.opcheck
    for Xs in ([X], listed(X), [M], listed(M)):
        half = [x.to(torch.bfloat16) for x in Xs]
        for wanted, count in (("rows", 0), ("cols", 0), ("all", 0), ("powers", 3), ("", 0)):
            opcheck(OPS.read.default, (half, torch.float32, wanted, count), test_utils=tests)
            flags = (0.9, True, False, wanted != "powers", wanted, count, ok)
            opcheck(
                OPS.momentum_step.default, ([x.clone() for x in Xs], half, *flags), test_utils=tests
            )
        args = (
            [x.clone() for x in Xs],
            half,
            gaussian(2, 5, 1),
            [],
            None,
            0.9,
            0.1,
            None,
            None,
            [],
        )
        opcheck(OPS.scaled_add.default, args, test_utils=tests)


def test_every_operation_is_one_node_of_a_graph():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    def step(W, M, G):
        U, _ = kernels.momentum_step_(M, G, 0.9, nesterov=True, squares="rows")
        kernels.scaled_add_(W, U, kernels.squares(U, -1), 0.9, -0.1)
        return kernels.cast_stack([W[0], W[1]], torch.bfloat16, True)

    args = [gaussian(2, 5, 7, seed=i) for i in range(3)]
    copies = [x.clone() for x in args]
    found = torch.compile(step, fullgraph=True, backend=backend)(*args)
    assert all(map(torch.equal, found, step(*copies))) and all(map(torch.equal, args, copies))
    (graph,) = graphs
    ours = [str(node.target) for node in graph.graph.nodes if "stiefel" in str(node.target)]
    assert [x.split(".")[1] for x in ours] == ["momentum_step", "read", "scaled_add", "read"]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: AuON(p, lr=0.1), lambda p: AuON(p, lr=0.1, nesterov=False, gamma=3.0),
        lambda p: AuON(p, lr=0.1, ns_steps=1), lambda p: AuON(p, lr=0.1, variant="repo2026"),
        lambda p: AuON(p, lr=0.1, ns_steps=2, variant="repo2026", state_dtype="bfloat16"),
        lambda p: Muon(p, lr=0.1, second_moment="normuon"),
        lambda p: Muon(p, lr=0.1, momentum_kind="sum"),
    ],
)  # fmt: skip
def test_methods_agree_with_their_plain_path(make, shape, monkeypatch):
    ends = []
    for back_end in ("reference", "triton"):
        monkeypatch.setenv("STIEFEL_KERNELS", back_end)
        p = torch.nn.Parameter(gaussian(*shape))
        optimizer = make([p])
        for i in range(3):
            p.grad = gaussian(*shape, seed=i + 1)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=2e-4, atol=2e-5)
