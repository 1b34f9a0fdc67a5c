"""Stochastic rounding inside the kernels that write: the bits of plain torch, and no pass more.

Values are such that sums are exact, so that both back ends round the same numbers.
"""

import itertools
import sys

import pytest
import torch
from helpers.covering import in_turn
from helpers.operands import DEVICE, LAYOUTS, gaussian, laid, nothing_beside
from helpers.paths import BENCH

from stiefel.kernels import Rounding, reference
from stiefel.kernels import triton as fast
from stiefel.kernels.triton._write import (
    COLUMN_PAIRS,
    FAR,
    NEAREST,
    ROW_PAIRS,
    SINGLE,
    Bits,
    drawn,
)

K, M, N, R = 2, 21, 40, 3
HALVES = [torch.bfloat16, torch.float16]
EXACT = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0}
"""Adam whose direction is the sign of the gradient."""
OPERATIONS = ("scaled_add_", "lift_", "adam_lift_", "split_step_", "row_step_")
POSITIONS = {
    "whole": (0, (M * N, N, 1), COLUMN_PAIRS),
    "odd offset": (7, (M * N, N, 1), SINGLE),
    "stack": (0, (0, N, 1), COLUMN_PAIRS),
    "transposed": (0, (M * N, 1, M + 1), ROW_PAIRS),
    "transposed, odd": (0, (M * N, 1, M), SINGLE),
    "columns of a wider one": (6, (M * 50, 50, 1), COLUMN_PAIRS),
    "columns of an odd one": (6, (M * 51, 51, 1), SINGLE),
    "far": (2**33 + 6, (M * N, N, 1), COLUMN_PAIRS),
    "far and transposed": (2**33 + 6, (0, 1, 2**20), ROW_PAIRS),
    "far and odd": (2**33 + 7, (M * N, N, 1), FAR),
    "over 2^32": (2**32 - 50, (M * N, N, 1), FAR),
    "far apart": (3, (2**40 + 1, 2**33 + 3, 2**31 + 1), FAR),
    "any": (11, (1, 7, 3), SINGLE),
}
"""First position, its strides, and how the bits are made of them."""
ONE_OF_EACH_WAY = ("whole", "transposed", "odd offset", "far and odd")


def keys_of(count, seed=0):
    """Keys of random bits."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, (count,), generator=generator, device="cpu")
    return drawn.int().to(DEVICE)


def coarse(*shape, seed=0):
    """Numbers of few bits, none of them 0."""
    X = gaussian(*shape, seed=seed).bfloat16().float()
    return torch.where(X == 0, 1.0, X)


def one_hot(m, r):
    """(K, m, r) with one number in every row, so that products are exact."""
    P = torch.zeros(K, m, r, device=DEVICE)
    P[:, torch.arange(m), torch.arange(m) % r] = coarse(K, m, seed=4)
    return P


def unit_rows(n):
    """(K, M, n) of signs, of which 4 or 16 in a row are not 0: its norm is a power of two."""
    X = gaussian(K, M, n, seed=5).sign()
    X[:, ::2, 4:], X[:, 1::2, 16:] = 0.0, 0.0
    return X.roll(1, -1)


def run(ops, name, W, alpha=2.0**-7, keep=1.0, control=None, **given):
    """An operation that changes W by multiples of alpha; its state, which moves too."""
    n = W.shape[-1]
    G = coarse(K, M, n, seed=1)
    given["control"] = control
    if name == "scaled_add_":
        by = torch.full((K, M, 1), 0.5, device=DEVICE)
        ops.scaled_add_(W, G, by, keep, alpha, **given)
        return []
    if name == "lift_":
        ops.lift_(W, one_hot(M, R), coarse(K, R, n, seed=2), keep, alpha, **given)
        return []
    if name == "adam_lift_":
        moments = [torch.zeros(K, R, n, device=DEVICE) for _ in range(2)]
        R_ = coarse(K, R, n, seed=3)
        ops.adam_lift_(W, one_hot(M, R), R_, *moments, 1, keep, alpha, **EXACT, **given)
        return moments
    if name == "split_step_":
        index = torch.tensor([[0, 3, 8], [1, 2, 7]], dtype=torch.int32, device=DEVICE)
        moments = [torch.zeros(K, M, 3, device=DEVICE) for _ in range(2)]
        ops.split_step_(W, G, index, -1, *moments, 1, keep, alpha, **EXACT, free="sgd", **given)
        return moments
    momentum = torch.zeros(K, M, n, device=DEVICE)
    ops.row_step_(W, momentum, unit_rows(n), 0.0, 0.0, "unit", keep, alpha, **given)
    return [momentum]


def same(X, Y):
    """Equal bit for bit, but for the sign and the payload of NaN."""
    return torch.equal(X.isnan(), Y.isnan()) and torch.equal(X.nan_to_num(7.0), Y.nan_to_num(7.0))


def weights(dtype, n=N, seed=0):
    """(K, M, n) of many exponents."""
    W = gaussian(K, M, n, seed=seed) * 2.0 ** gaussian(K, M, n, seed=seed + 9).round()
    return W.to(dtype)


# bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    [
        *(("scaled_add_", dtype, form) for dtype in HALVES for form in POSITIONS),
        # each kernel calls the same function for its bits, so one position of each way is enough
        *((name, torch.bfloat16, form) for name in OPERATIONS[1:] for form in ONE_OF_EACH_WAY),
        *((name, torch.float16, "whole") for name in OPERATIONS[1:]),
    ],
    ids=str,
)
def test_bits_are_those_of_plain_torch(name, dtype, form):
    offset, strides, way = POSITIONS[form]
    layouts = LAYOUTS if form in ("whole", "transposed") else LAYOUTS[:2]
    for layout, count in (("rows", 1), *((layout, K) for layout in layouts)):
        rounding = Rounding(keys_of(count), offset, strides)
        assert drawn(rounding, dtype, (K, M, N)).launched((K, M, N))[1] == way
        expected, (W, buffer) = weights(dtype), laid(weights(dtype), layout)
        run(reference, name, expected, rounding=rounding)
        with nothing_beside((W, buffer)):
            run(fast, name, W, rounding=rounding)
        assert torch.equal(W, expected)
        nearest = weights(dtype)
        run(reference, name, nearest)
        assert not torch.equal(W, nearest) and not torch.equal(W, weights(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_long_rows(dtype, offset):
    n = 150  # more than a tile of the interpreter's holds
    for layout, form in itertools.product(("rows", "columns"), ((M * n, n, 1), (0, 1, M))):
        rounding = Rounding(keys_of(K), offset, form)
        expected, (W, _) = weights(dtype, n), laid(weights(dtype, n), layout)
        run(reference, "row_step_", expected, rounding=rounding)
        run(fast, "row_step_", W, rounding=rounding)
        assert torch.equal(W, expected)


@pytest.mark.parametrize("dim", [-1, -2, None])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chosen_columns_rows_and_entries(dim, dtype):
    inside = {-1: (K, M, 3), -2: (K, 3, N), None: (K, 1, 3)}[dim]
    index = torch.tensor([[0, 3, 8], [1, 2, 7]], dtype=torch.int32, device=DEVICE)
    rounding = Rounding(keys_of(K), 2, (0, N, 1))
    for layout in LAYOUTS:
        found = []
        for ops in (reference, fast):
            W, _ = laid(weights(dtype), layout)
            moments = [torch.zeros(inside, device=DEVICE) for _ in range(2)]
            ops.split_step_(
                W, coarse(K, M, N), index, dim, *moments, 1, 1.0, 2.0**-7, **EXACT, free="sgd",
                rounding=rounding,
            )  # fmt: skip
            found.append(W)
        assert torch.equal(*found)


@pytest.mark.parametrize("name", ["lift_", "adam_lift_"])
def test_signs_of_what_a_subspace_leaves(name):
    found, X = [], coarse(K, M, N, seed=6)
    for ops in (reference, fast):
        W, P, R_ = weights(torch.bfloat16), one_hot(M, R), coarse(K, R, N, seed=3)
        given = {"X": X, "free": 0.5, "rounding": Rounding(keys_of(K), 0, (M * N, N, 1))}
        if name == "lift_":
            ops.lift_(W, P, R_, 1.0, 2.0**-7, R=R_, **given)
        else:
            moments = [torch.zeros_like(R_) for _ in range(2)]
            ops.adam_lift_(W, P, R_, *moments, 1, 1.0, 2.0**-7, **EXACT, **given)
        found.append(W)
    assert torch.equal(*found)


def test_positions_row_by_row_need_no_strides():
    for name, layout in itertools.product(OPERATIONS, LAYOUTS):
        A, B = (laid(weights(torch.bfloat16), layout)[0] for _ in range(2))
        run(fast, name, A, rounding=Rounding(keys_of(1), 4))
        run(reference, name, B, rounding=Rounding(keys_of(1), 4))
        assert torch.equal(A, B)


def test_a_list_has_the_bits_of_a_stack():
    """At addresses that are multiples of 16 and at others, along rows and along columns."""
    X = coarse(K, M, N)
    axes = ("whole", "stack", "odd offset", "over 2^32"), ("rows", "columns"), (0, 1), (1, K)
    for at in itertools.product(*map(enumerate, axes)):
        if not in_turn(*(i for i, _ in at), of=2):
            continue
        form, layout, shift, count = (x for _, x in at)
        rounding = Rounding(keys_of(count), *POSITIONS[form][:2])
        stack = weights(torch.bfloat16)
        reference.scaled_add_(stack, X, None, 1.0, 2.0**-7, rounding=rounding)
        buffers = [torch.zeros(M * N + 8, dtype=torch.bfloat16, device=DEVICE) for _ in range(K)]
        sides = (M, N) if layout == "rows" else (N, M)
        listed = [b[shift : shift + M * N].view(sides) for b in buffers]
        listed = listed if layout == "rows" else [W.mT for W in listed]
        for ops in (reference, fast):
            for W, w in zip(listed, weights(torch.bfloat16), strict=True):
                W.copy_(w)
            terms = [x.mT.contiguous().mT if layout == "columns" else x for x in X]
            ops.scaled_add_(listed, terms, None, 1.0, 2.0**-7, rounding=rounding)
            assert torch.equal(torch.stack(listed), stack)


# what rounding must not do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_flag_of_zero_leaves_weight_and_state(name):
    control = torch.tensor([[0.0, 1.0, 2.0**-7], [1.0, 1.0, 2.0**-7]], device=DEVICE)
    rounding = Rounding(keys_of(K), 0, (M * N, N, 1))
    for dtype, ops in itertools.product(HALVES, (reference, fast)):
        W, free = weights(dtype), weights(dtype)
        state = run(ops, name, W, alpha=5.0, control=control, rounding=rounding)
        run(fast, name, free, rounding=rounding)
        assert torch.equal(W[0], weights(dtype)[0]) and torch.equal(W[1], free[1])
        assert not any(X[0].any() for X in state)


@pytest.mark.parametrize("name", OPERATIONS)
def test_grid_points_and_what_is_not_finite_stay(name):
    special = [0.0, float("inf"), -float("inf"), float("nan"), 6e-8, 2.0**-14, 1.0, -1.0]
    for dtype in HALVES:
        W = weights(dtype)
        W[:, 0, :8] = torch.tensor(special).to(dtype)
        W[:, 1, 0] = torch.finfo(dtype).max
        for seed in range(2):
            X = W.clone()
            run(fast, name, X, alpha=0.0, rounding=Rounding(keys_of(K, seed), 0, (M * N, N, 1)))
            assert same(X, W)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_extreme_values_are_rounded_as_in_plain_torch(dtype):
    info = torch.finfo(dtype)
    sizes = torch.tensor([info.max, info.tiny, 2.0**-24, 2.0**-20, 2.0**-14, 1e-7, 3e-5, 3.0])
    W = torch.cat((sizes, -sizes, sizes.flip(0))).repeat(K, M, 2).to(DEVICE, dtype)
    steps = [2.0**-26, 2.0**-25, 2.0**-22, 2.0**-12, info.max * 2.0**-9, float("inf"), float("nan")]
    for step, seed in itertools.product(steps, range(2)):
        rounding = Rounding(keys_of(K, seed), 0, (M * W.shape[-1], W.shape[-1], 1))
        found = []
        for ops in (reference, fast):
            X = W.clone()
            ops.scaled_add_(X, torch.full_like(X, step), None, 1.0, 1.0, rounding=rounding)
            found.append(X)
        assert same(*found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_float32_weights_are_rounded_to_nearest(name):
    A, B = weights(torch.float32), weights(torch.float32)
    run(fast, name, A, alpha=0.3, rounding=Rounding(keys_of(K), 0, (M * N, N, 1)))
    run(fast, name, B, alpha=0.3)
    assert torch.equal(A, B)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kept", ["residual", "error"])
def test_what_is_cut_off_is_kept_by_plain_torch(name, kept):
    found = []
    control = torch.tensor([[1.0, 1.0, 2.0**-7], [0.0, 1.0, 2.0**-7]], device=DEVICE)
    dtype = {"residual": torch.bfloat16, "error": torch.float32}[kept]
    for ops in (reference, fast):
        W = weights(torch.bfloat16)
        left = 2.0**-9 * W if kept == "residual" else torch.zeros(W.shape, device=DEVICE)
        left = left.to(dtype)
        before = left.clone()
        given = Rounding(keys_of(K), 0, (M * N, N, 1), **{kept: left})
        run(ops, name, W, control=control, rounding=given)
        assert torch.equal(W[1], weights(torch.bfloat16)[1])
        assert torch.equal(left[1], before[1]) and not torch.equal(left[0], before[0])
        found.append((W, left))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_wrong_number_of_keys_is_refused():
    for name in OPERATIONS:
        W = weights(torch.bfloat16)
        with pytest.raises(ValueError, match="keys must have 1 or 2 entries, got 3"):
            run(fast, name, W, rounding=Rounding(keys_of(3), 0, (0, N, 1)))
        assert torch.equal(W, weights(torch.bfloat16))


def test_steps_of_paired_positions_wrap():
    """Numbers of a launch are of 32 bits, and what has no neighbours has no stride."""
    bits = Bits(keys_of(1), [2**32 - 4, 3, 5, 1])
    numbers, way = bits.launched((1, 1, 4))
    assert way == COLUMN_PAIRS and all(-(2**31) <= x < 2**31 for x in numbers[1:])
    assert Bits(None, []).launched((1, 1, 4)) == ((None,) * 6, NEAREST)
    assert bits.mT.positions == [2**32 - 4, 3, 1, 5]


# values of every kind -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, HALVES[i % 2]) for i, name in enumerate(OPERATIONS)], ids=str
)
def test_rounding_is_unbiased_and_off_by_less_than_a_grid_distance(name, dtype):
    """Counts of the upper grid point against shares in float64, which float32 may miss a little."""
    draws, exact, W0 = 10, weights(dtype).double(), weights(dtype)
    run(reference, name, exact, keep=0.97, alpha=0.0137)
    nearest = exact.to(dtype)
    down, up = (torch.nextafter(nearest, torch.full_like(nearest, s * torch.inf)) for s in (-1, 1))
    is_below = nearest.double() <= exact
    low = torch.where(is_below, nearest, down).double()
    high = torch.where(is_below, up, nearest).double()
    share, counts = (exact - low) / (high - low), torch.zeros_like(exact)
    inside = (share - 0.5).abs() < 0.49
    for seed in range(draws):
        W = W0.clone()
        rounding = Rounding(keys_of(K, seed), 0, (0, N, 1))
        run(fast, name, W, keep=0.97, alpha=0.0137, rounding=rounding)
        W = W.double()
        assert bool(((W >= low) & (W <= high))[inside].all())
        counts += high <= W
    variance = draws * (share * (1 - share))[inside]
    off = counts[inside] - draws * share[inside]
    assert float(off.sum().abs()) < 4 * float(variance.sum().sqrt())
    assert 0.9 < float(off.square().sum() / variance.sum()) < 1.1  # as draws without relation


# launches -----------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="the recorder is about the interpreter")
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_pass_is_added(name):
    """The same launches, which move the same bytes and beside them only the keys."""
    sys.path.insert(0, str(BENCH))
    from traffic import recorded

    logs = []
    for rounding in (None, Rounding(keys_of(K), 0, (0, N, 1))):
        W = weights(torch.bfloat16)
        with recorded() as log:
            run(fast, name, W, rounding=rounding)
        logs.append([work for work in log.works if work.kernel])
    assert [work.name for work in logs[0]] == [work.name for work in logs[1]]
    for nearest, random in zip(*logs, strict=True):
        assert random.written == nearest.written and random.stored == nearest.stored
        assert random.products == nearest.products
        assert random.read - nearest.read in (0, 4 * K)
        assert random.tensors.pop("keys", (0, 0)) in ((0, 0), (4 * K, 0))
        assert random.tensors == nearest.tensors
    assert sum(work.read for work in logs[1]) - sum(work.read for work in logs[0]) == 4 * K


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_stays_one_node_of_a_graph(name):
    nodes = []

    def recorded(graph, _):
        nodes.extend(x.target for x in graph.graph.nodes if x.op == "call_function")
        return graph.forward

    def step(W, keys, *operands):
        rounding = Rounding(keys, 0, (0, N, 1))
        given = {"rounding": rounding}
        if name == "scaled_add_":
            fast.scaled_add_(W, operands[0], None, 1.0, 0.5, **given)
        elif name == "lift_":
            fast.lift_(W, *operands[1:3], 1.0, 0.5, **given)
        elif name == "adam_lift_":
            fast.adam_lift_(W, *operands[1:5], 1, 1.0, 0.5, **EXACT, **given)
        elif name == "split_step_":
            fast.split_step_(
                W, operands[0], operands[7], -1, *operands[5:7], 1, 1.0, 0.5, **EXACT, **given
            )
        else:
            fast.row_step_(W, operands[8], operands[0], 0.0, 0.0, "unit", 1.0, 0.5, **given)

    def operands():
        inside, chosen = (K, R, N), (K, M, 3)
        index = torch.tensor([[0, 3, 8], [1, 2, 7]], dtype=torch.int32, device=DEVICE)
        zeros = [torch.zeros(s, device=DEVICE) for s in (inside, inside, chosen, chosen)]
        momentum = torch.zeros(K, M, N, device=DEVICE)
        return (
            unit_rows(N), one_hot(M, R), coarse(*inside, seed=3), *zeros, index, momentum
        )  # fmt: skip

    plain, compiled, keys = weights(torch.bfloat16), weights(torch.bfloat16), keys_of(K)
    step(plain, keys, *operands())
    torch.compile(step, fullgraph=True, backend=recorded)(compiled, keys, *operands())
    assert same(plain, compiled)
    ours = [str(target) for target in nodes if "stiefel" in str(target)]
    assert len(ours) == 1 and f"stiefel.{name.strip('_')}" in ours[0]


def test_schemas_hold_with_keys():
    check = {"test_utils": ("test_schema", "test_faketensor")}
    ops, W, keys, positions = torch.ops.stiefel, weights(torch.bfloat16), keys_of(K), [0, 0, N, 1]
    P, N_ = one_hot(M, R), coarse(K, R, N)
    M_, V, momentum = torch.zeros(K, R, N), torch.zeros(K, R, N), torch.zeros(K, M, N)
    arguments = {
        ops.scaled_add: ([W], [W.clone()], None, [], None, 1.0, 0.5, None),
        ops.lift_: (W, P, N_, 1.0, 0.5, None, None, None, 0.0, None, None),
        ops.adam_lift_: (
            W, P, N_, M_, V, 1.0, None, 1.0, 0.5, 0.9, 0.99, 1e-8, None, 0.0, None, None
        ),
        ops.row_step_: (W, momentum, W.clone(), 0.9, 1e-8, 1, 1.0, 0.5, None, False),
        ops.split_step_: (
            W, W.clone(), torch.zeros(K, 1, dtype=torch.int32), 0, torch.zeros(K, M, 1),
            torch.zeros(K, M, 1), 1.0, None, 1.0, 0.5, 0.9, 0.99, 1e-8, 2, 1.0, None, None,
        ),
    }  # fmt: skip
    for op, given in arguments.items():
        torch.library.opcheck(op.default, (*given, keys, positions), **check)
        torch.library.opcheck(op.default, (*given, None, []), **check)
