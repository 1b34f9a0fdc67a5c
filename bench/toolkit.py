"""What the toolkit's pieces cost beside each other, for the figures in docstrings and notes.

    python bench/toolkit.py                     subspaces, stacks, transforms, a plan made anew
    python bench/toolkit.py --only stack        one of them
    python bench/toolkit.py --quick             tiny shapes: does it run at all

Times are medians of paired ratios in one process; one thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stiefel.kernels import dct
from stiefel.optimizers import GaLore, Muon, StackedOptimizer
from stiefel.optimizers._driver import units
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS, make_projector
from stiefel.optimizers._toolkit.random_keys import StackRNG

Run = Callable[[], object]


def ratios(runs: dict[str, Run], to: str, rounds: int) -> dict[str, float]:
    """Median over rounds of each one's time over that of ``to``; the first round warms up."""
    pairs: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        times = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name] = time.perf_counter() - start
        if i:
            for name in runs:
                pairs[name].append(times[name] / times[to])
    return {name: statistics.median(values) for name, values in pairs.items()}


def subspaces(quick: bool) -> None:
    """A refresh as a ratio to a thin SVD, and the share of the SVD's energy that it keeps."""
    m, n, r = (32, 64, 8) if quick else (1024, 4096, 256)
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, m, generator=draw)).Q for k in (m, n))
    s = torch.arange(1, m + 1) ** -0.5
    G = ((U * s) @ V.mT)[None]
    best = s[:r].square().sum()
    runs: dict[str, Run] = {"thin SVD": lambda: torch.linalg.svd(G[0], full_matrices=False)}
    kept = {}
    for kind in (*PROJECTION_KINDS, "range:8,0", "range:8,2"):
        P = make_projector(kind)
        slots = P.slots(m, r)
        state = {
            name: torch.zeros(1, *slot.shape(m, n), dtype=slot.dtype or torch.float32)  # type: ignore[arg-type]
            for name, slot in slots.items()
        }
        find = partial(P.find, G, rng=StackRNG(0, (0,), 1))
        P.install(state, find(*P.state_tensors(state)))
        if kind.startswith("power"):
            for _ in range(2):  # warm
                P.install(state, find(*P.state_tensors(state)))
        kept[kind] = float(P.project(state, G).square().sum() / best)
        runs[kind] = partial(find, *P.state_tensors(state))
    print(f"refresh / thin SVD and kept energy, {m}x{n}, rank {r}, singular values i^-0.5")
    for name, ratio in ratios(runs, "thin SVD", 1 if quick else 5).items():
        print(f"  {name:<12} {ratio:8.4f}   {kept.get(name, 1.0):.2f}")


MODELS = {
    "28 of width 96": [(96, 96)] * 16 + [(256, 96)] * 8 + [(96, 256)] * 4,
    "16 of 128x128": [(128, 128)] * 16,
    "8 of 128x344": [(128, 344)] * 8,
}
METHODS: dict[str, Callable[[list[nn.Parameter]], StackedOptimizer]] = {
    "Muon": Muon,
    "GaLore": partial(GaLore, rank=24, update_proj_gap=10**9),
}


def made(name: str, shapes: Sequence[tuple[int, int]]) -> StackedOptimizer:
    """An optimizer past its first step."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer = METHODS[name](params)
    optimizer.step()
    return optimizer


def stack(quick: bool) -> None:
    """A step with other limits of stacking, as a ratio to 2**13 elements."""
    kept = units.MAX_STACKED_NUMEL["cpu"]
    print("step / step with a limit of 2^13 elements")
    for model, shapes in MODELS.items():
        for name in METHODS:
            runs: dict[str, Run] = {}
            for power in (13, 14, 15, 16):
                units.MAX_STACKED_NUMEL["cpu"] = 2**power
                runs[f"2^{power}"] = made(name, shapes[::4] if quick else shapes).step
            found = ratios(runs, "2^13", 1 if quick else 15)
            print(f"  {model:<15} {name:<7}", {k: round(v, 2) for k, v in found.items()})
    units.MAX_STACKED_NUMEL["cpu"] = kept


def transforms(quick: bool) -> None:
    """The cosine transform as a product, as a ratio to the FFT."""
    print("DCT of 1024 columns as a product / by the FFT")
    for n in (64, 128) if quick else (64, 128, 256, 512, 509, 1024, 1021):
        X: Tensor = torch.randn(1, n, 1024)
        runs: dict[str, Run] = {path: partial(dct, X, -2, path) for path in ("matmul", "fft")}
        print(f"  {n:<5} {ratios(runs, 'fft', 2 if quick else 30)['matmul']:.1f}")


def presence(quick: bool) -> None:
    """A step whose set of present gradients is new each time, as a ratio to a settled one."""
    count, turn = 20 if quick else 200, [0]
    print(f"{count} of 8x8, another fifth of them missing at every step / all present")
    for name in METHODS:
        settled, moving = (made(name, [(8, 8)] * count) for _ in range(2))
        params = moving.param_groups[0]["params"]
        grads = [p.grad for p in params]

        def step(
            params: list[Tensor] = params,
            grads: list[Tensor | None] = grads,
            moving: StackedOptimizer = moving,
        ) -> None:
            turn[0] += 1
            for k, p in enumerate(params):
                p.grad = None if (k + turn[0]) % 5 == 0 else grads[k]
            moving.step()

        runs: dict[str, Run] = {"settled": settled.step, "moving": step}
        print(f"  {name:<7} {ratios(runs, 'settled', 2 if quick else 30)['moving']:.1f}")


CASES = {"subspaces": subspaces, "stack": stack, "transforms": transforms, "presence": presence}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in args.only:
        CASES[name](args.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
