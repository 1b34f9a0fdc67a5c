"""What ``gpu.py`` times: products, polar factors, fused steps, steps of a whole model, cosines.

Everything is compared with plain torch beside it, and judged by ``ASKED``.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_checks import DELAY, NEVER, Place, back_end
from gpu_work import Job, Row
from peaks import PEAKS, Peaks
from plain import PLAIN, newton_schulz
from torch import Tensor, nn
from torch.optim import Optimizer

HALF = torch.bfloat16
ASKED = {
    "symmetric at 4096": 1.6,
    "symmetric where it is used": 1.0,
    "iteration": 1.35,
    "gram from aspect 4": 2.0,
    "24 matrices of 1024x4096, ms": 7.0,
    "fused low-rank step": 2.0,
    "fused step": 1.0,
    "training step / AdamW's": 1.04,
    "host, ms": 1.0,
    "cosines as chosen": 0.95,
}
"""Speeds as multiples of plain torch's, or times at most: figures to beat on an H200."""
Run = Callable[[], object]


# the clock ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Times runs that take turns; in a dry run it counts instead.

    Attributes:
        place: Where.
        seconds: How long a comparison may take.
        most: Turns at most.
    """

    place: Place
    seconds: float = 0.6
    most: int = 50

    def __call__(self, *runs: Run, flush: bool = True, warm: int = 3) -> list[float]:
        """The median seconds of each run."""
        if self.place.dry:
            return [counted(run) for run in runs]
        for run in runs * warm:
            run()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for run in runs:
            run()
        torch.cuda.synchronize()
        once = time.perf_counter() - begun
        cache = torch.empty(2**28 if flush else 0, dtype=torch.int8, device="cuda")
        rounds = max(5, min(self.most, int(self.seconds / max(once, 1e-5))))
        events = [[_between(run, cache) for run in runs] for _ in range(rounds)]
        torch.cuda.synchronize()
        times = [[start.elapsed_time(stop) / 1e3 for start, stop in pairs] for pairs in events]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def _between(run: Run, cache: Tensor) -> tuple[Any, Any]:
    cache.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # type: ignore[no-untyped-call]
    run()
    stop.record()  # type: ignore[no-untyped-call]
    return start, stop


def counted(run: Run) -> float:
    """One, and what a spoilt kernel says that it took."""
    before = DELAY[0]
    run()
    return 1.0 + 100 * (DELAY[0] - before)


def peaks(place: Place) -> Peaks | None:
    """The vendor's peaks of this GPU."""
    name = "" if place.dry else torch.cuda.get_device_name()
    return next((peaks for key, peaks in PEAKS.items() if key in name), None)


def judged(place: Place, name: str, figures: dict[str, Any], asked: str, value: float) -> Row:
    """A row, slow if a speed is less than what is asked for."""
    least = (0.5 if place.dry else 1.0) * ASKED[asked] if asked else 0.0
    if place.dry and asked:
        least = min(least, 0.5)
    text = f"{value:.2f} x torch, {ASKED[asked]} is asked for" if asked else ""
    return Row(name, figures, slow="" if value >= least else text)


def ready(place: Place) -> Any:
    """The kernels, and products of float32 that may be TF32, for both sides."""
    torch.backends.cuda.matmul.allow_tf32 = True
    return place.kernels()


def random(place: Place, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normal numbers: a product of zeros would be faster."""
    return torch.randn(*shape, device=place.device).to(dtype)


# symmetric products against torch's --------------------------------------------------------------

SIDES, DRY_SIDES = (512, 1024, 1536, 2048, 3072, 4096, 8192), (16,)
SHAPES = {"1": (1, 1), "1, batch 8": (1, 8), "4": (4, 1)}
"""Aspect and batch of Gram matrices."""


def products(place: Place) -> list[Job]:
    """Symmetric products at every size, whatever the gates say."""
    sides = DRY_SIDES if place.dry else SIDES
    return [
        (f"{kind} {m}", partial(_products, place, kind, m))
        for m in sides
        for kind in ("gram", "symmetric_poly")
    ]


def _products(place: Place, kind: str, m: int) -> list[Row]:
    from stiefel.kernels.dispatch import is_worthwhile

    ours, rows, clock = ready(place), [], Clock(place, 0.4)
    for label, (aspect, K) in (SHAPES if kind == "gram" else {"1": (1, 1)}).items():
        if K * m * m * aspect > 2**29:
            continue
        X = random(place, K, m, m * aspect)
        if kind == "gram":
            runs = [partial(ours.gram, X), partial(torch.bmm, X, X.mT)]
        else:
            S = ours.gram(X / m**0.5)
            whole = partial(torch.baddbmm, S, S, S, beta=-4.775, alpha=2.0315)
            runs = [partial(ours.symmetric_poly, S, -4.775, 2.0315), whole]
        taken, theirs = clock(*runs, flush=False)
        used = place.dry or is_worthwhile(X, "symmetric")
        asked = "symmetric where it is used" if used else ""
        if used and m == 4096:
            asked = "symmetric at 4096"
        figures = {
            "side": m, "aspect": label, "us": 1e6 * taken, "torch us": 1e6 * theirs,
            "x torch": theirs / taken, "TF/s": 2 * K * m**3 * aspect / taken / 1e12,
            "used": used,
        }  # fmt: skip
        rows.append(judged(place, f"{kind} {m}, aspect {label}", figures, asked, theirs / taken))
    return rows


def gates(rows: Sequence[Row]) -> list[Row]:
    """From which side on symmetric kernels are no slower than torch, and what the table says."""
    from stiefel.kernels.dispatch import GATES

    speeds: dict[int, float] = {}
    for row in rows:
        if "side" in row.figures:
            side = row.figures["side"]
            speeds[side] = min(speeds.get(side, math.inf), row.figures["x torch"])
    last = max((side for side, speed in speeds.items() if speed < 1.0), default=0)
    above = [side for side in sorted(speeds) if side > last]
    found = f"from a side of {above[0]} on" if above else "at no side that was timed"
    text = f"gate: symmetric kernels are no slower than torch {found}"
    return [Row("symmetric", {"gate": f"{text}; the table says {GATES['symmetric'].least}"})]


# polar factors ------------------------------------------------------------------------------------

METHODS = ("ns5", "ns5_tuned", "polar_express", "gram", "turbo")


def polar(place: Place) -> list[Job]:
    """Whole iterations by five methods, Gram forms by aspect, and 24 matrices at once."""
    m = 16 if place.dry else 4096
    methods = METHODS[::4] if place.dry else METHODS
    jobs: list[Job] = [(x, partial(_iteration, place, x, m, m)) for x in methods]
    small = 8 if place.dry else 2048
    for aspect in (4,) if place.dry else (1, 2, 3, 4, 6):
        jobs.append((f"gram, aspect {aspect}", partial(_aspect, place, small, aspect)))
    return [*jobs, ("24 matrices of 1024x4096", partial(_layer, place))]


def _iteration(place: Place, method: str, m: int, n: int) -> list[Row]:
    from stiefel.kernels import polar_factor

    ready(place)
    X = random(place, m, n)

    def plain() -> Tensor:
        return newton_schulz(X / X.norm().clamp(min=1e-7))

    with back_end("triton" if place.dry else "auto"):
        taken, theirs = Clock(place)(partial(polar_factor, X, method), plain, flush=False)
    asked = "iteration" if method == "ns5" else ""
    figures = {"ms": 1e3 * taken, "torch ms": 1e3 * theirs, "x torch": theirs / taken}
    return [judged(place, f"{method} {m}x{n}", figures, asked, theirs / taken)]


def _aspect(place: Place, m: int, aspect: int) -> list[Row]:
    from stiefel.kernels import polar_factor

    ready(place)
    X = random(place, m, m * aspect)
    gram = partial(polar_factor, X, "gram", dtype=torch.float16)
    with back_end("triton" if place.dry else "auto"):
        taken, theirs = Clock(place)(gram, partial(polar_factor, X, "ns5"), flush=False)
    asked = "gram from aspect 4" if aspect >= 4 else ""
    figures = {"ms": 1e3 * taken, "ns5 ms": 1e3 * theirs, "x ns5": theirs / taken}
    row = judged(place, f"gram {m}x{m * aspect}, aspect {aspect}", figures, asked, theirs / taken)
    row.slow = row.slow.replace("x torch", "x ns5")
    return [row]


def _layer(place: Place) -> list[Row]:
    from stiefel.kernels import polar_factor

    ready(place)
    X = random(place, *((2, 8, 32) if place.dry else (24, 1024, 4096)))
    runs = [partial(polar_factor, X, method) for method in ("ns5", "gram")]
    with back_end("triton" if place.dry else "auto"):
        times = [1e3 * seconds for seconds in Clock(place)(*runs, flush=False)]
    most = ASKED["24 matrices of 1024x4096, ms"]
    late = f"{min(times):.1f} ms, {most} is asked for" if min(times) > most else ""
    figures = dict(zip(("ns5 ms", "gram ms"), times, strict=True))
    return [Row("24 matrices of 1024x4096", figures, slow="" if place.dry else late)]


# fused steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of one weight, ours and in plain torch.

    Attributes:
        cls: Name of our class.
        plain: Name in ``plain.PLAIN``.
        options: Of our class.
        asked: Name in ``ASKED``.
        entry: Bytes that any step moves for each entry of the weight.
        inside: The same for each entry of the projected gradient.
    """

    cls: str
    plain: str
    options: Mapping[str, Any]
    asked: str
    entry: int
    inside: int = 0


FUSED = {
    "GaLore": Step("GaLore", "GaLore", NEVER, "fused low-rank step", 6, 16),
    "Fira": Step("Fira", "Fira", NEVER, "fused low-rank step", 8, 16),
    "FRUGAL columns": Step("FRUGAL", "FRUGAL columns", NEVER, "fused low-rank step", 10),
    "FRUGAL svd": Step("FRUGAL", "FRUGAL svd", {**NEVER, "split": "svd"}, "fused step", 8, 16),
    "AuON": Step("AuON", "AuON", {}, "fused step", 14),
    "RowNorm": Step("RowNorm", "RowNorm", {}, "fused step", 14),
}
"""Weights and gradients are bfloat16: 2 + 2 to write, 2 to read G once; state is float32."""
RANK = 128


def optimizer_of(cls: str, params: list[Any], options: Mapping[str, Any]) -> Optimizer:
    """An optimizer of ours, with the options that it knows."""
    import inspect

    import stiefel.optimizers

    made = getattr(stiefel.optimizers, cls)
    known = inspect.signature(made.__init__).parameters
    found: Optimizer = made(params, **{k: x for k, x in options.items() if k in known or k == "lr"})
    return found


def steps(place: Place) -> list[Job]:
    """Every fused step on one large weight."""
    return [(name, partial(_step, place, name)) for name in FUSED]


def _step(place: Place, name: str) -> list[Row]:
    step = FUSED[name]
    m, n, r = (8, 32, 4) if place.dry else (4096, 11008, RANK)
    p = nn.Parameter(random(place, m, n))
    p.grad = random(place, m, n)
    options = {"lr": 1e-3, "weight_decay": 0.1, "rank": r, **step.options}
    if step.options.get("split") == "svd":
        options["density"] = r / m
    ready(place)
    optimizer = optimizer_of(step.cls, [p], options)
    with back_end("triton" if place.dry else "auto"):
        optimizer.step()  # finds the basis
        plain = PLAIN[step.plain].step(m, n, r, place.device)
        taken, theirs = Clock(place)(optimizer.step, plain)
    known = peaks(place)
    moved = step.entry * m * n + step.inside * r * n + (4 * m * r if step.inside else 0)
    bound = moved / known.memory / 1e12 if known else math.nan
    figures = {
        "ms": 1e3 * taken, "torch ms": 1e3 * theirs, "x torch": theirs / taken,
        "of the bytes' limit": bound / taken,
    }  # fmt: skip
    return [judged(place, f"{name} {m}x{n}", figures, step.asked, theirs / taken)]


# whole steps of a model ---------------------------------------------------------------------------

LAYERS = {(2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16}
"""A LLaMA of 1B parameters, 16 layers: q and o; k and v; gate and up; down."""
DRY_LAYERS = {(16, 16): 1, (32, 16): 1}
TOKENS = 16384
"""Tokens of the training step beside which a step of an optimizer is put."""
OURS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Muon": ("Muon", {"polar": "ns5"}),
    "Muon gram": ("Muon", {"polar": "gram"}),
    "GaLore": ("GaLore", {"rank": 256, "projection": "random", **NEVER}),
    "Fira": ("Fira", {"rank": 256, "projection": "random", **NEVER}),
    "FRUGAL": ("FRUGAL", NEVER),
    "AuON": ("AuON", {}),
    "RowNorm": ("RowNorm", {}),
}
"""Random bases, as the time of a step does not depend on the basis, and 112 ``eigh`` take long."""


def layers(place: Place) -> list[Job]:
    """Every optimizer on all matrices of the model, and what training without one costs."""
    names = ("Muon",) if place.dry else tuple(OURS)
    return [(name, partial(_model, place, name)) for name in names]


def weights(place: Place) -> list[Any]:
    """The matrices of the model, with gradients."""
    made = []
    for (m, n), count in (DRY_LAYERS if place.dry else LAYERS).items():
        for _ in range(count):
            made.append(nn.Parameter(random(place, m, n).div_(n**0.5)))
            made[-1].grad = random(place, m, n)
    return made


def training_products(place: Place) -> Run:
    """The products of a training step: forward, and both gradients of every matrix."""
    tokens = 8 if place.dry else TOKENS
    shapes = DRY_LAYERS if place.dry else LAYERS
    parts = [
        (random(place, tokens, n), random(place, tokens, m), random(place, m, n), count)
        for (m, n), count in shapes.items()
    ]

    def run() -> None:
        for X, Y, W, count in parts:
            for _ in range(count):
                torch.mm(X, W.mT)
                torch.mm(Y, W)
                torch.mm(Y.mT, X)

    return run


def allocated(place: Place) -> tuple[int, int]:
    """Bytes now, and at most since the last call."""
    if place.dry:
        return 0, 0
    torch.cuda.synchronize()
    found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def host_seconds(place: Place, run: Run) -> float:
    """Until a call returns, with nothing before it that it could wait for."""
    times = []
    for _ in range(1 if place.dry else 7):
        place.wait()
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    place.wait()
    return statistics.median(times)


def _model(place: Place, name: str) -> list[Row]:
    gc.collect()
    ready(place)
    cls, options = OURS[name]
    params = weights(place)
    before, _ = allocated(place)
    dry = {"rank": 4} if place.dry else {}
    optimizer = optimizer_of(cls, params, {"lr": 1e-3, **options, **dry})
    with back_end("triton" if place.dry else "auto"):
        optimizer.step()  # makes state and bases
        state, at_first = allocated(place)
        optimizer.step()
        _, peak = allocated(place)
        host = host_seconds(place, optimizer.step)
        adamw = torch.optim.AdamW(params, lr=1e-3, fused=not place.dry)
        runs = [optimizer.step, adamw.step, training_products(place)]
        if name.startswith("Muon"):
            runs.append(torch.optim.Muon(params, lr=1e-3).step)
        taken, adamws, training, *others = Clock(place, 2.0, 10)(*runs, flush=False, warm=1)
    whole = (training + taken) / (training + adamws)
    figures = {
        "ms": 1e3 * taken, "AdamW fused ms": 1e3 * adamws,
        "torch Muon ms": 1e3 * others[0] if others else "", "products ms": 1e3 * training,
        "training step / AdamW's": whole, "host ms": 1e3 * host,
        "state GB": (state - before) / 1e9, "temporary GB": (peak - state) / 1e9,
        "temporary GB, first": (at_first - state) / 1e9,
    }  # fmt: skip
    limits = {"training step / AdamW's": whole, "host, ms": 1e3 * host}
    found = [f"{key} {x:.2f}, {ASKED[key]} is asked for" for key, x in limits.items()
             if x > ASKED[key]]  # fmt: skip
    return [Row(name, figures, slow="" if place.dry else "; ".join(found))]


# cosine transforms --------------------------------------------------------------------------------


def cosines(place: Place) -> list[Job]:
    """Transforms of rows by both paths."""
    sides = (16,) if place.dry else (256, 1024, 2048, 4096, 8192)
    return [(f"dct {n}", partial(_cosine, place, n)) for n in sides]


def _cosine(place: Place, n: int) -> list[Row]:
    from stiefel.kernels import dct, dct_path

    ready(place)
    X = random(place, n, n, dtype=torch.float32)
    with back_end("triton" if place.dry else "auto"):
        runs = [partial(dct, X, -1, path) for path in ("fft", "matmul")]
        fft, product = Clock(place)(*runs)
    chosen = dct_path(n, place.device)
    speed = product / fft if chosen == "fft" else fft / product
    known = peaks(place)
    bound = 8 * n * n / known.memory / 1e12 if known else math.nan
    figures = {
        "fft ms": 1e3 * fft, "product ms": 1e3 * product, "chosen": chosen,
        "of the bytes' limit": bound / min(fft, product),
    }  # fmt: skip
    row = judged(place, f"dct {n}x{n}", figures, "cosines as chosen", speed)
    row.slow = row.slow.replace("x torch", "x the other path")
    return [row]
