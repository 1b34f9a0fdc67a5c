"""The table of cases: who competes, on which shapes, and which ratio has which target."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.optim._muon as torch_muon
from torch import Tensor
from torch.optim import Optimizer

from stiefel.kernels import polar_factor, polar_report
from stiefel.optimizers import Dense, Direction, GaLore, Member, Muon, Rule, StackedOptimizer
from stiefel.optimizers.projectors import top_basis

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from allocations import AllocationCounter
from peers import Missing, galore_torch_adamw

Shape = tuple[int, ...]
Maker = Callable[[list[Any]], Optimizer]
"""From parameters to an optimizer on them."""
Swap = Callable[[], contextlib.AbstractContextManager[None]]
"""A context that holds during a step, such as a replaced function of a peer."""
NEVER = 10**9
"""Steps between refreshes, for cases that time the steps between them."""
POOL = 3
"""Gradients made beforehand and cycled."""


# --- What a case is made of ---


class Competitor(Protocol):
    """Something whose ``run`` is timed; ``prepare(i)`` comes before it, untimed."""

    def prepare(self, i: int) -> None:
        """Make round i ready."""

    def run(self) -> None:
        """The timed call."""


@dataclass(frozen=True)
class Ratio:
    """A weighted sum of times over another one, taken in each round, and its target.

    Attributes:
        name: What the table prints.
        top: Weight of each competitor's time above the line.
        bottom: The same below.
        target: The median ratio must not be above it; None: only shown.
    """

    name: str
    top: Mapping[str, float]
    bottom: Mapping[str, float]
    target: float | None = None


@dataclass(frozen=True)
class Figure:
    """A number that is not a time; its target is an upper limit as for ratios."""

    name: str
    value: float
    target: float | None = None
    unit: str = ""


@dataclass
class Contest:
    """One set of competitors on the same shapes.

    Attributes:
        competitors: Their makers by name; the runner calls them, in an order of its own.
        ratios: What is reported.
        skipped: Why a competitor is missing.
    """

    competitors: dict[str, Callable[[], Competitor]]
    ratios: list[Ratio]
    skipped: list[str] = field(default_factory=list)

    def ratio(self, name: str, top: str, bottom: str, target: float | None = None) -> None:
        """Add the ratio of two competitors, if both are there."""
        if top in self.competitors and bottom in self.competitors:
            self.ratios.append(Ratio(name, {top: 1.0}, {bottom: 1.0}, target))


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        title: One line for the reader.
        contests: Makes the timed contests; True asks for tiny shapes.
        figures: Makes numbers that are no times.
        floor: Least number of rounds.
        seconds: Time after which no further round begins once the floor is reached.
        builds: How often the competitors are made anew; rounds of all builds are pooled. A pass
            over memory is faster or slower by 15 % depending on where its tensors happened to
            land, for as long as they live, so one build says little about such a step.
    """

    title: str
    contests: Callable[[bool], Iterator[Contest]] = lambda quick: iter(())
    figures: Callable[[bool], Iterator[Figure]] = lambda quick: iter(())
    floor: int = 15
    seconds: float = 20.0
    builds: int = 1


# --- Shapes, gradients, competitors ---


def decaying(shape: Shape, generator: torch.Generator) -> Tensor:
    """A gradient whose singular values fall like 1/i: A diag(1/i) B with Gaussian A and B."""
    if len(shape) == 1:
        return torch.randn(shape, generator=generator)
    k = min(shape)
    w = 1.0 / torch.arange(1, k + 1)
    A, B = (torch.randn(side, generator=generator) for side in ((shape[0], k), (k, shape[1])))
    G: Tensor = (A * w) @ B / shape[1] ** 0.5
    return G


@lru_cache(maxsize=2)
def pool_of(shapes: tuple[Shape, ...]) -> list[list[Tensor]]:
    """A few sets of gradients, the same for every competitor; nobody writes into them."""
    generator = torch.Generator().manual_seed(0)
    return [[decaying(shape, generator) for shape in shapes] for _ in range(POOL)]


class Step:
    """An optimizer on weights of its own; ``swap`` is a context that holds during its steps."""

    def __init__(
        self,
        make: Maker,
        shapes: Sequence[Shape],
        pool: list[list[Tensor]],
        warm: int = 2,
        swap: Swap = contextlib.nullcontext,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        ]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.pool, self.optimizer, self.swap = pool, make(self.params), swap
        for i in range(warm):
            self.prepare(i)
            self.run()

    def prepare(self, i: int) -> None:
        """Fresh gradients, copied: each competitor then finds its own in the same state."""
        for p, G in zip(self.params, self.pool[i % POOL], strict=True):
            assert p.grad is not None
            p.grad.copy_(G)

    def run(self) -> None:
        """One step."""
        with self.swap():
            self.optimizer.step()


class Call:
    """A function of the round's gradients."""

    def __init__(self, fn: Callable[[list[Tensor]], Any], pool: list[list[Tensor]]) -> None:
        self.fn, self.pool, self.grads = fn, pool, [G.clone() for G in pool[0]]
        self.run()

    def prepare(self, i: int) -> None:
        """Fresh gradients."""
        for G, new in zip(self.grads, self.pool[i % POOL], strict=True):
            G.copy_(new)

    def run(self) -> None:
        """One call."""
        self.fn(self.grads)


# --- Peers ---


def peer(module: str, name: str) -> Any:
    """An attribute of an installed package."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Missing(f"{module}.{name} is not there: {error}") from error


def published_galore(rank: int, gap: int) -> Maker:
    """Constructor of galore_torch's AdamW at its README's settings."""
    cls = galore_torch_adamw()
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return lambda params: cls(
        [{"params": params, **keys}], weight_decay=0.1, no_deprecation_warning=True
    )


def pytorch_optimizer_galore(rank: int, gap: int) -> Maker:
    """Constructor of pytorch_optimizer's GaLore."""
    cls = peer("pytorch_optimizer", "GaLore")
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "projection_type": "std"}
    return lambda params: cls([{"params": params, **keys}], weight_decay=0.1)


def ours_galore(rank: int, gap: int) -> Maker:
    """Constructor of this package's GaLore."""
    return lambda params: GaLore(params, rank=rank, update_proj_gap=gap, weight_decay=0.1)


GALORES = {
    "galore_torch": published_galore,
    "pytorch_optimizer": pytorch_optimizer_galore,
}


# --- 1, 2: GaLore ---


def two_products(shape: Shape, rank: int) -> Callable[[list[Tensor]], Tensor]:
    """The products that no GaLore step can do without: project, and lift into the weight."""
    m, n = shape
    W = torch.randn(m, n)
    left = m < n
    P = torch.linalg.qr(torch.randn(min(m, n), rank)).Q.contiguous()
    N = torch.randn(rank, n) if left else torch.randn(m, rank)

    def fn(grads: list[Tensor]) -> Tensor:
        if left:
            torch.mm(P.mT, grads[0])
            return W.addmm_(P, N, beta=0.9999, alpha=-1e-4)
        torch.mm(grads[0], P)
        return W.addmm_(N, P.mT, beta=0.9999, alpha=-1e-4)

    return fn


def galore_step(quick: bool) -> Iterator[Contest]:
    """Steps between refreshes, on a wide and on a tall weight."""
    rank = 4 if quick else 256
    for shape in ((32, 64), (64, 32)) if quick else ((1024, 4096), (4096, 1024)):
        pool = pool_of((shape,))
        name = f"{shape[0]}x{shape[1]}"
        contest = Contest(
            {
                "ours": partial(Step, ours_galore(rank, NEVER), [shape], pool),
                "two products": partial(Call, two_products(shape, rank), pool),
            },
            [],
        )
        contest.ratio(f"{name} ours / two products", "ours", "two products", 1.10)
        for other, make in GALORES.items():
            try:
                contest.competitors[other] = partial(Step, make(rank, NEVER), [shape], pool)
            except Missing as why:
                contest.skipped.append(f"{other}: {why}")
            contest.ratio(f"{name} ours / {other}", "ours", other, 1.0)
        yield contest


def galore_refresh(quick: bool) -> Iterator[Contest]:
    """A new basis against the thin SVD, and what it makes of the mean step."""
    shape, rank = ((32, 64), 4) if quick else ((1024, 4096), 256)
    pool = pool_of((shape,))
    contest = Contest(
        {
            "top_basis": partial(Call, lambda grads: top_basis(grads[0][None], rank, "svd"), pool),
            "thin SVD": partial(
                Call, lambda grads: torch.linalg.svd(grads[0], full_matrices=False), pool
            ),
            "ours, step": partial(Step, ours_galore(rank, NEVER), [shape], pool),
            "two products": partial(Call, two_products(shape, rank), pool),
        },
        [],
    )
    contest.ratio("top_basis / thin SVD", "top_basis", "thin SVD", 0.15)
    mean = {"ours, step": 1.0, "top_basis": 1 / 200}
    contest.ratios.append(
        Ratio("mean step, refresh every 200 / two products", mean, {"two products": 1.0})
    )
    try:
        make = published_galore(rank, NEVER)
        contest.competitors["galore_torch, step"] = partial(Step, make, [shape], pool)
        theirs = {"galore_torch, step": 1.0, "thin SVD": 1 / 200}
        contest.ratios.append(
            Ratio("mean step, refresh every 200 / galore_torch's", mean, theirs, 1.0)
        )
    except Missing as why:
        contest.skipped.append(f"galore_torch: {why}")
    yield contest


# --- 3: Muon ---


def float32_newton_schulz(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """The iteration of torch.optim.Muon in float32: bfloat16 is emulated on many CPUs."""
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    X = grad.float()
    X = X / X.norm().clamp(min=eps)
    X = X.mT if tall else X
    for _ in range(ns_steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module replaced for the length of the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def torch_float32() -> contextlib.AbstractContextManager[None]:
    """torch.optim.Muon with a float32 iteration."""
    return replaced(torch_muon, "_zeropower_via_newtonschulz", float32_newton_schulz)


def pytorch_optimizer_muon() -> tuple[Maker, Swap]:
    """pytorch_optimizer's Muon; the dtype of its iteration is no option, so it is swapped in."""
    cls = peer("pytorch_optimizer", "Muon")
    base = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    name = "zero_power_via_newton_schulz_5"
    fn = partial(peer(base.__name__, name), dtype=torch.float32)
    return (
        lambda params: cls([{"params": params, "use_muon": True}], weight_decay=0.1),
        lambda: replaced(base, name, fn),
    )


def optimuon_muon() -> tuple[Maker, Swap]:
    """optimuon's Muon; ns_dtype=None iterates in the weights' dtype."""
    cls = peer("optimuon", "Muon")
    return lambda params: cls(params, weight_decay=0.1, ns_dtype=None), contextlib.nullcontext


MUONS = {"pytorch_optimizer": pytorch_optimizer_muon, "optimuon": optimuon_muon}


def muon_step(quick: bool) -> Iterator[Contest]:
    """A transformer's matrices: squares, wide and tall ones."""
    d, count = (16, 1) if quick else (512, 6)
    shapes: list[Shape] = [
        *[(d, d)] * (2 * count),
        *[(d, 4 * d)] * count,
        *[(4 * d, d)] * count,
    ]
    pool = pool_of(tuple(shapes))
    contest = Contest(
        {
            "ours": partial(Step, partial(Muon, weight_decay=0.1), shapes, pool),
            "ours, ns5": partial(Step, partial(Muon, weight_decay=0.1, polar="ns5"), shapes, pool),
            "torch": partial(
                Step,
                partial(torch.optim.Muon, weight_decay=0.1),
                shapes,
                pool,
                swap=torch_float32,
            ),
        },
        [],
    )
    contest.ratio("ours / torch (float32)", "ours", "torch", 0.42)
    contest.ratio("ours with ns5 / torch (float32)", "ours, ns5", "torch")
    for name, find in MUONS.items():
        try:
            maker, swap = find()
            contest.competitors[name] = partial(Step, maker, shapes, pool, swap=swap)
        except Missing as why:
            contest.skipped.append(f"{name}: {why}")
        contest.ratio(f"ours / {name} (float32)", "ours", name, 1.0)
    yield contest


def spectra(m: int, n: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices m x n whose singular values fall as gradients' do."""
    generator = torch.Generator().manual_seed(2)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, m, generator=generator)).Q
    i = torch.arange(m)
    yield "1/i", (U / (i + 1)) @ V.mT
    yield "geometric to 1e-7", (U * 10.0 ** (-7 * i / (m - 1))) @ V.mT
    r = max(1, m // 8)
    noise = torch.randn(m, n, generator=generator) * (0.01 / n**0.5)
    yield f"rank {r} plus noise", U[:, :r] @ V[:, :r].mT + noise


def muon_quality(quick: bool) -> Iterator[Figure]:
    """What the speed costs: alignment deficit and largest singular value of the direction."""
    d = 16 if quick else 512
    for shape in ((d, d), (d, 4 * d)):
        for spectrum, M in spectra(*shape):
            for method in ("zolo", "ns5"):
                report = polar_report(M, polar_factor(M, method))
                name = f"{shape[0]}x{shape[1]}, {spectrum}, {method}:"
                yield Figure(f"{name} d_A", report.alignment_deficit)
                yield Figure(f"{name} ||O||_2", report.operator_norm)


# --- 4, 5: AdamW and overhead ---

FLAGS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def adamw_parity(quick: bool) -> Iterator[Contest]:
    """The AdamW parameters of this package against torch.optim.AdamW."""
    models: dict[str, list[Shape]] = {
        "one matrix": [(32, 64) if quick else (1024, 4096)],
        "vectors": [(512,)] * (4 if quick else 200),
    }
    for model, shapes in models.items():
        pool = pool_of(tuple(shapes))
        for flag, options in FLAGS.items():

            def ours(params: list[Any], options: dict[str, Any] = options) -> Optimizer:
                groups = [{"params": params, "rule": "adamw"}]
                return GaLore(groups, weight_decay=0.1, **options)

            def theirs(params: list[Any], options: dict[str, Any] = options) -> Optimizer:
                return torch.optim.AdamW(params, weight_decay=0.1, **options)

            contest = Contest(
                {
                    "ours": partial(Step, ours, shapes, pool),
                    "torch": partial(Step, theirs, shapes, pool),
                },
                [],
            )
            contest.ratio(f"{model}, {flag}: ours / torch", "ours", "torch", 1.05)
            yield contest


@dataclass(frozen=True)
class ZeroRule(Rule):
    """Does nothing: what is left of its step is the driver."""

    def update(self, w: Member) -> Direction:
        """A direction of zeros."""
        assert w.grad is not None
        return w.step(Dense(torch.zeros_like(w.grad)))


def overhead(quick: bool) -> Iterator[Contest]:
    """Many small matrices, where arithmetic is nothing and Python is all."""
    shapes: list[Shape] = [(8, 8)] * (6 if quick else 200)
    pool = pool_of(tuple(shapes))
    contest = Contest(
        {
            "driver": partial(
                Step, lambda p: StackedOptimizer(p, ZeroRule(), 1e-3, 0.1), shapes, pool
            ),
            "Muon": partial(Step, partial(Muon, weight_decay=0.1), shapes, pool),
            "GaLore": partial(Step, ours_galore(4, NEVER), shapes, pool),
            "AdamW fused": partial(
                Step, partial(torch.optim.AdamW, weight_decay=0.1, fused=True), shapes, pool
            ),
        },
        [],
    )
    contest.ratio("zero rule / AdamW fused", "driver", "AdamW fused", 1.2)
    contest.ratio("Muon / AdamW fused", "Muon", "AdamW fused")
    contest.ratio("GaLore rank 4 / AdamW fused", "GaLore", "AdamW fused")
    yield contest


# --- 6: memory ---


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Tensors in a state: in dicts, in sequences, and in the projector objects of peers."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors_in(value)
    elif hasattr(x, "__dict__"):
        yield from tensors_in(vars(x))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all storages that the state keeps alive, each counted once; scalars left out."""
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for x in tensors_in(entry)
        if x.dim() > 0
    }
    return sum(storages.values())


def peak_of(step: Step, i: int) -> int:
    """Peak bytes allocated during one step."""
    step.prepare(i)
    with AllocationCounter() as counter:
        step.run()
    return int(counter.peak)


def held(quick: bool) -> Iterator[Figure]:
    """State of each optimizer on one matrix against its formula, in float32."""
    m, n, r = (32, 64, 4) if quick else (1024, 4096, 256)
    formulas = {"GaLore": r * m + 2 * r * n, "Muon": m * n, "AdamW": 2 * m * n}
    for name, step in memory_steps((m, n), r):
        held_now = state_bytes(step.optimizer)
        yield Figure(f"state, {name}", held_now / 2**20, unit="MiB")
        if name in formulas:
            yield Figure(f"state / formula, {name}", held_now / (4 * formulas[name]), 1.0)


def temporaries(quick: bool) -> Iterator[Figure]:
    """Peak bytes allocated in a step, and in one that refreshes, in units of what is bounded."""
    m, n, r = (32, 64, 4) if quick else (1024, 4096, 256)
    for name, step in memory_steps((m, n), r):
        # With a refresh at every second update one of two steps has it; it needs more, not less.
        low, high = sorted(peak_of(step, i) for i in (2, 3))
        yield Figure(f"temporaries, {name}", low / 2**20, unit="MiB")
        limit = 5.0 if name == "Muon" else None
        yield Figure(f"temporaries, {name}", low / (4 * m * n), limit, "matrices")
        if "GaLore" in name:
            yield Figure(f"temporaries, {name}", low / (4 * r * n), unit="r x n buffers")
            yield Figure(f"temporaries, {name}, refresh", high / 2**20, unit="MiB")
            yield Figure(f"temporaries, {name}, refresh", high / (4 * m * n), unit="matrices")


def memory_steps(shape: Shape, r: int) -> Iterator[tuple[str, Step]]:
    """Optimizers on one matrix, after two updates."""
    makers: dict[str, Maker] = {
        "GaLore": ours_galore(r, 2),
        "Muon": partial(Muon, weight_decay=0.1),
        "AdamW": lambda p: GaLore([{"params": p, "rule": "adamw"}], weight_decay=0.1),
        "torch AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
        "torch AdamW fused": partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
        "torch Muon": partial(torch.optim.Muon, weight_decay=0.1),
    }
    for name, make in GALORES.items():
        with contextlib.suppress(Missing):
            makers[f"GaLore of {name}"] = make(r, 2)
    pool = pool_of((shape,))
    for name, maker in makers.items():
        yield name, Step(maker, [shape], pool, swap=torch_float32)


def memory(quick: bool) -> Iterator[Figure]:
    """State and temporaries."""
    yield from held(quick)
    yield from temporaries(quick)


CASES: dict[str, Case] = {
    "galore-step": Case("GaLore between refreshes, rank 256", galore_step, seconds=8.0, builds=3),
    "galore-refresh": Case("a new basis, rank 256", galore_refresh, floor=5, seconds=60.0),
    "muon-step": Case(
        "Muon on 12 of 512x512, 6 of 512x2048, 6 of 2048x512",
        muon_step,
        muon_quality,
        floor=7,
        seconds=60.0,
    ),
    "adamw-parity": Case(
        "AdamW parameters against torch.optim.AdamW", adamw_parity, seconds=2.0, builds=9
    ),
    "overhead": Case("200 matrices of 8x8", overhead, floor=61, seconds=4.0, builds=3),
    "memory": Case("one matrix of 1024x4096, rank 256", figures=memory),
}
