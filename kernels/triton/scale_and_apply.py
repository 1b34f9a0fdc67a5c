"""The last product of a polynomial step: (a X + alpha P X) / sqrt(trace).

P may stay in a narrow dtype because a, which is up to 8.3, is not folded into it: a X is added to
the float32 sums.
"""

from __future__ import annotations

from typing import Any

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
from .symmetric import one_dtype, per_matrix, table


@triton.jit
def swizzled(t, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Tile (i, j) of number t: down bands of GROUP rows of tiles, so that neighbours share."""
    band = t // (GROUP * col_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = t % (GROUP * col_tiles)
    return band * GROUP + inside % height, inside // height


@triton.jit
def apply_kernel(
    P, X, out, trace, only, m, n, p_k, p_m, p_n, x_k, x_m, x_n, o_k, o_m, o_n, a, alpha,
    TRACE: tl.constexpr, ONLY: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of the result; the grid is (tiles, matrices)."""
    i, j = swizzled(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), 8)
    k = tl.program_id(1)
    if ONLY:
        if tl.load(only + k) == 0:
            return
    batch = k.to(tl.int64)  # a stack may have more than 2^31 elements
    P += batch * p_k
    X += batch * x_k
    out += batch * o_k
    rows = (i * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (j * BN + tl.arange(0, BN)).to(tl.int64)
    inner = tl.arange(0, BK)
    p = P + rows[:, None] * p_m + inner.to(tl.int64)[None, :] * p_n
    x = X + inner.to(tl.int64)[:, None] * x_m + cols[None, :] * x_n
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, m, BK):
        left = inner < m - start
        y = tl.load(p, mask=(rows[:, None] < m) & left[None, :], other=0.0)
        z = tl.load(x, mask=left[:, None] & (cols[None, :] < n), other=0.0)
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        acc = tl.dot(y, z, acc, input_precision=PRECISION)
        p += tl.cast(p_n, tl.int64) * BK
        x += tl.cast(x_m, tl.int64) * BK
    if TRACE:  # of X X^T
        root = tl.sqrt(tl.load(trace + k))
        a, alpha = a / root, alpha / root
    # a X as the first value of the sums takes more registers, and a division
    mask = (rows[:, None] < m) & (cols[None, :] < n)
    own = tl.load(X + rows[:, None] * x_m + cols[None, :] * x_n, mask=mask, other=0.0)
    o = (acc * alpha + own.to(tl.float32) * a).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * o_m + cols[None, :] * o_n, o, mask=mask)


def _launch(
    X: Tensor, P: Tensor, trace: Tensor | None, only: Tensor | None, a: float, alpha: float
) -> Tensor:
    X, P = stacked(X), stacked(P)
    K, m, n = X.shape
    out = X.new_empty(K, m, n)
    if out.numel() == 0:
        return out

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
        apply_kernel[(tiles, K)](
            P, X, out, trace, only, m, n, *strides(P), *strides(X), *strides(out), a, alpha,
            TRACE=trace is not None, ONLY=only is not None, UPCAST=INTERPRETED,
            PRECISION=precision(X), **options(chosen),
        )  # fmt: skip

    with guard(X):
        name, partial = table("scale_and_apply", X), only is not None
        run(tuned(name, X, (m, n), run, batch=K > 1, partial=partial))
    return out


@torch.library.custom_op("stiefel::scale_and_apply", mutates_args=())
def _apply(
    X: Tensor, P: Tensor, trace: Tensor | None, only: Tensor | None, a: float, alpha: float
) -> Tensor:
    return _launch(X, P, per_matrix(trace), per_matrix(only), a, alpha).view(X.shape)


@_apply.register_fake
def _(X: Tensor, *_: Any) -> Tensor:
    return X.new_empty(X.shape)


def scale_and_apply(
    X: Tensor, P: Tensor, a: float, alpha: float = 1.0, trace: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.scale_and_apply`."""
    one_dtype(X, P)
    out: Tensor = _apply(X, P, trace, only, a, alpha)
    return out


_SIZES = ("m", "n", *(f"{x}_{axis}" for x in "pxo" for axis in "kmn"))


def _case(
    name: str, element: str, dot: str, tall: bool = False, trace: bool = False,
    only: bool = False, precision: str = "tf32",
) -> Case:  # fmt: skip
    constants = {
        **dict.fromkeys(("p_n", "x_m" if tall else "x_n", "o_n"), 1), "TRACE": trace,
        "ONLY": only, "UPCAST": False, "PRECISION": precision,
        **({} if trace else {"trace": None}), **({} if only else {"only": None}),
    }  # fmt: skip
    types = {
        **dict.fromkeys(("P", "X", "out"), f"*{element}"),
        **dict.fromkeys(("trace", "only"), "*fp32"), **dict.fromkeys(_SIZES, "i32"),
        "a": "fp32", "alpha": "fp32",
    }  # fmt: skip
    types = {key: kind for key, kind in types.items() if key not in constants}
    sizes = "scale_and_apply32" if element == "fp32" else "scale_and_apply"
    return Case(name, sizes, apply_kernel, types, constants, dot)


CASES = [
    _case("scale_and_apply bf16", "bf16", "bf16"),
    _case("scale_and_apply fp16", "fp16", "fp16"),
    _case("scale_and_apply tf32", "fp32", "tf32"),
    _case("scale_and_apply tf32x3", "fp32", "tf32", precision="tf32x3"),
    _case("scale_and_apply bf16 of columns by trace", "bf16", "bf16", tall=True, trace=True),
    _case("scale_and_apply tf32 by trace", "fp32", "tf32", trace=True),
    _case("scale_and_apply fp16 only some", "fp16", "fp16", only=True),
]
