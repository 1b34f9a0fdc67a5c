"""The memory example: its counter, its runs, and what it says of LLaMA."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.allocations import AllocationCounter
from helpers.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import common
import memory

SHAPE = {"d": 48, "layers": 2, "heads": 2, "seq": 16, "batch": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, so that a started process does not spend its time on reading."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = "the step of a matrix is not the sum of its parts\n".split()
    path.write_text(" ".join(random.Random(0).choices(words, k=9000)))
    return path


@pytest.fixture(scope="module")
def results(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--quick`` prints and writes when it is run from the command line."""
    out = tmp_path_factory.mktemp("out")
    script = [sys.executable, str(EXAMPLES / "memory.py"), "--quick"]
    run = subprocess.run(
        [*script, "--corpus", str(text), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {**found, "printed": run.stdout}


def test_losses_fall_and_end_close_to_each_other(results: dict[str, Any]) -> None:
    ends = []
    for run in results["runs"]:
        before, after = run["validation"]
        assert after < before - 0.5
        ends.append(after)
    assert abs(ends[0] - ends[1]) < 0.3


def test_state_is_what_the_report_says(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        assert run["state_bytes"] == run["reported_state"] == run["peak"]["state"]


def test_no_more_gradients_than_those_of_the_two_largest_layers(results: dict[str, Any]) -> None:
    full, lean = results["runs"]
    assert full["most"]["gradients"] == full["peak"]["weights"]
    assert 0 < lean["most"]["gradients"] <= lean["largest_two"]
    assert 2 * lean["peak"]["weights"] == full["peak"]["weights"]


def test_printed_table_adds_up(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        line = next(
            line for line in results["printed"].splitlines() if memory.WAYS[run["way"]] in line
        )
        total = sum(run["peak"].values())
        assert line.endswith(f"{total / 1e6:.2f}")
        for kind in memory.KINDS:
            assert f"{run['peak'][kind] / 1e6:.2f} (" in line
            assert run["most"][kind] >= run["peak"][kind]
    for word in ("24 GB", "48 GB", "80 GB", "LLaMA 7B", "LLaMA 13B", "without activations"):
        assert word in results["printed"]


@pytest.mark.parametrize("way", memory.WAYS)
def test_the_kinds_are_parts_of_the_peak_that_another_counter_finds(way: str, text: Path) -> None:
    corpus = common.load_corpus(str(text), SHAPE["seq"])
    trainer = memory.Trainer(way, SHAPE, steps=8, seed=0, gap=3)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    generator = torch.Generator().manual_seed(0)
    with trainer.handle, AllocationCounter() as counter, trainer.meter:
        for _ in range(5):
            batch = common.draw_batch(corpus.train, 2, SHAPE["seq"], generator)
            trainer.step(batch)
            del batch
    meter = trainer.meter
    counts = 4 * len(list(trainer.model.parameters()))  # of AdamW's steps, which no operator makes
    assert sum(meter.peak.values()) == meter.highest
    assert 0 <= meter.highest - counter.peak - weights <= counts
    assert min(meter.peak.values()) >= 0


def test_the_second_way_needs_less_than_two_fifths_where_weights_outweigh_activations(
    text: Path,
) -> None:
    corpus = common.load_corpus(str(text), 32)
    shape = {"d": 192, "layers": 4, "heads": 4, "seq": 32, "batch": 2}
    peaks = []
    for way in memory.WAYS:
        trainer = memory.Trainer(way, shape, steps=8, seed=0, gap=2)
        with trainer.handle, trainer.meter:
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                trainer.step(common.draw_batch(corpus.train, 2, 32, generator))
        peaks.append(trainer.meter.highest)
    assert peaks[1] < 0.4 * peaks[0]


def test_linear_layers_in_float32_are_right_and_keep_nothing_wide() -> None:
    torch.manual_seed(0)
    X = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    W = torch.randn(16, 24).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        out = memory.Product.apply(X, W)
    grad = torch.randn(2, 5, 16).bfloat16()
    torch.autograd.backward(out, grad)
    assert {x.dtype for x in kept} == {torch.bfloat16}
    exact = [x.detach().double().requires_grad_() for x in (X, W)]
    expected = exact[0] @ exact[1].mT
    torch.autograd.backward(expected, grad.double())
    for got, want in ((out, expected), (X.grad, exact[0].grad), (W.grad, exact[1].grad)):
        assert got is not None and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


# ---------------------------------------------------------------------------------------- LLaMA


@pytest.mark.parametrize(("model", "entries"), [("7B", 6_738_415_616), ("13B", 13_015_864_320)])
def test_llama_numbers_by_hand(model: str, entries: int) -> None:
    """Entries as published; the state summed up here, matrix by matrix."""
    d, ffn, layers = memory.LLAMA[model]
    full, lean = memory.needs(model)
    tensors = 9 * layers + 3  # AdamW counts the steps of each in 4 bytes
    assert (full.weights, full.gradients) == (4 * entries, 4 * entries)
    assert full.state == 8 * entries + 4 * tensors
    assert lean.weights == 2 * entries
    assert lean.gradients == 2 * 2 * 32000 * d  # embedding and head
    r = d // 4
    squares, wide = 4 * layers, 3 * layers
    codes = squares * 3 * r * d + wide * (2 * r * ffn + r * d)  # two moments and the basis
    rest = entries - squares * d * d - wide * d * ffn  # embedding, head and norms
    counts = 4 * (2 * layers + 3)
    # a scale of 4 bytes for 256 codes; AdamW has moments in float32 where rounding is stochastic
    assert lean.state == codes + 4 * codes // 256 + 8 * rest + counts
    assert lean.total == lean.weights + lean.gradients + lean.state


def test_the_smaller_llama_fits_a_small_card_in_the_second_way_only() -> None:
    full, lean = memory.needs("7B")
    assert lean.total < 22e9 < 80e9 < full.total
    table = memory.llama_table([full, lean]).splitlines()
    assert table[2].count("does not fit") == 3
    assert "does not fit" not in table[3]
    assert f"{24 - lean.total / 1e9:.1f}" in table[3]


def test_a_bad_shape_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--quick", "--d", "50", "--heads", "4"]) == 2
    assert capsys.readouterr().err.startswith("memory.py: --d 50 must be a multiple")
