"""What ``gpu.py`` checks: kernels, optimizers, waits, graphs, and the tests of the kernels.

Jobs are made without touching the GPU, and run in processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_work import ROOT, Job, Row
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

HALF = torch.bfloat16
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference from float64 over the largest entry: about two digits of the dtype."""
TOLERANCE_SINGLE = 1e-4
SPOILT = "gram"
"""The kernel that ``--plant`` makes wrong or slow."""


def sweep() -> Any:
    """The module ``bench/kernels.py``, whose name is that of a folder."""
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench" / "kernels.py")
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


@dataclass(frozen=True)
class Place:
    """Where things run.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        dry: Whether kernels are interpreted, on small matrices.
        plant: "wrong" or "slow" for a spoilt kernel, else "".
    """

    device: str
    dry: bool
    plant: str = ""

    def kernels(self) -> Any:
        """The back end of kernels, one of which is spoilt if that was asked for."""
        from stiefel.kernels import triton

        plain = getattr(triton, SPOILT)
        if self.plant and not hasattr(plain, "is_spoilt"):
            setattr(triton, SPOILT, spoilt(plain, self.plant))
        return triton

    def wait(self) -> None:
        """Wait for the GPU, if there is one."""
        if not self.dry:
            torch.cuda.synchronize()


DELAY = [0.0]
"""Seconds that a spoilt kernel says it has taken, in a dry run."""


def spoilt(kernel: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    """A kernel of which one entry is wrong, or which takes its time."""

    def run(X: Tensor, *args: Any, **options: Any) -> Tensor:
        S = kernel(X, *args, **options)
        if how == "wrong":
            S[..., -1, -1] *= 1.1
        elif X.is_cuda:
            torch.cuda._sleep(10**7)
        DELAY[0] += float(how == "slow")
        return S

    run.is_spoilt = True  # type: ignore[attr-defined]
    return run


# the device ---------------------------------------------------------------------------------------


def device(dry: bool) -> list[Job]:
    """What runs here."""
    return [("device", partial(_device, dry))]


def _device(dry: bool) -> list[Row]:
    import triton

    import stiefel.kernels

    assert stiefel.kernels.__file__ is not None
    if Path(stiefel.kernels.__file__).resolve().parent.parent != ROOT:
        raise RuntimeError(f"stiefel is not that of this checkout: {stiefel.kernels.__file__}")
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("no GPU")
    name = "dry run, kernels interpreted" if dry else torch.cuda.get_device_name()
    text = f"{name}, torch {torch.__version__}, triton {triton.__version__}"
    return [Row("device", {"device": text, "python": sys.version.split()[0]})]


# kernels against float64 --------------------------------------------------------------------------

SIZES = ((257, 700), (1000, 1501), (1024, 4096), (2048, 5461))
"""Ragged ones, ones of whole tiles, and both size classes of tiles."""
DRY_SIZES = ((9, 20),)


def numerics(place: Place) -> list[Job]:
    """Every kernel at every size."""
    return [
        (f"{name} {m}x{n}", partial(_numerics, place, name, m, n))
        for m, n in (DRY_SIZES if place.dry else SIZES)
        for name in sweep().OPERATIONS
    ]


def _numerics(place: Place, name: str, m: int, n: int) -> list[Row]:
    from stiefel.kernels import reference

    bench = sweep()
    operation = bench.OPERATIONS[name]
    K = 1 if operation.kind == "pass" else 2
    job = bench.Job(name, K, m, m if operation.square else n)
    new = bench.operands(place.device, K)
    ours = operation.build(place.kernels(), new, job.m, job.n, job.rank)
    exact = operation.build(reference, doubled(place, K), job.m, job.n, job.rank)
    # operands too: those that it changes, and those that it must not
    found, expected = ([*tensors(x()), *tensors((x.args, x.keywords))] for x in (ours, exact))
    return [compared(f"{name} {job.shape}", found, expected)]


def doubled(place: Place, K: int) -> Callable[..., Tensor]:
    """Makes the operands of ``sweep().operands`` in float64, with the values that they have."""
    new = sweep().operands(place.device, K)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        X: Tensor = new(*shape, dtype=dtype)
        return X.double()

    return made


def compared(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    """How far tensors are from what they should be, over the largest entry of each."""
    worst, allowed = 0.0, 1.0
    for X, Y in zip(found, expected, strict=True):
        tolerance = TOLERANCE.get(X.dtype, TOLERANCE_SINGLE)
        error = difference(X, Y)
        if not error / tolerance <= worst / allowed:
            worst, allowed = error, tolerance
    text = f"off by {worst:.1e} of the largest entry, not {allowed:.0e}"
    return Row(name, {"error": worst}, wrong="" if worst <= allowed else text)


def difference(X: Tensor, Y: Tensor) -> float:
    """The largest, over the largest entry; infinite if X has NaN where Y has none."""
    if X.numel() == 0:
        return 0.0
    X, Y = (torch.view_as_real(Z) if Z.is_complex() else Z for Z in (X, Y))
    X, Y = X.double(), Y.to(X.device).double()
    error = float((X - Y).abs().max() / Y.abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


# optimizers on the GPU against the CPU ------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An optimizer that does the same on a GPU and on a CPU but for rounding.

    Attributes:
        name: Of the class.
        options: What keeps methods and precisions alike on both.
        tolerance: Of the change of a weight.
        rank: Name of the option that is a third of the shorter side, if any.
    """

    name: str
    options: Mapping[str, Any]
    tolerance: float = 1e-2
    rank: str = ""

    def make(self, params: list[Any], side: int, **more: Any) -> Optimizer:
        """The optimizer of parameters whose shortest side is this."""
        import stiefel.optimizers

        options = {"lr": 0.02, "weight_decay": 0.1, **self.options, **more}
        if self.rank:
            options[self.rank] = max(1, side // 3)
        if self.name in ("AltLoRA", "AdaPreLoRA"):
            pairs = list(zip(params[::2], params[1::2], strict=True))
            params = stiefel.optimizers.pairs_to_groups(pairs, scale=2.0)
        found: Optimizer = getattr(stiefel.optimizers, self.name)(params, **options)
        return found


SINGLE = {"polar": "ns5", "polar_dtype": "float32"}
ADAM = {"update_proj_gap": 3, "eps": 1e-6}
"""A larger eps keeps round-off of an entry near zero from becoming a full step."""
CASES = {
    "Muon": Case("Muon", SINGLE),
    "Muon gram": Case("Muon", {**SINGLE, "polar": "gram"}),
    "Muon normuon": Case("Muon", {**SINGLE, "second_moment": "normuon", "cautious": False}),
    "Muon in half precision": Case("Muon", {"polar": "ns5"}, 5e-2),
    "GaLore": Case("GaLore", ADAM, rank="rank"),
    "GaLore power": Case("GaLore", {**ADAM, "projection": "power"}, rank="rank"),
    "GaLore dct": Case("GaLore", {**ADAM, "projection": "dct"}, rank="rank"),
    "Fira": Case("Fira", ADAM, rank="rank"),
    "APOLLO": Case("APOLLO", ADAM, rank="rank"),
    "FRUGAL columns": Case("FRUGAL", {"update_gap": 3, "eps": 1e-6}),
    "FRUGAL rows": Case("FRUGAL", {"update_gap": 3, "eps": 1e-6, "split": "rows"}),
    "AuON": Case("AuON", {}),
    "RowNorm": Case("RowNorm", {}),
    "RowNorm of columns": Case("RowNorm", {"axis": "cols"}),
    "Spectral": Case("Spectral", {"polar": "svd"}),
    "Hybrid": Case("Hybrid", {"polar": "svd"}),
    "ARO": Case("ARO", {}, 5e-2),
    "SinkGD": Case("SinkGD", {}),
    "DCTAdamW": Case("DCTAdamW", ADAM, rank="rank"),
    "Trion": Case("Trion", {"polar": "svd"}, rank="rank"),
    "AltLoRA": Case("AltLoRA", {}),
    "AdaPreLoRA": Case("AdaPreLoRA", {}),
}
"""Signs of residuals and bounded steps of FRUGAL by SVD turn round-off into steps: not here."""
SHAPES = ((300, 400), (400, 300), (300, 400), (96, 600))
DRY_SHAPES = ((12, 24), (24, 12))
PAIR_SHAPES = ((16, 400), (300, 16))
DRY_PAIR_SHAPES = ((2, 12), (9, 2))
STEPS = 5
BAD_STEP, BAD = 1, 0
"""Where a gradient has a NaN: between the refreshes, which are at steps 0, 2 (3 for some), ..."""
DRY_CASES = ("Muon", "GaLore", "AltLoRA")


def chosen_cases(place: Place) -> list[str]:
    """Names of cases."""
    return [name for name in CASES if not place.dry or name in DRY_CASES]


def shapes_of(place: Place, case: Case) -> Sequence[tuple[int, int]]:
    """Shapes of the weights of a case."""
    if case.name in ("AltLoRA", "AdaPreLoRA"):
        return DRY_PAIR_SHAPES if place.dry else PAIR_SHAPES
    return DRY_SHAPES if place.dry else SHAPES


def optimizers(place: Place) -> list[Job]:
    """Every case, in float32 and, in its own numbers, in bfloat16 on large weights."""
    return [(name, partial(_optimizer, place, name)) for name in chosen_cases(place)]


def drawn(shapes: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    """Weights or gradients whose singular values fall, made on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for m, n in shapes:
        k = min(m, n)
        U, V = (torch.linalg.qr(torch.randn(side, k, generator=draw))[0] for side in (m, n))
        found.append(U * torch.arange(1, k + 1) ** -0.5 @ V.mT)
    return found


def trained(place: Place, case: Case, where: str) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Weights before and after some steps, their clocks, and what was skipped."""
    shapes = shapes_of(place, case)
    params = [nn.Parameter(W.to(where)) for W in drawn(shapes, 0)]
    before = [p.detach().cpu().clone() for p in params]
    optimizer = case.make(params, min(map(min, shapes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a gradient is not finite is meant
        for step in range(STEPS):
            for i, (p, G) in enumerate(zip(params, drawn(shapes, 100 + step), strict=True)):
                G[0, 0] = math.nan if (step, i) == (BAD_STEP, BAD) else G[0, 0]
                p.grad = G.to(where)
            optimizer.step()
        skipped = optimizer.skipped  # type: ignore[attr-defined]
    clocks = [optimizer.state[p].get("step") for p in params]
    return before, [p.detach().cpu() for p in params], clocks, skipped


@contextlib.contextmanager
def back_end(name: str) -> Iterator[None]:
    """Kernels, or plain torch, for a while."""
    before = os.environ.get("STIEFEL_KERNELS")
    os.environ["STIEFEL_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("STIEFEL_KERNELS")
        if before is not None:
            os.environ["STIEFEL_KERNELS"] = before


def _optimizer(place: Place, name: str) -> list[Row]:
    case, rows = CASES[name], []
    place.kernels()
    with back_end("reference"):
        before, expected, *states = trained(place, case, "cpu")
    for kind in ("triton",) if place.dry else ("auto", "triton"):
        with back_end(kind):
            _, found, *others = trained(place, case, place.device)
        worst = max(
            float((X - Y).abs().max() / (Y - W).abs().max())
            for W, X, Y in zip(before, found, expected, strict=True)
        )
        texts = [f"off by {worst:.1e} of the change"] if not worst <= case.tolerance else []
        texts += [f"clocks and skips {others}, not {states}"] if others != states else []
        rows.append(Row(f"{name}, {kind}", {"error": worst}, wrong="; ".join(texts)))
    return rows


# no wait for the GPU ------------------------------------------------------------------------------


def waits(place: Place) -> list[Job]:
    """Plain steps, which must not wait for the GPU."""
    names = chosen_cases(place)[:: 2 if place.dry else 1]
    return [(name, partial(_waits, place, name)) for name in names]


NEVER = {"update_proj_gap": 10**6, "update_gap": 10**6}
"""No refresh after the first step: those may wait."""


def _waits(place: Place, name: str) -> list[Row]:
    case = CASES[name]
    shapes = shapes_of(place, case)
    params = [nn.Parameter(W.to(place.device)) for W in drawn(shapes, 0)]
    rare: dict[str, Any] = {key: gap for key, gap in NEVER.items() if key in case.options}
    if case.options.get("polar") == "svd":  # which waits, and is there to be like the CPU's
        rare["polar"] = "ns5"
    kind = "triton" if place.dry else "auto"
    with back_end(kind):
        optimizer = case.make(params, min(map(min, shapes)), **rare)
        for p, G in zip(params, drawn(shapes, 1), strict=True):
            p.grad = G.to(place.device)
        for _ in range(2):
            optimizer.step()
        place.wait()
        with no_waits(place):
            optimizer.step()
            optimizer.step()
    return [Row(name)]


@contextlib.contextmanager
def no_waits(place: Place) -> Iterator[None]:
    """What waits for the GPU raises."""
    if place.dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# graphs -------------------------------------------------------------------------------------------


def graphs(place: Place) -> list[Job]:
    """Every kernel inside a graph, polar factors, and steps that are replayed."""
    m, n = (9, 20) if place.dry else (512, 1024)
    names = list(sweep().OPERATIONS)[:: 9 if place.dry else 1]
    jobs = [(name, partial(_graph, place, name, m, n)) for name in names]
    methods = ("ns5", "gram") if not place.dry else ("ns5",)
    jobs += [(f"polar {x}", partial(_polar_graph, place, x, m, n)) for x in methods]
    names = CAPTURED[:1] if place.dry else CAPTURED
    return jobs + [(f"steps of {x}", partial(_captured_steps, place, x)) for x in names]


def replayed(place: Place, run: Any) -> Any:
    """What a partial call gives as a graph replays it; the call itself in a dry run."""
    if place.dry:
        return run()
    given = tensors((run.args, run.keywords))
    kept = {X.untyped_storage().data_ptr() for X in given}  # results may be operands
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    for X in tensors(results):
        if X.untyped_storage().data_ptr() not in kept:
            X.fill_(0 if X.dtype == torch.int32 else math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return results


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest."""
    return [X for X in tree_leaves(value) if isinstance(X, Tensor)]


def _graph(place: Place, name: str, m: int, n: int) -> list[Row]:
    bench, ours = sweep(), place.kernels()
    operation = bench.OPERATIONS[name]
    job = bench.Job(name, 1, m, m if operation.square else n)
    made = [
        operation.build(ours, bench.operands(place.device), job.m, job.n, job.rank)
        for _ in range(3)
    ]
    made[0]()  # compiled before anything is captured
    expected = [*tensors(made[1]()), *tensors((made[1].args, made[1].keywords))]
    given = tensors((made[2].args, made[2].keywords))
    results = tensors(replayed(place, made[2]))
    return [compared(name, [*results, *given], expected)]


def _polar_graph(place: Place, method: str, m: int, n: int) -> list[Row]:
    from stiefel.kernels import polar_factor

    place.kernels()
    X = drawn([(m, n)], 0)[0].to(place.device)
    kind = "triton" if place.dry else "auto"
    with back_end(kind):
        expected = polar_factor(X, method)
        found = replayed(place, partial(polar_factor, X, method))
    return [compared(f"polar {method}", [found.clone()], [expected])]


CAPTURED = ("GaLore", "Muon", "Muon gram", "Fira", "APOLLO", "FRUGAL columns", "AuON", "RowNorm",
            "Trion", "DCTAdamW")  # fmt: skip


def _captured_steps(place: Place, name: str) -> list[Row]:
    with back_end("triton" if place.dry else "auto"):
        plain, replayed = (_scheduled(place, CASES[name], flag) for flag in (False, True))
    return [compared(f"steps of {name}", replayed, plain)]


def _scheduled(place: Place, case: Case, capturable: bool) -> list[Tensor]:
    """Weights after steps at a falling learning rate, over a refresh; replayed if capturable."""
    place.kernels()
    shapes = shapes_of(place, case)
    params = [nn.Parameter(W.to(place.device)) for W in drawn(shapes, 0)]
    for p in params:
        p.grad = torch.zeros_like(p)
    more = {"polar": "ns5"} if case.options.get("polar") == "svd" else {}
    optimizer: Any = case.make(params, min(map(min, shapes)), capturable=capturable, **more)
    graph = None
    for step in range(3 if place.dry else 8):
        for p, G in zip(params, drawn(shapes, 100 + step), strict=True):
            assert p.grad is not None
            p.grad.copy_(G)
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        if graph is not None and optimizer.prepare_replay():
            graph.replay()
        else:
            optimizer.step()
        if capturable and step == 1 and not place.dry:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
    place.wait()
    return [p.detach() for p in params]


# the tests of the kernels -------------------------------------------------------------------------

TEST_SECONDS = 150


def tests(place: Place, out: Path | None, until: float) -> list[Job]:
    """The tests of ``tests/kernels/interpreted``, on compiled kernels."""
    return [("tests/kernels/interpreted", partial(_tests, place, out, until))]


def _tests(place: Place, out: Path | None, until: float) -> list[Row]:
    folder = "tests/kernels/interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "STIEFEL_DEVICE": place.device}
    if place.dry:
        command += [f"{folder}/test_symmetric.py", "-k", "empty"]
    else:
        environment.pop("TRITON_INTERPRET", None)
        command.append(folder)
        command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    limit = until - time.monotonic() if place.dry else min(TEST_SECONDS, until - time.monotonic())
    seconds = max(1.0, limit - 5)  # pytest ends before us
    with open(os.devnull if out is None else out / "tests.txt", "w") as file:
        try:
            done = subprocess.run(
                command, env=environment, stdout=file, stderr=file, check=False, cwd=ROOT,
                timeout=seconds,
            )  # fmt: skip
            text = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            text = f"not done within {seconds:.0f} s"
    return [Row(folder, wrong=f"{text}, see tests.txt" if text else "")]
