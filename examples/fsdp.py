"""Train the byte model of pretrain.py over processes, and the same on plain tensors beside it.

torchrun --nproc-per-node 2 examples/fsdp.py --optimizer muon --compare
torchrun --nproc-per-node 2 examples/fsdp.py --optimizer galore --save runs/half --save-at 25
torchrun --nproc-per-node 3 examples/fsdp.py --optimizer galore --load runs/half --compare
torchrun --nproc-per-node 4 examples/fsdp.py --mesh hsdp --compare     or tp, or ep
python examples/fsdp.py --demo     Muon and GaLore on 2 processes, resumed on 1 and on 3

Every process takes its rows of one global batch, so the losses are those of one process up to
rounding, whatever the number of processes. They run on GPUs (nccl) if each can have one, else on
CPUs (gloo). Checkpoints are torch.distributed.checkpoint's; any number of processes reads them.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import (
    SIZES,
    Corpus,
    Settings,
    draw_batch,
    load_corpus,
)
from meshes import EXPERTS, KINDS, build_model, counted, make_mesh, parts_of, shard
from methods import (
    UserError,
    build_optimizer,
    default_lr,
    method_options,
    schedule,
    split_parameters,
)
from pretrain import (
    describe,
    make_folder,
    model_shape,
    parse_lrs,
    parse_options,
    positive,
    print_header,
)
from report import align, clean, write_text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from stiefel.optimizers import clip_grad_norm_

STEPS, QUICK = 50, 20
DEMO = "muon,galore"
DEMO_OPTIONS = {"galore": ["--set", "update_proj_gap=10", "--longest-dim"]}
"""The checkpoint after half of 50 steps lies in the middle of a window between two bases.

GaLore has nothing to send between them where the longer side is cut.
"""
DEMO_SECONDS = 300
"""A run of the demo takes about ten; after so many it is ended."""
WORDS = {"d": "width"}
"""torchrun takes --d for an abbreviation of an option of its own."""
FREE = ("threads", "val_every")
"""Settings that may differ between a checkpoint and the run that continues it."""


# ------------------------------------------------------------------------------------ processes


class World:
    """The processes of this run: torchrun's, or this one alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        device: Where this process computes.
        kind: Name of the mesh.
        mesh: All of them along one axis or two.
    """

    def __init__(self, kind: str, seconds: int, mesh: str = "fsdp") -> None:
        alone = not dist.is_torchelastic_launched()
        self.rank = 0 if alone else int(os.environ["RANK"])
        self.size = 1 if alone else int(os.environ["WORLD_SIZE"])
        self.device = pick_device(kind)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        place: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # A process that waits for one that has died ends after this time.
        timeout = datetime.timedelta(seconds=seconds)
        dist.init_process_group(backend, timeout=timeout, **(place if alone else {}))
        self.kind, self.mesh = mesh, make_mesh(mesh, self.size, self.device.type)

    def __str__(self) -> str:
        return f"{self.size} process" + "es" * (self.size > 1)

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """Rows of a global batch for this process, and the factor on the mean over them.

        The average over all processes of these means times their factors is the mean of the batch.
        """
        parts = parts_of(self.kind, self.size)
        rows = batch.tensor_split(parts)[self.rank * parts // self.size]
        return rows, len(rows) * parts / len(batch)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Any) -> list[Any]:
        """What every process has, in the order of ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found


def pick_device(kind: str) -> torch.device:
    """A GPU of this process's own if all processes here can have one, else the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cards = torch.cuda.device_count()
    if kind == "cuda" and cards < here:
        raise UserError(f"--device cuda: {here} processes need {here} GPUs, here are {cards}.")
    gpu = kind != "cpu" and cards >= here
    return torch.device("cuda", local_rank) if gpu else torch.device("cpu")


# ----------------------------------------------------------------------------------------- runs


class Trainer:
    """Model, optimizer and loop; without a world on plain tensors in this process alone.

    Without a world the gradients of as many parts of the batch are added as there were processes:
    ``history`` has [processes, last step] for each part of the run. So both runs add up the same
    numbers, and of two processes the same bits.

    Attributes:
        calls: Collectives of the optimizer's last step, by name.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        world: World | None = None,
        longest: bool = False,
        clip: float | None = None,
        history: Sequence[Sequence[int]] = (),
        kind: str = "fsdp",
    ) -> None:
        s = settings
        self.settings, self.corpus, self.device = s, corpus, device
        self.world, self.clip, self.history, self.kind = world, clip, history, kind
        self.model = build_model(kind, s.d, s.layers, s.heads, s.seq, s.seed).to(device)
        self.calls: dict[str, int] = {}
        if world is not None:
            shard(self.model, kind, world.mesh, longest)
        self.optimizer = build_optimizer(s.method, self.model, s.lr, s.options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, s.steps)
        )
        self.generator = torch.Generator().manual_seed(1000 + s.seed)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self) -> None:
        s, begin = self.settings, time.perf_counter()
        batch = draw_batch(self.corpus.train, s.batch, s.seq, self.generator).to(self.device)
        self.optimizer.zero_grad()
        mean = torch.zeros((), device=self.device)
        for rows, factor in self.shares(batch):
            loss = self.model.loss(rows) * factor
            torch.autograd.backward(loss)
            mean += loss.detach()
        if self.clip is not None:
            clip_grad_norm_(self.model.parameters(), self.clip)
        with counted() as self.calls:
            self.optimizer.step()
        self.scheduler.step()
        if self.world is not None:
            mean = self.world.total(mean) / self.world.size
        self.losses.append(mean.item())
        self.seconds += time.perf_counter() - begin

    def shares(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """Parts of the batch for this process, each with the factor on its mean loss."""
        if self.world is not None:
            return [self.world.share(batch)]
        step = len(self.losses)
        size = next((size for size, last in self.history if step < last), 1)
        parts = max(1, parts_of(self.kind, size))
        return [(rows, len(rows) / len(batch)) for rows in batch.tensor_split(parts)]

    def train(self, until: int, say: Callable[[str], None]) -> None:
        every = max(1, self.settings.steps // 10)
        while len(self.losses) < until:
            self.step()
            step = len(self.losses)
            if step % every == 0 or step == until:
                say(f"step {step:>4} of {self.settings.steps}  loss {self.losses[-1]:.4f}")

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of the run but for rounding, as JSON gives it back."""
        values = {**asdict(self.settings), "clip": self.clip}
        if self.kind == "ep":
            values["experts"] = EXPERTS
        found: dict[str, Any] = json.loads(json.dumps(clean(values)))
        return found

    def held_bytes(self) -> int:
        """Bytes of optimizer state in this process."""
        values = [x for state in self.optimizer.state.values() for x in state.values()]
        held = [x.to_local() if isinstance(x, DTensor) else x for x in values]
        return sum(x.nbytes for x in held if isinstance(x, Tensor))

    def sent_bytes(self) -> int:
        """Bytes that this process sends for the optimizer in an ordinary step."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            return 0  # elementwise: each process moves what it holds
        rows = self.optimizer.assignment().rows  # type: ignore[attr-defined]
        return sum(row.bytes_per_step for row in rows)

    def plans(self) -> list[str]:
        """Plans of the weights."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            return ["local"]
        rows = self.optimizer.assignment().rows  # type: ignore[attr-defined]
        return sorted({row.plan for row in rows})

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU of rank 0; empty on the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {**get_model_state_dict(self.model, options=options)}  # type: ignore[dict-item]


# ---------------------------------------------------------------------------------- checkpoints


class Saved:
    """What torch.distributed.checkpoint writes and reads; each process its own part."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": trainer.scheduler.state_dict(),
            "generator": trainer.generator.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        trainer = self.trainer
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        trainer.scheduler.load_state_dict(saved["scheduler"])
        trainer.generator.set_state(saved["generator"])


def save(folder: Path, trainer: Trainer, history: list[list[int]]) -> None:
    """Write ``step-N`` below the folder, then ``run.json``, which points to it."""
    name = f"step-{len(trainer.losses)}"
    dcp.save({"run": Saved(trainer)}, checkpoint_id=folder / name)  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        content = {
            "settings": trainer.identity(),
            "checkpoint": name,
            "history": history,
            "losses": trainer.losses,
        }
        write_text(folder / "run.json", json.dumps(content, indent=1))


def load(folder: Path, trainer: Trainer) -> list[list[int]]:
    """Continue the run in the folder; returns its history, [processes, last step] of each part."""
    try:
        saved = json.loads((folder / "run.json").read_text())
        losses, history = list(saved["losses"]), list(saved["history"])
        found, name = dict(saved["settings"]), str(saved["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--load {folder}: no checkpoint of this script; make one with --save {folder}."
        ) from error
    for key, value in trainer.identity().items():
        if key not in FREE and found.get(key) != value:
            raise UserError(
                f"--load {folder} was made with {key} = {found.get(key)!r}, not {value!r}; give "
                f"the same settings."
            )
    dcp.load({"run": Saved(trainer)}, checkpoint_id=folder / name)  # type: ignore[attr-defined]
    trainer.losses = losses
    return history


# --------------------------------------------------------------------------------------- report


def loss_table(losses: Sequence[float], beside: Sequence[float], name: str) -> str:
    cells = [["step", name, "one process", "difference"]]
    every = max(1, len(losses) // 10)
    for i, (x, y) in enumerate(zip(losses, beside, strict=True)):
        if (i + 1) % every == 0 or i + 1 == len(losses):
            cells.append([str(i + 1), f"{x:.6f}", f"{y:.6f}", f"{x - y:+.1e}"])
    return align(cells)


def weight_difference(found: dict[str, Tensor], model: nn.Module) -> float:
    """The largest difference of an entry, relative to the largest entry of its weight."""
    gaps = [
        (found[name].double() - p.detach().cpu().double()).abs().max()
        / p.detach().abs().max().cpu()
        for name, p in model.named_parameters()
    ]
    return max(gap.item() for gap in gaps)


def assignment_text(optimizer: torch.optim.Optimizer) -> str:
    if isinstance(optimizer, torch.optim.AdamW):
        return "torch.optim.AdamW for every parameter: each process moves what it holds"
    return str(optimizer.assignment())  # type: ignore[attr-defined]


def compare(
    trainer: Trainer, weights: dict[str, Tensor], history: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The same training on plain tensors, and how far the sharded one is from it."""
    beside = Trainer(
        trainer.settings,
        trainer.corpus,
        trainer.device,
        clip=trainer.clip,
        history=history,
        kind=trainer.kind,
    )
    beside.train(len(trainer.losses), lambda _: None)
    gaps = [abs(x - y) for x, y in zip(trainer.losses, beside.losses, strict=True)]
    return {
        "one_process": beside.losses,
        "loss_difference": max(gaps),
        "weight_difference": weight_difference(weights, beside.model),
        "one_process_state_bytes": beside.held_bytes(),
        "one_process_ms_per_step": 1e3 * beside.seconds / len(beside.losses),
    }


def print_comparison(found: dict[str, Any], name: str, out: TextIO) -> None:
    print(f"\n{loss_table(found['losses'], found['one_process'], name)}\n", file=out)
    print(
        f"Largest difference over {len(found['losses'])} steps: {found['loss_difference']:.1e} of "
        f"a loss, {found['weight_difference']:.1e} of a weight (by its largest entry)",
        file=out,
    )


def print_traffic(found: dict[str, Any], out: TextIO) -> None:
    for key, text in (
        ("sent_bytes", "kB sent for the optimizer in an ordinary step"),
        ("state_bytes", "kB of optimizer state"),
    ):
        sizes = ", ".join(f"{x / 1e3:.1f}" for x in found[key])
        print(f"{text}, by process: {sizes}", file=out)


# ----------------------------------------------------------------------------------- one command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", default="muon", metavar="NAME", help="default: muon")
    add("--lr", action="append", default=[], help="for the matrices")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="constructor keyword, such as rank=16 or plan=gather",
    )
    add("--mesh", choices=tuple(KINDS), default="fsdp", help="default: fsdp; others on 4 processes")
    add("--longest-dim", action="store_true", help="cut matrices along their longer side")
    add("--clip", type=float, metavar="NORM", help="clip gradients, as pretrain.py does at 1")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help=f"default: {STEPS}")
    length.add_argument("--quick", action="store_true", help=f"{QUICK} steps")
    add("--save", type=Path, metavar="DIR", help="write a checkpoint")
    add("--save-at", type=positive, metavar="N", help="after N of the steps; default: the last")
    add("--load", type=Path, metavar="DIR", help="continue from a checkpoint")
    add("--compare", action="store_true", help="train on plain tensors too; print the differences")
    add("--seed", type=int, default=0, help="start and batches; default: 0")
    add("--corpus", default="code", help="code (default), prose, or a file")
    add("--size", choices=tuple(SIZES), default="micro", help="default: micro")
    for name in ("d", "layers", "heads", "seq", "batch"):
        flags = [f"--{word}" for word in dict.fromkeys((WORDS.get(name, name), name))]
        add(*flags, type=positive, dest=name, metavar="N", help=f"instead of the size's {name}")
    add("--threads", type=positive, default=1, metavar="N", help="of each process; default: 1")
    add("--timeout", type=positive, default=120, metavar="S", help="of a collective; default: 120")
    add("--out", type=Path, default=Path("runs/fsdp"), metavar="DIR")
    add("--demo", nargs="?", const=DEMO, metavar="A,B", help=f"start all runs; default: {DEMO}")
    return parser


def make_settings(args: argparse.Namespace, corpus: Corpus, shape: dict[str, int]) -> Settings:
    name = args.optimizer.strip().lower()
    options = parse_options(args.options, [name])[name]
    return Settings(
        method=name,
        lr=parse_lrs(args.lr, [name])[name],
        options=method_options(name, shape["d"], options),
        seed=args.seed,
        steps=QUICK if args.quick else args.steps or STEPS,
        val_every=1,
        corpus=corpus.name,
        corpus_hash=corpus.digest,
        threads=args.threads,
        **shape,
    )


def prepare(args: argparse.Namespace, world: World, out: TextIO) -> Trainer:
    """Everything that can be refused is refused here, before the first step."""
    torch.set_num_threads(args.threads)
    shape = model_shape(args)
    if world.size > shape["batch"]:
        raise UserError(
            f"--batch {shape['batch']} has no row for each of {world.size} processes; give a "
            f"larger batch or start fewer."
        )
    default_lr(args.optimizer.strip().lower())  # an unknown name is said before the corpus is read
    corpus = load_corpus(args.corpus, shape["seq"])
    settings = make_settings(args, corpus, shape)
    if args.save_at is not None and args.save_at > settings.steps:
        raise UserError(
            f"--save-at {args.save_at} is beyond the {settings.steps} steps of this run."
        )
    trainer = Trainer(
        settings, corpus, world.device, world, args.longest_dim, args.clip, kind=world.kind
    )
    matrices, _ = split_parameters(trainer.model)
    sizes = (
        sum(p.numel() for p in trainer.model.parameters()),
        sum(p.numel() for _, p in matrices),
    )
    print_header([settings], corpus, sizes, describe(args, shape), out)
    side = "longer side" if args.longest_dim else "rows"
    where = f"{dist.get_backend()} on {world.device.type}"
    print(f"{world}, {where}: {KINDS[world.kind]}", file=out)
    print(f"Matrices are cut along their {side}\n", file=out, flush=True)
    return trainer


def train(args: argparse.Namespace, world: World, out: TextIO) -> tuple[Trainer, dict[str, Any]]:
    """The sharded run; what it found is equal on all ranks but for the weights, on rank 0."""
    trainer = prepare(args, world, out)
    history: list[list[int]] = []
    if args.load is not None:
        history = load(args.load, trainer)
        parts = ", ".join(f"{size} to step {step}" for size, step in history)
        print(f"Continues {args.load} (processes: {parts})", file=out, flush=True)
    done, steps = len(trainer.losses), trainer.settings.steps
    if args.save is not None and (args.save_at or steps) <= done:
        raise UserError(f"--save-at {args.save_at or steps}: the run continues at step {done}.")
    for until in sorted({args.save_at or steps, steps}) if args.save is not None else [steps]:
        trainer.train(until, lambda text: print(text, file=out, flush=True))
        if args.save is not None and until == (args.save_at or steps):
            save(args.save, trainer, [*history, [world.size, until]])
    found = {
        "settings": trainer.identity(),
        "device": world.device.type,
        "history": [*history, [world.size, steps]],
        "losses": trainer.losses,
        "mesh": world.kind,
        "plans": trainer.plans(),
        "calls": sum(trainer.calls.values()),
        "sent_bytes": world.gather(trainer.sent_bytes()),
        "state_bytes": world.gather(trainer.held_bytes()),
        "ms_per_step": 1e3 * trainer.seconds / max(1, steps - done),
        "weights": trainer.whole_weights() if args.compare else {},
    }
    return trainer, found


def print_row(found: dict[str, Any], out: TextIO) -> None:
    """What docs/sharding.md has a table of."""
    head = ["optimizer", "mesh", "plans", "calls", "kB sent", "losses differ by", "weights by"]
    row = [
        found["settings"]["method"],
        found["mesh"],
        ", ".join(found["plans"]),
        str(found["calls"]),
        f"{max(found['sent_bytes']) / 1e3:.1f}",
        f"{found['loss_difference']:.1e}",
        f"{found['weight_difference']:.1e}",
    ]
    print(f"\n{align([head, row])}", file=out)


def work(args: argparse.Namespace) -> int:
    world = World(args.device, args.timeout, args.mesh)
    out: TextIO = sys.stdout if world.rank == 0 else io.StringIO()
    try:
        if world.rank == 0:
            for folder in (args.out, args.save):
                if folder is not None:
                    make_folder(folder)
        trainer, found = train(args, world, out)
        print(f"\n{assignment_text(trainer.optimizer)}\n", file=out)
        print_traffic(found, out)
    finally:
        dist.destroy_process_group()
    weights = found.pop("weights")
    if world.rank == 0:  # the others are done, so none waits for what follows
        if args.compare:
            found |= compare(trainer, weights, found["history"])
            print_comparison(found, str(world), out)
            print_row(found, out)
        write_text(args.out / "results.json", json.dumps(clean(found), indent=1, allow_nan=False))
        print(f"\nWritten to {args.out}: results.json", file=out)
    return int(not math.isfinite(trainer.losses[-1]))


# ---------------------------------------------------------------------------------------- demo


def torchrun(processes: int, arguments: Sequence[str]) -> list[str]:
    """The command that starts this script in so many processes, at a port that is free."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"),
        *("--nproc-per-node", str(processes), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", str(Path(__file__).resolve()), *arguments),
    ]


def start(processes: int, arguments: Sequence[str], seconds: float) -> str:
    """What the script prints; torchrun ends its processes when it is told to end."""
    command = torchrun(processes, arguments)
    # torchrun sets it too, with a warning
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        try:
            printed, _ = run.communicate(timeout=seconds)
        except BaseException as error:
            started = children_of(run.pid)
            run.terminate()
            with suppress(subprocess.TimeoutExpired):
                run.wait(40)  # after 30 seconds torchrun kills its processes
            run.kill()
            for pid in started:  # torchrun forgets one that it was about to start
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"--demo: {' '.join(command)} took over {seconds} s.") from error
            raise
    if run.returncode:
        raise UserError(f"--demo: {' '.join(command)} ended with {run.returncode}.\n{printed}")
    return printed


def children_of(pid: int) -> set[int]:
    """Processes that a process has started; none where /proc does not tell."""
    found = set[int]()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(child) for child in path.read_text().split()}
    return found


def demo(args: argparse.Namespace) -> int:
    """Each method on 2 processes, from their checkpoint on 1 and on 3 again, and one table."""
    steps = QUICK if args.quick else args.steps or STEPS
    names = [name.strip().lower() for name in args.demo.split(",")]
    for name in names:
        default_lr(name)  # an unknown name is said before the first run
    # So that what this process has started ends with it.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        rows = [row for name in names for row in demo_runs(name, steps, args)]
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{demo_table(rows)}\n")
    print(
        "Sizes are those of the fullest process; sent: for the optimizer, in an ordinary step.\n"
        "Weights differ by at most so much of their largest entry."
    )
    write_text(args.out / "results.json", json.dumps(rows, indent=1))
    print(f"Written to {args.out}: results.json and a folder for each run")
    return 0


def demo_runs(name: str, steps: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """On 2 processes, then from their checkpoint on 1 and on 3."""
    checkpoint, rows = args.out / f"{name}-checkpoint", []
    shutil.rmtree(checkpoint, ignore_errors=True)
    write = ["--save", str(checkpoint), "--save-at", str(max(1, steps // 2))]
    read = ["--load", str(checkpoint)]
    for processes, more in ((2, write), (1, read), (3, read)):
        folder = args.out / f"{name}-{processes}"
        make_folder(folder)
        print(f"{name}, {processes} process{'es' * (processes > 1)}: {' '.join(more)}", flush=True)
        command = ["--optimizer", name, "--steps", str(steps), *passed_on(args)]
        command += [*DEMO_OPTIONS.get(name, []), "--compare", *more, "--out", str(folder)]
        write_text(folder / "printed.txt", start(processes, command, DEMO_SECONDS))
        rows.append(json.loads((folder / "results.json").read_text()))
    return rows


def passed_on(args: argparse.Namespace) -> list[str]:
    """Options that the demo gives to all its runs."""
    names = ("clip", "seed", "corpus", "size", "device", "threads", "timeout", *SIZES[args.size])
    given = [(name, getattr(args, name)) for name in names]
    options = [f"--{WORDS.get(name, name)}={value}" for name, value in given if value is not None]
    return options + ["--longest-dim"] * args.longest_dim


def demo_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for every run that went to the end; sizes are those of the fullest process."""
    head = ["processes", "steps", "loss", "one process", "loss differs by", "weights by"]
    cells = [["optimizer", *head, "sent, kB", "state, kB", "one process", "ms per step"]]
    for row in rows:
        cells.append(
            [
                row["settings"]["method"],
                " to ".join(str(size) for size, _ in row["history"]),
                str(len(row["losses"])),
                f"{row['losses'][-1]:.4f}",
                f"{row['one_process'][-1]:.4f}",
                f"{row['loss_difference']:.1e}",
                f"{row['weight_difference']:.1e}",
                f"{max(row['sent_bytes']) / 1e3:.1f}",
                f"{max(row['state_bytes']) / 1e3:.1f}",
                f"{row['one_process_state_bytes'] / 1e3:.1f}",
                f"{row['ms_per_step']:.0f}",
            ]
        )
    return align(cells)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return demo(args) if args.demo else work(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fsdp.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
