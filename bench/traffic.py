"""What kernels and torch operations read, write and multiply, counted while they run.

Kernels are watched in Triton's interpreter (``TRITON_INTERPRET=1``): every load and store that is
not masked, and every product of tiles, of the real tile sizes. Torch operations are watched by
their operands, on CPU or meta tensors. Nothing here measures time.

Bytes are those that a launch cannot do without: each byte that it touches once for reading and once
for writing, since what it reads again comes from a cache if that is large enough. What it asks for
with repetitions is counted beside them.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Point = tuple[int, int]


@dataclass
class Work:
    """What one launch of a kernel, or one torch operation, does.

    Attributes:
        name: Of the kernel or operation.
        kernel: Whether it is a kernel.
        read: Bytes read, each once.
        written: Bytes written, each once.
        loaded: Bytes read, as often as programs ask for them.
        stored: Bytes written, as often as programs do it.
        products: Flops of matrix products by dtype of the operands, ``"bf16"``, ``"fp16"``,
            ``"fp32"``: 2 M N K for tiles, which count whole at the edges.
        other: Flops of anything else; of a torch operation one for each entry that it writes.
        tensors: Bytes (read, written) by name of the kernel's argument.
    """

    name: str
    kernel: bool = False
    read: int = 0
    written: int = 0
    loaded: int = 0
    stored: int = 0
    products: Counter[str] = field(default_factory=Counter)
    other: int = 0
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Bytes in either direction."""
        return self.read + self.written

    @property
    def issued(self) -> int:
        """The same as often as programs ask."""
        return self.loaded + self.stored

    @property
    def flops(self) -> int:
        """All flops."""
        return sum(self.products.values()) + self.other

    def numbers(self) -> dict[str, int]:
        """What there is to scale, by name."""
        names = ("read", "written", "loaded", "stored", "other")
        fields = {name: getattr(self, name) for name in names}
        return {**fields, **{f"product {dtype}": n for dtype, n in self.products.items()}}

    @classmethod
    def of(cls, name: str, kernel: bool, numbers: Mapping[str, int]) -> Work:
        """The opposite of `numbers`."""
        made = cls(name, kernel)
        for key, n in numbers.items():
            if key.startswith("product "):
                made.products[key.removeprefix("product ")] = n
            else:
                setattr(made, key, n)
        return made


@dataclass
class Log:
    """What has been recorded, in order."""

    works: list[Work] = field(default_factory=list)

    def kernels(self) -> list[Work]:
        """Launches only."""
        return [work for work in self.works if work.kernel]

    def total(self, key: str) -> int:
        """Sum of an attribute of all."""
        return sum(getattr(work, key) for work in self.works)


# torch operations ---------------------------------------------------------------------------------

_OVERWRITE = {"copy_", "fill_", "zero_", "set_", "normal_", "uniform_", "random_", "bernoulli_"}
_NOTHING = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "detach_"}
_CHOSEN = {"index_select", "gather", "index", "take", "embedding"}  # read what they return
_PLACED = {"index_copy_", "scatter_", "index_put_", "index_fill_", "index_add_", "scatter_add_"}
_BETA = {"addmm", "baddbmm", "addmm_", "baddbmm_", "addmv", "addbmm"}
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def bytes_of(X: Tensor) -> int:
    """Bytes of the entries of X, expanded ones once."""
    sides = (n for n, step in zip(X.shape, X.stride(), strict=True) if step != 0)
    return math.prod(sides) * X.element_size() if X.numel() else 0


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _same(X: Tensor) -> tuple[Any, ...]:
    """What views of the same entries have in common, turned or expanded ones too."""
    sides = sorted((s, n) for s, n in zip(X.stride(), X.shape, strict=True) if s and n > 1)
    return (X.untyped_storage()._cdata, X.storage_offset(), *sides)


def _once(Xs: Iterable[Tensor]) -> int:
    return sum(bytes_of(X) for X in {_same(X): X for X in Xs}.values())


def work_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work | None:
    """What a torch operation reads and writes; None where it moves nothing."""
    name, schema = func._schema.name.split("::")[-1], func._schema
    fresh = not any(ret.alias_info is not None for ret in schema.returns)
    written_to = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if name in _NOTHING or "empty" in name or (not fresh and not any(written_to)):
        return None  # views are free, and so is memory that nobody has filled
    results = _tensors(out) if fresh else []
    read: list[Tensor] = []
    written: list[Tensor] = list(results)
    for i, (argument, writes) in enumerate(zip(schema.arguments, written_to, strict=True)):
        value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        Xs = _tensors(value)
        if writes and not (name.startswith("_fused_adam") and argument.name == "grads"):
            written += Xs
            if argument.is_out or name in _OVERWRITE:
                continue
        if name.startswith("new_") or name.endswith("_like"):  # its shape is all that is read
            continue
        if i == 0 and name in _BETA and kwargs.get("beta", 1) == 0:
            continue
        read += Xs
    work = Work(name, read=_once(read), written=_once(written))
    if name in _CHOSEN:
        work.read += _once(results) - bytes_of(args[0])
    if name in _PLACED:
        part = _once(X for X in read if X is not args[0] and X.dtype == args[0].dtype)
        both = name.endswith("add_")
        work.read -= bytes_of(args[0]) - both * part
        work.written = part
    work.loaded, work.stored = work.read, work.written
    packet = getattr(aten, name.rstrip("_"), None)  # the registry has no operations in place
    if packet in flop_registry:
        dtype = next(_DTYPES.get(X.dtype, "fp32") for X in read)
        work.products[dtype] = flop_registry[packet](*args, **kwargs, out_val=out)
    elif written:
        work.other = sum(X.numel() for X in written)
    return work if work.moved else None


class Watch(TorchDispatchMode):
    """Records torch operations; those of kernels' launchers too, but not the launches."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log, self.quiet = log, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "stiefel":  # its launches and operations record themselves
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self.quiet:
            work = work_of(func, args, kwargs, out)
            if work is not None:
                self.log.works.append(work)
        return out


def watched(step: Callable[[], object]) -> Log:
    """The torch operations of one call."""
    log = Log()
    with Watch(log):
        step()
    return log


# kernels ------------------------------------------------------------------------------------------


class _Memory:
    """Which bytes of the tensors of a launch have been touched, in two bit maps for each."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        named: dict[tuple[int, int], list[str]] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage()
                start = storage.data_ptr()
                named.setdefault((start, start + storage.nbytes()), []).append(name)
        self.spans = sorted(named)
        self.starts = [start for start, _ in self.spans]
        self.names = {span: "=".join(names) for span, names in named.items()}
        self.maps: dict[tuple[Point, int, bool], Any] = {}
        self.loose: dict[tuple[int, bool], list[Any]] = {}

    def touch(self, pointers: Any, mask: Any, size: int, store: bool) -> int:
        """Mark, and the bytes that were asked for."""
        import numpy as np

        flat = pointers[mask] if not mask.all() else pointers.ravel()
        if flat.size == 0:
            return 0
        low, high = int(flat.min()), int(flat.max())
        i = bisect.bisect_right(self.starts, low) - 1
        if i >= 0 and high < self.spans[i][1]:
            key = (self.spans[i], size, store)
            if key not in self.maps:
                start, stop = self.spans[i]
                self.maps[key] = np.zeros((stop - start) // size, dtype=bool)
            self.maps[key][(flat - np.uint64(self.starts[i])) // np.uint64(size)] = True
        else:  # of several tensors, or found in a table of pointers
            self.loose.setdefault((size, store), []).append(np.unique(flat))
        return int(flat.size) * size

    def bytes_by_name(self) -> dict[str, tuple[int, int]]:
        """(read, written) of every argument; ``"elsewhere"`` for what is no argument's."""
        import numpy as np

        found: dict[str, list[int]] = {}
        for (span, size, store), touched in self.maps.items():
            found.setdefault(self.names[span], [0, 0])[store] += size * int(touched.sum())
        for (size, store), parts in self.loose.items():
            count = len(np.unique(np.concatenate(parts)))
            found.setdefault("elsewhere", [0, 0])[store] += size * count
        return {name: (pair[0], pair[1]) for name, pair in found.items()}


class _Recorder:
    """Wraps the interpreter's memory operations and products for as long as it is entered."""

    def __init__(self, log: Log, watch: Watch, dry: bool) -> None:
        self.log, self.watch, self.dry = log, watch, dry
        self.work: Work | None = None
        self.memory = _Memory({})

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Everything wrapped."""
        from triton.runtime import interpreter

        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        wraps = {
            "create_masked_load": self.load, "create_masked_store": self.store,
            "create_atomic_rmw": self.atomic, "create_atomic_cas": self.atomic,
            "create_dot": self.dot, "binary_op": self.pointwise, "unary_op": self.pointwise,
            "create_fma": self.fma,
        }  # fmt: skip
        launch, total = executor.__call__, interpreter.ReduceOps.sum
        for name, wrap in wraps.items():
            setattr(builder, name, types.MethodType(wrap, getattr(builder, name)))
        executor.__call__ = lambda made, *args, **kwargs: self.launch(launch, made, args, kwargs)
        interpreter.ReduceOps.sum = lambda made, X: self.total(total, made, X)
        try:
            yield
        finally:
            executor.__call__, interpreter.ReduceOps.sum = launch, total
            for name in wraps:
                delattr(builder, name)

    def launch(self, run: Any, made: Any, args: Any, kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(made.arg_names, args, strict=False)), **kwargs}
        if self.dry and "UPCAST" in kwargs:  # the operands as a GPU has them
            kwargs = {**kwargs, "UPCAST": False}
        self.work, self.memory = Work(made.fn.__name__, kernel=True), _Memory(named)
        self.watch.quiet = True
        try:
            run(made, *args, **kwargs)
        finally:
            work, self.work, self.watch.quiet = self.work, None, False
        work.tensors = self.memory.bytes_by_name()
        work.read = sum(pair[0] for pair in work.tensors.values())
        work.written = sum(pair[1] for pair in work.tensors.values())
        self.log.works.append(work)

    # Each gets the method that it wraps first: they are bound to it, not to the recorder.

    @property
    def load(self) -> Any:
        def load(inner: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
            if self.work:
                self.work.loaded += self._touch(pointers, mask.data, False)
            return inner(pointers, mask, *rest, **more)

        return load

    @property
    def store(self) -> Any:
        def store(inner: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            if self.work:
                self.work.stored += self._touch(pointers, mask.data, True)
            return inner(pointers, value, mask, *rest)

        return store

    @property
    def atomic(self) -> Any:
        def atomic(inner: Any, *operands: Any) -> Any:
            raise NotImplementedError("atomics are not counted: no kernel of this package has any")

        return atomic

    @property
    def dot(self) -> Any:
        def dot(inner: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            if self.work:
                kind = {"bf16": "bf16", "fp16": "fp16"}.get(str(a.dtype.scalar), "fp32")
                self.work.products[kind] += 2 * d.data.size * a.data.shape[-1]
            return d if self.dry else inner(a, b, d, *rest)

        return dot

    @property
    def pointwise(self) -> Any:
        def pointwise(inner: Any, *operands: Any) -> Any:
            out = inner(*operands)
            if self.work and out.dtype.scalar.is_floating():
                self.work.other += out.data.size
            return out

        return pointwise

    @property
    def fma(self) -> Any:
        def fma(inner: Any, *operands: Any) -> Any:
            out = inner(*operands)
            if self.work:
                self.work.other += 2 * out.data.size
            return out

        return fma

    def total(self, inner: Any, made: Any, X: Any) -> Any:
        if self.work and X.dtype.is_floating():
            self.work.other += X.handle.data.size
        return inner(made, X)

    def _touch(self, pointers: Any, mask: Any, store: bool) -> int:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return self.memory.touch(pointers.data, mask, size, store)


@contextlib.contextmanager
def tiles_of(target: str | None) -> Iterator[None]:
    """Let kernels in the interpreter have the tiles of an architecture; None: their small ones.

    Those of large matrices, however small the ones at hand are.
    """
    from stiefel.kernels.triton.tables import TABLES

    kept = {name: dict(table["interpreted"]) for name, table in TABLES.items()}
    try:
        if target is not None:
            for table in TABLES.values():
                large = table[target]["large"]
                table["interpreted"].update({"small": large, "large": large})
        yield
    finally:
        for name, sizes in kept.items():
            TABLES[name]["interpreted"].update(sizes)


@contextlib.contextmanager
def recorded(target: str | None = None, dry: bool = False) -> Iterator[Log]:
    """Record the kernels and the torch operations of a block, on CPU tensors.

    Args:
        target: Architecture whose tiles the kernels have, ``"sm_90"``; None: the interpreter's.
        dry: Leave products out and narrow operands narrow, so that dtypes are those of a GPU:
            results are wrong then, but not loads and stores, as no address depends on a result.

    Yields:
        The log, which fills up.
    """
    log = Log()
    watch = Watch(log)
    with tiles_of(target), _Recorder(log, watch, dry).installed(), watch:
        yield log


# from small sizes to large ones -------------------------------------------------------------------


def triangle(degree: int) -> list[Point]:
    """The points (i, j) that determine a polynomial of a degree in two variables."""
    return [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]


def extended(values: Mapping[Point, int], degree: int, x: int, y: int) -> int:
    """The integer at (x, y) of the polynomial with these values on `triangle`: Newton's formula.

    Exact: differences of integers are integers, and so are binomial coefficients. Values on the
    points (i, 0) alone make a polynomial in the first variable.
    """
    table = dict(values)
    for axis in (0, 1):
        for order in range(1, degree + 1):
            for i, j in sorted(table, reverse=True):
                if (i, j)[axis] >= order:
                    table[i, j] -= table[(i - 1, j) if axis == 0 else (i, j - 1)]
    return sum(math.comb(x, i) * math.comb(y, j) * d for (i, j), d in table.items())


def scaled(logs: Mapping[Point, Log], degree: int, x: int, y: int) -> Log:
    """The log of a size that was not run, from those on `triangle`, launch by launch.

    Raises:
        ValueError: If the logs are not of the same kernels and operations.
    """
    first = logs[0, 0]
    names = [work.name for work in first.works]
    for point, log in logs.items():
        found = [work.name for work in log.works]
        if found != names:
            raise ValueError(f"small problems differ: {names}, at {point} {found}")
    works = []
    for k, work in enumerate(first.works):
        numbers = {point: log.works[k].numbers() for point, log in logs.items()}
        keys = {key for found in numbers.values() for key in found}
        at = {
            key: extended({p: found.get(key, 0) for p, found in numbers.items()}, degree, x, y)
            for key in sorted(keys)
        }
        works.append(Work.of(work.name, work.kernel, at))
    return Log(works)
