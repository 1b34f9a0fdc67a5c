"""Rows and columns at equal norms, alternately: only their squared factors are iterated.

Squares of X / max|X| are made where X is read; nothing of X's size is written but the result. One
pass finds the largest entry and the mean square. Where a line of memory has up to 16384 entries an
iteration reads X once: a program holds the line, finds its factor from the factors across, and adds
the line, scaled by it, to sums across for the next half. So `iterations` + 2 reads and one write;
longer lines are read once per half iteration. For a column-major X the halves change places:
sums across come first, and the last pass, which knows the factors of its own lines, writes the
result. Sums across go through partial sums that are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..reference.sinkhorn import SINKHORN_FLOOR
from ._launch import INTERPRETED, Case, config, guard, options, scratch, stacked, strides
from ._row_sums import MAX_ROW_IN_REGISTERS, is_transposed, split
from ._sinkhorn_kernels import (
    across_kernel,
    factors_kernel,
    lines_kernel,
    measure_kernel,
    measured_kernel,
    written_kernel,
)
from ._tables import Config

TINY = 4 * torch.finfo(torch.float32).tiny
"""Largest entry up to which a matrix counts as zero: its reciprocal could overflow."""


def _line(Y: Tensor) -> tuple[Config, bool]:
    """Lines and entries of a tile, and whether it has all of a line."""
    n = Y.shape[-1]
    if INTERPRETED:
        chosen = config("sinkhorn", Y, n)
        return chosen, n <= chosen.tile_sizes["BN"]
    if n > MAX_ROW_IN_REGISTERS:
        return config("sinkhorn_long", Y, n), False
    width = max(16, triton.next_power_of_2(n))
    warps = 4 if width <= 2048 else min(16, width // 512)
    return Config((("R", max(1, 2048 // width)), ("BN", width)), warps, 1), True


class _Pass:
    """A stack Y whose memory runs along its rows, its result, and its factors."""

    def __init__(self, Y: Tensor, out: Tensor) -> None:
        self.Y, self.out = Y, out
        K, m, n = Y.shape
        self.K, self.m, self.n = K, m, n
        self.facts, self.along, self.across = (scratch(Y, K, length) for length in (2, m, n))
        chosen = config("sinkhorn_measure", Y, m, n)
        tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
        largest, sums = scratch(Y, K, tiles), scratch(Y, K, tiles)
        measure_kernel[(tiles, K)](
            Y, largest, sums, m, n, *strides(Y), TINY, **options(chosen)
        )  # fmt: skip
        chosen = config("sinkhorn_measured", Y, m, n)
        measured_kernel[(1, K)](
            largest, sums, self.facts, tiles, 1 / (m * n), TINY, **options(chosen)
        )

    def lines(self, even: bool, mean: bool, out: bool = False, sums: bool = False) -> None:
        """Factors along from those across; and, if asked for, those across from them."""
        Y, (chosen, whole) = self.Y, _line(self.Y)
        length = chosen.tile_sizes["R"]
        bands = triton.cdiv(self.m, length)
        held = sums and whole
        if held:
            length, bands = split(self.m, length, length)
        parts = scratch(Y, self.K, bands, self.n) if held else None
        lines_kernel[(bands, self.K)](
            Y, self.out, self.facts, self.across, self.along, parts, self.m, self.n, length,
            *strides(Y), *strides(self.out), 1 / self.n, SINKHORN_FLOOR,
            EVEN=even, MEAN=mean, OUT=out, SUMS=held, WHOLE=whole, **options(chosen),
        )  # fmt: skip
        if parts is not None:
            self._factors(parts, False, not mean)
        elif sums:
            self.sums(False, not mean)

    def sums(self, even: bool, mean: bool) -> None:
        """Factors across from those along."""
        Y, chosen = self.Y, config("sinkhorn_across", self.Y, self.m, self.n)
        length, bands = split(self.m, chosen.tile_sizes["BM"], 4 * chosen.tile_sizes["BM"])
        parts = scratch(Y, self.K, bands, self.n)
        grid = (bands * triton.cdiv(self.n, chosen.tile_sizes["BN"]), self.K)
        across_kernel[grid](
            Y, self.facts, self.along, parts, self.m, self.n, length, *strides(Y), EVEN=even,
            **options(chosen),
        )  # fmt: skip
        self._factors(parts, even, mean)

    def _factors(self, parts: Tensor, even: bool, mean: bool) -> None:
        chosen = config("fold", self.Y, self.n)
        factors_kernel[(triton.cdiv(self.n, chosen.tile_sizes["BL"]), self.K)](
            parts, self.across, self.facts, self.n, parts.shape[1], 1 / self.m, SINKHORN_FLOOR,
            EVEN=even, MEAN=mean, **options(chosen),
        )  # fmt: skip

    def write(self, both: bool) -> None:
        """The result, where no other pass has written it."""
        m, n, chosen = self.m, self.n, config("sinkhorn_written", self.Y, self.m, self.n)
        tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
        written_kernel[(tiles, self.K)](
            self.Y, self.out, self.facts, self.along, self.across, m, n, *strides(self.Y),
            *strides(self.out), BOTH=both, **options(chosen),
        )  # fmt: skip


def _scaled(X: Tensor, out: Tensor, iterations: int) -> None:
    """No iterations: rows only."""
    if is_transposed(X):  # rows lie across the memory
        p = _Pass(X.mT, out.mT)
        p.sums(even=True, mean=iterations == 0)
        for i in range(iterations):
            last = i == iterations - 1
            p.lines(even=False, mean=True, out=last, sums=not last)
        if iterations == 0:
            p.write(both=False)
        return
    p = _Pass(X, out)
    if iterations == 0:
        p.lines(even=True, mean=True, out=True)
    for i in range(iterations):
        p.lines(even=i == 0, mean=False, sums=True)
    if iterations:
        p.write(both=True)


@torch.library.custom_op("stiefel::sinkhorn", mutates_args=())
def _sinkhorn(X: Tensor, iterations: int) -> Tensor:
    out = torch.empty_like(X)
    if out.numel():
        with guard(X):
            _scaled(stacked(X), stacked(out), iterations)
    return out


@_sinkhorn.register_fake
def _(X: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(X)


def sinkhorn(X: Tensor, iterations: int = 5) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.sinkhorn`."""
    out: Tensor = _sinkhorn(X, iterations)
    return out


def equal_rows(X: Tensor) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.equal_rows`."""
    out: Tensor = _sinkhorn(X, 0)
    return out


_FACTORS = dict.fromkeys(("facts", "across", "along", "parts"), "*fp32")
_SIZES = dict.fromkeys(("m", "n", "x_k", "x_m"), "i32")
_OUTS = dict.fromkeys(("o_k", "o_m"), "i32")
_UNIT = {"x_n": 1, "o_n": 1}


def _without(name: str) -> dict[str, str]:
    """Types of the factors, but for one."""
    return {key: kind for key, kind in _FACTORS.items() if key != name}


def _line_cases(element: str) -> list[Case]:
    """Of ``lines_kernel``."""
    X, scalars = f"*{element}", {"length": "i32", "scale": "fp32", "floor": "fp32"}
    whole = {**_UNIT, "EVEN": False, "MEAN": False, "SUMS": True, "WHOLE": True}
    long = {"SUMS": False, "WHOLE": False, "parts": None, "OUT": True}
    found = [
        Case(
            f"sinkhorn lines {element} {size}", "sinkhorn", lines_kernel,
            {"X": X, **_FACTORS, **_SIZES, **_OUTS, **scalars},
            {**whole, "out": None, "OUT": False}, size=size,
        )
        for size in ("small", "large")
    ]  # fmt: skip
    types = {"X": X, "out": X, **_without("parts"), **_SIZES, **_OUTS, **scalars}
    name = f"sinkhorn lines {element} long"
    return [*found, Case(name, "sinkhorn_long", lines_kernel, types, {**whole, **long})]


def _matrix_cases(element: str) -> list[Case]:
    """Of the kernels that walk a matrix in tiles."""
    X, measure_case = f"*{element}", {"largest": "*fp32", "sums": "*fp32", "tiny": "fp32"}
    return [
        Case(
            f"sinkhorn across {element}", "sinkhorn_across", across_kernel,
            {"X": X, **_without("across"), **_SIZES, "length": "i32"}, {"x_n": 1, "EVEN": False},
        ),
        Case(
            f"sinkhorn written {element}", "sinkhorn_written", written_kernel,
            {"X": X, "out": X, **_without("parts"), **_SIZES, **_OUTS}, {**_UNIT, "BOTH": True},
        ),
        Case(
            f"sinkhorn measure {element}", "sinkhorn_measure", measure_kernel,
            {"X": X, **measure_case, **_SIZES}, {"x_n": 1},
        ),
    ]  # fmt: skip


_FACTS = {"facts": "*fp32", "scale": "fp32"}
_SMALL = [
    Case(
        "sinkhorn measured", "sinkhorn_measured", measured_kernel,
        {**_FACTS, "largest": "*fp32", "sums": "*fp32", "tiles": "i32", "tiny": "fp32"}, load=4,
    ),
    Case(
        "sinkhorn factors", "fold", factors_kernel,
        {
            **_FACTS, "parts": "*fp32", "out": "*fp32", "n": "i32", "bands": "i32",
            "floor": "fp32",
        },
        {"EVEN": False, "MEAN": False}, load=4,
    ),
]  # fmt: skip
CASES = [
    *(case for e in ("fp32", "bf16") for case in (*_line_cases(e), *_matrix_cases(e))),
    *_SMALL,
]
