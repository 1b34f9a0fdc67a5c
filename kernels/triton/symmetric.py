"""Products that are known to be symmetric: half of the tiles are computed and mirrored.

out = alpha A B^T + beta S + diagonal I, with A B^T symmetric: X X^T, S S, or two polynomials of one
matrix. Tiles on the diagonal are made symmetric bit for bit, the others are by construction, so the
right factor of the next product may be read by rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    INTERPRETED,
    Case,
    guard,
    options,
    precision,
    stacked,
    strides,
    tuned,
)
from ._tables import Config


@triton.jit
def unranked(t):
    """Tile (i, j), i <= j, of number t = j (j + 1) / 2 + i in the upper triangle."""
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j


@triton.jit
def near_inverse(t):
    """The power of two s with t s in [1, 2): a factor that rounds nothing."""
    exponent = t.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(0x7F000000 - exponent, 0).to(tl.float32, bitcast=True)


@triton.jit
def symmetric_kernel(
    A, B, S, out, trace, only, m, n, a_k, a_m, a_n, b_k, b_m, b_n, s_k, s_m, s_n, o_k, o_m, o_n,
    alpha, beta, diagonal,
    SOURCE: tl.constexpr, TRACE: tl.constexpr, ONLY: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of the upper triangle and its mirror image; the grid is (tiles, matrices)."""
    i, j = unranked(tl.program_id(0))
    k = tl.program_id(1)
    if ONLY:
        if tl.load(only + k) == 0:
            return
    batch = k.to(tl.int64)  # a stack may have more than 2^31 elements
    A += batch * a_k
    B += batch * b_k
    out += batch * o_k
    r = tl.arange(0, BM)
    rows = (i * BM + r).to(tl.int64)
    cols = (j * BM + r).to(tl.int64)
    inner = tl.arange(0, BK)
    a = A + rows[:, None] * a_m + inner.to(tl.int64)[None, :] * a_n
    b = B + cols[:, None] * b_m + inner.to(tl.int64)[None, :] * b_n
    if TRACE:  # everything was to be divided by the trace of S, whose square may overflow
        t = tl.load(trace + k)
        near = near_inverse(t)
        alpha, beta = alpha / t / (t * near), beta / t
    acc = tl.zeros((BM, BM), tl.float32)
    for start in range(0, n, BK):
        left = inner[None, :] < n - start
        x = tl.load(a, mask=(rows[:, None] < m) & left, other=0.0)
        y = tl.load(b, mask=(cols[:, None] < m) & left, other=0.0)
        if TRACE:
            x = (x.to(tl.float32) * near).to(x.dtype)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        a += tl.cast(a_n, tl.int64) * BK
        b += tl.cast(b_n, tl.int64) * BK
    acc *= alpha
    mask = (rows[:, None] < m) & (cols[None, :] < m)
    if SOURCE:
        s = S + batch * s_k + rows[:, None] * s_m + cols[None, :] * s_n
        acc += beta * tl.load(s, mask=mask, other=0.0).to(tl.float32)
    if i == j:
        acc += tl.where(r[:, None] == r[None, :], diagonal, 0.0)
    o = acc.to(out.dtype.element_ty)
    if i == j:  # after the cast, where it takes half of the registers
        o = tl.where(r[:, None] <= r[None, :], o, tl.trans(o))
    tl.store(out + rows[:, None] * o_m + cols[None, :] * o_n, o, mask=mask)
    if i != j:
        mirror = (cols[:, None] < m) & (rows[None, :] < m)
        tl.store(out + cols[:, None] * o_m + rows[None, :] * o_n, tl.trans(o), mask=mirror)


def table(name: str, X: Tensor) -> str:
    """The name of the tile sizes for products of X's dtype."""
    return f"{name}32" if X.dtype == torch.float32 else name


def per_matrix(given: Tensor | None) -> Tensor | None:
    """One number for each matrix as the kernels read them."""
    return None if given is None else given.reshape(-1).to(torch.float32).contiguous()


def one_dtype(*Xs: Tensor) -> None:
    """Raise ValueError where the factors of a product differ in dtype."""
    if len({X.dtype for X in Xs}) > 1:
        found = " and ".join(str(X.dtype) for X in Xs)
        raise ValueError(f"factors of {found} do not multiply: cast them to one dtype")


def _launch(
    A: Tensor, B: Tensor, S: Tensor | None, trace: Tensor | None, only: Tensor | None,
    alpha: float, beta: float, diagonal: float,
) -> Tensor:  # fmt: skip
    A, B = stacked(A), stacked(B)
    K, m, n = A.shape
    out = A.new_empty(K, m, m)
    if out.numel() == 0:
        return out
    source = stacked(S) if S is not None else None

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(m, chosen.tile_sizes["BM"])
        symmetric_kernel[(tiles * (tiles + 1) // 2, K)](
            A, B, source, out, trace, only, m, n, *strides(A), *strides(B),
            *(strides(source) if source is not None else (0, 0, 0)), *strides(out),
            alpha, beta, diagonal, SOURCE=source is not None, TRACE=trace is not None,
            ONLY=only is not None, UPCAST=INTERPRETED, PRECISION=precision(A), **options(chosen),
        )  # fmt: skip

    with guard(A):
        run(tuned(table("symmetric", A), A, (m, n), run, batch=K > 1, partial=only is not None))
    return out


@torch.library.custom_op("stiefel::gram", mutates_args=())
def _gram(X: Tensor, only: Tensor | None) -> Tensor:
    S = _launch(X, X, None, None, per_matrix(only), 1.0, 0.0, 0.0)
    return S.view(*X.shape[:-1], X.shape[-2])


@_gram.register_fake
def _(X: Tensor, only: Tensor | None) -> Tensor:
    return X.new_empty(*X.shape[:-1], X.shape[-2])


@torch.library.custom_op("stiefel::symmetric", mutates_args=())
def _symmetric(
    A: Tensor, B: Tensor, S: Tensor, trace: Tensor | None, only: Tensor | None, alpha: float,
    beta: float, diagonal: float,
) -> Tensor:  # fmt: skip
    out = _launch(A, B, S, per_matrix(trace), per_matrix(only), alpha, beta, diagonal)
    return out.view(S.shape)


@_symmetric.register_fake
def _(
    A: Tensor, B: Tensor, S: Tensor, trace: Tensor | None, only: Tensor | None, alpha: float,
    beta: float, diagonal: float,
) -> Tensor:  # fmt: skip
    return S.new_empty(S.shape)


def gram(X: Tensor, only: Tensor | None = None) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.gram`."""
    out: Tensor = _gram(X, only)
    return out


def symmetric_poly(
    S: Tensor, b: float, c: float, d: float = 0.0, trace: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.symmetric_poly`."""
    out: Tensor = _symmetric(S, S, S, trace, only, c, b, d)
    return out


def symmetric_apply(A: Tensor, B: Tensor, a: float) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.symmetric_apply`."""
    one_dtype(A, B)
    out: Tensor = _symmetric(A, B, A, None, None, 1.0, a, 0.0)
    return out


_POINTERS = ("A", "B", "S", "out")
_SIZES = ("m", "n", *(f"{x}_{axis}" for x in "abso" for axis in "kmn"))
_SCALARS = ("alpha", "beta", "diagonal")


def _case(
    name: str, element: str, dot: str, source: bool = False, tall: bool = False,
    trace: bool = False, only: bool = False, precision: str = "tf32",
) -> Case:  # fmt: skip
    unit = ("a_m", "b_m") if tall else ("a_n", "b_n")
    constants = {
        **dict.fromkeys((*unit, "s_n", "o_n"), 1), "SOURCE": source, "TRACE": trace,
        "ONLY": only, "UPCAST": False, "PRECISION": precision,
        **({} if source else {"S": None}), **({} if trace else {"trace": None}),
        **({} if only else {"only": None}),
    }  # fmt: skip
    types = {
        **dict.fromkeys(_POINTERS, f"*{element}"), **dict.fromkeys(("trace", "only"), "*fp32"),
        **dict.fromkeys(_SIZES, "i32"), **dict.fromkeys(_SCALARS, "fp32"),
    }  # fmt: skip
    types = {key: kind for key, kind in types.items() if key not in constants}
    table = "symmetric32" if element == "fp32" else "symmetric"
    return Case(name, table, symmetric_kernel, types, constants, dot)


CASES = [
    _case("gram bf16", "bf16", "bf16"),
    _case("gram fp16", "fp16", "fp16"),
    _case("gram tf32", "fp32", "tf32"),
    _case("gram tf32x3", "fp32", "tf32", precision="tf32x3"),
    _case("gram bf16 of columns", "bf16", "bf16", tall=True),
    _case("symmetric_poly bf16", "bf16", "bf16", source=True),
    _case("symmetric_poly fp16", "fp16", "fp16", source=True),
    _case("symmetric_poly tf32", "fp32", "tf32", source=True),
    _case("symmetric_poly tf32x3", "fp32", "tf32", source=True, precision="tf32x3"),
    _case("symmetric_poly bf16 by trace", "bf16", "bf16", source=True, trace=True),
    _case("symmetric_poly tf32 by trace", "fp32", "tf32", source=True, trace=True),
    _case("symmetric_poly fp16 only some", "fp16", "fp16", source=True, only=True),
]
