"""Adam on stacks of matrices: both moments moved and the direction written in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, config, guard, options, strides


@triton.jit
def distance(x):
    """1 - exp(x) for x <= 0, with all digits near 0."""
    series = 1.0 + x * 0.1
    for i in tl.static_range(8):
        series = 1.0 + x * series * (1.0 / (9 - i))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adam_moved(r, m, v, beta1, rest1, beta2, rest2, one, two, eps):
    """Both averages, and the direction: `one` corrects m, `two` the root of v."""
    m = beta1 * m + rest1 * r
    v = beta2 * v + rest2 * (r * r)
    return m, v, tl.div_rn(tl.div_rn(m, one), tl.div_rn(tl.sqrt_rn(v), two) + eps)


@triton.jit
def adam_kernel(
    R, M, V, N, clock, finite, m, n, r_k, r_m, r_n, m_k, m_m, m_n, v_k, v_m, v_n, n_k, n_m, n_n,
    t_k, t_m, t_n, finite_k, beta1, rest1, beta2, rest2, one, two, eps,
    CLOCK: tl.constexpr, FINITE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of both moments and of the direction; the grid is (tiles, matrices)."""
    col_tiles = tl.cdiv(n, BN)
    k = tl.program_id(1).to(tl.int64)
    rows = ((tl.program_id(0) // col_tiles) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = ((tl.program_id(0) % col_tiles) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    M += k * m_k + rows * m_m + cols * m_n
    V += k * v_k + rows * v_m + cols * v_n
    x = tl.load(R + k * r_k + rows * r_m + cols * r_n, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(M, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(V, mask=mask, other=0.0).to(tl.float32)
    if CLOCK:  # logarithms of the decays were passed
        t = tl.load(clock + k * t_k + rows * t_m + cols * t_n, mask=mask, other=1).to(tl.float32)
        one, two = distance(t * one), tl.sqrt_rn(distance(t * two))
    a, b, direction = adam_moved(x, a, b, beta1, rest1, beta2, rest2, one, two, eps)
    N += k * n_k + rows * n_m + cols * n_n
    tl.store(N, direction.to(N.dtype.element_ty), mask=mask)
    if FINITE:
        mask = (rows < m) & (cols < tl.where(tl.load(finite + k * finite_k) != 0.0, n, 0))
    tl.store(M, a.to(M.dtype.element_ty), mask=mask)
    tl.store(V, b.to(V.dtype.element_ty), mask=mask)


def bias(t: float, clocked: bool, beta1: float, beta2: float) -> tuple[float, ...]:
    """What `adam_moved` takes between eps and the averages; logarithms for clocks of their own."""
    if clocked:
        one, two = (math.log(beta) if beta > 0.0 else -1e30 for beta in (beta1, beta2))
    else:
        one, two = 1.0 - beta1**t, math.sqrt(1.0 - beta2**t)
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, one, two


def flag_stride(flags: Tensor | None) -> int:
    """From one matrix's flag to the next, 0 for one flag of all."""
    return 0 if flags is None or len(flags) == 1 else flags.stride(0)


def spread(clock: Tensor | None, like: Tensor) -> tuple[int, int, int]:
    """Strides of clocks that broadcast against (K, m, n)."""
    if clock is None:
        return 0, 0, 0
    k, m, n = clock.expand(like.shape).stride()
    return k, m, n


@torch.library.custom_op("stiefel::adam", mutates_args=("M", "V"))
def _adam_op(
    R: Tensor, M: Tensor, V: Tensor, t: float, clock: Tensor | None, beta1: float, beta2: float,
    eps: float, finite: Tensor | None,
) -> Tensor:  # fmt: skip
    N = torch.empty_like(R, memory_format=torch.contiguous_format)
    if R.numel() == 0:
        return N
    K, m, n = R.shape
    xs: tuple[Tensor, ...] = (R, M, V, N)
    if clock is None and all(X.is_contiguous() for X in xs):
        m, n, xs = 1, m * n, tuple(X.view(K, 1, m * n) for X in xs)
    chosen = config("adam", R, n)
    grid = (triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"]), K)
    with guard(R):
        adam_kernel[grid](
            *xs, clock, finite, m, n, *(s for X in xs for s in strides(X)), *spread(clock, R),
            flag_stride(finite), *bias(t, clock is not None, beta1, beta2), eps,
            CLOCK=clock is not None, FINITE=finite is not None, **options(chosen),
        )  # fmt: skip
    return N


@_adam_op.register_fake
def _(R: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(R, memory_format=torch.contiguous_format)


def clocks(t: float | Tensor) -> tuple[float, Tensor | None]:
    """A number for all, or clocks: a custom operation has an argument for each."""
    return (1.0, t) if isinstance(t, Tensor) else (float(t), None)


def adam(
    R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, *, beta1: float, beta2: float, eps: float,
    finite: Tensor | None = None, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.adam`; N is always a new tensor."""
    number, clock = clocks(t)
    if M.stride(-1) != 1 and M.stride(-2) == 1:  # moments of a transposed weight
        R, M, V, clock = R.mT, M.mT, V.mT, None if clock is None else clock.mT
        U: Tensor = _adam_op(R, M, V, number, clock, beta1, beta2, eps, finite)
        return U.mT
    N: Tensor = _adam_op(R, M, V, number, clock, beta1, beta2, eps, finite)
    return N


_POINTERS = {*"WPNXRMVG", "by", "floor", "control", "clock", "finite", "out", "squares", "parts"}
_NUMBERS = {"keep", "alpha", "free", "beta1", "rest1", "beta2", "rest2", "one", "two", "eps"}
_LOOSE = ("splits", "col_tiles", "f_k", "c_k", "finite_k")


def described(
    name: str, table: str, kernel: Any, pointers: Mapping[str, str], units: Iterable[str] = (),
    dot: str = "", **constants: Any,
) -> Case:  # fmt: skip
    """A Case from a kernel's own arguments.

    Pointers that are not listed are absent, strides in `units` are 1, switches are off.
    """
    given: dict[str, Any] = {**dict.fromkeys(units, 1), **constants}
    types = {}
    for arg in kernel.arg_names:
        if arg in _POINTERS:
            if arg in pointers:
                types[arg] = f"*{pointers[arg]}"
            else:
                given[arg] = None
        elif arg.isupper():
            if arg not in ("BM", "BN", "BK"):
                given.setdefault(arg, False)
        elif arg not in given:
            types[arg] = "fp32" if arg in _NUMBERS else "i32"
    given = {key: value for key, value in given.items() if key in kernel.arg_names}
    loose = tuple(arg for arg in _LOOSE if arg in types)
    return Case(name, table, kernel, types, given, dot, loose)


def _case(name: str, R: str, moments: str, **on: Any) -> Case:
    pointers = {"R": R, "M": moments, "V": moments, "N": R}
    pointers |= {key.lower(): "fp32" for key in on}
    return described(name, "adam", adam_kernel, pointers, ("r_n", "m_n", "v_n", "n_n"), **on)


CASES = [
    _case("adam", "fp32", "fp32"),
    _case("adam bf16", "bf16", "bf16", FINITE=True),
    _case("adam clocks", "fp32", "fp32", CLOCK=True),
]
