"""The language-model example: data, model, protocol, report, and runs that are killed."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import content, same_bits
from helpers.paths import EXAMPLES

import stiefel.optimizers

sys.path.insert(0, str(EXAMPLES))

import common
import methods
import pretrain
import report

NAMES = [
    "adamw",
    *(
        pytest.param(
            name.lower(),
            marks=pytest.mark.skipif(
                not hasattr(stiefel.optimizers, name), reason=f"{name} is not exported yet"
            ),
        )
        for name in ("Muon", "GaLore")
    ),
]
SHAPE = {"d": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
VALIDATION_KEYS = ["dataclasses.py", "ftplib.py", "glob.py"]
TINY = [f"--{key}={value}" for key, value in SHAPE.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, so that a started process does not spend its time on reading."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = random.Random(0).choices(
        "the step of a matrix is not the sum of its parts\n".split(), k=9000
    )
    path.write_text(" ".join(words))
    return path


def settings(name: str, **changes: Any) -> common.Settings:
    values: dict[str, Any] = {**SHAPE, "seed": 0, "steps": 12, "val_every": 5, "threads": 1}
    values |= {"lr": methods.default_lr(name), "options": methods.method_options(name, 32, {})}
    return common.Settings(method=name, corpus="text", corpus_hash="0", **(values | changes))


# ---------------------------------------------------------------------------------------- data


def test_the_split_depends_on_the_file_name_alone() -> None:
    # Fixed for ever: a change of the split would make all published numbers incomparable.
    keys = ["abc.py", "json/decoder.py", "asyncio/events.py", "typing.py", "re/_parser.py"]
    found = [common.in_validation(key) for key in [*keys, *VALIDATION_KEYS]]
    assert found == [False] * len(keys) + [True] * len(VALIDATION_KEYS)


def test_code_corpus_is_stable_and_whole(tmp_path: Path) -> None:
    for name in ("a.py", "json/b.py", "json/test/c.py", "other/d.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    corpus = common.code_corpus(tmp_path)
    texts = {key: f"# {key}\n".encode() for key in ("a.py", "json/b.py")}
    assert corpus.digest == common.split_texts("code", texts).digest
    assert corpus.name == "code" and not corpus.note


def test_split_joins_sorted_files_by_newlines() -> None:
    keys = sorted([*VALIDATION_KEYS, "b", "a"])
    corpus = common.split_texts("x", {key: key.encode() for key in reversed(keys)})
    assert bytes(corpus.val.tolist()) == "\n".join(sorted(VALIDATION_KEYS)).encode()
    assert bytes(corpus.train.tolist()) == b"a\nb"


def test_standard_library_and_prose() -> None:
    code, again, prose = (common.load_corpus(name, 64) for name in ("code", "code", "prose"))
    assert code.digest == again.digest and torch.equal(code.val, again.val)
    assert len(code.train) > len(code.val) > 100_000
    assert len(prose.train) > 10 * len(prose.val)
    if sys.version_info[:3] == (3, 11, 7):
        assert (code.digest, prose.digest) == ("8b5e4b14549c", "dded5f7d5ed8")


def test_without_library_sources_torch_steps_in(tmp_path: Path) -> None:
    corpus = common.code_corpus(tmp_path)
    assert "torch" in corpus.note
    assert 7e6 <= len(corpus.train) + len(corpus.val) < 9e6


def test_own_file_keeps_its_last_tenth_for_validation(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(bytes(range(250)) * 4)
    corpus = common.load_corpus(str(tmp_path / "own.txt"), 32)
    assert (len(corpus.train), len(corpus.val), corpus.name) == (900, 100, "own.txt")
    with pytest.raises(methods.UserError, match="too few"):
        common.load_corpus(str(tmp_path / "own.txt"), 99)
    with pytest.raises(methods.UserError, match=r"--corpus .*cannot be read"):
        common.load_corpus(str(tmp_path / "none.txt"), 32)


def test_batches_reach_both_ends_of_the_data() -> None:
    data = torch.arange(8, dtype=torch.uint8)
    batch = common.draw_batch(data, 200, 5, torch.Generator().manual_seed(0))
    assert batch.shape == (200, 6) and batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()
    assert (int(batch.min()), int(batch.max())) == (0, 7)


# --------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("size", "total", "hidden"), [("micro", 492_384, 442_368), ("small", 844_928, 778_240)]
)
def test_parameter_counts(size: str, total: int, hidden: int) -> None:
    shape = dict(common.SIZES[size])
    del shape["batch"]
    model = common.build_model(**shape, seed=0)
    matrices, aux = methods.split_parameters(model)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for _, p in matrices) == hidden
    assert len(matrices) == 28 and all(p.ndim == 2 for _, p in matrices)
    assert {name for name, p in aux if p.ndim == 2} == {"embed.weight", "head.weight"}


def test_initial_scales() -> None:
    model = common.build_model(96, 4, 4, 64, seed=3)
    p = dict(model.named_parameters())
    expected = {
        "embed.weight": 0.02,
        "head.weight": 0.02,
        "blocks.1.q.weight": 96**-0.5,
        "blocks.0.up.weight": 96**-0.5,
        "blocks.2.o.weight": 96**-0.5 / 8**0.5,
        "blocks.3.down.weight": 256**-0.5 / 8**0.5,
    }
    for name, std in expected.items():
        assert float(p[name].detach().std()) == pytest.approx(std, rel=0.05)
    assert p["blocks.3.gate.weight"].shape == (256, 96)
    batch = torch.randint(256, (8, 65), generator=torch.Generator().manual_seed(0))
    assert float(model.loss(batch).detach()) == pytest.approx(math.log(256), abs=0.1)


def test_model_is_causal_and_knows_positions() -> None:
    model = common.build_model(**{key: SHAPE[key] for key in list(SHAPE)[:4]}, seed=0)
    ids = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-6)
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).min() > 1e-6


def test_rotary_embedding_sees_distances_only() -> None:
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.1])
    q, k = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    q, k = (common.rotate(x.expand(40, 4), angles.cos(), angles.sin()) for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[3, 1], scores[33, 31], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(40))


# ------------------------------------------------------------------------------------ protocol


def test_schedule_warms_up_and_ends_near_a_tenth() -> None:
    factors = [common.schedule(step, 300) for step in range(300)]
    assert factors[0] == pytest.approx(1 / 30) and factors[29] == 1.0 == max(factors)
    assert factors[165] == pytest.approx(0.55) and factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(0 < common.schedule(step, 1) <= 1 for step in range(3))


@pytest.mark.parametrize("name", NAMES)
def test_aux_parameters_are_trained_alike(name: str, text: Path) -> None:
    """With matrices at rest (lr 0), every method must move the rest exactly as AdamW does."""
    corpus = common.load_corpus(str(text), 32)
    runs = [common.Run(settings(n, lr=0.0), corpus) for n in ("adamw", name)]
    for run in runs:
        for _ in range(4):
            run.train_step()
        matrices, _ = methods.split_parameters(run.model)
        start, _ = methods.split_parameters(common.build_model(32, 1, 2, 32, seed=0))
        assert all(torch.equal(p, q) for (_, p), (_, q) in zip(matrices, start, strict=True))
    first, second = (methods.split_parameters(run.model)[1] for run in runs)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(first, second, strict=True))
    assert runs[0].record.train == runs[1].record.train


@pytest.mark.parametrize("name", NAMES)
def test_same_start_and_same_batches(name: str, text: Path) -> None:
    corpus = common.load_corpus(str(text), 32)
    a, b = (common.Run(settings(n), corpus) for n in ("adamw", name))
    assert same_bits(dict(a.model.state_dict()), dict(b.model.state_dict()))
    assert same_bits(a.validation, b.validation) and len(a.validation) == 16
    for run in (a, b):
        run.train_step()
    assert a.record.train == b.record.train
    assert torch.equal(a.generator.get_state(), b.generator.get_state())
    lrs = [group["lr"] for group in b.optimizer.param_groups]
    assert sorted({round(lr / common.schedule(1, 12), 9) for lr in lrs}) == sorted(
        {methods.AUX_LR, methods.default_lr(name)}
    )


def test_seeds_differ_in_start_and_batches(text: Path) -> None:
    corpus = common.load_corpus(str(text), 32)
    a, b = (common.Run(settings("adamw", seed=seed), corpus) for seed in (0, 1))
    assert not torch.equal(a.model.head.weight, b.model.head.weight)
    assert not torch.equal(a.generator.get_state(), b.generator.get_state())
    assert same_bits(a.validation, b.validation)


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bit_for_bit(name: str, text: Path, tmp_path: Path) -> None:
    corpus = common.load_corpus(str(text), 32)
    for path in ("a", "b"):
        common.Run(settings(name), corpus).train(tmp_path / path, 50, lambda record: None)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert same_bits(a, b)
    assert a["record"]["step"] == 12 and [step for step, _ in a["record"]["val"]] == [5, 10, 12]


# -------------------------------------------------------------------------------------- options


def test_lrs_and_options_go_where_they_belong() -> None:
    names = ["adamw"]
    assert pretrain.parse_lrs(["0.5"], names) == {"adamw": 0.5}
    assert pretrain.parse_lrs(["AdamW=0.5"], names) == {"adamw": 0.5}
    assert pretrain.parse_lrs([], names) == {"adamw": 1e-3}
    assert pretrain.parse_options(["betas=(0.5, 0.9)"], names) == {"adamw": {"betas": (0.5, 0.9)}}
    assert pretrain.parse_options(["adamw.eps=1e-6"], names) == {"adamw": {"eps": 1e-6}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "Unknown optimizer 'adam': choose from adamw"),
        (["--compare", "adamw,adamw"], "each method can be named once"),
        (["--optimizer", "adamw", "--lr", "muon=0.1"], "muon is not in this run"),
        (["--optimizer", "adamw", "--lr", "-1"], "not a number above 0"),
        (["--optimizer", "adamw", "--lr", "x"], "'x' is not a number"),
        (["--optimizer", "adamw", "--set", "rnak=8"], "none of adamw takes 'rnak'"),
        (["--optimizer", "adamw", "--set", "rank"], "write --set key=value"),
        (["--optimizer", "adamw", "--set", "betas=(3, 3)"], "refuses its options"),
        (["--optimizer", "adamw", "--d", "33"], "--d 33 must be a multiple"),
        (["--optimizer", "adamw", "--corpus", "no.txt"], "--corpus no.txt: cannot be read"),
    ],
)
def test_mistakes_are_said_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main([*arguments, "--quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


# --------------------------------------------------------------------------------------- report


def record_of(losses: list[float], diverged_at: int | None = None) -> common.Record:
    record = common.Record(diverged_at=diverged_at, optimizer_seconds=1.0, step_seconds=4.0)
    record.val = [[100.0 * (i + 1), loss] for i, loss in enumerate(losses)]
    record.step = 100 * len(losses)
    record.train = record.ema = record.lr = [3.0] * record.step
    return record


@pytest.mark.parametrize(
    ("gaps", "steps", "word"),
    [
        ([-0.16], 300, "better"),
        ([0.16], 300, "worse"),
        ([-0.05], 300, "1 seed"),
        ([-0.05, -0.04], 300, "2 seeds"),
        ([-0.05, -0.04, -0.03], 300, "better"),
        ([-0.05, -0.04, 0.01], 300, "tie"),
        ([0.014], 300, "tie"),
        ([-0.3], 40, "short"),
    ],
)
def test_verdict_claims_no_more_than_the_runs_show(
    gaps: list[float], steps: int, word: str
) -> None:
    assert report.verdict(gaps, steps) == word


def test_summary_is_paired_sorted_and_keeps_diverged_runs() -> None:
    common_values = {"steps": 200, "options": {}, "lr": 0.1}
    results = []
    for seed in (0, 1, 2):
        for name, losses, bad in (
            ("adamw", [2.5 + seed / 100, 2.2 + seed / 100], None),
            ("x", [2.1 + seed / 100, 2.0 + seed / 50], None),
            ("y", [1.0], 150 if seed == 1 else None),
        ):
            made = common.Settings(
                method=name,
                corpus="t",
                corpus_hash="0",
                seed=seed,
                val_every=100,
                threads=1,
                **SHAPE,
                **common_values,
            )
            results.append((made, record_of(losses, bad)))
    rows = report.summarize(results)
    assert [row.method for row in rows] == ["x", "adamw", "y"]
    x, adamw, y = rows
    assert x.gaps == pytest.approx([-0.2, -0.19, -0.18]) and x.verdict == "better"
    assert x.loss == pytest.approx(2.02) and x.baseline_steps == "> 200"
    assert adamw.gap == 0 and adamw.verdict == "baseline" and adamw.optimizer_share == 0.25
    assert y.loss is None and y.gap is None and y.verdict == "diverged"
    assert y.losses == [1.0, None, 1.0]
    shown = report.table(rows) + report.seed_table(rows, [0, 1, 2])
    assert shown.count("diverged") >= 3 and f"{2.02 / math.log(2):.3f}" in shown


def test_steps_to_reach() -> None:
    curve = [(100, 3.0), (200, 2.0)]
    found = [report.steps_to_reach(curve, target) for target in (3.5, 2.5, 2.0, 1.0)]
    assert found == ["<= 100", "~150", "~200", "> 200"]


def test_json_has_no_nan() -> None:
    values = {"a": [math.nan, math.inf, 1.0], "b": (True, None, "x"), 3: torch.float32}
    assert report.clean(values) == {
        "a": [None, None, 1.0],
        "b": [True, None, "x"],
        "3": "torch.float32",
    }


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    common.write_atomically(path, b"old")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(methods.UserError, match="No space left"):
        common.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------ whole runs


def check_png(path: Path, height: int) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert size == (1350, height)  # 9 x 5.5 inches at 150 dots, 7.5 with the differences
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert 0.02 < (image[..., :3].min(axis=-1) < 0.95).mean() < 0.5  # drawn on, not filled


@pytest.mark.slow
def test_quick_comparison(tmp_path: Path) -> None:
    """The command of the documentation, from another folder, on the default corpus."""
    names = [name for name in ("adamw", "muon", "galore") if name in methods.available_methods()]
    arguments = ["--compare", ",".join(names), "--quick", "--out", "here"]
    script = str(EXAMPLES / "pretrain.py")
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("torch ", "492,384 parameters", "Estimate", "40/40", "bits", *names):
        assert word in done.stdout
    assert "Traceback" not in done.stderr
    results = json.loads((tmp_path / "here/results.json").read_text())
    assert results.keys() == {"environment", "protocol", "corpus", "model", "runs", "summary"}
    assert results["environment"].keys() == {"python", "torch", "system", "threads"}
    assert results["protocol"]["aux_lr"] == 0.01
    assert [run["settings"]["method"] for run in results["runs"]] == names
    for run in results["runs"]:
        lengths = {key: len(run["record"][key]) for key in ("train", "ema", "lr", "val")}
        assert lengths == {"train": 40, "ema": 40, "lr": 40, "val": 1}
        assert not run["diverged"] and 2 < run["val_loss"] < 3.5
        assert run["bits_per_byte"] == pytest.approx(run["val_loss"] / math.log(2))
    for row in results["summary"]:
        assert 0 < row["optimizer_share"] < 1 and row["state_bytes"] > 400_000
    check_png(tmp_path / "here/loss.png", 825 if len(names) == 1 else 1125)


def tiny(text: Path, out: Path, *more: object) -> list[str]:
    base = [*TINY, "--corpus", text, "--out", out, "--no-progress", *more]
    return [str(word) for word in base]


@pytest.mark.skipif(not hasattr(stiefel.optimizers, "Muon"), reason="Muon is not exported yet")
def test_comparison_resumes_and_refuses(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds in one comparison; a second call runs nothing; other settings are refused."""
    whole = tiny(text, tmp_path, "--steps", 8, "--compare", "adamw,muon", "--seeds", 2)
    assert pretrain.main(whole) == 0
    first = capsys.readouterr().out
    assert "by seed" in first and "Estimate" in first
    names = [f"{name}-seed{seed}.pt" for name in ("adamw", "muon") for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == names
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert pretrain.main([*whole, "--resume", "--json", "-"]) == 0
    again = capsys.readouterr()
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert json.loads(again.out) == json.loads((tmp_path / "results.json").read_text())
    assert again.err.count("finished earlier") == 4 and "Estimate" not in again.err
    other = tiny(text, tmp_path, "--steps", 8, "--optimizer", "muon", "--lr", 0.5, "--resume")
    assert pretrain.main(other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and "lr = 0.01, not 0.5" in error


def broken_files(whole: bytes) -> dict[str, Any]:
    """Damages of a checkpoint by name: bytes of a file, or what torch.save writes."""
    saved = torch.load(io.BytesIO(whole), weights_only=True)
    parts = ("settings", "record", "model", "optimizer", "scheduler", "generator")
    lacking = {f"no {key}": {k: v for k, v in saved.items() if k != key} for key in parts}
    other_model = {name: torch.ones(2) for name in saved["model"]}
    entry = {**saved["optimizer"]["state"][0], "exp_avg": torch.ones(3)}
    optimizer = {**saved["optimizer"], "state": {**saved["optimizer"]["state"], 0: entry}}
    return {
        "empty": b"",
        "text": b"step 1, loss 5.1\nstep 2, loss 4.9\n",
        "numbers": bytes(range(256)) * 40,
        "truncated": whole[:5000],
        "last byte lost": whole[:-1],
        "tensor": torch.ones(2),
        "list": [1, 2],
        "another program's": {"weights": torch.ones(2)},
        "another model": {**saved, "model": other_model},
        "settings of another kind": {**saved, "settings": 3},
        "record of another kind": {**saved, "record": {"steps": 3}},
        "generator": {**saved, "generator": torch.ones(3)},
        "optimizer": {**saved, "optimizer": optimizer},
        **lacking,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["muon", "galore"])
def test_resuming_from_a_damaged_file_is_one_sentence_and_exit_code_2(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    command = tiny(text, tmp_path, "--steps", 2, "--optimizer", method, "--resume")
    assert pretrain.main(command) == 0  # without a checkpoint it starts
    path = tmp_path / f"{method}-seed0.pt"
    whole = path.read_bytes()
    for name, damage in broken_files(whole).items():
        if name in ("another model", "generator", "optimizer"):
            # a finished run is not loaded: make it one that goes on
            damage["record"] = {**damage["record"], "step": 1, "train": [5.0]}
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            torch.save(damage, path)
        kept = path.read_bytes()
        capsys.readouterr()
        assert pretrain.main(command) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--resume" in error and str(path) in error, name
        assert path.read_bytes() == kept, name
    path.unlink()
    path.mkdir()
    for words in (command, [word for word in command if word != "--resume"]):
        assert pretrain.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    path.rmdir()
    assert pretrain.main([word for word in command if word != "--resume"]) == 0


def test_diverged_run_is_kept_and_told_by_the_exit_code(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tiny(text, tmp_path, "--steps", 25, "--optimizer", "adamw", "--lr", "1e30")
    assert pretrain.main(command) == 1
    assert "diverged" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["diverged"] and run["val_loss"] is None and run["record"]["diverged_at"] <= 25
    assert pretrain.main([*command, "--resume"]) == 1


# ---------------------------------------------------------------------------------- killed runs

# Imports once, then trains in forked children: so a kill costs no new start of Python. It runs
# no tensor code itself, so there are no threads that a fork could lose.
SERVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch._dynamo
import pretrain
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(pretrain.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(EXAMPLES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def killed(self, command: list[str], path: Path, step: int, delay: float) -> int:
        """SIGKILL ``delay`` seconds after the checkpoint of ``step``; returns the exit code."""
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        child = self.read()
        limit = time.monotonic() + 60
        while step_of(path) < step and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # no handler, no clean-up
        return self.read()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork and no SIGKILL")
    made = Server()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(10)


def step_of(path: Path) -> int:
    """The step of a checkpoint that a running process keeps replacing: always a whole file."""
    return int(torch.load(path, weights_only=True)["record"]["step"]) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("every", "kills"), [(3, 2), (1, 5)])
def test_killed_runs_end_bit_identical(
    name: str, every: int, kills: int, server: Server, text: Path, tmp_path: Path
) -> None:
    """With a checkpoint after every step, many of the random moments lie inside a write."""
    steps, draw, step = 90 if every > 1 else 300, random.Random(kills), 0
    command = tiny(text, tmp_path, "--optimizer", name, "--steps", steps, "--val-every", 25)
    command += ["--checkpoint-every", str(every), "--resume"]
    if name == "galore":
        command += ["--set", "update_proj_gap=7"]  # refreshes lie between checkpoints
    path = tmp_path / f"{name}-seed0.pt"
    for _ in range(kills):
        status = server.killed(command, path, step + 1, draw.uniform(0.0, 0.03))
        assert status == -signal.SIGKILL
        step = step_of(path)
    assert 0 < step < steps
    assert pretrain.main(command) == 0
    assert not list(tmp_path.glob("*.tmp"))
    made = common.Settings(**torch.load(path, weights_only=True)["settings"])
    whole = common.Run(made, common.load_corpus(str(text), 32))
    whole.train(tmp_path / "whole", 10 * steps, lambda record: None)
    assert same_bits(content(tmp_path / "whole"), content(path))
