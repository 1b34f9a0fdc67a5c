"""Rows at one length, centred or not.

A row of up to 16384 entries is held in registers: read once, written once, 2e bytes an entry of e
bytes. Longer rows are read twice. Where memory runs along the columns, or all rows must be known
first, sums of squares come first and a pass that scales follows (3e). Centred: column means, row
norms along with the sums of the scaled rows, and the result (4e; 5e where rows are not held).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.row_norm import check_mode
from ._launch import Case, config, guard, options, scratch, stacked, strides
from ._partial_sums import fold
from ._row_sums import ROW_MODE_CODES, case, columns, factor, is_transposed, root_mean, split, tile


@triton.jit
def rows_kernel(
    X, out, mean, squares, parts, m, n, length, x_k, x_m, x_n, o_k, o_m, o_n, eps,
    MODE: tl.constexpr, MEAN: tl.constexpr, OUT: tl.constexpr, SQUARES: tl.constexpr,
    SUMS: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`length` rows, R at a time: X - mean at norm 1, its squared norms, its sums over these rows.

    The grid is (row bands, matrices). WHOLE: a tile has all columns.
    """
    batch = tl.program_id(1).to(tl.int64)  # a stack may have more than 2^31 elements
    X += batch * x_k
    if OUT:
        out += batch * o_k
    first = tl.program_id(0) * length
    cols = tl.arange(0, BN).to(tl.int64)[None, :]
    line = tl.arange(0, R)
    acc = tl.zeros((R, BN), tl.float32)
    for start in range(first, tl.minimum(first + length, m), R):
        row = (start + line).to(tl.int64)
        rows = row[:, None]
        at = X + rows * x_m
        if WHOLE:
            mask = (rows < m) & (cols < n)
            x = tl.load(at + cols * x_n, mask=mask, other=0.0).to(tl.float32)
            if MEAN:
                mu = tl.load(mean + batch * n + cols, mask=cols < n, other=0.0)
                x = tl.where(mask, x - mu, 0.0)
            s = tl.sum(x * x, axis=1)
        else:
            sums = tl.zeros((R, BN), tl.float32)
            for j in range(0, n, BN):
                mask = (rows < m) & (cols < n - j)
                x = tl.load(at + (cols + j) * x_n, mask=mask, other=0.0).to(tl.float32)
                if MEAN:
                    mu = tl.load(mean + batch * n + cols + j, mask=cols < n - j, other=0.0)
                    x = tl.where(mask, x - mu, 0.0)
                sums += x * x
            s = tl.sum(sums, axis=1)
        if SQUARES:
            tl.store(squares + batch * m + row, s, mask=row < m)
        if OUT or SUMS:
            f = factor(s, 0.0, eps, MODE)[:, None]
        if WHOLE:
            if SUMS:
                acc += x * f
            if OUT:
                o = (x * f).to(out.dtype.element_ty)
                tl.store(out + rows * o_m + cols * o_n, o, mask=mask)
        elif OUT:
            for j in range(0, n, BN):
                mask = (rows < m) & (cols < n - j)
                x = tl.load(at + (cols + j) * x_n, mask=mask, other=0.0).to(tl.float32)
                o = (x * f).to(out.dtype.element_ty)
                tl.store(out + rows * o_m + (cols + j) * o_n, o, mask=mask)
    if SUMS:
        at = (batch * tl.num_programs(0) + tl.program_id(0)) * n + tl.arange(0, BN)
        tl.store(parts + at, tl.sum(acc, axis=0), mask=tl.arange(0, BN) < n)


@triton.jit
def scaled_kernel(
    X, out, mean, squares, rms, after, m, n, x_k, x_m, x_n, o_k, o_m, o_n, eps,
    MODE: tl.constexpr, MEAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Out = (X - mean) at row norm 1, less `after`; the grid is (tiles, matrices)."""
    tiles = tl.cdiv(n, BN)
    batch = tl.program_id(1).to(tl.int64)
    rows = ((tl.program_id(0) // tiles) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = ((tl.program_id(0) % tiles) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    x = tl.load(X + batch * x_k + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(squares + batch * m + rows, mask=rows < m, other=1.0)
    f = factor(s, tl.load(rms + batch) if MODE == 2 else 0.0, eps, MODE)
    if MEAN:
        x -= tl.load(mean + batch * n + cols, mask=cols < n, other=0.0)
        x = x * f - tl.load(after + batch * n + cols, mask=cols < n, other=0.0)
    else:
        x *= f
    o = x.to(out.dtype.element_ty)
    tl.store(out + batch * o_k + rows * o_m + cols * o_n, o, mask=mask)


# launchers ----------------------------------------------------------------------------------------


def _rows(
    X: Tensor, out: Tensor | None, mode: int, eps: float, mean: Tensor | None = None,
    squares: Tensor | None = None, sums: bool = False,
) -> Tensor | None:  # fmt: skip
    """One launch of ``rows_kernel``; the partial sums, if wanted."""
    K, m, n = X.shape
    chosen, whole = tile(X)
    length, bands = chosen.tile_sizes["R"], triton.cdiv(m, chosen.tile_sizes["R"])
    if sums:
        length, bands = split(m, length, length)
    parts = scratch(X, K, bands, n) if sums else None
    rows_kernel[(bands, K)](
        X, out, mean, squares, parts, m, n, length, *strides(X),
        *(strides(out) if out is not None else (0, 0, 0)), eps,
        MODE=mode, MEAN=mean is not None, OUT=out is not None, SQUARES=squares is not None,
        SUMS=sums, WHOLE=whole, **options(chosen),
    )  # fmt: skip
    return parts


def _normed(X: Tensor, out: Tensor, eps: float, mode: int, centred: bool) -> None:
    K, m, n = X.shape
    relative, along = mode == ROW_MODE_CODES["relative"], not is_transposed(X)
    if along and not centred and not relative:
        _rows(X, out, mode, eps)
        return
    mean = columns(X, 1 / m) if centred else None
    parts = rms = after = None
    if along:
        squares = scratch(X, K, m)
        sums = centred and not relative and tile(X)[1]
        parts = _rows(X, None, mode, eps, mean, squares, sums)
    else:
        squares = columns(X.mT, 1.0, mean=mean, side=2, square=True)
    if relative:
        rms = root_mean(squares)
    if parts is not None:
        after = fold(parts, 1 / m)
    elif centred:
        after = columns(X, 1 / m, mode, eps, mean, 1, squares, rms)
    chosen = config("rows_scaled", X, m, n)
    tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
    scaled_kernel[(tiles, K)](
        X, out, mean, squares, rms, after, m, n, *strides(X), *strides(out), eps,
        MODE=mode, MEAN=centred, **options(chosen),
    )  # fmt: skip


@torch.library.custom_op("stiefel::row_norm", mutates_args=())
def _row_norm(X: Tensor, eps: float, mode: int, centred: bool) -> Tensor:
    out = torch.empty_like(X)
    if out.numel():
        with guard(X):
            _normed(stacked(X), stacked(out), eps, mode, centred)
    return out


@_row_norm.register_fake
def _(X: Tensor, eps: float, mode: int, centred: bool) -> Tensor:
    return torch.empty_like(X)


def row_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.row_norm`."""
    check_mode(mode)
    out: Tensor = _row_norm(X, eps, ROW_MODE_CODES[mode], centred)
    return out


def column_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.column_norm`."""
    return row_norm(X.mT, eps, mode, centred).mT


def _cases(element: str, size: str) -> list[Case]:
    X_OUT = "m n length x_k x_m o_k o_m"
    OWN: dict[str, Any] = {"MODE": 0, "WHOLE": True}
    UNIT: dict[str, Any] = {"x_n": 1, "o_n": 1}
    return [
        case(
            f"row_norm {element} {size}", rows_kernel, "rows", element, "X out", X_OUT, "eps", size,
            **UNIT, mean=None, squares=None, parts=None, MEAN=False, OUT=True, SQUARES=False,
            SUMS=False, **OWN,
        ),
        case(
            f"row_norm centred {element} {size}", rows_kernel, "rows", element, "X", X_OUT, "eps",
            size, "mean squares parts", **UNIT, out=None, MEAN=True, OUT=False, SQUARES=True,
            SUMS=True, **OWN,
        ),
    ]  # fmt: skip


LONG: dict[str, Any] = {
    "x_n": 1, "o_n": 1, "MODE": 0, "MEAN": False, "SQUARES": False, "SUMS": False,
}  # fmt: skip
CASES = [found for e in ("fp32", "bf16") for s in ("small", "large") for found in _cases(e, s)] + [
    case(
        f"row_norm scaled {element}", scaled_kernel, "rows_scaled", element, "X out",
        "m n x_k x_m o_k o_m", "eps", floats="mean squares after", x_n=1, o_n=1, rms=None, MODE=0,
        MEAN=True,
    )
    for element in ("fp32", "bf16")
] + [
    case(
        f"row_norm {element} long", rows_kernel, "rows_long", element, "X out",
        "m n length x_k x_m o_k o_m", "eps", **LONG, mean=None, squares=None, parts=None, OUT=True,
        WHOLE=False,
    )
    for element in ("fp32", "bf16")
]  # fmt: skip
