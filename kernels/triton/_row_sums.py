"""What kernels of rows at one length share: factors, tiles, and sums over the rows.

Sums over rows go through partial sums of bands of rows, which are added in their order, so neither
the number of matrices nor the device changes a bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..reference.row_norm import ROW_MODES
from ._launch import INTERPRETED, Case, config, options, scratch, strides
from ._partial_sums import fold
from ._tables import Config

MAX_ROW_IN_REGISTERS = 16384
"""Entries of a row that one program holds in registers."""
TILE_ENTRIES = 4096
"""Entries of a tile of several rows."""
MAX_PARTIAL_SUMS = 256
"""Most partial sums of a column."""
ROW_MODE_CODES = {"inverse_eps": 0, "inverse": 1, "unit": 1, "relative": 2}
assert tuple(ROW_MODE_CODES) == ROW_MODES


@triton.jit
def factor(s, rms, eps, MODE: tl.constexpr):
    """What a row of squared norm s is multiplied by; NaN stays."""
    d = tl.sqrt_rn(s)
    if MODE == 0:
        d += eps
    elif MODE == 1:
        d = tl.where(d < eps, eps, d)
    else:
        d += 0.01 * rms
    f = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d)
    return tl.where(rms > 0.0, f, 0.0) if MODE == 2 else tl.where(d == 0.0, 0.0, f)


@triton.jit
def columns_kernel(
    X, mean, squares, rms, parts, m, n, length, x_k, x_m, x_n, eps,
    MODE: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over `length` rows of X - mean, of its squares, or of it at row norm 1.

    The mean has an entry for each column (MEAN 1) or row (2). The grid is (row bands * column
    tiles, matrices); tiles are added entry by entry, so that memory may run either way.
    """
    tiles = tl.cdiv(n, BN)
    band = tl.program_id(0) // tiles
    batch = tl.program_id(1).to(tl.int64)
    X += batch * x_k
    col = ((tl.program_id(0) % tiles) * BN + tl.arange(0, BN)).to(tl.int64)
    cols = col[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(band * length, tl.minimum((band + 1) * length, m), BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)[:, None]
        mask = (rows < m) & (cols < n)
        x = tl.load(X + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32)
        if MEAN == 1:
            mu = tl.load(mean + batch * n + cols, mask=cols < n, other=0.0)
        elif MEAN == 2:
            mu = tl.load(mean + batch * m + rows, mask=rows < m, other=0.0)
        if MEAN:
            x = tl.where(mask, x - mu, 0.0)
        if FACTOR:
            s = tl.load(squares + batch * m + rows, mask=rows < m, other=1.0)
            x *= factor(s, tl.load(rms + batch) if MODE == 2 else 0.0, eps, MODE)
        acc += x * x if SQUARE else x
    bands = tl.num_programs(0) // tiles
    at = (batch * bands + band) * n + col
    tl.store(parts + at, tl.sum(acc, axis=0), mask=col < n)


@triton.jit
def rms_kernel(squares, rms, m, scale, BN: tl.constexpr):
    """Root of the mean of all squared norms of a matrix; the grid is (1, matrices)."""
    batch = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(0, m, BN):
        row = start + tl.arange(0, BN)
        acc += tl.load(squares + batch * m + row, mask=row < m, other=0.0)
    tl.store(rms + batch, tl.sqrt_rn(tl.sum(acc, axis=0) * scale))


# launchers ----------------------------------------------------------------------------------------


def is_transposed(X: Tensor) -> bool:
    """Whether memory runs along the columns of X."""
    return X.stride(-1) != 1 and X.stride(-2) == 1


def tile(X: Tensor) -> tuple[Config, bool]:
    """Rows and columns of a tile of the row kernels, and whether it has all columns."""
    n = X.shape[-1]
    if INTERPRETED:
        chosen = config("rows", X, n)
        return chosen, n <= chosen.tile_sizes["BN"] and not is_transposed(X)
    if is_transposed(X) or n > MAX_ROW_IN_REGISTERS:
        return config("rows_column_major" if is_transposed(X) else "rows_long", X, n), False
    width = max(16, triton.next_power_of_2(n))
    warps = 4 if width <= TILE_ENTRIES else width // 1024
    return Config((("R", max(1, TILE_ENTRIES // width)), ("BN", width)), warps, 1), True


def split(m: int, step: int, least: int) -> tuple[int, int]:
    """Length and number of the bands of rows that are summed; the same for every K."""
    length = max(step * triton.cdiv(m, step * MAX_PARTIAL_SUMS), least)
    return length, triton.cdiv(m, length)


def columns(
    X: Tensor, scale: float, mode: int = 0, eps: float = 0.0,
    mean: Tensor | None = None, side: int = 1, squares: Tensor | None = None,
    rms: Tensor | None = None, square: bool = False,
) -> Tensor:  # fmt: skip
    """Sums over the rows of X, times scale; see ``columns_kernel``."""
    K, m, n = X.shape
    chosen = config("rows_columns", X, m, n)
    length, bands = split(m, chosen.tile_sizes["BM"], 4 * chosen.tile_sizes["BM"])
    parts = scratch(X, K, bands, n)
    columns_kernel[(bands * triton.cdiv(n, chosen.tile_sizes["BN"]), K)](
        X, mean, squares, rms, parts, m, n, length, *strides(X), eps,
        MODE=mode, MEAN=0 if mean is None else side, SQUARE=square,
        FACTOR=squares is not None, **options(chosen),
    )  # fmt: skip
    return fold(parts, scale)


def root_mean(squares: Tensor) -> Tensor:
    """Root of the mean of squared norms (K, m), as (K,)."""
    K, m = squares.shape
    rms, chosen = scratch(squares, K), config("rows_rms", squares, m)
    rms_kernel[(1, K)](squares, rms, m, 1 / m, **options(chosen))
    return rms


def case(
    name: str, kernel: Any, table: str, element: str, pointers: str, sizes: str, scalars: str,
    size: str = "large", floats: str = "", load: int = 16, **constants: Any,
) -> Case:  # fmt: skip
    """A static case from the names of its arguments, by their types."""
    types = {
        **dict.fromkeys(pointers.split(), f"*{element}"), **dict.fromkeys(sizes.split(), "i32"),
        **dict.fromkeys(floats.split(), "*fp32"), **dict.fromkeys(scalars.split(), "fp32"),
    }  # fmt: skip
    return Case(name, table, kernel, types, constants, size=size, load=load)


CASES = [
    case(
        f"column sums {element}", columns_kernel, "rows_columns", element, "X",
        "m n length x_k x_m", "eps", floats="mean squares parts", x_n=1, rms=None, MODE=0,
        MEAN=1, SQUARE=False, FACTOR=True,
    )
    for element in ("fp32", "bf16")
]  # fmt: skip
CASES.append(case("row rms", rms_kernel, "rows_rms", "fp32", "squares rms", "m", "scale", load=4))
