"""Every kernel against what torch does, on the GPU at hand, and whether that is good enough.

    python bench/kernels.py                    everything, about ten minutes on a large GPU
    python bench/kernels.py --only gram lift   operations whose names hold one of these words
    python bench/kernels.py --quick            one size each
    python bench/kernels.py --out runs/kernels writes kernels.md and kernels.csv there
    python bench/kernels.py --probe            only says whether there is a GPU: 2 if not

"torch" is the best that plain torch does: matmul, addmm, baddbmm and few eager operations. Times
are medians by CUDA events; what is bound by memory finds an empty L2 cache. TF/s count whole
products, also where half of one is enough. Bytes are those of each operand once, of what is written
once, and of what has to be read again. "of bound" is the time that bytes and flops need at
the vendor's peaks, over the time that was taken. Products of float32 may be TF32, for both.

The exit status is 1 if a result is wrong or a figure is missed; all such are listed. Asked for:

- gram, symmetric_poly, symmetric_apply: 1.5 times as fast as torch from a side of 4096 on, never
  slower than 0.95 of it;
- passes over memory, from 2**22 entries on: 70 % of the bound;
- five steps on a 2048x8192 bfloat16 matrix: 1.25 times as fast as torch.

Without a GPU nothing is timed, and what the compilers make of every kernel is printed instead.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # before triton is imported

import operations
import torch
from peaks import PEAKS, Peaks
from plain import newton_schulz
from tables import markdown
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stiefel.kernels import polar_factor, reference
from stiefel.kernels.dispatch import GATES, triton_backend

SIDES, QUICK_SIDES = (512, 1024, 2048, 4096, 8192), (4096,)
ASPECTS, BATCHES = (1, 4), (1, 8, 32)
RANK = 128
MOST = 6 * 2**30
"""Bytes of the largest operand; larger problems are left out."""
WRONG = 3e-2
"""Largest difference of a result from torch's, over its largest entry."""
GAIN, LOSS, LARGE = 1.5, 0.95, 4096
SHARE, ENTRIES = 0.7, 2**22
STEPS_GAIN = 1.25
HALF = torch.bfloat16


# timers -------------------------------------------------------------------------------------------

Timer = Callable[[Callable[[], object], bool], float]
"""Seconds of one run; the flag asks for an empty cache."""


@dataclass(frozen=True)
class Events:
    """CUDA events around each run."""

    warm: int = 20
    repeats: int = 100

    def __call__(self, run: Callable[[], object], flush: bool) -> float:
        """The median."""
        cache = torch.empty(2**28 if flush else 0, dtype=torch.int8, device="cuda")
        for _ in range(self.warm):
            run()
        pairs = []
        for _ in range(self.repeats):
            cache.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3


@dataclass(frozen=True)
class Clock:
    """The wall clock, where a run ends when its call returns."""

    repeats: int = 3

    def __call__(self, run: Callable[[], object], flush: bool) -> float:
        """The median."""
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


# what is timed ------------------------------------------------------------------------------------

Run = Callable[[], object]
Made = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """An operation of both back ends.

    Attributes:
        build: Makes operands with ``new``, and a call on them: (ops, new, m, n, r).
        kind: ``"symmetric"``, ``"product"`` or ``"pass"``: what is asked of it.
        flops: Of one matrix, in (m, n, r), as whole products.
        single: Whether the products are of float32.
        again: How often the first operand has to be read again.
        square: Whether n is m.
        full: Whether r is m.
    """

    build: Callable[[Any, Made, int, int, int], Run]
    kind: str = "pass"
    flops: Callable[[int, int, int], float] = lambda m, n, r: 0.0
    single: bool = False
    again: int = 0
    square: bool = False
    full: bool = False


def _of(name: str, *shapes: str, **options: Any) -> Callable[..., Run]:
    """Builds the call of a function of float32 operands whose shapes are in letters."""

    def build(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
        sides = {"m": m, "n": n, "r": r, "1": 1}
        operands = [new(1, *(sides[letter] for letter in shape)) for shape in shapes]
        return partial(getattr(ops, name), *operands, **options)

    return build


def _row_step(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
    W, M, G = new(1, m, n, dtype=HALF), new(1, m, n), new(1, m, n, dtype=HALF)
    return partial(ops.row_step_, W, M, G, 0.95, 1e-8, "inverse_eps", 0.9, -0.1)


def _take(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
    S = new(1, m, n)
    index = torch.arange(0, n, n // r, dtype=torch.int32, device=S.device)[None, :r]
    return partial(ops.dct_take, S, index, -1)


def _twiddle(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
    V = torch.complex(*(new(1, m, n // 2 + 1) for _ in range(2)))
    return partial(ops.dct_twiddle, V, n, -1, "l2")


def _project(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
    G = new(1, m, n)
    index = torch.arange(0, m, m // r, dtype=torch.int32, device=G.device)[None, :r]
    return partial(ops.dct_project, G, index, -2)


def _powers(ops: Any, new: Made, m: int, n: int, r: int) -> Run:
    return partial(ops.momentum_power_sums_, new(1, m, n), new(1, m, n, dtype=HALF), 0.95, 2)


def _square(m: int, n: int, r: int) -> float:
    return 2.0 * m**3


def _wide(m: int, n: int, r: int) -> float:
    return 2.0 * m * m * n


def _thin(m: int, n: int, r: int) -> float:
    return 2.0 * m * n * r


def _thrice(m: int, n: int, r: int) -> float:
    return 4 * _thin(m, n, r)  # the sign needs the residual to float32: three products of TF32


OPERATIONS: Mapping[str, Operation] = {
    "gram": Operation(operations.gram, "symmetric", _wide),
    "symmetric_poly": Operation(operations.symmetric_poly, "symmetric", _square, square=True),
    "symmetric_apply": Operation(
        lambda ops, new, m, n, r: partial(
            ops.symmetric_apply, S := new(1, m, m, dtype=HALF), S, 1.5
        ),
        "symmetric", _square, square=True,
    ),
    "scale_and_apply": Operation(operations.scale_and_apply, "product", _wide),
    "normalized": Operation(operations.normalized, again=1),
    "cast_stack": Operation(_of("cast_stack", "mn", dtype=HALF)),
    "padded": Operation(_of("padded", "mn", dtype=HALF)),
    "project": Operation(operations.project, flops=_thin, single=True),
    "adam": Operation(operations.adam, full=True),
    "lift_": Operation(operations.lift, flops=_thin, single=True),
    "lift_ by X": Operation(operations.lift_by, flops=_thin, single=True),
    "lift_ sign": Operation(operations.lift_sign, flops=_thrice, single=True),
    "adam_lift_": Operation(operations.adam_lift, flops=_thin, single=True),
    "split_step_": Operation(operations.split_step),
    "momentum_step_": Operation(operations.momentum_step),
    "squares": Operation(operations.squares),
    "scaled_add_": Operation(operations.scaled_add),
    "power_sums": Operation(_of("power_sums", "mn", count=2)),
    "momentum_power_sums_": Operation(_powers),
    "row_norm": Operation(_of("row_norm", "mn")),
    "column_norm": Operation(_of("column_norm", "mn"), again=1),
    "row_step_": Operation(_row_step),
    "equal_rows": Operation(_of("equal_rows", "mn")),
    "sinkhorn": Operation(_of("sinkhorn", "mn"), again=11),
    "dct_reorder": Operation(_of("dct_reorder", "mn", dim=-1)),
    "dct_twiddle": Operation(_twiddle),
    "dct_untwiddle": Operation(_of("dct_untwiddle", "mn", dim=-1)),
    "dct_restore": Operation(_of("dct_restore", "mn", dim=-1)),
    "dct_project": Operation(_project, flops=_thin, single=True),
    "dct_take": Operation(_take),
}  # fmt: skip


def _normalized(X: Tensor, dtype: torch.dtype) -> Tensor:
    return (X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)


def plain() -> SimpleNamespace:
    """Plain torch: the reference, and shorter forms where that guards against overflow."""
    shorter = {
        "normalized": _normalized,
        "squares": lambda X, dim: X.square().sum(dim, keepdim=True),
        "row_norm": lambda X: X / X.norm(dim=-1, keepdim=True).add_(1e-8),
        "column_norm": lambda X: X / X.norm(dim=-2, keepdim=True).add_(1e-8),
    }
    return SimpleNamespace(**{**vars(reference), **shorter})


@dataclass(frozen=True)
class Job:
    """An operation at a size: K matrices m x n."""

    name: str
    K: int
    m: int
    n: int

    @property
    def operation(self) -> Operation:
        """What is done."""
        return OPERATIONS[self.name]

    @property
    def shape(self) -> str:
        """As it stands in the table."""
        return f"{self.K}x{self.m}x{self.n}" if self.K > 1 else f"{self.m}x{self.n}"

    @property
    def rank(self) -> int:
        """The rank of its subspace."""
        return self.m if self.operation.full else min(RANK, self.m)


def jobs(
    sides: Sequence[int] = SIDES,
    aspects: Sequence[int] = ASPECTS,
    batches: Sequence[int] = BATCHES,
    only: Sequence[str] = (),
) -> Iterator[Job]:
    """All of them. Passes over memory take one matrix: to them a stack is a longer one."""
    for name, operation in OPERATIONS.items():
        if only and not any(word in name for word in only):
            continue
        for m in sides:
            for aspect in aspects[:1] if operation.square else aspects:
                for K in batches[:1] if operation.kind == "pass" else batches:
                    if 2 * K * m * m * aspect <= MOST:
                        yield Job(name, K, m, m * aspect)


def operands(device: str, K: int = 1, seed: int = 0) -> Made:
    """Makes the same stacks of K in every run: entries from 0 to 1, square matrices symmetric."""
    generator = torch.Generator(device).manual_seed(seed)

    def new(one: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        X = torch.rand(K * one, *shape, generator=generator, device=device).to(dtype)
        return (X + X.mT) / 2 if len(shape) == 2 and shape[0] == shape[1] else X

    return new


# how it is timed and judged -----------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """What came of a job: seconds, flops, bytes, and the largest relative difference."""

    name: str
    shape: str
    seconds: float
    torch: float
    flops: float
    bytes: float
    bound: float
    error: float
    missed: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast as torch."""
        return self.torch / self.seconds

    @property
    def share(self) -> float:
        """The part of the bound that is reached; NaN where no peaks are known."""
        return self.bound / self.seconds


HEAD = (
    "operation",
    "shape",
    "us",
    "torch us",
    "x torch",
    "TF/s",
    "GB/s",
    "of bound",
    "error",
    "missed",
)


def cells(figure: Figure) -> list[str]:
    """A row of the table."""
    share = "" if math.isnan(figure.share) else f"{figure.share:.0%}"
    return [
        figure.name, figure.shape, f"{figure.seconds * 1e6:.1f}", f"{figure.torch * 1e6:.1f}",
        f"{figure.ratio:.2f}", f"{figure.flops / figure.seconds / 1e12:.1f}",
        f"{figure.bytes / figure.seconds / 1e9:.0f}", share, f"{figure.error:.1e}", figure.missed,
    ]  # fmt: skip


def tensors(value: object) -> list[Tensor]:
    """All tensors in a nest of arguments or results."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def size(X: Tensor) -> int:
    """Bytes of a tensor's entries."""
    return X.numel() * X.element_size()


def first_runs(ours: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor], int]:
    """What two calls on equal operands give and change, and the bytes neither can help to move."""
    mine, given = tensors((ours.args, ours.keywords)), tensors((theirs.args, theirs.keywords))
    results = tensors(theirs())
    changed = [i for i, (X, Y) in enumerate(zip(mine, given, strict=True)) if not X.equal(Y)]
    once = {id(X): X for X in given}.values()
    moved = sum(map(size, [*once, *(given[i] for i in changed), *results]))
    found = [*tensors(ours()), *(mine[i] for i in changed)]
    return found, [*results, *(given[i] for i in changed)], moved


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest, over the largest entry of the same tensor. NaN and holes are infinite."""
    worst = 0.0
    for X, Y in zip(ours, theirs, strict=True):
        X, Y = (torch.view_as_real(Z) if Z.is_complex() else Z for Z in (X, Y))
        for x, y in zip(X, Y, strict=True):  # one matrix at a time, as copies are wider
            x, y = x.to(torch.float32), y.to(torch.float32)
            error = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def measured(job: Job, ours: Any, timer: Timer, device: str, peaks: Peaks | None) -> Figure:
    """Run a job of both back ends, compare what they give, time them, judge it."""
    operation, r = job.operation, job.rank
    run, plainly = (
        operation.build(ops, operands(device, job.K), job.m, job.n, r) for ops in (ours, plain())
    )
    found, expected, moved = first_runs(run, plainly)
    error = difference(found, expected)
    del found, expected
    moved += operation.again * size(tensors(run.args)[0])
    flops = job.K * operation.flops(job.m, job.n, r)
    flush = operation.kind == "pass"
    taken, torchs = timer(run, flush), timer(plainly, flush)
    bound = least(flops, moved, operation.single, peaks)
    figure = Figure(job.name, job.shape, taken, torchs, flops, moved, bound, error)
    return judged(figure, job)


def least(flops: float, moved: float, single: bool, peaks: Peaks | None) -> float:
    """Seconds that a device cannot do without."""
    if peaks is None:
        return math.nan
    product = peaks.single if single else peaks.half
    return max(flops / product, moved / peaks.memory) / 1e12


def judged(figure: Figure, job: Job) -> Figure:
    """With what it misses."""
    kind = job.operation.kind
    gain = GAIN if job.m >= LARGE else LOSS
    is_used = kind == "symmetric" and job.m >= GATES["symmetric"].least
    short = is_used and figure.ratio < gain
    slow = kind == "pass" and job.m * job.n >= ENTRIES and figure.share < SHARE
    found = {
        f"differs from torch by {figure.error:.1e}": not figure.error <= WRONG,
        f"{figure.ratio:.2f} of torch's speed, not {gain}": short,
        f"{figure.share:.0%} of the bound, not {SHARE:.0%}": slow,
    }
    return _missing(figure, [text for text, wrong in found.items() if wrong])


def _missing(figure: Figure, missed: Sequence[str]) -> Figure:
    return Figure(**{**vars(figure), "missed": "; ".join(missed)})


def all_measured(
    which: Iterable[Job], ours: Any, timer: Timer, device: str, peaks: Peaks | None
) -> Iterator[Figure]:
    """Figures of all jobs; one that fails does not keep the others from being timed."""
    for job in which:
        try:
            yield measured(job, ours, timer, device, peaks)
        except Exception as error:
            nothing = Figure(job.name, job.shape, *[math.nan] * 6)
            yield _missing(nothing, [f"{type(error).__name__}: {str(error).strip()[:200]}"])


def five_steps(timer: Timer, device: str, shape: tuple[int, int] = (2048, 8192)) -> list[Figure]:
    """The polar factor of a bfloat16 matrix in five steps, against torch in eager mode."""
    m, n = shape
    X = operands(device)(1, m, n)[0].sub_(0.5).to(HALF)

    def eager() -> Tensor:
        return newton_schulz(X / X.norm().clamp(min=1e-7))

    figures = []
    for method in ("ns5", "gram"):
        ours = partial(polar_factor, X, method)
        error = difference([ours()[None]], [eager()[None]]) if method == "ns5" else 0.0
        flops = 20.0 * m * m * n + 10.0 * m**3
        figure = Figure(
            f"polar_factor, {method}", f"{m}x{n}", timer(ours, False), timer(eager, False), flops,
            4.0 * m * n, math.nan, error,
        )  # fmt: skip
        slow = method == "ns5" and figure.ratio < STEPS_GAIN
        missed = [f"{figure.ratio:.2f} of torch's speed, not {STEPS_GAIN}"] if slow else []
        missed += [f"differs from torch by {error:.1e}"] if not error <= 3 * WRONG else []
        figures.append(_missing(figure, missed))
    return figures


# the report ---------------------------------------------------------------------------------------


def report(figures: Sequence[Figure], out: Path | None, device: str) -> int:
    """Print and write the table and what is missed; the exit status."""
    lines = [list(HEAD), *map(cells, figures)]
    missed = [f"{x.name} {x.shape}: {x.missed}" for x in figures if x.missed]
    verdict = (
        f"{len(missed)} of {len(figures)} figures are missed:" if missed else "None is missed."
    )
    text = "\n".join(
        [f"{device}, torch {torch.__version__}", "", markdown(lines), "", verdict, *missed]
    )
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.md").write_text(text + "\n")
        with (out / "kernels.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return 1 if missed else 0


def static_report(only: Sequence[str]) -> int:
    """What is known without a GPU."""
    import compiled

    names = compiled.chosen(only) or compiled.chosen()
    wanted = [compiled.key(name, arch) for name in names for arch in compiled.TARGETS]
    known = compiled.stored() or {}
    rows = {name: known[name] for name in wanted if name in known}
    print(compiled.markdown(rows if len(rows) == len(wanted) else compiled.measured(names)))
    print(
        "\nNo GPU was found, so nothing was timed: this is what the compilers make of each kernel."
    )
    return 0


def peaks_of(device: str, given: Sequence[float] | None) -> Peaks | None:
    """The peaks of a device of this name."""
    if given:
        half, single, memory = given
        return Peaks(half, single, single, memory)
    return next((peaks for name, peaks in PEAKS.items() if name in device), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--quick", action="store_true", help="one size each")
    parser.add_argument("--out", type=Path, help="folder for kernels.md and kernels.csv")
    parser.add_argument("--probe", action="store_true", help="only look for a GPU")
    parser.add_argument(
        "--peaks", nargs=3, type=float, metavar=("TF", "TF32", "TB"),
        help="of a GPU that the table does not have: dense bfloat16 and TF32 TF/s, TB/s",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        if args.probe:
            print("No GPU was found: run this where torch.cuda.is_available() is true.")
            return 2
        return static_report(args.only)
    device = torch.cuda.get_device_name()
    if args.probe:
        print(device)
        return 0
    peaks = peaks_of(device, args.peaks)
    if peaks is None:
        parser.error(f"the peaks of {device} are not known: pass --peaks")
    torch.backends.cuda.matmul.allow_tf32 = True
    sizes = (QUICK_SIDES, (1,), (1,)) if args.quick else (SIDES, ASPECTS, BATCHES)
    ours: ModuleType = triton_backend()
    figures = []
    for figure in all_measured(jobs(*sizes, only=args.only), ours, Events(), "cuda", peaks):
        figures.append(figure)
        print(*cells(figure), flush=True)
    if not args.only or any(word in "polar_factor" for word in args.only):
        figures += five_steps(Events(), "cuda")
    return report(figures, args.out, device)


if __name__ == "__main__":
    sys.exit(main())
