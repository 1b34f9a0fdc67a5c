"""The recorder of the roofline: what a kernel moves and multiplies, to the byte."""

import sys

import pytest
import torch
import triton
import triton.language as tl
from helpers.operands import gaussian
from helpers.paths import BENCH

from stiefel.kernels.triton import symmetric
from stiefel.kernels.triton._tables import TABLES

sys.path.insert(0, str(BENCH))
from traffic import Log, Work, extended, recorded, scaled, triangle, watched


@triton.jit
def twice_kernel(X, Y, out, n, BLOCK: tl.constexpr):
    """Reads X twice, Y in every program from its start, and writes out once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    x += tl.load(X + at, mask=at < n, other=0.0)
    y = tl.load(Y + tl.arange(0, BLOCK))
    tl.store(out + at, x * y, mask=at < n)


@triton.jit
def product_kernel(X, Y, out, SIDE: tl.constexpr):
    """One tile."""
    at = tl.arange(0, SIDE)
    place = at[:, None] * SIDE + at[None, :]
    tl.store(out + place, tl.dot(tl.load(X + place), tl.trans(tl.load(Y + place))))


@triton.jit
def address_kernel(X, out):
    """An entry decides where something is stored."""
    at = tl.load(X + tl.arange(0, 16)).to(tl.int32)
    tl.store(out + at, 1.0)


@triton.jit
def branch_kernel(X, out):
    """The sum of entries decides whether something is stored."""
    if tl.sum(tl.load(X + tl.arange(0, 16))) > 0.0:
        tl.store(out, 1.0)


@triton.jit
def flag_kernel(X, out):
    """A scalar of its own tells each program whether it stores."""
    if tl.load(X + tl.program_id(0)) > 0.0:
        tl.store(out + tl.program_id(0), 1.0)


def test_bytes_are_counted_once_and_as_issued():
    X, Y, out = torch.randn(100), torch.randn(32), torch.empty(100)
    with recorded() as log:
        twice_kernel[(4,)](X, Y, out, 100, BLOCK=32)
    (work,) = log.works
    assert work.kernel and work.name == "twice_kernel"
    assert (work.read, work.written) == (4 * 132, 4 * 100)
    assert (work.loaded, work.stored) == (4 * (200 + 4 * 32), 4 * 100)
    assert work.tensors == {"X": (400, 0), "Y": (128, 0), "out": (0, 400)}
    assert work.other == 2 * 4 * 32 and not work.products


def test_a_view_and_a_narrow_dtype():
    X = torch.randn(4, 64).bfloat16()
    out = torch.empty(64, dtype=torch.bfloat16)
    with recorded() as log:
        twice_kernel[(2,)](X[1], X[2], out, 64, BLOCK=32)
    (work,) = log.works  # the two views lie in one tensor
    assert work.tensors == {"X=Y": (2 * 96, 0), "out": (0, 2 * 64)}


@pytest.mark.parametrize("dry", [False, True])
def test_products_and_their_dtypes(dry):
    X, out = torch.randn(16, 16), torch.empty(16, 16)
    with recorded(dry=dry) as log:
        product_kernel[(1,)](X, X, out, SIDE=16)
    assert log.works[0].products == {"fp32": 2 * 16**3}
    assert torch.equal(out, torch.zeros(16, 16)) == dry
    narrow = gaussian(16, 16, dtype=torch.bfloat16)
    with recorded(dry=dry) as log:
        symmetric.gram(narrow)
    (work,) = log.kernels()  # what a GPU multiplies, or what the interpreter does
    assert work.products == {"bf16" if dry else "fp32": 2 * 16**3}


def test_nothing_stays_behind():
    before, X = dict(TABLES["symmetric"]["interpreted"]), gaussian(20, 40)
    S = symmetric.gram(X)
    with recorded("sm_90", dry=True) as log:
        symmetric.gram(X)
    assert dict(TABLES["symmetric"]["interpreted"]) == before
    count = len(log.works)
    assert torch.equal(symmetric.gram(X), S) and len(log.works) == count


def test_operations_beside_kernels_are_recorded_too():
    X = gaussian(32, 16)
    with recorded() as log:
        Y = symmetric.gram(X.mul(2.0))
        Y.add_(1.0)
    assert [(work.name, work.kernel) for work in log.works] == [
        ("mul", False), ("symmetric_kernel", True), ("add_", False)
    ]  # fmt: skip
    assert log.works[2].moved == 2 * 4 * 32 * 32


def test_torch_operations():
    X, Y, I = torch.empty(8, 6), torch.empty(6, 4), torch.tensor([0, 3])
    cases = [
        (lambda: X @ Y, (48 + 24) * 4, 32 * 4, 2 * 8 * 6 * 4),
        (lambda: X.mT.reshape(2, 3, 8).sum(), 48 * 4, 4, 0),
        (lambda: X.mul_(X), 48 * 4, 48 * 4, 0),
        (lambda: X.copy_(Y[0, 0].expand(8, 6)), 4, 48 * 4, 0),
        (lambda: X.index_select(1, I), 16 * 4 + 16, 16 * 4, 0),
        (lambda: X.index_copy_(1, I, X[:, :2]), 16 * 4 + 16, 16 * 4, 0),
        (lambda: torch.mm(X, Y, out=torch.empty(8, 4)), (48 + 24) * 4, 32 * 4, 2 * 8 * 6 * 4),
    ]
    for run, read, written, flops in cases:
        log = watched(run)
        last = log.works[-1]
        assert (last.read, last.written) == (read, written), last
        assert sum(last.products.values()) == flops


def test_extension_is_exact():
    def f(x, y):
        return 7 + 3 * x - y + x * y + 2 * y * y + 5 * x * x * x - x * y * y

    values = {p: f(*p) for p in triangle(3)}
    assert all(extended(values, 3, x, y) == f(x, y) for x, y in [(0, 0), (4, 1), (31, 22)])
    line = {(i, 0): f(i, 0) for i in range(4)}
    assert extended(line, 3, 31, 0) == f(31, 0)


def test_a_size_that_was_not_run():
    def run(i, j):
        X = torch.zeros(128 * (1 + i), 128 * (1 + i + j), dtype=torch.bfloat16)
        with recorded("sm_90", dry=True) as log:
            symmetric.symmetric_poly(symmetric.gram(X), 1.0, 2.0)
        return log

    logs = {point: run(*point) for point in triangle(3)}
    found = scaled(logs, 3, 2, 3)
    assert [work.numbers() for work in found.works] == [w.numbers() for w in run(2, 3).works]
    far = scaled(logs, 3, 31, 0).works[0]
    assert far.read == far.written == 2 * 4096**2
    assert far.products["bf16"] == 2 * 128**2 * 4096 * 32 * 33 // 2


def test_problems_of_another_kind_are_refused():
    logs = {point: Log([Work("a")]) for point in triangle(1)}
    logs[0, 1] = Log([Work("b")])
    with pytest.raises(ValueError, match="small problems differ"):
        scaled(logs, 1, 3, 3)


@pytest.mark.parametrize("kernel", [address_kernel, branch_kernel], ids=["address", "branch"])
def test_what_a_dry_run_does_not_compute_decides_nothing(kernel):
    with pytest.raises(ValueError, match="a dry run does not have"), recorded(dry=True):
        kernel[(2,)](torch.arange(16.0) % 2, torch.zeros(16))


@pytest.mark.parametrize("lanes", [1, 2**20])
def test_scalars_are_read_and_programs_that_part_are_counted_apart(lanes):
    X, out = torch.arange(16.0) % 2, torch.zeros(16)
    with recorded(dry=True, lanes=lanes) as log:
        flag_kernel[(16,)](X, out)
    (work,) = log.works
    assert (work.read, work.loaded, work.written, work.stored) == (64, 64, 32, 32)
    assert torch.equal(out, X)
