"""The operations that kernels exist for, each ready to run on an m x n problem of either back end.

Operands are as in training: weights and gradients bfloat16, state float32. Meta tensors do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Made = Callable[..., Tensor]
"""A tensor of zeros of some shape and dtype."""
Builder = Callable[[ModuleType, Made, int, int, int], Callable[[], object]]
HALF, INT = torch.bfloat16, torch.int32
ADAM: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def gram(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """X X^T."""
    return partial(ops.gram, new(1, m, n, dtype=HALF))


def symmetric_poly(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """b S + c S S."""
    return partial(ops.symmetric_poly, new(1, m, m, dtype=HALF), -4.775, 2.0315)


def scale_and_apply(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """a X + P X."""
    X, P = new(1, m, n, dtype=HALF), new(1, m, m, dtype=HALF)
    return partial(ops.scale_and_apply, X, P, 3.4445)


def normalized(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """X / |X| in bfloat16."""
    return partial(ops.normalized, new(1, m, n), HALF)


def project(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """P^T G, with the squares of G's columns."""
    return partial(ops.project, new(1, m, r), new(1, m, n, dtype=HALF), True)


def adam(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """Adam's direction inside."""
    return partial(ops.adam, *(new(1, r, n) for _ in range(3)), 10, **ADAM)


def lift(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """W and P N."""
    return partial(ops.lift_, new(1, m, n, dtype=HALF), new(1, m, r), new(1, r, n), 0.9, -0.1)


def lift_by(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """W, P N and G by columns: Fira's."""
    more = {"X": new(1, m, n, dtype=HALF), "by": new(1, 1, n)}
    return partial(lift(ops, new, m, n, r), **more)


def lift_sign(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """W, P N and the sign of G - P R: FRUGAL's."""
    more = {"X": new(1, m, n, dtype=HALF), "R": new(1, r, n), "free": 1.0}
    return partial(lift(ops, new, m, n, r), **more)


def adam_lift(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """Adam inside and W."""
    inside = [new(1, r, n) for _ in range(3)]
    W, P = new(1, m, n, dtype=HALF), new(1, m, r)
    return partial(ops.adam_lift_, W, P, *inside, 10, 0.9, -0.1, **ADAM)


def split_step(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """FRUGAL's step with a quarter of the columns."""
    W, G = (new(1, m, n, dtype=HALF) for _ in range(2))
    M, V = (new(1, m, n // 4) for _ in range(2))
    index = torch.arange(0, n, 4, dtype=INT, device=W.device)[None]
    return partial(ops.split_step_, W, G, index, -1, M, V, 10, 0.9, -0.1, **ADAM)


def momentum_step(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """Momentum, Nesterov's step and its squares."""
    M, G = new(1, m, n), new(1, m, n, dtype=HALF)
    return partial(ops.momentum_step_, M, G, 0.95, nesterov=True, squares="all")


def squares(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """Sums of squares of rows."""
    return partial(ops.squares, new(1, m, n), -1)


def scaled_add(ops: ModuleType, new: Made, m: int, n: int, r: int) -> Callable[[], object]:
    """W and rows of X by factors."""
    return partial(ops.scaled_add_, new(1, m, n, dtype=HALF), new(1, m, n), new(1, m, 1), 0.9, -0.1)


@dataclass(frozen=True)
class Operation:
    """An operation as it stands in the table.

    Attributes:
        build: Makes the operands, and what runs it.
        name: Of the function.
        ranks: Ranks it is counted at; 0 where it has none.
        square: Whether both sides are m.
        degree: Of what it counts, in the sides.
    """

    build: Builder
    name: str
    ranks: tuple[int, ...] = (0,)
    square: bool = False
    degree: int = 2


OPERATIONS = {
    "gram": Operation(gram, "gram", square=True, degree=3),
    "gram, wide": Operation(gram, "gram", degree=3),
    "symmetric_poly": Operation(symmetric_poly, "symmetric_poly", square=True, degree=3),
    "scale_and_apply": Operation(scale_and_apply, "scale_and_apply", square=True, degree=3),
    "normalized": Operation(normalized, "normalized"),
    "project, squares": Operation(project, "project", (128, 1024)),
    "adam inside": Operation(adam, "adam", (128, 1024)),
    "lift_": Operation(lift, "lift_", (128, 1024)),
    "lift_ by X": Operation(lift_by, "lift_", (128, 1024)),
    "lift_ sign": Operation(lift_sign, "lift_", (128, 1024)),
    "adam_lift_": Operation(adam_lift, "adam_lift_", (128,)),
    "split_step_ columns": Operation(split_step, "split_step_"),
    "momentum_step_": Operation(momentum_step, "momentum_step_"),
    "squares": Operation(squares, "squares"),
    "scaled_add_": Operation(scaled_add, "scaled_add_"),
}
