"""Data, model, training loop and checkpoints shared by the examples.

Nothing here belongs to one optimizer: a method is a name, a learning rate for the hidden
matrices and constructor keywords (``methods.py``). Every method sees the same start and the same
batches; tables and pictures are in ``report.py``.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods import UserError, build_optimizer, schedule, state_bytes
from torch import Tensor, nn

CLIP = 1.0
VAL_SEED, VAL_BATCHES, VAL_ROWS, VAL_SEQ = 999, 16, 32, 64
SIZES = {
    "micro": {"d": 96, "layers": 4, "heads": 4, "seq": 64, "batch": 8},
    "small": {"d": 128, "layers": 4, "heads": 4, "seq": 64, "batch": 16},
}


# ---------------------------------------------------------------------------------------- data

PACKAGES = (
    "asyncio email http json logging xml urllib collections concurrent importlib unittest "
    "multiprocessing ctypes sqlite3 html wsgiref curses dbm re zoneinfo"
).split()
FALLBACK_BYTES = 7_000_000


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Tensor
    val: Tensor
    digest: str
    note: str = ""


def in_validation(key: str) -> bool:
    """A tenth of the files, chosen by their names: the same ones wherever the files lie."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 100


def make_corpus(name: str, train: bytes, val: bytes, note: str = "") -> Corpus:
    digest = hashlib.sha256(train + val).hexdigest()[:12]
    as_tensor = [
        torch.frombuffer(bytearray(part or b"\n"), dtype=torch.uint8) for part in (train, val)
    ]
    return Corpus(name, as_tensor[0], as_tensor[1], digest, note)


def split_texts(name: str, texts: dict[str, bytes], note: str = "") -> Corpus:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for key in sorted(texts):
        parts[in_validation(key)].append(texts[key])
    return make_corpus(name, b"\n".join(parts[0]), b"\n".join(parts[1]), note)


def python_files(root: Path, packages: list[str]) -> dict[str, Path]:
    files = list(root.glob("*.py"))
    for package in packages:
        files += (root / package).rglob("*.py")
    found = {path.relative_to(root).as_posix(): path for path in files}
    return {
        key: path
        for key, path in sorted(found.items())
        # Build settings of this machine, and test data, say nothing about the language.
        if "test" not in key.split("/")[:-1] and not key.startswith("_sysconfigdata")
    }


def code_corpus(root: Path | None = None) -> Corpus:
    """Python's standard library, or torch's sources where the library has no sources."""
    files = python_files(root or Path(sysconfig.get_paths()["stdlib"]), PACKAGES)
    if files:
        return split_texts("code", {key: path.read_bytes() for key, path in files.items()})
    texts: dict[str, bytes] = {}
    size = 0
    for key, path in python_files(Path(torch.__file__).parent, ["."]).items():
        texts[key] = path.read_bytes()
        size += len(texts[key])
        if size >= FALLBACK_BYTES:
            break
    return split_texts("code", texts, "no standard-library sources here: torch's sources instead")


def load_corpus(name: str, seq: int) -> Corpus:
    """The corpus called "code" or "prose", or the user's own file (last tenth: validation)."""
    if name == "code":
        corpus = code_corpus()
    elif name == "prose":
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError(
                "--corpus prose: this Python lacks pydoc_data; use --corpus code or a file."
            ) from error
        corpus = split_texts("prose", {key: text.encode() for key, text in topics.items()})
    else:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise UserError(
                f"--corpus {name}: cannot be read ({error.strerror}); give code, prose or a file."
            ) from error
        cut = len(data) - len(data) // 10
        corpus = make_corpus(Path(name).name, data[:cut], data[cut:])
    if min(len(corpus.train), len(corpus.val)) < seq + 2:
        raise UserError(
            f"--corpus {name}: {len(corpus.train)} + {len(corpus.val)} bytes (training + "
            f"validation) are too few for --seq {seq}; give a longer text or a smaller --seq."
        )
    return corpus


def draw_batch(data: Tensor, rows: int, seq: int, generator: torch.Generator) -> Tensor:
    """``rows`` random windows of ``seq + 1`` bytes: inputs and, one to the right, targets."""
    starts = torch.randint(len(data) - seq, (rows, 1), generator=generator)
    return data[starts + torch.arange(seq + 1)].long()


def validation_batches(corpus: Corpus, seq: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(VAL_SEED)
    # Never longer than what the model saw in training.
    width = min(seq, VAL_SEQ)
    return [draw_batch(corpus.val, VAL_ROWS, width, generator) for _ in range(VAL_BATCHES)]


# --------------------------------------------------------------------------------------- model


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; the two halves of the last dimension are the pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        hidden = max(16, 8 * d // 3 // 16 * 16)
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))

    def feed_forward(self, h: Tensor) -> Tensor:
        mixed: Tensor = self.down(F.silu(self.gate(h)) * self.up(h))
        return mixed


class LanguageModel(nn.Module):
    """Whatever turns bytes into logits of the next one."""

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next byte, in nats."""
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class ByteLM(LanguageModel):
    """LLaMA-style decoder over bytes: RMSNorm, RoPE, causal attention, SwiGLU, no biases."""

    def __init__(self, d: int, layers: int, heads: int, seq: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(d, eps=1e-5)
        self.head = nn.Linear(d, 256, bias=False)
        half = d // heads // 2
        angles = torch.arange(seq)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build_model(d: int, layers: int, heads: int, seq: int, seed: int) -> ByteLM:
    return started(ByteLM(d, layers, heads, seq), layers, seed)


def started(model: ByteLM, layers: int, seed: int) -> ByteLM:
    """The model with the weights that this seed draws."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                continue  # norm gains stay 1
            std = 0.02 if name.startswith(("embed", "head")) else p.shape[-1] ** -0.5
            if name.endswith(("o.weight", "down.weight", "down_proj")):
                std /= math.sqrt(2 * layers)  # keeps the residual stream's size at depth
            p.normal_(0.0, std, generator=generator)
    return model


# --------------------------------------------------------------------------------- checkpoints


def write_atomically(path: Path, content: bytes) -> None:
    """The file is the old one or the new one at every moment, also when the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"--out: cannot write {path} ({error.strerror}); free space or choose another folder."
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        parts = [saved[key] for key in ("settings", "record", "model", "optimizer", "scheduler")]
        if not all(isinstance(part, dict) for part in parts):
            raise EOFError("another program's file")
        if not isinstance(saved["generator"], torch.Tensor):
            raise EOFError("another program's file")
        record = Record(**saved["record"])
        if not (isinstance(record.step, int) and record.step == len(record.train)):
            raise EOFError("a record that ends elsewhere")
        return saved
    # whatever torch.load and the parts of another program's file raise: it is not one of ours
    except Exception as error:
        raise UserError(
            f"--resume: {path} is not a readable checkpoint; remove it to start that run afresh."
        ) from error


# ---------------------------------------------------------------------------------------- loop


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of one run; saved with it and compared on resuming."""

    method: str
    lr: float
    options: dict[str, Any]
    seed: int
    steps: int
    d: int
    layers: int
    heads: int
    seq: int
    batch: int
    val_every: int
    corpus: str
    corpus_hash: str
    threads: int

    @property
    def label(self) -> str:
        return f"{self.method}-seed{self.seed}"


@dataclass
class Record:
    """What one run logged; saved in its checkpoint."""

    step: int = 0
    train: list[float] = field(default_factory=list)
    ema: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    val: list[list[float]] = field(default_factory=list)  # [step, loss]
    diverged_at: int | None = None
    state_bytes: int = 0
    optimizer_seconds: float = 0.0
    step_seconds: float = 0.0

    def log(self, loss: float, lr: float) -> None:
        self.step += 1
        self.train.append(loss)
        self.ema.append(loss if not self.ema else 0.9 * self.ema[-1] + 0.1 * loss)
        self.lr.append(lr)

    @property
    def final(self) -> float:
        return self.val[-1][1] if self.val else math.nan

    def finished(self, steps: int) -> bool:
        return self.step >= steps or self.diverged_at is not None


class Run:
    """One method on one seed: every object of the training loop, and its checkpoint."""

    floor = 0.1  # of the learning rate, at the end

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        s = settings
        self.settings, self.corpus, self.record = s, corpus, Record()
        self.model = self.make_model(s)
        self.optimizer = self.make_optimizer(s, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, s.steps, self.floor)
        )
        self.generator = torch.Generator().manual_seed(1000 + s.seed)
        self.validation = validation_batches(corpus, s.seq)

    @staticmethod
    def make_model(settings: Settings) -> LanguageModel:
        s = settings
        return build_model(s.d, s.layers, s.heads, s.seq, s.seed)

    @staticmethod
    def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(settings.method, model, settings.lr, settings.options)

    def train_step(self) -> None:
        s, record, start = self.settings, self.record, time.process_time()
        batch = draw_batch(self.corpus.train, s.batch, s.seq, self.generator)
        self.optimizer.zero_grad()
        loss = self.model.loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        lr = self.optimizer.param_groups[0]["lr"]
        before = time.process_time()
        self.optimizer.step()
        record.optimizer_seconds += time.process_time() - before
        self.scheduler.step()
        record.log(loss.item(), lr)
        record.step_seconds += time.process_time() - start
        record.state_bytes = record.state_bytes or state_bytes(self.optimizer)
        if not math.isfinite(record.train[-1]):
            record.diverged_at = record.step

    def validate(self) -> float:
        with torch.no_grad():
            losses = [self.model.loss(batch).item() for batch in self.validation]
        return sum(losses) / len(losses)

    def train(self, path: Path, every: int, after_step: Callable[[Record], None]) -> None:
        """Go on from ``record.step`` to the end, with a checkpoint after ``every`` steps."""
        s, record = self.settings, self.record
        while not record.finished(s.steps):
            self.train_step()
            last = record.finished(s.steps)
            if record.diverged_at is None and (last or record.step % s.val_every == 0):
                record.val.append([record.step, self.validate()])
                # No better than guessing all bytes alike. The first steps may still be near that.
                blind = math.log(256) * (0.99 if record.step >= 20 else 1.5)
                if last and not record.final < blind:
                    record.diverged_at = record.step
            if last or record.step % every == 0:
                self.save(path)
            after_step(record)

    def save(self, path: Path) -> None:
        content = {
            "settings": asdict(self.settings),
            "record": asdict(self.record),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        saved = read_checkpoint(path)
        check_settings(path, saved["settings"], asdict(self.settings))
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            self.generator.set_state(saved["generator"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--resume: {path} does not fit this run ({reason}); remove it to start that run "
                "afresh."
            ) from error
        self.record = Record(**saved["record"])


def check_settings(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if key not in saved or saved[key] != value:
            raise UserError(
                f"--resume: {path} was made with {key} = {saved.get(key)!r}, not {value!r}; give "
                f"the same settings, another --out, or leave --resume out to start afresh."
            )
