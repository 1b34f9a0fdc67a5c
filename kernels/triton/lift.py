"""Out of a subspace: W <- keep W + alpha (P N + rest), W read once and written once.

The rest is by * X, or free * sign(X - P R). The sum is rounded once, in W's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import lift as plain
from ..reference.rounding import Rounding
from ._launch import (
    Case,
    config,
    guard,
    options,
    precision,
    refuse_overlap,
    strides,
)
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
from .adam import described
from .project import needs_upcast


@triton.jit
def signs(x, least):
    """The sign of x, 0 up to `least` in magnitude and for what is no number."""
    return tl.where(x > least, 1.0, 0.0) - tl.where(x < -least, 1.0, 0.0)


@triton.jit
def lift_kernel(
    W, P, N, X, by, R, floor, control, m, n, r, w_k, w_m, w_n, p_k, p_m, p_r, n_k, n_r, n_n,
    x_k, x_m, x_n, b_k, b_m, b_n, r_k, r_r, r_n, f_k, c_k, c_c, keys, keys_k, h_0, h_k, h_m, h_n,
    keep, alpha, free,
    REST: tl.constexpr, BY: tl.constexpr, FLOOR: tl.constexpr, CONTROL: tl.constexpr,
    UPCASTS: tl.constexpr, PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    ROUNDING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of W; the grid is (tiles, matrices)."""
    col_tiles = tl.cdiv(n, BN)
    k = tl.program_id(1).to(tl.int64)  # a stack may have more than 2^31 elements
    rows = ((tl.program_id(0) // col_tiles) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = ((tl.program_id(0) % col_tiles) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    inner = tl.arange(0, BK).to(tl.int64)
    width = n
    if CONTROL:
        control += k * c_k
        width = tl.where(tl.load(control) != 0.0, n, 0)  # else nothing is touched
        keep = tl.load(control + c_c)
        alpha = tl.load(control + 2 * c_c)
    mask = (rows < m) & (cols < width)
    p = P + k * p_k + rows * p_m + inner[None, :] * p_r
    d = N + k * n_k + inner[:, None] * n_r + cols * n_n
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    if REST == 2:
        e = R + k * r_k + inner[:, None] * r_r + cols * r_n
        reached = tl.zeros((BM, BN), tl.float32)
    for start in range(0, r, BK):
        left = tl.arange(0, BK) < r - start
        x = tl.load(p, mask=(rows < m) & left[None, :], other=0.0)
        y = tl.load(d, mask=left[:, None] & (cols < n), other=0.0)
        if REST == 2:
            z = tl.load(e, mask=left[:, None] & (cols < n), other=0.0)
            reached = tl.dot(x.to(tl.float32), z.to(tl.float32), reached, input_precision=RESIDUAL)
            e += step * r_r
        if UPCASTS:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        p += step * p_r
        d += step * n_r
    if REST > 0:
        x = tl.load(X + k * x_k + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32)
    if REST == 1:
        if BY == 1:
            x *= tl.load(by + k * b_k).to(tl.float32)
        elif BY == 2:
            x *= tl.load(by + k * b_k + rows * b_m, mask=rows < m, other=0.0).to(tl.float32)
        elif BY == 3:
            x *= tl.load(by + k * b_k + cols * b_n, mask=cols < n, other=0.0).to(tl.float32)
        elif BY == 4:
            x *= tl.load(by + k * b_k + rows * b_m + cols * b_n, mask=mask, other=0.0)
        acc += x
    elif REST == 2:
        least = tl.load(floor + k * f_k).to(tl.float32) if FLOOR else 0.0
        acc += free * signs(x - reached, least)
    W += k * w_k + rows * w_m + cols * w_n
    w = keep * tl.load(W, mask=mask, other=0.0).to(tl.float32) + alpha * acc
    store_weight(W, w, mask, keys, keys_k, h_0, h_k, h_m, h_n, k, rows, cols, ROUNDING)


def products(W: Tensor, *Xs: Tensor) -> str:
    """Of P N: more digits than tf32 has are rounded away by a half-precision weight."""
    least = precision(*Xs)
    return "tf32" if least == "tf32x3" and W.dtype != torch.float32 else least


def residual() -> str:
    """Of P R, which is subtracted: as float32 is multiplied, whatever the dtypes."""
    return precision()


def three(X: Tensor | None) -> tuple[int, int, int]:
    """Strides of a tensor that may be absent."""
    return (0, 0, 0) if X is None else strides(X)


def _scales(by: Tensor | None) -> tuple[int, tuple[int, int, int]]:
    """What multiplies X (0 nothing, 1 a number, 2 a column, 3 a row, 4 a matrix), its strides."""
    if by is None:
        return 0, (0, 0, 0)
    _, m, n = by.shape
    return 1 + (m > 1) + 2 * (n > 1), strides(by)


def floors(floor: Tensor | None) -> int:
    """From one matrix's floor to the next."""
    return 0 if floor is None or floor.numel() == 1 else floor.stride(0)


def controls(control: Tensor | None) -> tuple[int, int]:
    """Strides of control (K, 3)."""
    if control is None:
        return 0, 0
    return 0 if len(control) == 1 else control.stride(0), control.stride(1)


@torch.library.custom_op("stiefel::lift_", mutates_args=("W",))
def _lift_op(
    W: Tensor, P: Tensor, N: Tensor, keep: float, alpha: float, X: Tensor | None,
    by: Tensor | None, R: Tensor | None, free: float, floor: Tensor | None, control: Tensor | None,
    keys: Tensor | None, positions: Sequence[int],
) -> None:  # fmt: skip
    if W.numel() == 0:
        return
    given = [Y for Y in (P, N, X, R) if Y is not None]
    refuse_overlap(W, *given)
    (K, m, n), r = W.shape, N.shape[-2]
    kind, b = _scales(by)
    rest = 0 if X is None else 1 if R is None else 2
    random, way = Bits(keys, positions).launched((K, m, n))
    chosen = config("lift_sign" if rest == 2 else "lift", W, m, n)
    tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
    with guard(W):
        lift_kernel[(tiles, K)](
            W, P, N, X, by, R, floor, control, m, n, r, *strides(W), *strides(P), *strides(N),
            *three(X), *b, *three(R), floors(floor), *controls(control), *random, keep, alpha, free,
            REST=rest, BY=kind, FLOOR=floor is not None, CONTROL=control is not None,
            UPCASTS=needs_upcast(P, N), PRECISION=products(W, P, N), RESIDUAL=residual(),
            ROUNDING=way, **options(chosen),
        )  # fmt: skip


def lift_(
    W: Tensor, P: Tensor, N: Tensor, keep: float, alpha: float, *, X: Tensor | None = None,
    by: Tensor | None = None, R: Tensor | None = None, free: float = 0.0,
    floor: Tensor | None = None, control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.lift_`."""
    if is_plain(rounding):
        plain.lift_(
            W, P, N, keep, alpha, X=X, by=by, R=R, free=free, floor=floor, control=control,
            rounding=rounding,
        )  # fmt: skip
        return
    K, m, n = W.shape
    bits = drawn(rounding, W.dtype, (K, m, n))
    _lift_op(W, P, N, keep, alpha, X, by, R, free, floor, control, *bits)


_UNITS = ("p_r", "n_n", "r_n", "m_n", "v_n", "b_n", "c_c")


def case(name: str, table: str, kernel: Any, pointers: dict[str, str], **constants: Any) -> Case:
    """Column-major weights have unit strides along their columns."""
    units = (*_UNITS, *(("w_m", "x_m") if "column-major" in name else ("w_n", "x_n")))
    dot = "bf16" if "narrow" in name else "tf32"
    way = ROW_PAIRS if "column-major" in name else COLUMN_PAIRS
    constants = {"PRECISION": "tf32", "RESIDUAL": "tf32x3", **constants}
    found = described(name, table, kernel, pointers, units, dot, **constants)
    return with_rounding(found, way if "stochastic" in name else NEAREST)


def _lift(name: str, W: str, P: str = "fp32", table: str = "lift", **constants: Any) -> Case:
    beside = ((), ("X", "by"), ("X", "R", "floor", "control"))[constants.get("REST", 0)]
    pointers = {"W": W, "P": P, "N": P, **dict.fromkeys(beside, "fp32")}
    return case(name, table, lift_kernel, pointers, **constants)


_SIGN: dict[str, Any] = {"REST": 2, "FLOOR": True, "CONTROL": True, "table": "lift_sign"}
CASES = [
    _lift("lift bf16", "bf16"),
    _lift("lift fp16", "fp16"),
    _lift("lift tf32x3", "fp32", PRECISION="tf32x3"),
    _lift("lift bf16 narrow", "bf16", "bf16"),
    _lift("lift bf16 column-major", "bf16"),
    _lift("lift bf16 with a scaled matrix", "bf16", REST=1, BY=3),
    _lift("lift bf16 with a scaled matrix column-major", "bf16", REST=1, BY=3),
    _lift("lift bf16 with signs", "bf16", **_SIGN),
    _lift("lift tf32x3 with signs column-major", "fp32", PRECISION="tf32x3", **_SIGN),
    _lift("lift bf16 stochastic", "bf16"),
    _lift("lift fp16 stochastic", "fp16"),
    _lift("lift bf16 stochastic column-major", "bf16"),
    _lift("lift bf16 with a scaled matrix stochastic", "bf16", REST=1, BY=3),
    _lift("lift bf16 with signs stochastic", "bf16", **_SIGN),
]
