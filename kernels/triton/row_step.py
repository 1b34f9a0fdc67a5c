"""A whole step of RowNorm in one kernel: momentum, row norms, decay and the write.

Rows of up to 16384 entries are held in registers: G, M and W are read once, M and W written once,
5e bytes an entry of e bytes. Of longer rows G and M are read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import row_step as plain
from ..reference.rounding import Rounding
from ..reference.row_step import check_step
from ._launch import Case, guard, options, strides
from ._row_sums import ROW_MODE_CODES, case, factor, tile
from ._write import (
    COLUMN_PAIRS,
    NEAREST,
    ROW_PAIRS,
    Bits,
    drawn,
    is_plain,
    store_weight,
    with_rounding,
)

HIGH, LOW = tl.constexpr(2.0**48), tl.constexpr(2.0**-48)
"""Between them entries have squares whose sums are in range."""
UP, DOWN = tl.constexpr(2.0**80), tl.constexpr(2.0**-80)


@triton.jit
def lerped(a, b, weight, rest):
    """From a to b, and exactly b at weight 1; rest = 1 - weight."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - rest * (b - a))


@triton.jit
def moved(M, G, at_m, at_g, mask, momentum, gain, NESTEROV: tl.constexpr):
    """The new momentum, and the step that is made of it."""
    a = tl.load(M + at_m, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G + at_g, mask=mask, other=0.0).to(tl.float32)
    a = lerped(a, g, gain, momentum)
    return a, lerped(g, a, momentum, gain) if NESTEROV else a


@triton.jit
def safe_scale(is_huge, is_tiny):
    """A power of two for each row such that squares neither overflow nor vanish; mostly 1."""
    return tl.where(is_huge, DOWN, tl.where(is_tiny, UP, 1.0)).to(tl.float32)


@triton.jit
def step_kernel(
    W, M, G, control, m, n, w_k, w_m, w_n, m_k, m_m, m_n, g_k, g_m, g_n, c_k, c_x,
    keys, keys_k, h_0, h_k, h_m, h_n, momentum, gain, eps, keep, alpha,
    MODE: tl.constexpr, NESTEROV: tl.constexpr, CONTROL: tl.constexpr, WHOLE: tl.constexpr,
    ROUNDING: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """R rows of W and M; the grid is (row bands, matrices)."""
    k = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    cols = tl.arange(0, BN).to(tl.int64)[None, :]
    if CONTROL:
        control_row = control + k * c_k
        keep, alpha = tl.load(control_row + c_x), tl.load(control_row + 2 * c_x)
        m = tl.where(tl.load(control_row) != 0.0, m, 0)  # else no row is touched
    valid = rows < m
    W += k * w_k + rows * w_m
    M += k * m_k + rows * m_m
    G += k * g_k + rows * g_m
    if WHOLE:
        mask = valid & (cols < n)
        place = W + cols * w_n
        w = tl.load(place, mask=mask, other=0.0).to(tl.float32)  # beside the others
        a, u = moved(M, G, cols * m_n, cols * g_n, mask, momentum, gain, NESTEROV)
        top = tl.max(tl.abs(tl.where(mask, u, 0.0)), axis=1)
        c = safe_scale(top > HIGH, top < LOW)
        u = tl.where(mask, u * c[:, None], 0.0)
        tl.store(M + cols * m_n, a.to(M.dtype.element_ty), mask=mask)
        by = alpha * factor(tl.sum(u * u, axis=1), 0.0, eps * c, MODE)[:, None]
        w = keep * w + by * u
        store_weight(place, w, mask, keys, keys_k, h_0, h_k, h_m, h_n, k, rows, cols, ROUNDING)
    else:  # M is stored last, as rounding it early would show
        sums = tl.zeros((R, BN), tl.float32)
        for j in range(0, n, BN):
            mask, at = valid & (cols < n - j), cols + j
            _, u = moved(M, G, at * m_n, at * g_n, mask, momentum, gain, NESTEROV)
            u = tl.where(mask, u, 0.0)
            sums += u * u
        s = tl.sum(sums, axis=1)
        c = safe_scale(~(s <= HIGH * HIGH), s < LOW * LOW)
        if (tl.min(c, axis=0) < 1.0) | (tl.max(c, axis=0) > 1.0):  # seldom: read once more
            sums = tl.zeros((R, BN), tl.float32)
            for j in range(0, n, BN):
                mask, at = valid & (cols < n - j), cols + j
                _, u = moved(M, G, at * m_n, at * g_n, mask, momentum, gain, NESTEROV)
                u = tl.where(mask, u * c[:, None], 0.0)
                sums += u * u
            s = tl.sum(sums, axis=1)
        by = alpha * factor(s, 0.0, eps * c, MODE)[:, None]
        for j in range(0, n, BN):
            mask, at = valid & (cols < n - j), cols + j
            a, u = moved(M, G, at * m_n, at * g_n, mask, momentum, gain, NESTEROV)
            u *= c[:, None]
            tl.store(M + at * m_n, a.to(M.dtype.element_ty), mask=mask)
            place = W + at * w_n
            w = keep * tl.load(place, mask=mask, other=0.0).to(tl.float32) + by * u
            store_weight(place, w, mask, keys, keys_k, h_0, h_k, h_m, h_n, k, rows, at, ROUNDING)


@torch.library.custom_op("stiefel::row_step_", mutates_args=("W", "M"))
def _row_step(
    W: Tensor, M: Tensor, G: Tensor, momentum: float, eps: float, mode: int, keep: float,
    alpha: float, control: Tensor | None, nesterov: bool, keys: Tensor | None,
    positions: Sequence[int],
) -> None:  # fmt: skip
    if W.numel() == 0:
        return
    K, m, n = W.shape
    chosen, whole = tile(W)
    random, way = Bits(keys, positions).launched((K, m, n))
    with guard(W):
        step_kernel[(triton.cdiv(m, chosen.tile_sizes["R"]), K)](
            W, M, G, control, m, n, *strides(W), *strides(M), *strides(G),
            *(control.stride() if control is not None else (0, 0)), *random,
            momentum, 1 - momentum, eps, keep, alpha, MODE=mode, NESTEROV=nesterov,
            CONTROL=control is not None, WHOLE=whole, ROUNDING=way, **options(chosen),
        )  # fmt: skip


def row_step_(
    W: Tensor, M: Tensor, G: Tensor, momentum: float, eps: float, mode: str, keep: float,
    alpha: float, control: Tensor | None = None, nesterov: bool = False, *,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.row_step_`."""
    check_step(mode)
    if is_plain(rounding):
        plain.row_step_(
            W, M, G, momentum, eps, mode, keep, alpha, control, nesterov, rounding=rounding
        )
        return
    K, m, n = W.shape
    code, bits = ROW_MODE_CODES[mode], drawn(rounding, W.dtype, (K, m, n))
    _row_step(W, M, G, momentum, eps, code, keep, alpha, control, nesterov, *bits)


def _case(
    element: str, table: str, size: str, unit: str = "n", rounding: int = NEAREST
) -> Case:  # fmt: skip
    """Rows run along the memory, or columns do."""
    other = "m" if unit == "n" else "n"
    sizes = " ".join(("m n c_k", *(f"{x}_{axis}" for x in "wmg" for axis in ("k", other))))
    units = {f"{x}_{unit}": 1 for x in "wmg"}
    kind = size if table == "rows" else table[5:].replace("_", "-")
    found = case(
        f"row_step_ {element} {kind}{' stochastic' if rounding else ''}", step_kernel, table,
        element, "W G", sizes, "momentum gain eps keep alpha", size, "M control", **units, c_x=1,
        NESTEROV=False, CONTROL=True, MODE=0, WHOLE=table == "rows",
    )  # fmt: skip
    return with_rounding(found, rounding)


_KINDS = (("rows", "small"), ("rows", "large"), ("rows_long", "large"))
CASES = [
    *(_case(element, *kind) for element in ("fp32", "bf16") for kind in _KINDS),
    _case("fp32", "rows_column_major", "large", "m"),
    *(_case("bf16", *kind, rounding=COLUMN_PAIRS) for kind in _KINDS),
    _case("fp16", "rows", "large", rounding=COLUMN_PAIRS),
    _case("bf16", "rows_column_major", "large", "m", ROW_PAIRS),
]
