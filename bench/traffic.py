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
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from lockstep import Lockstep, Parting, spread
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Point = tuple[int, int]
LANES = 2**20
"""Entries of tiles that the interpreter works on at once: few batches, arrays of a few MiB."""


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

    def add(self, part: Work) -> None:
        """Count what a part of the launch does."""
        self.loaded += part.loaded
        self.stored += part.stored
        self.other += part.other
        self.products.update(part.products)

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
    """What views of the same entries have in common, transposed or expanded ones too."""
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


class Idle(TorchDispatchMode):
    """Leaves out products and eigenvectors, for steps that only have to bring state to be.

    A product is 0, or what it was to be added to; eigenvectors are those of the identity, which
    pass for a basis: float32 products of a tensor with itself are made, so that P^T P says so.
    """

    _PRODUCTS: ClassVar = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[-1]
        if name == "_linalg_eigh":
            values = args[0].new_zeros(args[0].shape[:-1])
            return values, torch.diag_embed(torch.ones_like(values))
        if name not in self._PRODUCTS:
            return func(*args, **kwargs)
        if name.endswith("_"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"].zero_()
        left, right = args[-2:]
        own = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        if own and left.dtype == torch.float32:
            return func(*args, **kwargs)
        return left.new_zeros(*left.shape[:-1], right.shape[-1])


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
        pointers, mask = np.broadcast_arrays(pointers, mask)
        flat = pointers.ravel() if mask.all() else pointers[mask]
        if flat.size == 0:
            return 0
        low, high = int(flat.min()), int(flat.max())
        i = bisect.bisect_right(self.starts, low) - 1
        if i >= 0 and high < self.spans[i][1]:
            key = (self.spans[i], size, store)
            if key not in self.maps:
                start, stop = self.spans[i]
                self.maps[key] = np.zeros((stop - start) // size, dtype=bool)
            at = (flat - np.uint64(self.starts[i])) >> np.uint64(size.bit_length() - 1)
            self.maps[key][at.view(np.int64)] = True
        else:  # of several tensors, or found in a table of pointers
            self.loose.setdefault((size, store), []).append(np.unique(flat))
        return int(flat.size) * size

    def bytes_by_name(self) -> dict[str, tuple[int, int]]:
        """(read, written) of every argument; ``"elsewhere"`` for what is no argument's."""
        found: dict[str, list[int]] = {}
        for (span, size, store), touched in self.maps.items():
            found.setdefault(self.names[span], [0, 0])[store] += size * int(touched.sum())
        for (size, store), parts in self.loose.items():
            count = len(np.unique(np.concatenate(parts)))
            found.setdefault("elsewhere", [0, 0])[store] += size * count
        return {name: (pair[0], pair[1]) for name, pair in found.items()}


class _Recorder(Lockstep):
    """Runs launches in the interpreter and counts.

    Args:
        log: Gets a Work for each launch.
        watch: Is told not to record while a launch runs.
        dry: Tiles of floats are not read but 0, and products are left out. An address, a mask or a
            branch that such a number decides is refused. A launch that equals one before is not run
            again.
        lanes: About as many entries of a tile are worked on at once, in all programs of a batch.
    """

    FLAGS = 64
    """Tensors of up to so many entries may be flags."""
    FLOPS: ClassVar = {"binary_op": 1, "unary_op": 1, "create_fma": 2}
    """Flops for each float that a method of the interpreter makes."""

    def __init__(self, log: Log, watch: Watch, dry: bool, lanes: int) -> None:
        super().__init__()
        self.log, self.watch, self.dry, self.lanes = log, watch, dry, lanes
        self.work, self.memory, self.widest = Work(""), _Memory({}), 1
        self.known: dict[Any, tuple[Work, dict[str, Tensor]]] = {}

    @property
    def own(self) -> dict[str, Any]:
        """See `Lockstep`."""
        memory = {"create_masked_load": self.load, "create_masked_store": self.store}
        return {**super().own, **memory, "create_dot": self.dot}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The interpreter's methods and its launch replaced."""

        def launched(made: Any, *args: Any, **kwargs: Any) -> None:
            self.launch(made, args, kwargs)

        executor = self.triton.GridExecutor
        with super().installed(), mock.patch.object(executor, "__call__", launched):
            yield

    def launch(self, made: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """All programs of a GridExecutor's launch, or what is known of an equal one."""
        named = {**dict(zip(made.arg_names, args, strict=False)), **kwargs}
        named = {name: value for name, value in named.items() if name in made.arg_names}
        if self.dry and "UPCAST" in named:  # the operands as a GPU has them
            named["UPCAST"] = False
        self.watch.quiet = True
        try:
            key = (made.fn, made.grid, *self.deciding(named))
            if self.dry and key in self.known:
                work, written = self.known[key]
                for name, X in written.items():
                    named[name].copy_(X)
            else:
                work, written = self.known[key] = self.counted(made, named)
        finally:
            self.watch.quiet = False
        self.log.works.append(copy.deepcopy(work))

    def deciding(self, named: Mapping[str, Any]) -> Iterator[Any]:
        """What addresses and branches of a dry launch may depend on, argument by argument.

        That is where tensors lie, integers, the sign of a float, and the numbers in a tensor that
        is so small that they may be flags.
        """
        places: dict[int, int] = {}
        for name, X in named.items():
            if isinstance(X, Tensor):
                storage = X.untyped_storage()
                place = places.setdefault(storage.data_ptr(), len(places))
                small = X.numel() <= self.FLAGS or not X.is_floating_point()
                numbers = tuple(X.flatten().tolist()) if small else ()
                lies = (place, storage.nbytes(), X.storage_offset(), X.shape, X.stride(), X.dtype)
                yield name, *lies, numbers
            else:
                yield name, (X > 0) - (X < 0) if isinstance(X, float) else X

    def counted(self, made: Any, named: Mapping[str, Any]) -> tuple[Work, dict[str, Tensor]]:
        """A launch that is run, and copies of the arguments that it wrote."""
        work, self.memory, self.widest = Work(made.fn.__name__, True), _Memory(named), 1
        with self.prepared(made, named) as (call, ids):
            self.batch(call, ids[:1], work)  # one program tells how wide tiles are
            size = max(1, self.lanes // self.widest)
            for start in range(1, len(ids), size):
                self.batch(call, ids[start : start + size], work)
        work.tensors = self.memory.bytes_by_name()
        work.read = sum(pair[0] for pair in work.tensors.values())
        work.written = sum(pair[1] for pair in work.tensors.values())
        names = [name for name, (_, stored) in work.tensors.items() if stored]
        return work, {x: named[x].clone() for name in names for x in name.split("=") if x in named}

    def batch(self, call: Callable[[], None], ids: Any, total: Work) -> None:
        """Run programs (count, 3) at once; those whose ways part begin again, apart."""
        self.ids, self.work = ids, Work("")
        try:
            call()
        except Parting as parting:
            for value in np.unique(parting.values):
                self.batch(call, ids[parting.values == value], total)
        else:
            total.add(self.work)

    def each(self, data: Any) -> int:
        """Entries of an array over all programs of the batch."""
        return data.size // len(data) * len(self.ids)

    def saw(self, name: str, out: Any) -> None:
        """Flops of the methods that make floats entry by entry."""
        if name in self.FLOPS and out.dtype.scalar.is_floating():
            self.work.other += self.FLOPS[name] * self.each(out.data)

    def reduce(self, made: Any, X: Any) -> Any:
        """A sum has a flop for each entry."""
        if made.combine_fn is self.language.standard._sum_combine and X.dtype.is_floating():
            self.work.other += self.each(X.handle.data)
        return super().reduce(made, X)

    def dot(self, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        """d + a b, in a dry run d."""
        kind = {"bf16": "bf16", "fp16": "fp16"}.get(str(a.dtype.scalar), "fp32")
        self.work.products[kind] += 2 * self.each(d.data) * a.data.shape[-1]
        if self.dry:
            return self.triton.TensorHandle(d.data, d.dtype.scalar, {self.UNREAD: True})
        return self.handle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d)

    def load(self, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        """What is there; scalars and integers in a dry run too, as they may decide something."""
        kind, shape = pointers.get_element_ty(), pointers.data.shape[1:]
        dtype = self.triton._get_np_dtype(kind)
        self.work.loaded += self.touch(pointers, mask, False)
        if self.dry and kind.is_floating() and shape:
            zeros = np.zeros((1, *shape), dtype)
            return self.triton.TensorHandle(zeros, kind, {self.UNREAD: True})
        beside = np.zeros(1, dtype) if other is None else other.data
        arrays = spread(shape, pointers.data, mask.data, beside)
        return self.triton.TensorHandle(self.triton._interpreter.load(*arrays, dtype), kind)

    def store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        """Put it there."""
        self.work.stored += self.touch(pointers, mask, True)
        arrays = spread(pointers.data.shape[1:], pointers.data, value.data, mask.data)
        return self.triton._interpreter.store(*arrays)

    def touch(self, pointers: Any, mask: Any, store: bool) -> int:
        """Mark what a batch asks for, and its bytes."""
        if pointers.attr.get(self.UNREAD) or mask.attr.get(self.UNREAD):
            raise ValueError("an address depends on numbers that a dry run does not have")
        self.widest = max(self.widest, pointers.data[0].size)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        alike = len(pointers.data) == len(mask.data) == 1
        asked = self.memory.touch(pointers.data, mask.data, size, store)
        return asked * len(self.ids) if alike else asked


@contextlib.contextmanager
def tiles_of(target: str | None) -> Iterator[None]:
    """Let kernels in the interpreter have the tiles of an architecture; None: their small ones.

    Those of large matrices, however small the ones at hand are.
    """
    from stiefel.kernels.triton._tables import TABLES

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
def recorded(target: str | None = None, dry: bool = False, lanes: int = LANES) -> Iterator[Log]:
    """Record the kernels and the torch operations of a block, on CPU tensors.

    Args:
        target: Architecture whose tiles the kernels have, ``"sm_90"``; None: the interpreter's.
        dry: Leave products out and narrow operands narrow, so that dtypes are those of a GPU:
            results are wrong then, but not loads and stores: an address or a branch that depended
            on one is refused.
        lanes: Entries of tiles that are worked on at once; 1: program by program.

    Raises:
        ValueError: While it is on and dry, where such a number decides what is loaded or stored.

    Yields:
        The log, which fills up.
    """
    log = Log()
    watch = Watch(log)
    with tiles_of(target), _Recorder(log, watch, dry, lanes).installed(), watch:
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
