"""Two checkouts of this package in one process, their steps timed in turn: after / before.

    git worktree add ../before REVISION
    python -P bench/trees.py --before ../before --after . --threads 1

The folders optimizers/ and kernels/ of both are imported as packages before.* and after.* (they
import each other relatively), so that rounds can be paired. ``bench/run.py`` compares a tree with a
rival instead, and a quotient of two of its ratios carries that rival's noise twice. Rows cover
every class on 50 matrices of 8x8 (Python is all), 28 of width 96 and one of 512x2048; rows called
refresh or each refresh in every step. A row has the median of paired quotients of processor time,
their quartiles, and whether the weights agree bit for bit at the end.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import sys
import time
import types
from pathlib import Path

import torch

NEVER = 10**9
SMALL = [(8, 8)] * 50
MIDDLE = [(96, 96)] * 16 + [(256, 96)] * 8 + [(96, 256)] * 4
LARGE = [(512, 2048)]
MODELS = {"50 of 8x8": SMALL, "28 of width 96": MIDDLE, "512x2048": LARGE}


def tree(name: str, root: Path):
    package = types.ModuleType(name)
    package.__path__ = [str(root)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.optimizers")


def dense(cls: str, **options):
    return lambda so, params: getattr(so, cls)(params, lr=1e-3, weight_decay=0.1, **options)


def pairs(cls: str, **options):
    def make(so, params):
        made = zip(params[::2], params[1::2], strict=True)
        return getattr(so, cls)(so.pairs_to_groups(made, scale=2.0), lr=1e-3, **options)

    return make


def triples(so, params):
    made = [params[i : i + 3] for i in range(0, len(params), 3)]
    for _, _, W in made:
        W.requires_grad_(False)
    return so.SwitchLoRA(so.pairs_to_groups(made, scale=2.0), lr=1e-3, total_steps=1000)


def rows(model: str) -> dict:
    rank = {"50 of 8x8": 2, "28 of width 96": 24, "512x2048": 128}[model]
    never, each = {"update_proj_gap": NEVER}, {"update_proj_gap": 1}
    found = {
        "Muon": dense("Muon"),
        "Muon ns5": dense("Muon", polar="ns5"),
        "Muon torch": dense("Muon", compat="torch"),
        "Muon low rank": dense("Muon", polar="low_rank", rank=rank),
        "NorMuon": dense("Muon", second_moment="normuon"),
        "AdaMuon": dense("Muon", second_moment="adamuon"),
        "GaLore": dense("GaLore", rank=rank, **never),
        "GaLore refresh": dense("GaLore", rank=rank, **each),
        "GaLore int8": dense("GaLore", rank=rank, state_dtype="int8", **never),
        "GaLore dct": dense("GaLore", rank=rank, projection="dct", **never),
        "Fira": dense("Fira", rank=rank, **never),
        "Fira refresh": dense("Fira", rank=rank, **each),
        "FRUGAL columns": dense("FRUGAL", update_gap=NEVER),
        "FRUGAL rows": dense("FRUGAL", update_gap=NEVER, split="rows"),
        "FRUGAL svd": dense("FRUGAL", update_gap=NEVER, split="svd"),
        "FRUGAL block": dense("FRUGAL", update_gap=NEVER, split="block", density=1.0),
        "FRUGAL columns refresh": dense("FRUGAL", update_gap=1),
        "DCTAdamW": dense("DCTAdamW", rank=rank, **never),
        "DCTAdamW each": dense("DCTAdamW", rank=rank),
        "DCTAdamW int8": dense("DCTAdamW", rank=rank, error_feedback="int8", **never),
        "Trion": dense("Trion", rank=rank),
        "AuON": dense("AuON"),
        "AuON hybrid": dense("AuON", ns_steps=1),
        "ARO": dense("ARO"),
        "ARO adam": dense("ARO", base="adam"),
        "RowNorm": dense("RowNorm"),
        "Spectral": dense("Spectral"),
        "Hybrid": dense("Hybrid"),
        "SymmetryStack": dense("SymmetryStack"),
    }
    return found


LORA = {
    "AltLoRA": pairs("AltLoRA"),
    "AltLoRA+": pairs("AltLoRA", second_moment="elementwise"),
    "AdaPreLoRA": pairs("AdaPreLoRA"),
    "SwitchLoRA": triples,
}


class Side:
    def __init__(self, so, make, shapes, pool) -> None:
        g = torch.Generator().manual_seed(1)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        self.optimizer, self.pool = make(so, self.params), pool
        for p in self.params:
            if p.requires_grad:
                p.grad = torch.empty_like(p)

    def prepare(self, i: int) -> None:
        for p, G in zip(self.params, self.pool[i % len(self.pool)], strict=True):
            if p.grad is not None:
                p.grad.copy_(G)


def contest(trees, make, shapes, seconds: float, builds: int = 2):
    """Paired quotients, times of both sides, and whether all weights agree."""
    g = torch.Generator().manual_seed(0)
    pool = [[torch.randn(s, generator=g) for s in shapes] for _ in range(3)]
    quotients, bits, times = [], True, {"before": [], "after": []}
    for build in range(builds):
        names = ["before", "after"] if build % 2 == 0 else ["after", "before"]
        sides = {n: Side(trees[n], make, shapes, pool) for n in names}
        start, i = time.perf_counter(), 0
        while i < 5 or (time.perf_counter() - start < seconds / builds and i < 400):
            cpu = {}
            for n in random.Random(1000 * build + i).sample(names, 2):
                sides[n].prepare(i)
                t = time.process_time()
                sides[n].optimizer.step()
                cpu[n] = time.process_time() - t
            if i >= 2:
                quotients.append(cpu["after"] / cpu["before"])
                for n in names:
                    times[n].append(cpu[n])
            i += 1
        bits &= all(
            torch.equal(a, b)
            for a, b in zip(sides["before"].params, sides["after"].params, strict=True)
        )
    return quotients, times, bits


COLUMNS = "| row | before, ms | after, ms | median quotient | quartiles | rounds | bits |"


def contests() -> list[tuple]:
    """(name, constructor, shapes) of every row."""
    dense_rows = [
        (f"{name}, {model}", make, shapes)
        for model, shapes in MODELS.items()
        for name, make in rows(model).items()
    ]
    lora_rows = []
    for count, side, r in ((25, 8, 2), (16, 512, 16)):
        for name, make in LORA.items():
            one = [(r, side), (side, r)] + ([(side, side)] if make is triples else [])
            lora_rows.append((f"{name}, {count} pairs of {side}", make, one * count))
    return dense_rows + lora_rows


def row_of(name: str, quotients, times, bits: bool) -> str:
    low, middle, high = statistics.quantiles(quotients, n=4)
    before, after = (1e3 * statistics.median(times[side]) for side in ("before", "after"))
    return (
        f"| {name} | {before:.3f} | {after:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} "
        f"| {len(quotients)} | {'same' if bits else 'differ'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="another checkout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row, both sides")
    parser.add_argument("--only", default="", help="part of a row's name; several by comma")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trees = {"before": tree("before", args.before), "after": tree("after", args.after)}
    print(f"{COLUMNS}\n{'|---' * 7}|", flush=True)
    medians = []
    for name, make, shapes in contests():
        if any(part in name for part in args.only.split(",")):
            quotients, times, bits = contest(trees, make, shapes, args.seconds)
            medians.append(statistics.median(quotients))
            print(row_of(name, quotients, times, bits), flush=True)
    if medians:
        middle = statistics.median(medians)
        print(f"\n{len(medians)} rows: median {middle:.3f}, worst {max(medians):.3f}")


if __name__ == "__main__":
    main()
