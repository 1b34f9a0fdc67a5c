"""examples/memory.py: what it counts is what is there, and what it prints is right."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.paths import EXAMPLES
from torch import nn

from stiefel.optimizers import GaLore, memory_report

sys.path.insert(0, str(EXAMPLES))

import memory


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run from the command line: what it printed, and its results by way."""
    out = tmp_path_factory.mktemp("memory")
    command = [sys.executable, str(EXAMPLES / "memory.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    ways = json.loads((out / "results.json").read_text())
    return done.stdout, {way["name"]: way for way in ways}, out


def test_losses_fall_and_end_close_to_each_other(results):
    _, ways, _ = results
    assert all(way["after"] < way["before"] for way in ways.values())
    a, b = (way["after"] for way in ways.values())
    assert abs(a - b) < 0.3


def test_state_is_what_memory_report_says(results):
    _, ways, _ = results
    lean = ways[memory.GALORE]
    assert lean["peak"]["state"] == lean["reported"]


def test_weights_and_gradients_are_those_of_the_model(results):
    _, ways, _ = results
    model = memory.build_model(64, 2, 4, 32, 0)
    sizes = sorted(4 * p.numel() for p in model.parameters())
    whole, lean = ways[memory.ADAMW], ways[memory.GALORE]
    assert whole["peak"]["weights"] == whole["gradients"] == sum(sizes)
    assert lean["peak"]["weights"] == sum(sizes) // 2
    assert lean["gradients"] <= sum(sizes[-2:]) // 2


def test_the_second_way_takes_less(results):
    text, ways, out = results
    whole, lean = (sum(way["peak"].values()) for way in ways.values())
    assert lean < whole and f"takes {lean / whole:.2f} of the first" in text
    assert (out / "memory.txt").read_text().strip() in text


def test_the_ledger_counts_what_is_alive_and_no_more():
    model = nn.Linear(100, 50, bias=False)
    ledger = memory.Ledger(model)
    with ledger:
        x = torch.ones(1000)
        y = x.view(10, 100)  # a view takes nothing
        z = x + 1
        del z
        w = torch.ones(500)
    assert ledger.live == x.nbytes + w.nbytes and y.shape == (10, 100)
    assert sum(ledger.peak.values()) == 4 * 5000 + 2 * x.nbytes
    assert ledger.peak["weights"] == 4 * 5000


def test_bfloat16_layers_have_the_products_of_float32():
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).bfloat16(), torch.randn(3, 5, 12, requires_grad=True)
    exact, X = layer.weight.detach().float().requires_grad_(), x.detach().clone().requires_grad_()
    memory.compute_in_float32(layer)
    y, Y = layer(x), X @ exact.mT
    y.square().sum().backward()
    Y.square().sum().backward()
    torch.testing.assert_close(y, Y)
    torch.testing.assert_close(x.grad, X.grad)
    assert torch.equal(layer.weight.grad, exact.grad.bfloat16())


def test_a_llama_of_7b_has_the_sizes_of_the_paper():
    d, ffn, layers = memory.LLAMAS["LLaMA 7B"]
    count = 2 * 32000 * d + layers * (4 * d * d + 3 * d * ffn + 2 * d) + d
    model = memory.llama(d, ffn, layers, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == count == 6_738_415_616
    report = memory_report(model, GaLore, rank=0.25)
    assert report.weight == report.gradient == 4 * count
    rows = {tuple(row[:2]): row for row in memory.llama_rows()}
    whole, lean = rows["LLaMA 7B", memory.ADAMW], rows["LLaMA 7B", memory.GALORE]
    assert whole[5] == f"{16 * count / 2**30:.1f}" and whole[6] == "does not fit"
    assert lean[2] == f"{2 * count / 2**30:.1f}" and float(lean[5]) < 20 and float(lean[6]) > 4
