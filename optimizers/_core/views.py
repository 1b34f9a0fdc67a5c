"""How a parameter becomes matrices: a pure function of a string and a shape.

A view gives a parameter one or more :class:`MatrixView`. Each of them is a unit of its own and is
seen as k matrices of m x n, in place wherever strides allow that.

| view | parameter | matrices (k, m, n) |
|---|---|---|
| ``auto`` | 2-D; 3-D; more | (1, m, n); a batch of matrices; flattened |
| ``flatten`` | (m, ...) | (1, m, rest) |
| ``batch`` | (..., m, n) | (all leading, m, n) |
| ``transposed`` | (..., n, m) | as ``batch``, transposed: weights stored (in, out) |
| ``heads:H`` | (H * d, n) | (H, d, n): q, k, v projections |
| ``heads_in:H`` | (m, H * d) | (H, m, d): output projections |
| ``rows:a,b,c`` | (..., a + b + c, n) | one MatrixView for each run of rows: fused qkv |
| ``interleaved`` | (2 * f, n) | (2, f, n): even rows, odd rows; of a batch two MatrixViews |
| ``transposed:V`` | (..., n, m) | the view V of the transposed parameter |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

CUTTING_VIEWS = ("heads", "heads_in", "rows", "interleaved")
VIEW_KINDS = ("auto", "flatten", "batch", "transposed", *CUTTING_VIEWS)


@dataclass(frozen=True)
class MatrixView:
    """Part of a parameter as k matrices m x n.

    Attributes:
        k: Number of matrices.
        m: Rows of each.
        n: Columns of each.
        to_matrices: Parameter-shaped tensor -> (k, m, n); a view where its strides allow, else a
            copy.
        tag: Suffix of state keys: ``""`` for a parameter of one view, else ``".0"``, ``".1"``, ...
        plain: Whether the matrix is the whole 2-D parameter as it is.
        stored_transposed: Whether the parameter holds the transposes.
    """

    k: int
    m: int
    n: int
    to_matrices: Callable[[Tensor], Tensor]
    tag: str = ""
    plain: bool = False
    stored_transposed: bool = False

    def from_matrices(self, X: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Matrices (k, m, n) of a whole parameter in the parameter's shape."""
        return (X.mT if self.stored_transposed else X).reshape(shape)


def _parse_numbers(view: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"view {view!r} needs positive whole numbers after the colon")
    return numbers


def _transposed(to_matrices: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: to_matrices(x).mT


def _batch(x: Tensor) -> Tensor:
    return x.flatten(0, -3)  # unlike a reshape to -1, also where there are no entries


def _rows(start: int, stop: int, step: int = 1) -> Callable[[Tensor], Tensor]:
    def to_matrices(x: Tensor) -> Tensor:
        part = x[..., start:stop:step, :]
        return part if x.ndim == 3 else part.unsqueeze(0)

    return to_matrices


def _heads(x: Tensor, dim: int, heads: int) -> Tensor:
    """(H * d, n) or (m, H * d) as H matrices: always a view, whatever the strides."""
    size, stride = x.shape[dim] // heads, x.stride(dim)
    shape, strides = list(x.shape), list(x.stride())
    shape[dim] = size
    return x.as_strided((heads, *shape), (size * stride, *strides), x.storage_offset())


def _even_odd(x: Tensor) -> Tensor:
    """(2 * f, n) as (2, f, n), the even and the odd rows: always a view."""
    return x.as_strided(
        (2, x.shape[0] // 2, x.shape[1]),
        (x.stride(0), 2 * x.stride(0), x.stride(1)),
        x.storage_offset(),
    )


@lru_cache(maxsize=4096)
def split_view(view: str, shape: tuple[int, ...]) -> tuple[MatrixView, ...]:
    """Cut a parameter of this shape as the view says.

    Args:
        view: One of the strings in the module's table.
        shape: The parameter's shape, at least 2-D.

    Returns:
        One MatrixView per unit.

    Raises:
        ValueError: If the view is unknown or does not fit the shape.
    """
    kind, _, text = view.partition(":")
    if kind not in VIEW_KINDS:
        raise ValueError(f"view {view!r} is unknown; choose one of {', '.join(VIEW_KINDS)}")
    if len(shape) < 2:
        raise ValueError(f"view {view!r} needs a parameter of at least 2 dimensions, got {shape}")
    if kind == "auto":
        kind = "batch" if len(shape) <= 3 else "flatten"
    m, n = shape[-2:]
    if kind == "transposed" and text:
        return _transposed_views(text, (*shape[:-2], n, m))
    if kind == "flatten":
        rest = 1
        for side in shape[1:]:
            rest *= side
        plain = len(shape) == 2
        return (MatrixView(1, shape[0], rest, lambda x: x.flatten(1).unsqueeze(0), plain=plain),)
    if kind in ("batch", "transposed"):
        k = 1
        for side in shape[:-2]:
            k *= side
        if len(shape) == 2:
            to_matrices: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(0)  # noqa: E731
        else:
            to_matrices = _batch
        if kind == "transposed":
            return (MatrixView(k, n, m, _transposed(to_matrices), stored_transposed=True),)
        return (MatrixView(k, m, n, to_matrices, plain=len(shape) == 2),)
    is_batch = kind in ("rows", "interleaved") and len(shape) == 3
    if len(shape) != 2 and not is_batch:
        raise ValueError(f"view {view!r} needs a 2-D parameter, got shape {shape}")
    return _cutting_view(view, kind, text, shape[0] if is_batch else None, m, n)


def _transposed_views(view: str, shape: tuple[int, ...]) -> tuple[MatrixView, ...]:
    """The view of the transposes of a parameter; ``shape`` is that of the transposes."""
    if view.partition(":")[0] not in CUTTING_VIEWS:
        raise ValueError(
            f"view 'transposed:{view}' is unknown; after the colon choose one of "
            f"{', '.join(CUTTING_VIEWS)}"
        )

    def after_transpose(to_matrices: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: to_matrices(x.mT)

    return tuple(
        replace(b, to_matrices=after_transpose(b.to_matrices), plain=False)
        for b in split_view(view, shape)
    )


def _cutting_view(
    view: str, kind: str, text: str, batch: int | None, m: int, n: int
) -> tuple[MatrixView, ...]:
    """The views in ``CUTTING_VIEWS`` of an m x n parameter, or of a batch of them."""
    if kind == "interleaved":
        if m % 2:
            raise ValueError(f"view {view!r} needs an even number of rows, got {m}")
        if batch is None:
            return (MatrixView(2, m // 2, n, _even_odd),)
        return tuple(MatrixView(batch, m // 2, n, _rows(i, m, 2), tag=f".{i}") for i in (0, 1))
    numbers = _parse_numbers(view, text)
    if kind == "rows":
        if sum(numbers) != m:
            raise ValueError(f"view {view!r} must add up to the parameter's {m} rows")
        ends = [sum(numbers[: i + 1]) for i in range(len(numbers))]
        return tuple(
            MatrixView(batch or 1, size, n, _rows(end - size, end), tag=f".{i}")
            for i, (size, end) in enumerate(zip(numbers, ends, strict=True))
        )
    heads, side = numbers[0], m if kind == "heads" else n
    if len(numbers) != 1 or side % heads:
        raise ValueError(f"view {view!r} must divide the parameter's {side} rows or columns")
    if kind == "heads":
        return (MatrixView(heads, m // heads, n, lambda x: _heads(x, 0, heads)),)
    return (MatrixView(heads, m, n // heads, lambda x: _heads(x, 1, heads)),)
