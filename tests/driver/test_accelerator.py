"""A step on an accelerator that is not there: fake tensors say what it would call, and wait for.

A fake tensor has a shape, a dtype and the device "cuda", but no numbers. So the driver takes the
way of accelerators, kernels are picked and called as operations without running, whoever asks for
a number on the host fails, and copies between the host and the device can be counted.
"""

import pytest
import torch
from helpers.attentions import model_of
from helpers.fake_device import Arrived, Calls, device, rarely
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import run
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton", reason="there is no triton on this platform")

from stiefel.kernels import dispatch
from stiefel.optimizers import MaxLogits, qk_clip_
from stiefel.optimizers._driver import finite

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
SHAPES = [(300, 400), (400, 300), (300, 400), (70, 600)]
"""Two that are stacked and two views, above the sizes from which kernels are picked."""
WAITS = {
    "muon-kaczmarz": "columns are drawn on the CPU, by the norms of this very momentum",
}


def steady(make, shapes=SHAPES):
    """Calls of the second of two steps in the middle of a window."""
    drawn = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    run(rarely(make(drawn)), drawn, [[torch.ones(s)] * 3 for s in shapes])  # the CPU's draws
    with device():
        params = [torch.nn.Parameter(torch.empty(s, device="cuda").bfloat16()) for s in shapes]
        optimizer = rarely(make(params))
        optimizer.init_state()
        for p in params:
            clocks = [k for k in optimizer.state[p] if k in ("step", "refreshed")]
            optimizer.state[p].update(dict.fromkeys(clocks, 1))
            p.grad = torch.empty_like(p)
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
    return calls


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    monkeypatch.setattr(finite, "LateFlags", Arrived)
    monkeypatch.setattr(dispatch, "is_supported_gpu", lambda index: True)
    monkeypatch.delenv("STIEFEL_KERNELS", raising=False)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WAITS])
def test_a_step_waits_for_nothing(name):
    calls = steady(METHODS[name])
    assert calls.ours and not calls.moves


@pytest.mark.parametrize("kind", ["gqa", "by group", "latent"])
def test_clipping_logits_waits_for_nothing(kind):
    model = model_of(kind, dtype=torch.bfloat16)
    heads = 3 if kind == "latent" else 4
    with device():
        for layer in model.modules():
            for name, p in layer._parameters.items():
                if p is not None:
                    made = torch.empty(p.shape, device="cuda").bfloat16()
                    layer._parameters[name] = torch.nn.Parameter(made)
        optimizer = METHODS["muon"](list(model.parameters()))
        optimizer.init_state()
        for p in optimizer.state:
            optimizer.state[p]["weight_radius"] = torch.ones(1, 1, device="cuda")
        record = MaxLogits()
        record("blocks.0.attn", torch.ones(2, heads, 5, 5, device="cuda"))
        with Calls() as calls:
            gamma = qk_clip_(model, record.take(), optimizer=optimizer)
    assert gamma["blocks.0.attn"].device.type == "cuda" and not calls.moves


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_on_pairs_waits_for_nothing(name):
    def make(params, **options):
        return PAIRS[name](list(zip(params[::2], params[1::2], strict=True)), **options)

    calls = steady(make, [(16, 400), (300, 16)] * 2 + [(8, 200), (100, 8)])
    assert not calls.moves


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_does_so(name):
    assert steady(METHODS[name]).moves


def test_a_number_on_the_host_is_noticed():
    def careless(params, **options):
        optimizer = METHODS["muon"](params, **options)
        optimizer.register_step_post_hook(lambda *_: bool((params[0] > 0).all()))
        return optimizer

    with pytest.raises(DataDependentOutputException):
        steady(careless)
