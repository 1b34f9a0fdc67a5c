"""Many programs of a launch at once in Triton's interpreter, for counts of what they do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar
from unittest import mock

import numpy as np


class Parting(BaseException):
    """Programs of a batch would take different ways. No Exception: the interpreter wraps those.

    Attributes:
        values: What their way depends on, one number for each program.
    """

    def __init__(self, values: Any) -> None:
        super().__init__("programs of a batch part")
        self.values = values


class Lockstep:
    """Lets the interpreter run many programs of a launch at once.

    Triton's front end is Python and nearly all that a program costs. Here it runs once for a batch:
    what has a shape (*shape) to it is an array (programs, *shape) beneath, or (1, *shape) where all
    programs have the same. The methods below stand in for those of the interpreter that look at
    shapes; all others work on entries.
    """

    UNREAD = "unread"
    """Attribute of the interpreter's arrays that come from tiles which were not read."""
    REFUSED: ClassVar = {
        f"create_{name}"
        for name in ("atomic_rmw", "atomic_cas", "cat", "unsplat", "gather", "histogram",
        "dot_scaled", "descriptor_load", "descriptor_store")
    }  # fmt: skip
    """Methods that look at shapes and that no kernel of this package needs."""

    def __init__(self) -> None:
        from triton import language
        from triton.runtime import interpreter

        self.triton, self.language = interpreter, language
        self.ids = np.zeros((1, 3), dtype=np.int32)  # of the programs
        self.patched: set[Any] = set()

    @property
    def own(self) -> dict[str, Any]:
        """Methods by the names that they have in the interpreter."""
        return {
            "create_get_program_id": self.program_id, "create_make_range": self.make_range,
            "create_splat": self.splat, "create_broadcast": self.broadcast,
            "create_expand_dims": self.expand_dims, "create_reshape": self.reshape,
            "create_trans": self.trans, **dict.fromkeys(self.REFUSED, self.refuse),
        }  # fmt: skip

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The interpreter's methods replaced."""
        triton, builder = self.triton, self.triton.interpreter_builder
        lang, tensor = triton._patch_lang, triton._patch_lang_tensor
        methods = {**{name: getattr(builder, name) for name in dir(builder)}, **self.own}
        replaced = [
            (builder, name, self.followed(name, method))
            for name, method in methods.items()
            if name.startswith("create_") or name.endswith("ary_op")
        ]
        replaced += [
            (triton.ReduceOps, "apply_impl", lambda made, Xs: self.reduce(made, *Xs)),
            (triton.ScanOps, "apply_impl", self.refuse),
            (triton, "_patch_lang", lambda fn: self.patch_once(lang, fn)),
            (triton, "_patch_lang_tensor", lambda kind, scope: self.patch(tensor, kind, scope)),
        ]
        with contextlib.ExitStack() as stack:
            for place, name, method in replaced:
                stack.enter_context(mock.patch.object(place, name, method))
            yield

    @contextlib.contextmanager
    def prepared(
        self, made: Any, named: Mapping[str, Any]
    ) -> Iterator[tuple[Callable[[], None], Any]]:
        """A launch of the interpreter's GridExecutor, with arguments by name.

        Yields:
            What runs the programs in `ids`, and all programs of the grid (count, 3).
        """
        self.patched.clear()
        scope, space = self.triton._patch_lang(made.fn), made.fn.__globals__
        space["range"] = self.range
        try:
            given = {
                name: value if name in made.constexprs else self.triton._implicit_cvt(value)
                for name, value in named.items()
            }
            grid = made.grid(given) if callable(made.grid) else made.grid
            grid = (*grid, 1, 1)[:3]
            self.triton.interpreter_builder.set_grid_dim(*grid)
            with np.errstate(all="ignore"):
                yield lambda: made.fn(**given), np.indices(grid, dtype=np.int32).reshape(3, -1).T
        finally:
            del space["range"]
            scope.restore()

    # what Python asks of arrays

    def agreed(self, X: Any) -> Any:
        """The number that a scalar is in all programs of the batch."""
        data = X.handle.data
        if X.handle.attr.get(self.UNREAD):
            raise ValueError("a branch depends on numbers that a dry run does not have")
        if len(data) > 1 and (data != data[0]).any():
            raise Parting(data)
        return data[0]

    def patch_once(self, patch: Any, fn: Any) -> Any:
        """Functions that kernels call are patched once for a launch, not at each call."""
        if fn in self.patched:
            return None
        self.patched.add(fn)
        return patch(fn)

    def patch(self, patch: Any, kind: Any, scope: Any) -> None:
        """Scalars as conditions and as bounds are those of all programs."""
        patch(kind, scope)
        scope.set_attr(kind, "__index__", lambda X: int(self.agreed(X)))
        scope.set_attr(
            kind, "__bool__", lambda X: X.handle.data[0].size > 1 or bool(self.agreed(X).all())
        )

    def range(self, *bounds: Any) -> Iterable[Any]:
        """Loops of equal length run in lockstep, wherever each program's begins."""
        start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
        step, tensor, int64 = int(step), self.language.tensor, self.language.int64
        first, last = (
            X.handle.data.astype(np.int64) if isinstance(X, tensor) else np.array([int(X)])
            for X in (start, stop)
        )
        count = np.maximum(0, -(-(last - first) // step))
        times = int(self.agreed(tensor(self.triton.TensorHandle(count, int64), int64)))
        if (first == first[0]).all():
            return range(int(first[0]), int(first[0]) + times * step, step)
        return (start + i * step for i in range(times))

    # methods of the interpreter

    def followed(self, name: str, method: Any) -> Any:
        """The method, whose results are marked as unread where an operand is."""
        Handle = self.triton.TensorHandle

        def follow(*operands: Any, **more: Any) -> Any:
            out = method(*operands, **more)
            self.saw(name, out)
            if any(isinstance(X, Handle) and X.attr.get(self.UNREAD) for X in operands):
                for made in out if isinstance(out, tuple) else (out,):
                    if isinstance(made, Handle):
                        made.attr[self.UNREAD] = True
            return out

        return follow

    def saw(self, name: str, out: Any) -> None:
        """Told of every result."""

    def refuse(self, *operands: Any) -> Any:
        """Nothing is counted rather than something wrong."""
        raise NotImplementedError("a kernel does what cannot be counted: teach bench/traffic.py")

    def handle(self, data: Any, like: Any) -> Any:
        """An array of the dtype of another one."""
        return self.triton.TensorHandle(data, like.dtype.scalar)

    def program_id(self, axis: int) -> Any:
        """One number where all programs have the same, so that what depends on it is small."""
        data = self.ids[:, axis].copy()
        same = (data == data[0]).all()
        return self.triton.TensorHandle(data[:1] if same else data, self.language.int32)

    def make_range(self, kind: Any, start: int, stop: int) -> Any:
        """0, 1, 2, ... of all programs."""
        data = np.arange(start, stop, dtype=np.int32)[None]
        return self.triton.TensorHandle(data, self.language.int32)

    def splat(self, kind: Any, X: Any) -> Any:
        """A scalar as a block."""
        shape = [*kind.shape]
        return self.broadcast(self.handle(X.data.reshape(-1, *[1] * len(shape)), X), shape)

    def broadcast(self, X: Any, shape: Any) -> Any:
        """A block with sides of 1 repeated."""
        return self.handle(np.broadcast_to(X.data, (len(X.data), *shape)), X)

    def expand_dims(self, X: Any, axis: int) -> Any:
        """A block with one more side of 1."""
        return self.handle(np.expand_dims(X.data, axis + 1), X)

    def reshape(self, X: Any, shape: Any, reorder: bool) -> Any:
        """The same entries in another shape."""
        return self.handle(X.data.reshape(len(X.data), *shape), X)

    def trans(self, X: Any, order: Any) -> Any:
        """A block with its sides in another order."""
        return self.handle(X.data.transpose(0, *(axis + 1 for axis in order)), X)

    def reduce(self, made: Any, X: Any) -> Any:
        """The sum or the maximum along an axis, or of all."""
        lang, data = self.language, X.handle.data
        kinds = {lang.standard._sum_combine: np.sum, lang.standard._elementwise_max: np.max}
        if made.combine_fn not in kinds:
            self.refuse()
        sides = data.ndim - 1
        axes = tuple(range(1, sides + 1)) if made.axis is None else made.axis % sides + 1
        found = kinds[made.combine_fn](data, axis=axes, keepdims=made.keep_dims)
        handle = self.triton.TensorHandle(found.astype(data.dtype), X.dtype, {**X.handle.attr})
        shape = list(found.shape[1:])
        return lang.tensor(handle, lang.block_type(X.dtype, shape) if shape else X.dtype)


def spread(shape: tuple[int, ...], *Xs: Any) -> list[Any]:
    """Arrays (programs, *shape) in memory of their own, of as many programs as any has."""
    most = max(len(X) for X in Xs)
    return [np.require(np.broadcast_to(X, (most, *shape)), None, ["C", "W"]) for X in Xs]
