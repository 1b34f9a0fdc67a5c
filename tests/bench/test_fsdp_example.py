"""The FSDP2 example: its shares of a batch, its runs on several processes, and its checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.paths import EXAMPLES
from helpers.ranks import pool

sys.path.insert(0, str(EXAMPLES))

import fsdp
import methods

SHAPE = {"width": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
TINY = [f"--{key}={value}" for key, value in SHAPE.items()]
NAMES = sorted(methods.available_methods())
LENGTH = ("--steps=24",)
SECONDS = 600


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, so that a started process does not spend its time on reading."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = "the step of a matrix is not the sum of its parts\n".split()
    path.write_text(" ".join(random.Random(0).choices(words, k=9000)))
    return path


def run(*arguments: str, out: Path, text: Path) -> dict[str, Any]:
    """What a run on this process alone writes."""
    assert fsdp.main([*arguments, *TINY, "--corpus", str(text), "--out", str(out)]) == 0
    assert not dist.is_initialized()
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The demo, from the command line."""
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "fsdp.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def end(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[str, str]:
    """What the process prints; one that lasts too long ends what it has started, and itself."""
    try:
        return process.communicate(timeout=seconds)
    except BaseException:
        process.terminate()
        process.communicate(timeout=60)
        raise


# ------------------------------------------------------------------------- shares of a batch


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows", [5, 6, 8])
def test_shares_make_up_the_batch_and_its_mean(size: int, rows: int) -> None:
    batch = torch.randn(rows, 3, dtype=torch.float64)
    shares, mean = [], torch.zeros((), dtype=torch.float64)
    for rank in range(size):
        world = object.__new__(fsdp.World)
        world.rank, world.size, world.device = rank, size, torch.device("cpu")
        world.kind = "fsdp"
        share, factor = world.share(batch)
        assert len(share) > 0
        shares.append(share)
        mean += share.mean() * factor / size
    torch.testing.assert_close(torch.cat(shares), batch, rtol=0, atol=0)
    torch.testing.assert_close(mean, batch.mean())


def test_gpus_are_taken_if_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert fsdp.pick_device("auto") == torch.device("cuda", 1)
    assert fsdp.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert fsdp.pick_device("auto") == torch.device("cpu")
    with pytest.raises(methods.UserError, match="2 processes need 2 GPUs, here are 1"):
        fsdp.pick_device("cuda")


# --------------------------------------------------------------------------- meshes of two axes


def on_mesh(rank: int, size: int, kind: str, name: str, path: str) -> dict[str, Any]:
    """Three steps on a mesh, and on rank 0 those of plain tensors."""
    world = object.__new__(fsdp.World)
    world.rank, world.size, world.device, world.kind = rank, size, torch.device("cpu"), kind
    world.mesh = fsdp.make_mesh(kind, size, "cpu")
    arguments = ["--optimizer", name, "--steps", "3", *TINY, "--corpus", path, "--mesh", kind]
    args = fsdp.make_parser().parse_args(arguments)
    corpus = fsdp.load_corpus(path, SHAPE["seq"])
    settings = fsdp.make_settings(args, corpus, fsdp.model_shape(args))
    trainer = fsdp.Trainer(settings, corpus, world.device, world, clip=0.5, kind=kind)
    trainer.train(3, lambda _: None)
    weights = trainer.whole_weights()
    found = {"calls": trainer.calls, "plans": trainer.plans(), "sent": trainer.sent_bytes()}
    if rank == 0:
        found |= fsdp.compare(trainer, weights, [[size, 3]])
    return found


@pytest.mark.parametrize("kind", ["hsdp", "tp", "ep"])
@pytest.mark.parametrize("name", ["muon", "galore"])
def test_a_mesh_trains_as_plain_tensors(kind: str, name: str, text: Path) -> None:
    found = pool(4).run(on_mesh, kind, name, str(text))
    assert found[0]["loss_difference"] < 1e-4
    assert found[0]["weight_difference"] < (1e-3 if name == "muon" else 5e-2)
    assert set(found[0]["calls"]) <= {"all_reduce", "all_to_all_single"}
    assert "gather" not in found[0]["plans"]
    assert all(rank["sent"] > 0 for rank in found)


def test_a_mesh_of_two_axes_needs_four_processes() -> None:
    with pytest.raises(methods.UserError, match="--mesh tp needs 4 processes"):
        fsdp.make_mesh("tp", 2, "cpu")


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", NAMES)
def test_one_process_resumes_in_equal_bits(name: str, text: Path, tmp_path: Path) -> None:
    """And equals plain tensors in bits: on a mesh of one process nothing is cut."""
    shared = ["--optimizer", name, "--steps", "8"]
    if "update_proj_gap" in methods.free_options(name):
        shared += ["--set", "update_proj_gap=3"]
    checkpoint = str(tmp_path / "checkpoint")
    write = ["--save", checkpoint, "--save-at", "4", "--compare"]
    whole = run(*shared, *write, out=tmp_path / "whole", text=text)
    assert whole["losses"][-1] < whole["losses"][0] - 0.5
    assert whole["one_process"] == whole["losses"] and whole["weight_difference"] == 0
    assert whole["sent_bytes"] == [0]
    assert whole["state_bytes"] == [whole["one_process_state_bytes"]]
    rest = run(*shared, "--load", checkpoint, "--compare", out=tmp_path / "rest", text=text)
    assert rest["losses"] == whole["losses"] and rest["weight_difference"] == 0
    assert rest["history"] == [[1, 4], [1, 8]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--optimizer", "adam"], "Unknown optimizer 'adam': choose from "),
        (["--width", "30"], "--d 30 must be a multiple of twice --heads"),
        (["--save-at", "9", "--steps", "8"], "--save-at 9 is beyond the 8 steps"),
        (["--load", "nowhere"], "--load nowhere: no checkpoint of this script; make one with"),
        (["--set", "size=3"], "--set size=3: none of muon takes 'size'"),
        (["--demo", "muon,adam"], "Unknown optimizer 'adam': choose from "),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = [*TINY, "--corpus", str(text), "--out", str(tmp_path)]
    assert fsdp.main([*shared, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fsdp.py: {sentence}") and len(printed.splitlines()) == 1
    assert not dist.is_initialized()


def test_a_checkpoint_of_other_settings_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--optimizer", "adamw", "--steps", "3"]
    checkpoint = str(tmp_path / "checkpoint")
    run(*shared, "--save", checkpoint, "--save-at", "1", out=tmp_path, text=text)
    wrong = [*shared, *TINY, "--corpus", str(text), "--out", str(tmp_path), "--load", checkpoint]
    for option, key in (("--lr=0.5", "lr"), ("--seq=16", "seq"), ("--steps=4", "steps")):
        assert fsdp.main([*wrong, option]) == 2
        assert f"was made with {key} = " in capsys.readouterr().err
    assert fsdp.main([*wrong, "--save", checkpoint, "--save-at", "1"]) == 2
    assert "the run continues at step 1" in capsys.readouterr().err


# -------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def muon(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the demo prints and writes: Muon on 2 processes, from their checkpoint on 1 and on 3."""
    out = tmp_path_factory.mktemp("muon")
    process = begin("--demo", "muon", *LENGTH, *TINY, f"--corpus={text}", f"--out={out}")
    printed, errors = end(process)
    assert process.returncode == 0, errors
    rows = json.loads((out / "results.json").read_text())
    files = [(out / f"muon-{size}" / "printed.txt").read_text() for size in (2, 1, 3)]
    return {"rows": rows, "table": printed, "printed": files}


@pytest.fixture(scope="module")
def galore(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """GaLore on 2 processes, longer sides cut, and from within a window on this one."""
    out = tmp_path_factory.mktemp("galore")
    shared = ["--optimizer=galore", "--set=update_proj_gap=5", "--longest-dim", "--compare"]
    shared += [*LENGTH, *TINY, f"--corpus={text}"]
    write = [f"--save={out / 'checkpoint'}", "--save-at=12", f"--out={out / '2'}"]
    printed = fsdp.start(2, [*shared, *write], SECONDS)
    assert fsdp.main([*shared, f"--load={out / 'checkpoint'}", f"--out={out / '1'}"]) == 0
    rows = [json.loads((out / size / "results.json").read_text()) for size in "21"]
    return {"rows": rows, "printed": [printed]}


@pytest.fixture(params=["muon", "galore"])
def runs(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


@pytest.mark.slow
def test_losses_and_weights_are_those_of_one_process(runs: dict[str, Any]) -> None:
    for row in runs["rows"]:
        assert len(row["losses"]) == len(row["one_process"]) == 24
        assert row["losses"][-1] < row["losses"][0] - 1
        assert row["loss_difference"] < 1e-4
        assert row["weight_difference"] < 1e-3


@pytest.mark.slow
def test_state_is_divided(runs: dict[str, Any]) -> None:
    """But for GaLore's bases, which each process has whole."""
    for row in runs["rows"]:
        processes, whole = row["history"][-1][0], row["one_process_state_bytes"]
        assert len(row["sent_bytes"]) == len(row["state_bytes"]) == processes
        assert max(row["state_bytes"]) <= 1.5 * whole / processes


@pytest.mark.slow
def test_what_is_sent(muon: dict[str, Any], galore: dict[str, Any]) -> None:
    """By Muon every matrix twice at most; by GaLore nothing, as longer sides are cut."""
    matrices = 4 * 16 * SHAPE["width"] ** 2
    for row in muon["rows"]:
        assert (sum(row["sent_bytes"]) > 0) == (row["history"][-1][0] > 1)
        assert sum(row["sent_bytes"]) <= 2 * matrices
    assert [row["sent_bytes"] for row in galore["rows"]] == [[0, 0], [0]]


@pytest.mark.slow
def test_any_number_of_processes_reads_a_checkpoint(runs: dict[str, Any]) -> None:
    first, *others = runs["rows"]
    assert first["history"] == [[2, 24]]
    assert [row["history"] for row in others] == [[[2, 12], [n, 24]] for n in (1, 3)][: len(others)]
    assert all(row["losses"][:12] == first["losses"][:12] for row in others)


@pytest.mark.slow
def test_what_is_printed(muon: dict[str, Any], galore: dict[str, Any]) -> None:
    seen = ((muon["printed"][2], "rows", "owner"), (galore["printed"][0], "longer side", "reduce"))
    for text, side, plan in seen:
        assert "gloo on cpu" in text and f"Matrices are cut along their {side}" in text
        assert f" {plan} " in text and "blocks.0.down.weight" in text
        assert "kB sent for the optimizer" in text and "Largest difference over 24 steps" in text
    lines = [line.split() for line in muon["table"].splitlines() if line.startswith("muon  ")]
    for row, line in zip(muon["rows"], lines, strict=True):
        assert line[1 : len(line) - 9] == " to ".join(str(n) for n, _ in row["history"]).split()
        assert line[-9:-7] == ["24", f"{row['losses'][-1]:.4f}"]
        assert line[-6] == f"{row['loss_difference']:.1e}"


def living(mark: str) -> set[int]:
    """Processes with this variable in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue  # it has ended, or belongs to somebody else
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are read from /proc")
def test_a_demo_that_is_told_to_end_leaves_no_process(text: Path, tmp_path: Path) -> None:
    mark = str(tmp_path)
    arguments = ["--demo", "adamw", "--steps", "100000", *TINY, "--corpus", str(text)]
    process = begin(*arguments, "--out", str(tmp_path), FSDP_EXAMPLE_TEST=mark)
    try:
        wait_for(lambda: len(living(mark)) >= 4)  # demo, torchrun and its two
        process.terminate()
        end(process)
        assert process.returncode == 128 + signal.SIGTERM
        wait_for(lambda: not living(mark))
    finally:
        for pid in living(mark):
            os.kill(pid, signal.SIGKILL)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    last = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < last
        time.sleep(0.1)
