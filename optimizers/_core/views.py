"""How a parameter becomes matrices: a pure function of a string and a shape.

A view cuts a parameter into blocks. Each block is a unit of its own and is seen as k matrices of
m x n, in place wherever strides allow it.

| view | parameter | blocks of (k, m, n) |
|---|---|---|
| ``auto`` | 2-D; 3-D; more | (1, m, n); a batch of matrices; flattened |
| ``flatten`` | (m, ...) | (1, m, rest) |
| ``batch`` | (..., m, n) | (all leading, m, n) |
| ``transposed`` | (..., n, m) | the same, turned: weights stored (in, out) |
| ``heads:H`` | (H * d, n) | (H, d, n): q, k, v projections |
| ``heads_in:H`` | (m, H * d) | (H, m, d): output projections |
| ``rows:a,b,c`` | (..., a + b + c, n) | one block for each run of rows: fused qkv |
| ``interleaved`` | (2 * f, n) | (2, f, n): even rows, odd rows; of a batch two blocks |
| ``transposed:V`` | (..., n, m) | the view V of what is stored turned |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

CUTS = ("heads", "heads_in", "rows", "interleaved")
KINDS = ("auto", "flatten", "batch", "transposed", *CUTS)


@dataclass(frozen=True)
class Block:
    """Part of a parameter as k matrices m x n.

    Attributes:
        k: Number of matrices.
        m: Rows of each.
        n: Columns of each.
        take: Parameter-shaped tensor -> (k, m, n); in place where its strides allow, else a copy.
        tag: ``""`` for a parameter of one block, else ``".0"``, ``".1"``, ... in state keys.
        plain: Whether the block is the whole 2-D parameter as it is.
        stored_turned: Whether the parameter holds the transposes.
    """

    k: int
    m: int
    n: int
    take: Callable[[Tensor], Tensor]
    tag: str = ""
    plain: bool = False
    stored_turned: bool = False

    def back(self, X: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Blocks (k, m, n) of a whole parameter in the parameter's shape again."""
        return (X.mT if self.stored_turned else X).reshape(shape)


def _numbers(view: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"view {view!r} needs positive whole numbers after the colon")
    return numbers


def _turned(take: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: take(x).mT


def _batch(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _rows(start: int, stop: int, step: int = 1) -> Callable[[Tensor], Tensor]:
    def take(x: Tensor) -> Tensor:
        part = x[..., start:stop:step, :]
        return part if x.ndim == 3 else part.unsqueeze(0)

    return take


def _heads(x: Tensor, dim: int, heads: int) -> Tensor:
    """(H * d, n) or (m, H * d) as H matrices: always a view, whatever the strides."""
    size, stride = x.shape[dim] // heads, x.stride(dim)
    shape, strides = list(x.shape), list(x.stride())
    shape[dim] = size
    return x.as_strided((heads, *shape), (size * stride, *strides), x.storage_offset())


def _even_odd(x: Tensor) -> Tensor:
    """(2 * f, n) as its even and its odd rows."""
    return x.as_strided(
        (2, x.shape[0] // 2, x.shape[1]),
        (x.stride(0), 2 * x.stride(0), x.stride(1)),
        x.storage_offset(),
    )


@lru_cache(maxsize=4096)
def blocks(view: str, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """Blocks of a parameter of this shape under this view.

    Args:
        view: One of the strings in the module's table.
        shape: The parameter's shape, at least 2-D.

    Returns:
        One block per unit.

    Raises:
        ValueError: If the view is unknown or does not fit the shape.
    """
    kind, _, text = view.partition(":")
    if kind not in KINDS:
        raise ValueError(f"view {view!r} is unknown; choose one of {', '.join(KINDS)}")
    if len(shape) < 2:
        raise ValueError(f"view {view!r} needs a parameter of at least 2 dimensions, got {shape}")
    if kind == "auto":
        kind = "batch" if len(shape) <= 3 else "flatten"
    m, n = shape[-2:]
    if kind == "transposed" and text:
        return _turned_blocks(text, (*shape[:-2], n, m))
    if kind == "flatten":
        rest = 1
        for side in shape[1:]:
            rest *= side
        plain = len(shape) == 2
        return (Block(1, shape[0], rest, lambda x: x.reshape(1, x.shape[0], -1), plain=plain),)
    if kind in ("batch", "transposed"):
        k = 1
        for side in shape[:-2]:
            k *= side
        if len(shape) == 2:
            take: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(0)  # noqa: E731
        else:
            take = _batch
        if kind == "transposed":
            return (Block(k, n, m, _turned(take), stored_turned=True),)
        return (Block(k, m, n, take, plain=len(shape) == 2),)
    batches = kind in ("rows", "interleaved") and len(shape) == 3
    if len(shape) != 2 and not batches:
        raise ValueError(f"view {view!r} needs a 2-D parameter, got shape {shape}")
    return _cut(view, kind, text, shape[0] if batches else None, m, n)


def _turned_blocks(view: str, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """Blocks of a parameter that holds the transposes of what the view is of."""
    if view.partition(":")[0] not in CUTS:
        raise ValueError(
            f"view 'transposed:{view}' is unknown; after the colon choose one of {', '.join(CUTS)}"
        )

    def of(take: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: take(x.mT)

    return tuple(replace(b, take=of(b.take), plain=False) for b in blocks(view, shape))


def _cut(view: str, kind: str, text: str, batch: int | None, m: int, n: int) -> tuple[Block, ...]:
    """Blocks of a 2-D m x n parameter, or a batch of them, under the views that cut it."""
    if kind == "interleaved":
        if m % 2:
            raise ValueError(f"view {view!r} needs an even number of rows, got {m}")
        if batch is None:
            return (Block(2, m // 2, n, _even_odd),)
        return tuple(Block(batch, m // 2, n, _rows(i, m, 2), tag=f".{i}") for i in (0, 1))
    numbers = _numbers(view, text)
    if kind == "rows":
        if sum(numbers) != m:
            raise ValueError(f"view {view!r} must add up to the parameter's {m} rows")
        ends = [sum(numbers[: i + 1]) for i in range(len(numbers))]
        return tuple(
            Block(batch or 1, size, n, _rows(end - size, end), tag=f".{i}")
            for i, (size, end) in enumerate(zip(numbers, ends, strict=True))
        )
    heads, side = numbers[0], m if kind == "heads" else n
    if len(numbers) != 1 or side % heads:
        raise ValueError(f"view {view!r} must divide the parameter's {side} rows or columns")
    if kind == "heads":
        return (Block(heads, m // heads, n, lambda x: _heads(x, 0, heads)),)
    return (Block(heads, m, n // heads, lambda x: _heads(x, 1, heads)),)
