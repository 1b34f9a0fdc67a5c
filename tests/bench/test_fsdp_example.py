"""The FSDP2 example: its shares of a batch, its runs on several processes, and its checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import fsdp
import methods

SHAPE = {"width": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
TINY = [f"--{key}={value}" for key, value in SHAPE.items()]
NAMES = sorted(methods.available_methods())
METHODS = ("muon", "galore")
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


def end(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
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


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "longer-side"])
def demo(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the demo prints and writes: each method on 2 processes, then on 1 and on 3."""
    out = tmp_path_factory.mktemp("demo")
    arguments = ["--demo", ",".join(METHODS), "--steps", "24", *TINY, "--corpus", str(text)]
    process = begin(*arguments, "--out", str(out), *["--longest-dim"] * request.param)
    printed, errors = end(process, SECONDS)
    assert process.returncode == 0, errors
    rows = json.loads((out / "results.json").read_text())
    return {"rows": rows, "printed": printed, "out": out, "longest": request.param}


@pytest.mark.slow
def test_losses_and_weights_are_those_of_one_process(demo: dict[str, Any]) -> None:
    assert [row["settings"]["method"] for row in demo["rows"]] == [
        m for m in METHODS for _ in "213"
    ]
    for row in demo["rows"]:
        assert len(row["losses"]) == len(row["one_process"]) == 24
        assert row["losses"][-1] < row["losses"][0] - 1
        assert row["loss_difference"] < 1e-4
        assert row["weight_difference"] < 1e-3


@pytest.mark.slow
def test_state_is_divided_and_traffic_is_small(demo: dict[str, Any]) -> None:
    """A process holds its part, and sends at most every weight and its state twice a step."""
    for row in demo["rows"]:
        processes, whole = row["history"][-1][0], row["one_process_state_bytes"]
        assert len(row["sent_bytes"]) == len(row["state_bytes"]) == processes
        assert max(row["state_bytes"]) <= 1.35 * whole / processes
        if processes == 1:
            assert row["sent_bytes"] == [0]
        else:
            weights = 4 * 12 * SHAPE["width"] ** 2
            assert 0 < sum(row["sent_bytes"]) <= 2 * (2 * weights + whole)


@pytest.mark.slow
def test_any_number_of_processes_reads_a_checkpoint(demo: dict[str, Any]) -> None:
    histories = [row["history"] for row in demo["rows"]]
    assert histories == [[[2, 24]], [[2, 12], [1, 24]], [[2, 12], [3, 24]]] * len(METHODS)
    for i in range(0, len(demo["rows"]), 3):
        first, *others = demo["rows"][i : i + 3]
        assert all(row["losses"][:12] == first["losses"][:12] for row in others)


@pytest.mark.slow
def test_table_and_assignment_are_printed(demo: dict[str, Any]) -> None:
    lines = demo["printed"].splitlines()
    for row in demo["rows"]:
        processes = " to ".join(str(size) for size, _ in row["history"])
        name = row["settings"]["method"]
        line = next(
            x
            for x in lines
            if x.split()[: 1 + len(processes.split())] == [name, *processes.split()]
        )
        assert f"{row['losses'][-1]:.4f}" in line and f"{row['loss_difference']:.1e}" in line
        size = row["history"][-1][0]
        printed = (demo["out"] / f"{name}-{size}" / "printed.txt").read_text()
        side = "longer side" if demo["longest"] else "rows"
        assert f"gloo on cpu; matrices are cut along their {side}" in printed
        assert "plan" in printed and "blocks.0.down.weight" in printed
        assert printed.count("one process") == 1 and "kB sent for the optimizer" in printed


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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda x: x.name)
def test_a_demo_that_is_told_to_end_leaves_no_process(
    number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    mark = f"{tmp_path}-{number.name}"
    arguments = ["--demo", "adamw", "--steps", "100000", *TINY, "--corpus", str(text)]
    process = begin(*arguments, "--out", str(tmp_path), FSDP_EXAMPLE_TEST=mark)
    try:
        wait_for(lambda: len(living(mark)) >= 4)  # demo, torchrun and its two
        process.send_signal(number)
        end(process, 60)
        assert process.returncode != 0
        wait_for(lambda: not living(mark))
    finally:
        for pid in living(mark):
            os.kill(pid, signal.SIGKILL)


def wait_for(what: Any, seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < last
        time.sleep(0.1)
