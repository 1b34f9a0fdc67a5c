"""How far do bfloat16 weights follow float32 ones, by way of writing and by optimizer?

    python bench/low_precision.py                          all four tables, an hour or more
    python bench/low_precision.py --only share,decay       some of them
    python bench/low_precision.py --methods muon,galore    some optimizers
    python bench/low_precision.py --quick                  tiny: does it run at all

share: how much of the float32 move the weights make under the same given gradients. loss: the
language model of examples/, weights stored in bfloat16 and multiplied in float32. decay: weight
decay alone. walk: a constant step of a fiftieth of the distance between two weights. "adamw" is the
group key rule="adamw", "torch-adamw" is torch.optim.AdamW. Prints tables, writes results.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from quality import run_or_explain
from tables import markdown
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from common import CLIP, SIZES, Corpus, Run, Settings, draw_batch, load_corpus, started
from common import ByteLM as ByteModel
from methods import (
    AUX_LR,
    BETAS,
    EPS,
    UserError,
    available_methods,
    build_optimizer,
    default_lr,
    exported_methods,
    method_options,
    schedule,
    split_parameters,
)
from pretrain import positive
from report import clean, clock, write_text
from torch.optim import Optimizer

from stiefel.optimizers import Dense, Muon, Rule, Slot, StackedOptimizer, pairs_to_groups
from stiefel.optimizers._core.rule import Carry

MODES = ("nearest", "stochastic", "kahan", "eco")
CARRYING = ("adamw", "muon")
"""Who takes write="eco"."""
EXPECTED = {"stochastic": 0.05, "kahan": 0.01}
"""How far a share may be from 1."""
ENOUGH = 0.015
"""Statistical error of a share above which another seed is added."""
TINY = {"d": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
SHAPES = {"tiny": TINY, **SIZES}


# --- Who takes part, and on what ---


def plain_methods() -> list[str]:
    """Optimizers of plain parameters: AdamW's two forms, then the classes of the package."""
    return ["torch-adamw", "adamw", *sorted(exported_methods(pairs=False))]


def pair_methods() -> list[str]:
    return sorted(exported_methods(pairs=True))


def modes_of(name: str) -> tuple[str, ...]:
    if name == "torch-adamw":
        return MODES[:1]
    return MODES if name in CARRYING else MODES[:3]


@dataclass(frozen=True)
class Size:
    """How much one measurement takes: the side of the matrices, their number, and steps."""

    side: int = 128
    count: int = 2
    steps: int = 200
    seeds: int = 6


def subject(name: str, size: Size, seed: int) -> nn.Module:
    """Weights of bfloat16: matrices, the pairs of adapters, or a model whose weights have roles."""
    draw = torch.Generator().manual_seed(seed)
    if name == "symmetrystack":
        model = ByteModel(d=size.side, layers=max(1, size.count // 12), heads=4, seq=8)
        return started(model, 1, seed).bfloat16()
    side, other = size.side, size.side * 3 // 4
    shapes = [(side, other) if i % 2 else (other, side) for i in range(size.count)]
    if name in pair_methods():
        rank = max(1, side // 8)
        shapes = [x for m, n in shapes for x in ((rank, n), (m, rank))]
    return nn.ParameterList(
        nn.Parameter(0.1 * torch.randn(shape, generator=draw)) for shape in shapes
    ).bfloat16()


def pair_groups(weights: nn.Module, name: str) -> list[dict[str, Any]]:
    flat = list(weights.parameters())
    pairs: list[Any] = list(zip(flat[::2], flat[1::2], strict=True))
    if name == "switchlora":
        pairs = [
            (A, B, nn.Parameter(A.new_zeros(B.shape[0], A.shape[1]), requires_grad=False))
            for A, B in pairs
        ]
    return pairs_to_groups(pairs, scale=2.0)


def optimizer_of(name: str, weights: nn.Module, lr: float, write: str) -> Optimizer:
    """With weight decay 0.1; SwitchLoRA never switches, since a switch dwarfs every step."""
    decay = {"weight_decay": 0.1}
    if name == "torch-adamw":
        return torch.optim.AdamW(weights.parameters(), lr=lr, betas=BETAS, eps=EPS, **decay)
    if name == "adamw":
        groups = [{"params": list(weights.parameters()), "rule": "adamw"}]
        return Muon(groups, lr=lr, write=write, adamw_betas=BETAS, adamw_eps=EPS, **decay)
    if name in pair_methods():
        cls: Any = exported_methods(pairs=True)[name]
        never = {"ratio": None, "interval0": 10**9} if name == "switchlora" else {}
        return cls(pair_groups(weights, name), lr=lr, write=write, **decay, **never)
    cls = available_methods()[name]
    if name == "symmetrystack":
        return cls(weights, lr=lr, write=write, **decay)
    small = min(min(p.shape) for p in weights.parameters())
    return cls(weights.parameters(), lr=lr, write=write, **method_options(name, small, decay))


# --- Share of the float32 move, and decay ---


@dataclass
class Share:
    """One optimizer at one learning rate in one mode.

    ``share`` is the projection of the move on float32's, ``error`` what is off relative to it,
    ``doubt`` the statistical error of ``share``: each entry is rounded on its own.
    """

    name: str
    lr: float
    mode: str
    share: float
    error: float
    doubt: float

    @property
    def missed(self) -> bool:
        """Whether it is too far from 1, beyond what the number of entries leaves open."""
        limit = EXPECTED.get(self.mode)
        return limit is not None and not abs(self.share - 1) <= limit


def given_gradients(weights: nn.Module, steps: int, seed: int) -> Iterator[list[Tensor]]:
    """A part that lasts and fresh noise as large as it, in bfloat16."""
    shapes = [p.shape for p in weights.parameters()]
    draw = torch.Generator().manual_seed(1000 + seed)
    lasting = [torch.randn(shape, generator=draw) for shape in shapes]
    for _ in range(steps):
        yield [(C + torch.randn(C.shape, generator=draw)).bfloat16() for C in lasting]


def no_gradients(weights: nn.Module, steps: int, seed: int) -> Iterator[list[Tensor]]:
    for _ in range(steps):
        yield [torch.zeros_like(p) for p in weights.parameters()]


Gradients = Callable[[nn.Module, int, int], Iterator[list[Tensor]]]


def move(name: str, start: nn.Module, gradients: Gradients, lr: float, mode: str | None,
         steps: int, seed: int) -> Tensor:  # fmt: skip
    """All entries of the change, with what kahan keeps beside the weights; mode None: float32."""
    weights = copy.deepcopy(start)
    if mode is None:
        weights = weights.float()
    optimizer = optimizer_of(name, weights, lr, mode or "nearest")
    for grads in gradients(start, steps, seed):
        for p, G in zip(weights.parameters(), grads, strict=True):
            p.grad = G.to(p.dtype)
        optimizer.step()
    change = []
    for p, old in zip(weights.parameters(), start.parameters(), strict=True):
        rest = optimizer.state[p].get("residual", torch.zeros(()))
        change.append((p.detach().double() - old.detach().double() + rest.double()).flatten())
    return torch.cat(change)


def shares(name: str, lr: float, size: Size, gradients: Gradients = given_gradients,
           modes: Sequence[str] | None = None) -> list[Share]:  # fmt: skip
    """All modes of one optimizer, over as many seeds as the statistical error asks for."""
    modes = modes_of(name) if modes is None else modes
    along, off, noise = (dict.fromkeys(modes, 0.0) for _ in range(3))
    whole, found = 0.0, []
    for seed in range(size.seeds):
        start = subject(name, size, seed)
        run = partial(move, name, start, gradients, lr, steps=size.steps, seed=seed)
        exact = run(mode=None)
        whole += float(exact @ exact)
        for mode in modes:
            got = run(mode=mode)
            along[mode] += float(got @ exact)
            off[mode] += float((got - exact).square().sum())
            noise[mode] += float(((got - exact) * exact).square().sum())
        found = [
            Share(name, lr, mode, along[mode] / whole, math.sqrt(off[mode] / whole),
                  math.sqrt(noise[mode]) / whole)
            for mode in modes
        ]  # fmt: skip
        if all(one.doubt < ENOUGH for one in found):
            break
    return found


def share_table(rows: Sequence[Share]) -> str:
    """One line for an optimizer and learning rate: share, relative error and its doubt."""
    lines = [["optimizer", "lr", *MODES]]
    keys = list(dict.fromkeys((row.name, row.lr) for row in rows))
    for name, lr in keys:
        by = {row.mode: row for row in rows if (row.name, row.lr) == (name, lr)}
        lines.append([name, f"{lr:g}", *(share_cell(by.get(mode)) for mode in MODES)])
    return markdown(lines)


def share_cell(row: Share | None) -> str:
    if row is None:
        return ""
    doubt = f" ±{row.doubt:.3f}" if row.doubt >= 5e-4 else ""
    text = f"{row.share:.3f}{doubt} ({row.error:.2g})"
    return f"**{text}**" if row.missed else text


# --- Loss ---


class StoredRun(Run):
    """A run of the examples, weights stored in bfloat16 and multiplied in float32.

    ``mode`` None: stored in float32.

    Matrix products of bfloat16 are far slower on most CPUs, and they would hide the write behind
    the error of the forward pass. All start from what bfloat16 holds.
    """

    def __init__(self, name: str, settings: Settings, corpus: Corpus, mode: str | None) -> None:
        super().__init__(settings, corpus)
        self.stored = copy.deepcopy(self.model).bfloat16()
        if mode is None:
            self.stored = self.stored.float()
        self.optimizer = stored_optimizer(name, settings, self.stored, mode or "nearest")
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, settings.steps, self.floor)
        )

    def fetch(self) -> None:
        """Copy the stored weights into the model that is multiplied."""
        with torch.no_grad():
            for p, q in zip(self.model.parameters(), self.stored.parameters(), strict=True):
                p.copy_(q)

    def train_step(self) -> None:
        s = self.settings
        batch = draw_batch(self.corpus.train, s.batch, s.seq, self.generator)
        self.fetch()
        self.model.zero_grad()
        loss = self.model.loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for p, q in zip(self.model.parameters(), self.stored.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.to(q.dtype)
        self.optimizer.step()
        self.scheduler.step()
        self.record.log(loss.item(), s.lr)

    def validate(self) -> float:
        self.fetch()
        return super().validate()


def stored_optimizer(name: str, settings: Settings, model: nn.Module, write: str) -> Optimizer:
    if name == "torch-adamw":
        return build_optimizer("adamw", model, settings.lr, settings.options)
    if name != "adamw":
        return build_optimizer(name, model, settings.lr, settings.options | {"write": write})
    matrices, aux = ([p for _, p in part] for part in split_parameters(model))
    groups = [{"params": matrices}, {"params": aux, "lr": AUX_LR}]
    return Muon(
        [{**group, "rule": "adamw"} for group in groups], lr=settings.lr, write=write,
        adamw_betas=BETAS, adamw_eps=EPS, weight_decay=0.0,
    )  # fmt: skip


@dataclass
class Loss:
    """Validation losses of one optimizer in one mode, and their differences to float32, by seed."""

    name: str
    lr: float
    mode: str
    values: list[float]
    gaps: list[float]

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


def loss(name: str, corpus: Corpus, shape: dict[str, int], steps: int, seed: int,
         mode: str | None) -> float:  # fmt: skip
    """Validation loss in nats per byte; mode None: float32."""
    method = "adamw" if name == "torch-adamw" else name
    settings = Settings(
        method=method, lr=default_lr(method), seed=seed, steps=steps, threads=1, val_every=steps,
        options=method_options(method, shape["d"], {}), corpus=corpus.name,
        corpus_hash=corpus.digest, **shape,
    )  # fmt: skip
    run = StoredRun(name, settings, corpus, mode)
    for _ in range(steps):
        run.train_step()
    return run.validate()


def losses(name: str, corpus: Corpus, shape: dict[str, int], steps: int, seeds: int) -> list[Loss]:
    """Float32 first, then every mode on the same seeds."""
    lr = default_lr("adamw" if name == "torch-adamw" else name)
    value = partial(loss, name, corpus, shape, steps)
    exact = [value(seed, None) for seed in range(seeds)]
    found = [Loss(name, lr, "float32", exact, [0.0] * seeds)]
    for mode in modes_of(name):
        values = [value(seed, mode) for seed in range(seeds)]
        gaps = [a - b for a, b in zip(values, exact, strict=True)]
        found.append(Loss(name, lr, mode, values, gaps))
    return found


def loss_table(rows: Sequence[Loss]) -> str:
    lines = [["optimizer", "lr", "float32 (spread)", *MODES]]
    for name in dict.fromkeys(row.name for row in rows):
        by = {row.mode: row for row in rows if row.name == name}
        exact = by["float32"]
        cells = [gap_cell(by.get(mode), exact.spread) for mode in MODES]
        head = f"{fmean(exact.values):.4f} ({exact.spread:.4f})"
        lines.append([name, f"{exact.lr:g}", head, *cells])
    return markdown(lines)


def gap_cell(row: Loss | None, spread: float) -> str:
    """The differences of the seeds; bold where their mean is outside the spread."""
    if row is None:
        return ""
    text = " ".join(f"{gap:+.4f}" for gap in row.gaps)
    outside = row.mode in EXPECTED and abs(fmean(row.gaps)) > spread
    return f"**{text}**" if outside else text


# --- Walk ---


@dataclass(frozen=True)
class Descent(Rule):
    """Momentum alone: M <- b M + (1 - b) G, W <- W - lr M."""

    beta: float = 0.9

    def state(self, m: int, n: int) -> dict[str, Slot]:
        return {"momentum_buffer": Slot("mn")}

    def update(self, w: Any) -> Any:
        M = w.state["momentum_buffer"].lerp_(w.grad, 1 - self.beta)
        carry = Carry(M, self.beta, lambda error, ks: error) if w.carries_errors else None
        return w.step(Dense(M.clone()), carry=carry)

    def eco_obstacle(self) -> str | None:
        return None


@dataclass
class Walk:
    """Mean and standard deviation over weights of the way they went, in distances ``ulp``."""

    name: str
    dtype: str
    mode: str
    true: float
    mean: float
    std: float


def signs(side: int) -> Tensor:
    """A symmetric orthogonal matrix times sqrt(side): its polar factor is itself, all one size."""
    H = torch.ones(1, 1)
    while H.shape[0] < side:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


def walker(name: str, params: list[nn.Parameter], step: float, write: str) -> Optimizer:
    """An optimizer that moves every weight by ``step`` along a gradient of signs."""
    plain = {"weight_decay": 0.0, "write": write}
    if name == "adamw":
        return Muon([{"params": params, "rule": "adamw"}], lr=step, **plain)
    if name == "muon":
        return Muon(params, lr=step / 0.2, polar="svd", **plain)
    return StackedOptimizer(params, Descent(), step, **plain)


def walk(name: str, dtype: torch.dtype, mode: str, true: int, side: int, count: int) -> Walk:
    """Take 50 steps per ulp, in the middle of [1, 2), where ulp is one number."""
    ulp, H = torch.finfo(dtype).eps, signs(side)
    params = [nn.Parameter(torch.full((side, side), 1.5, dtype=dtype)) for _ in range(count)]
    optimizer = walker(name, params, ulp / 50, mode)
    for _ in range(50 * true):
        for p in params:
            p.grad = -H.to(dtype)
        optimizer.step()
    ways = [
        (p.detach().double() - 1.5 + optimizer.state[p].get("residual", torch.zeros(()))) * H / ulp
        for p in params
    ]
    way = torch.stack(ways)
    kind = str(dtype).removeprefix("torch.")
    return Walk(name, kind, mode, float(true), float(way.mean()), float(way.std()))


def walk_table(rows: Sequence[Walk]) -> str:
    lines = [["optimizer", "weights", "true move", *MODES]]
    for name, kind in dict.fromkeys((row.name, row.dtype) for row in rows):
        by = {row.mode: row for row in rows if (row.name, row.dtype) == (name, kind)}
        cells = [f"{by[mode].mean:.2f} ±{by[mode].std:.2f}" for mode in MODES]
        lines.append([name, kind, f"{by['eco'].true:g}", *cells])
    return markdown(lines)


# --- The command ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(PARTS), metavar="A,B", help=f"among {', '.join(PARTS)}")
    add("--methods", default="", metavar="A,B", help="default: all")
    add("--steps", type=positive, default=100, help="of loss; default: 100")
    add("--seeds", type=positive, default=3, metavar="N", help="of loss; default: 3")
    add("--corpus", default="code", help="of loss: code (default), prose, or a file")
    add("--size", choices=tuple(SHAPES), default="micro", help="of loss; default: micro")
    add("--threads", type=positive, default=1, metavar="N", help="default: 1")
    add("--out", type=Path, default=Path("runs/low_precision"), metavar="DIR")
    add("--quick", action="store_true", help="tiny weights, few steps: no figure means anything")
    return parser.parse_args(argv)


def chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    names = [part.strip().lower() for part in text.split(",") if part.strip()] or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: choose from {', '.join(known)}.")
    return names


def work_share(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Any], str]:
    size = Size(32, 2, 4, 1) if args.quick else Size()
    rows: list[Share] = []
    for name in names:
        for lr in (1e-3, 1e-4, 1e-5):
            rows += shares(name, lr, size)
        print(share_table(rows[-3 * len(modes_of(name)) :]), flush=True)
    return rows, share_table(rows)


def work_loss(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Any], str]:
    shape, steps = (TINY, 4) if args.quick else (SHAPES[args.size], args.steps)
    corpus = load_corpus(args.corpus, shape["seq"])
    rows: list[Loss] = []
    for name in (name for name in names if name not in pair_methods()):
        found = losses(name, corpus, shape, steps, 1 if args.quick else args.seeds)
        rows += found
        print(loss_table(found), flush=True)
    return rows, loss_table(rows) if rows else ""


def work_decay(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Any], str]:
    size = Size(32, 2, 4, 1) if args.quick else Size(128, 4, 500, 1)
    rows: list[Share] = []
    for name in names:
        for lr in (1e-3, 1e-4):
            rows += shares(name, lr, size, no_gradients, modes_of(name)[:3])
        print(share_table([row for row in rows if row.name == name]), flush=True)
    return rows, share_table(rows)


def work_walk(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Any], str]:
    side, count, scale = (8, 1, 50) if args.quick else (64, 4, 1)
    rows = [
        walk(name, dtype, mode, true // scale, side, 1 if name == "muon" else count)
        for dtype, true in ((torch.float16, 200), (torch.bfloat16, 50))
        for name in ("descent", *CARRYING)
        for mode in MODES
    ]
    return rows, walk_table(rows)


PARTS = {
    "share": (work_share, "Share of the float32 move (relative error of the move)"),
    "loss": (work_loss, "Validation loss, and its differences to float32 by seed"),
    "decay": (work_decay, "Share of float32's decay (relative error of it)"),
    "walk": (work_walk, "A constant step of ulp/50, in ulp"),
}


def work(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    parts = chosen(args.only, list(PARTS), "--only")
    names = chosen(args.methods, [*plain_methods(), *pair_methods()], "--methods")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"torch": torch.__version__, "quick": args.quick, "tables": {}}
    begin = time.perf_counter()
    for part in parts:
        run, title = PARTS[part]
        rows, text = run(args, names)
        print(f"\n## {title}\n\n{text}\n", flush=True)
        results["tables"][part] = [asdict(row) for row in rows]
        write_text(args.out / "results.json", json.dumps(clean(results), indent=1))
    print(f"Took {clock(time.perf_counter() - begin)}; written to {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_explain("low_precision.py", work, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
