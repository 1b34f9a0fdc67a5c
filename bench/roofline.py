"""Flops, bytes and the time that they bound, of every kernel and of whole steps: no GPU is timed.

    python bench/roofline.py                        steps on the layers of LLaMA-7B, then kernels
    python bench/roofline.py --only GaLore Muon     some methods
    python bench/roofline.py --detail               every kernel and torch operation of the steps
    python bench/roofline.py --json roofline.json   writes all of it as well

COUNTED: what the kernels themselves load, store and multiply, with the tiles of ``sm_90``, recorded
in Triton's interpreter while the optimizer steps, on several small weights, and extended to the
real size by the polynomial through those, which is exact. Torch operations of our steps are counted
with them. ``plain`` is ``bench/plain.py``, or the reference of an operation, counted from the
tensors that its operations read and write. Weights and gradients are bfloat16, state is float32.
No step makes a new basis.

BOUND: for each kernel or operation the longest of bytes / bandwidth and flops / peak, then summed.
Peaks are the vendors', dense; float32 products count as TF32, as if torch was allowed to. Launches,
caches that are too small and all that keeps a kernel from a peak are left out: nothing here was
timed, and a ratio of two bounds is no speedup.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from operations import OPERATIONS, Operation
from peaks import PEAKS, Peaks
from plain import PLAIN
from tables import markdown
from torch import Tensor, nn
from traffic import LANES, Idle, Log, Point, Work, recorded, scaled, watched

from stiefel import optimizers
from stiefel.kernels import reference
from stiefel.kernels.reference import reductions
from stiefel.optimizers._driver import units, write
from stiefel.optimizers._toolkit import power_sums

TARGET = "sm_90"
UNIT = 256
"""Sides of the small weights are multiples of it, and so of tiles, and of splits of sums."""
LAYERS = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
"""LLaMA-7B: 32 times q, k, v, o; gate and up; down."""
SQUARE, WIDE_SHAPE = (4096, 4096), (4096, 11008)


DEVICES = {name: PEAKS[name] for name in ("A100", "H100", "B200", "MI300X")}


def least(work: Work, peaks: Peaks) -> float:
    """Seconds that no launch of this work goes below."""
    rates = {"bf16": peaks.half, "fp16": peaks.half, "fp32": peaks.single}
    product = sum(n / rates[dtype] for dtype, n in work.products.items())
    return max(product, work.other / peaks.other, work.moved / peaks.memory) / 1e12


Count = Callable[[int, int], Log]
"""The log of a small m x n problem."""


# small problems that stand for a large one --------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The small sizes from which one is extended: m = m0 + i unit and n = 2 m + j unit, or n = m.

    Attributes:
        side: m0.
        degree: Of the polynomial.
        square: Whether m = n, with one variable only.
        unit: What both sides grow by.
    """

    side: int
    degree: int
    square: bool
    unit: int = UNIT

    def at(self, point: Point) -> tuple[int, int]:
        """The sides (m, n), m <= n, of a point."""
        m = self.side + self.unit * point[0]
        return m, m if self.square else 2 * m + self.unit * point[1]

    def points(self) -> list[Point]:
        """Where the problem is run."""
        most = self.degree
        return [(i, j) for i in range(most + 1) for j in range(1 if self.square else most + 1 - i)]

    def of(self, m: int, n: int) -> Point:
        """The point of a real size."""
        x, y = m - self.side, 0 if self.square else n - 2 * m
        if x % self.unit or y % self.unit or (self.square and m != n):
            raise ValueError(f"{m}x{n} is not of these sizes: {self}")
        return x // self.unit, y // self.unit

    def extended(self, count: Count, m: int, n: int, check: Count | None = None) -> Log:
        """What `count` of an m x n problem would be.

        Args:
            count: Of a small problem.
            m: Shorter side.
            n: Longer side.
            check: Counts one more small size first, which the polynomial has to foretell.

        Raises:
            ValueError: If it does not.
        """
        logs = {point: count(*self.at(point)) for point in self.points()}
        if check is not None:
            point = (self.degree + 1, 0) if self.square else (1, self.degree)
            self.compare(scaled(logs, self.degree, *point), check(*self.at(point)), point)
        return scaled(logs, self.degree, *self.of(m, n))

    def compare(self, found: Log, real: Log, point: Point) -> None:
        """All but ``other``, which counts lanes that are masked too, has to be equal."""
        for one, two in zip(found.works, real.works, strict=True):
            x, y = one.numbers(), two.numbers()
            far = abs(x.pop("other") - y.pop("other")) > 1000 + 0.01 * real.total("other")
            if x != y or far:
                raise ValueError(f"{one.name} is no polynomial at {self.at(point)}: {x}, not {y}")


# our steps, through the driver --------------------------------------------------------------------


@contextlib.contextmanager
def set_to(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of modules with other values for a while."""
    kept = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextlib.contextmanager
def as_on_a_device(kernels: str) -> Iterator[None]:
    """CPU tensors go the ways of an accelerator's: whole matrices, no panels, and a back end."""
    before = os.environ.get("STIEFEL_KERNELS")
    os.environ["STIEFEL_KERNELS"] = kernels
    try:
        with set_to(
            (write, "WRITE_PANEL", write.WRITE_PANEL_ACCELERATOR),
            (units, "MIN_TRANSPOSED_NUMEL", 2**62),
            (power_sums, "POWER_SUM_PANEL", 2**62),
            (reductions, "_PANEL_DEVICES", ()),
        ):
            yield
    finally:
        if before is None:
            del os.environ["STIEFEL_KERNELS"]
        else:
            os.environ["STIEFEL_KERNELS"] = before


@contextlib.contextmanager
def chosen_for(m: int, n: int) -> Iterator[None]:
    """What depends on the size is chosen for a small problem as for an m x n one on an H100.

    That is how many parts sums are split into, and whether Adam and its lift are one kernel.

    Raises:
        ValueError: While it is on, where the small problem cannot be split so.
    """
    from stiefel.kernels.triton import adam_lift

    subspace = importlib.import_module("stiefel.kernels.triton.project")

    real, fused = subspace._plan, adam_lift.on_chip

    def plan(P: Tensor, G: Tensor) -> tuple[Any, int, int]:
        K, rows, _ = G.shape
        large = G.new_empty(K, m, n, device="meta"), P.new_empty(K, m, P.shape[-1], device="meta")
        chosen, splits, _ = real(large[1], large[0])
        blocks = -(-rows // chosen.tile_sizes["BM"])
        length = -(-blocks // splits)
        if -(-blocks // length) != splits:
            raise ValueError(f"{rows} rows do not make {splits} splits: choose other small sizes")
        return chosen, splits, length * chosen.tile_sizes["BM"]

    def on_chip(W: Tensor, P: Tensor, r: int, sign: bool) -> bool:
        with set_to((adam_lift, "INTERPRETED", False)):
            return fused(W.new_empty(len(W), m, n, device="meta"), P, r, sign)

    count = [(module, "multiprocessors", lambda index: 132) for module in (adam_lift, subspace)]
    with set_to((subspace, "_plan", plan), (adam_lift, "on_chip", on_chip), *count):
        yield


@dataclass(frozen=True)
class Method:
    """An optimizer of ours and the plain step that it stands against.

    Attributes:
        name: Of its class.
        plain: Its key in ``PLAIN``.
        options: Keywords.
        rank: Of a subspace; 0 where there is none.
        degree: Of flops in the sides: 3 where the short side is multiplied with itself.
        side: Shorter side of the smallest weight that is run; a sum over one tile is no sum yet.
    """

    name: str
    plain: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    degree: int = 2
    side: int = UNIT

    def step(self, m: int, n: int, real: tuple[int, int] | None = None, lanes: int = LANES) -> Log:
        """What the third step of one m x n weight does, which makes no new basis.

        It stands for a weight of the sides `real`; `lanes` are those of `recorded`.
        """
        generator = torch.Generator().manual_seed(0)
        draw = {"generator": generator, "dtype": torch.float32}
        p = nn.Parameter(torch.randn(m, n, **draw).bfloat16())
        make = getattr(optimizers, self.name)
        optimizer = make([p], lr=1e-3, weight_decay=0.1, **self.options)
        p.grad = torch.randn(m, n, **draw).bfloat16()
        with Idle(), as_on_a_device("reference"):
            optimizer.step()
            optimizer._wait = False
            optimizer.step()
        choices = chosen_for(*sorted(real or (m, n)))
        with Idle(), as_on_a_device("triton"), choices, recorded(TARGET, True, lanes) as log:
            optimizer.step()
        return merged(log)

    def count(self, m: int, n: int, check: bool = False) -> Log:
        """The same of a weight of any size, extended; `check`: a size more, program by program."""
        tall, square = m > n, m == n
        sizes = Sizes(self.side, self.degree, square)

        def run(short: int, long: int, lanes: int = LANES) -> Log:
            return self.step(*((long, short) if tall else (short, long)), (m, n), lanes)

        alone = partial(run, lanes=1) if check else None
        return sizes.extended(run, min(m, n), max(m, n), alone)

    def plain_log(self, m: int, n: int) -> Log:
        """The same step in plain torch."""
        return watched(PLAIN[self.plain].step(m, n, self.rank))


def merged(log: Log) -> Log:
    """Torch operations of one name together behind the kernels: how many there are may vary."""
    found: dict[str, dict[str, int]] = {}
    for work in log.works:
        if not work.kernel:
            one = found.setdefault(work.name, {})
            for key, n in work.numbers().items():
                one[key] = one.get(key, 0) + n
    return Log([*log.kernels(), *(Work.of(name, False, found[name]) for name in sorted(found))])


def _ranked(name: str, plain: str, rank: int, key: str = "rank", **options: Any) -> Method:
    least = UNIT if name == "GaLore" else 2 * UNIT
    side = least if rank < UNIT else rank + UNIT
    return Method(name, plain, {key: rank, **options}, rank, side=side)


METHODS = {
    "GaLore r 128": _ranked("GaLore", "GaLore", 128),
    "GaLore r 1024": _ranked("GaLore", "GaLore", 1024),
    "Fira r 128": _ranked("Fira", "Fira", 128),
    "Fira r 1024": _ranked("Fira", "Fira", 1024),
    "FRUGAL columns 1/4": Method("FRUGAL", "FRUGAL columns", {"density": 0.25}),
    "FRUGAL svd r 128": _ranked("FRUGAL", "FRUGAL svd", 128, "density", split="svd"),
    "FRUGAL svd r 1024": _ranked("FRUGAL", "FRUGAL svd", 1024, "density", split="svd"),
    "Muon ns5": Method("Muon", "Muon", {"polar": "ns5", "polar_dtype": "bfloat16"}, degree=3),
    "Muon gram": Method("Muon", "Muon", {"polar": "gram", "polar_dtype": "float16"}, degree=3),
    "AuON": Method("AuON", "AuON"),
    "RowNorm": Method("RowNorm", "RowNorm"),
}


# single operations --------------------------------------------------------------------------------


def operation_logs(operation: Operation, rank: int) -> tuple[str, Log, Log]:
    """The size, and what the kernels and the plain operation of it do."""
    from stiefel.kernels import triton as kernels

    m, n = SQUARE if operation.square else WIDE_SHAPE

    def count(small_m: int, small_n: int) -> Log:
        run = operation.build(kernels, torch.zeros, small_m, small_n, rank)
        with chosen_for(m, n), recorded(TARGET, dry=True) as log:
            run()
        return merged(log)

    unit = UNIT // 2 if operation.square else UNIT
    ours = Sizes(unit, operation.degree, operation.square, unit).extended(count, m, n)
    plain = operation.build(reference, partial(torch.zeros, device="meta"), m, n, rank)
    return f"{m}x{n}", ours, watched(plain)


def operations(chosen: Sequence[str]) -> dict[str, Any]:
    """Per operation: size and figures."""
    found: dict[str, Any] = {}
    for name in chosen:
        for rank in OPERATIONS[name].ranks:
            size, *logs = operation_logs(OPERATIONS[name], rank)
            ours, plain = map(figures, logs)
            works = [numbers(work) for work in logs[0].works]
            m, n = map(int, size.split("x"))
            named = f"{name} r {rank}" if rank else name
            found[named] = {"entries": m * n, "ours": ours, "plain": plain, "works": works}
    return found


# tables -------------------------------------------------------------------------------------------


def figures(log: Log, times: int = 1) -> dict[str, Any]:
    """The numbers of a log, times as many."""
    moved, flops = log.total("moved") * times, log.total("flops") * times
    return {
        "flops": flops,
        "product_flops": sum(sum(work.products.values()) for work in log.works) * times,
        "bytes": moved,
        "issued_bytes": log.total("issued") * times,
        "intensity": flops / moved,
        "seconds": {
            name: times * sum(least(work, peaks) for work in log.works)
            for name, peaks in DEVICES.items()
        },
    }


def added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of several logs as one."""
    out: dict[str, Any] = {
        key: sum(part[key] for part in parts)
        for key in ("flops", "product_flops", "bytes", "issued_bytes")
    }
    seconds = {name: sum(part["seconds"][name] for part in parts) for name in DEVICES}
    return {**out, "intensity": out["flops"] / out["bytes"], "seconds": seconds}


def whole_steps(
    chosen: Sequence[str], layers: Mapping[tuple[int, int], int], checked: Sequence[str] = ()
) -> dict[str, Any]:
    """Per method: figures of the layer set, ours and plain, and per shape the logs' numbers."""
    found: dict[str, Any] = {}
    for name in chosen:
        method, shapes = METHODS[name], {}
        for (m, n), times in layers.items():
            print(f"  counting {name} {m}x{n}", file=sys.stderr, flush=True)
            logs = {"ours": method.count(m, n, name in checked), "plain": method.plain_log(m, n)}
            shapes[f"{m}x{n}"] = {
                "times": times,
                **{who: figures(log, times) for who, log in logs.items()},
                "works": {who: [numbers(work) for work in log.works] for who, log in logs.items()},
            }
        totals = {who: added([part[who] for part in shapes.values()]) for who in ("ours", "plain")}
        found[name] = {**totals, "shapes": shapes}
    return found


def numbers(work: Work) -> dict[str, Any]:
    """A line of the record."""
    return {"name": work.name, "kernel": work.kernel, **work.numbers()}


def _row(name: str, who: str, f: Mapping[str, Any], entries: int, ratio: str) -> list[str]:
    return [
        name, who, f"{f['flops'] / 1e12:.3g}", f"{f['bytes'] / 1e9:.3g}",
        f"{f['bytes'] / entries:.2f}", f"{f['issued_bytes'] / f['bytes']:.1f}", ratio,
        f"{f['intensity']:.2f}", *(f"{1e3 * f['seconds'][device]:.3g}" for device in DEVICES),
    ]  # fmt: skip


def figure_table(found: Mapping[str, Any], entries: int, what: str) -> str:
    """Ours and plain, of the layer set or of what has entries of its own."""
    head = [
        what, "", "TFLOP", "GB", "bytes/entry", "issued/bytes", "bytes, flops / plain's",
        "flop/byte", *(f"{name} ms" for name in DEVICES),
    ]  # fmt: skip
    rows = []
    for name, both in found.items():
        ours, plain, entries = both["ours"], both["plain"], both.get("entries", entries)
        ratio = f"{ours['bytes'] / plain['bytes']:.2f}, {ours['flops'] / plain['flops']:.2f}"
        rows += [_row(name, "ours", ours, entries, ratio), _row(name, "plain", plain, entries, "")]
    return markdown([head, *rows])


def detail_table(found: Mapping[str, Any]) -> str:
    """Every kernel and operation of every step, per entry of the weight."""
    rows = []
    for name, both in found.items():
        for shape, part in both["shapes"].items():
            m, n = map(int, shape.split("x"))
            for who in ("ours", "plain"):
                for work in part["works"][who]:
                    if work["read"] + work["written"] < m * n // 1000:
                        continue  # flags, norms, factors
                    products = sum(v for key, v in work.items() if key.startswith("product"))
                    cells = [work[key] / (m * n) for key in ("read", "written", "loaded", "stored")]
                    rows.append(
                        [
                            name, shape, who, f"{'' if work['kernel'] else 'torch '}{work['name']}",
                            *(f"{cell:.3g}" for cell in cells), f"{products / 1e9:.4g}",
                        ]
                    )  # fmt: skip
    head = ["step", "shape", "", "launch", "read", "written", "loaded", "stored", "product GFLOP"]
    return markdown([head, *rows])


def adamw_bytes() -> dict[str, float]:
    """Bytes per entry of torch's AdamW on bfloat16 weights, whose moments are bfloat16 too."""
    found = {}
    for way in ("foreach", "fused"):
        p = nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW([p], weight_decay=0.1, **{way: True})
        optimizer.step()
        found[way] = round(watched(optimizer.step).total("moved") / p.numel(), 2)
    return found


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Those that begin with what was asked for."""
    return [name for name in names if only is None or any(name.startswith(x) for x in only)]


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="beginnings of names of steps and operations")
    parser.add_argument("--shapes", nargs="+", help="shapes of the layers: 4096x4096 ...")
    parser.add_argument(
        "--check", nargs="*", help="of these steps, or all, count one more small size"
    )
    parser.add_argument("--detail", action="store_true", help="every launch of the steps")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    layers = {
        (m, n): times
        for (m, n), times in LAYERS.items()
        if not args.shapes or f"{m}x{n}" in args.shapes
    }
    entries = sum(m * n * times for (m, n), times in layers.items())
    names = chosen(list(METHODS), args.only)
    checked = [] if args.check is None else chosen(names, args.check or None)
    steps = whole_steps(names, layers, checked)
    single = operations(chosen(list(OPERATIONS), args.only))
    print("COUNTED" + __doc__.partition("COUNTED")[2])
    count = sum(layers.values())
    print(f"Whole steps of {count} matrices of LLaMA-7B, {entries / 1e9:.2f} G entries")
    print("\n" + figure_table(steps, entries, "step"))
    square, wide = ("x".join(map(str, shape)) for shape in (SQUARE, WIDE_SHAPE))
    print(f"\nSingle operations, {square} (Gram form) or {wide}")
    print("\n" + figure_table(single, 0, "operation"))
    fused = adamw_bytes()
    print(f"\nBytes per entry of torch.optim.AdamW, moments bfloat16 like the weights: {fused}")
    if args.detail:
        print(
            "\nBytes per entry of the weight, of what has 0.001 or more\n\n" + detail_table(steps)
        )
    if args.json:
        record = {"layers": {f"{m}x{n}": k for (m, n), k in layers.items()}, "adamw": fused}
        args.json.write_text(json.dumps({**record, "steps": steps, "operations": single}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
