"""X / max(margin ||X||_F, eps), cast and padded with zeros, in three launches and two reads of X.

The copy is dense with sides that are multiples of 16, whatever X is like: every later load of it is
as out_n as it can be. A matrix that was given transposed is transposed back on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import normalize as plain
from ..reference._stacks import Stack
from ._launch import INTERPRETED, Case, config, guard, options, scratch, strides
from ._pointer_lists import Operand, as_list, is_column_major, is_unsupported, matrix_pointer

_DOWN = tl.constexpr(2.0**-80)
_UP = tl.constexpr(2.0**80)
_VANISHING = tl.constexpr(2.0**-80)  # below it squares of entries may have flushed to zero


@triton.jit
def squares_kernel(
    X, parts, m, n, x_k, x_m, x_n, across, count, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one tile: as it is, scaled down, scaled up, so that one sum is exact."""
    tile, k = tl.program_id(0), tl.program_id(1)
    rows = (tile // across * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (tile % across * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    place = matrix_pointer(X, k, x_k, TYPE, ALIGNED) + rows * x_m + cols * x_n
    x = tl.load(place, mask=(rows < m) & (cols < n), other=0.0).to(tl.float32)
    small, large = x * _DOWN, x * _UP
    parts += k.to(tl.int64) * (3 * count) + tile
    tl.store(parts, tl.sum(tl.sum(x * x, 1), 0))
    tl.store(parts + count, tl.sum(tl.sum(small * small, 1), 0))
    tl.store(parts + 2 * count, tl.sum(tl.sum(large * large, 1), 0))


@triton.jit
def inverse_kernel(parts, inverse, count, margin, eps, BN: tl.constexpr):
    """1 / max(margin ||X||_F, eps) of one matrix; the parts are added in a fixed order."""
    k = tl.program_id(0)
    parts += k.to(tl.int64) * (3 * count)
    lane = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    small = tl.zeros((BN,), tl.float32)
    large = tl.zeros((BN,), tl.float32)
    for start in range(0, count, BN):
        left = lane < count - start
        total += tl.load(parts + start + lane, mask=left, other=0.0)
        small += tl.load(parts + count + start + lane, mask=left, other=0.0)
        large += tl.load(parts + 2 * count + start + lane, mask=left, other=0.0)
    square = tl.sum(total, 0)
    size = tl.where(square == float("inf"), tl.sqrt(tl.sum(small, 0)) / _DOWN, tl.sqrt(square))
    size = tl.where(square < _VANISHING, tl.sqrt(tl.sum(large, 0)) / _UP, size)
    size *= margin
    tl.store(inverse + k, 1.0 / tl.where(size < eps, eps, size))  # keeps NaN, which max does not


@triton.jit
def cast_kernel(
    X, out, inverse, m, n, x_k, x_m, x_n, o_k, o_m, o_n, out_m, out_n, across,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One tile of the copy, of sides out_m x out_n."""
    tile, k = tl.program_id(0), tl.program_id(1)
    rows = (tile // across * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (tile % across * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    place = matrix_pointer(X, k, x_k, TYPE, ALIGNED) + rows * x_m + cols * x_n
    x = tl.load(place, mask=(rows < m) & (cols < n), other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(inverse + k)
    x = tl.where((rows < m) & (cols < n), x, 0.0)  # 0 times a norm of NaN is no padding
    o = out + k.to(tl.int64) * o_k + rows * o_m + cols * o_n
    tl.store(o, x.to(out.dtype.element_ty), mask=(rows < out_m) & (cols < out_n))


@torch.library.custom_op("stiefel::normalized", mutates_args=())
def _normalized(
    Xs: Sequence[Tensor], dtype: torch.dtype, margin: float, eps: float, pad: int, scaled: bool
) -> Tensor:
    X = Operand(Xs, "X")
    K, m, n = X.shape
    out_m, out_n = _ceil(m, pad), _ceil(n, pad)
    out = X.first.new_empty(K, out_m, out_n, dtype=dtype)
    if out.numel() == 0:
        return out
    with guard(X.first):
        inverse = _inverse(Xs, margin, eps) if scaled else None
        chosen = config("cast", X.first, m, n)
        across = triton.cdiv(out_n, chosen.tile_sizes["BN"])
        cast_kernel[(triton.cdiv(out_m, chosen.tile_sizes["BM"]) * across, K)](
            X.pointer, out, inverse, m, n, *X.strides, *strides(out), out_m, out_n, across,
            TYPE=X.type, ALIGNED=X.aligned, SCALED=scaled, **options(chosen),
        )  # fmt: skip
    return out


def _inverse(Xs: Sequence[Tensor], margin: float, eps: float) -> Tensor:
    X = Operand(Xs, "X", is_column_major(Xs))  # seen so that its rows lie along the memory
    K, m, n = X.shape
    chosen = config("squares", X.first, m, n)
    across = triton.cdiv(n, chosen.tile_sizes["BN"])
    count = triton.cdiv(m, chosen.tile_sizes["BM"]) * across
    count = count if INTERPRETED else _ceil(count, 16)  # those beyond X add 0, and loads are wide
    parts, inverse = scratch(X.first, K, 3, count), scratch(X.first, K)
    squares_kernel[(count, K)](
        X.pointer, parts, m, n, *X.strides, across, count, TYPE=X.type, ALIGNED=X.aligned,
        **options(chosen),
    )  # fmt: skip
    inverse_kernel[(K,)](parts, inverse, count, margin, eps, **options(config("inverse", parts, 1)))
    return inverse


@_normalized.register_fake
def _(
    Xs: Sequence[Tensor], dtype: torch.dtype, margin: float, eps: float, pad: int, scaled: bool
) -> Tensor:
    X = Xs[0]
    K = len(Xs) if X.ndim == 2 else X.shape[0]
    return X.new_empty(K, _ceil(X.shape[-2], pad), _ceil(X.shape[-1], pad), dtype=dtype)


def _ceil(side: int, pad: int) -> int:
    return -(-side // pad) * pad


def normalized(
    X: Stack, dtype: torch.dtype, margin: float = 1.0, eps: float = 1e-7, pad: int = 16
) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.normalized`."""
    if len(X) == 0 or is_unsupported(X) or dtype == torch.float64:
        return plain.normalized(X, dtype, margin, eps, pad)
    out: Tensor = _normalized(as_list(X), dtype, margin, eps, pad, True)
    return out


def padded(X: Stack, dtype: torch.dtype, pad: int = 16) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.padded`."""
    if len(X) == 0 or is_unsupported(X) or dtype == torch.float64:
        return plain.padded(X, dtype, pad)
    out: Tensor = _normalized(as_list(X), dtype, 1.0, 0.0, pad, False)
    return out


_X = ("m", "n", "x_k", "x_m", "x_n", "across")
_O = ("o_k", "o_m", "o_n", "out_m", "out_n")


def _cast_case(
    name: str, read: str, write: str, transposed: bool = False, listed: bool = False
) -> Case:
    constants = {
        ("x_m" if transposed else "x_n"): 1, "o_n": 1, "SCALED": True, "ALIGNED": listed,
        "TYPE": {"fp32": tl.float32, "bf16": tl.bfloat16}[read] if listed else None,
    }  # fmt: skip
    types = {
        "X": "*i64" if listed else f"*{read}", "out": f"*{write}", "inverse": "*fp32",
        **dict.fromkeys((*_X, *_O), "i32"),
    }  # fmt: skip
    types = {key: kind for key, kind in types.items() if key not in constants}
    return Case(name, "cast", cast_kernel, types, constants, loose=("across",))


def _squares_case(name: str, read: str) -> Case:
    types = {"X": f"*{read}", "parts": "*fp32", **dict.fromkeys((*_X, "count"), "i32")}
    del types["x_n"]
    constants = {"x_n": 1, "TYPE": None, "ALIGNED": False}
    return Case(name, "squares", squares_kernel, types, constants, loose=("across",))


CASES = [
    _squares_case("normalize: squares of fp32", "fp32"),
    _squares_case("normalize: squares of bf16", "bf16"),
    Case(
        "normalize: inverse", "inverse", inverse_kernel,
        {"parts": "*fp32", "inverse": "*fp32", "count": "i32", "margin": "fp32", "eps": "fp32"},
    ),
    _cast_case("normalize: cast fp32 to bf16", "fp32", "bf16"),
    _cast_case("normalize: cast bf16 to bf16", "bf16", "bf16"),
    _cast_case("normalize: cast columns of fp32 to fp16", "fp32", "fp16", transposed=True),
    _cast_case("normalize: cast columns of bf16 to bf16", "bf16", "bf16", transposed=True),
    _cast_case("normalize: cast list of fp32 to bf16", "fp32", "bf16", listed=True),
]  # fmt: skip
