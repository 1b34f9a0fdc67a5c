"""Every method on kernels against the same method in plain torch, through the driver."""

import os

import pytest
import torch
from helpers.methods import METHODS
from helpers.operands import DEVICE, gaussian
from helpers.problems import gradients, run, same, tensors, weight
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel.optimizers import Fira
from stiefel.optimizers._driver import buckets
from stiefel.optimizers._toolkit.projectors import DctProjector

SHAPES = [(24, 10), (5, 17), (24, 10)]
"""A stack of two that is tall, and a wide one: each shape more costs every method a third."""
STEPS = 4
OPERATIONS = {
    "muon-ns5": "gram",
    "muon-normuon": "read",
    "galore": "adam_lift_",
    "fira": "lift_",
    "frugal-columns": "split_step_",
    "frugal-rows": "split_step_",
    "frugal-svd": "adam_lift_",
    "auon": "momentum_step",
    "rownorm": "row_step_",
    "aro": "sinkhorn",
    "dctadamw": "adam_lift_",
}
"""An operation that a method must reach."""
SPREAD = {"galore-full": {"eps": 1e-3}}
"""Options without which Adam gives round-off a full step: P^T G Q is diagonal in a fresh basis."""
AMPLIFIED = {"soap-kl": 0.05}
"""Largest differences, in parts of the step, of what divides by roots of small eigenvalues."""
SKETCHED = ["muon-low-rank", "muon-kaczmarz"]
"""Tiny sketches draw a column twice: then one unit of round-off decides the rest of their range."""
HANDLES_NONFINITE = [
    "muon", "muon-ns5", "muon-normuon", "muon-adamuon", "muon-spike", "auon", "auon-hybrid",
    "trion", "trion-l2", "galore", "galore-full", "galore-rotate", "galore-reset", "fira",
    "fira-paper", "dctadamw", "frugal-columns", "frugal-rows", "frugal-randk", "frugal-svd",
    "frugal-random", "aro", "aro-adam", "rownorm", "rownorm-columns", "rownorm-centred", "spectral",
    "spectral-published", "hybrid",
]  # fmt: skip
"""What keeps nothing aside where the host does not wait for flags."""


class Counted(TorchDispatchMode):
    """How often each operation of the house was called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stiefel":
            name = func._opname
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def placed(make, *args):
    """Weights or gradients of the CPU's random numbers, where the kernels run."""
    with torch.device("cpu"):
        made = make(*args)
    if isinstance(made, list):
        return [X.to(DEVICE) for X in made]
    return torch.nn.Parameter(made.detach().to(DEVICE))


def trained(
    make, back_end, monkeypatch, dtype=torch.float32, wait=None, bad=(), shapes=SHAPES, **options
):
    """Weights after each step, the state, and the operations that were called."""
    monkeypatch.setenv("STIEFEL_KERNELS", back_end)
    params = [placed(weight, shape, i, dtype) for i, shape in enumerate(shapes)]
    optimizer = make(params, **options)
    optimizer._wait = wait
    grads = [placed(gradients, shape, STEPS, i) for i, shape in enumerate(shapes)]
    for i, step in bad:
        grads[i][step] = grads[i][step].clone()
        grads[i][step][0, 0] = float("nan")
    with Counted() as counted:
        weights = run(optimizer, params, grads)
    skipped = optimizer.skipped  # waits for flags, which move clocks
    return weights, tensors(optimizer), counted.calls, skipped


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in METHODS),
        # what is written in low precision goes through one place, whatever the method
        *((name, torch.bfloat16) for name in OPERATIONS),
    ],
    ids=str,
)
def test_a_method_is_the_same_on_kernels(name, dtype, monkeypatch):
    given = [placed(weight, shape, i, dtype) for i, shape in enumerate(SHAPES)]
    more = SPREAD.get(name, {})
    plain, state, none, _ = trained(METHODS[name], "reference", monkeypatch, dtype, **more)
    ours, kept, calls, _ = trained(METHODS[name], "triton", monkeypatch, dtype, **more)
    assert not none and state.keys() == kept.keys()
    assert all(word in " ".join(calls) for word in [OPERATIONS.get(name, "")])
    for before, a, b in zip(given, plain[-1], ours[-1], strict=True):
        moved = (a.float() - before.float()).detach().abs().max()
        if name in SKETCHED:
            length, other = (float((X.float() - before.float()).norm()) for X in (a, b))
            assert abs(length - other) <= 0.1 * length
            continue
        off = (a.float() - b.float()).detach().abs()
        # bfloat16 weights are rounded once where torch rounds after each operation
        least = 2**-7 * a.float().abs().max() if dtype == torch.bfloat16 else 0.0
        assert off.max() <= AMPLIFIED.get(name, 1e-3) * moved + least, (
            name,
            float(off.max()),
            float(moved),
        )


@pytest.mark.parametrize("form", [{}, {"scaling": "matrix"}, {"proj_type": "full"}], ids=str)
@pytest.mark.parametrize("variant", ["reference", "paper"])
def test_a_bounded_step_of_fira_is_the_same_on_kernels(variant, form, monkeypatch):
    """Columns that the basis misses; Adam's eps keeps round-off of R from becoming a full step."""
    draw = torch.Generator().manual_seed(0)
    D = torch.diag(torch.logspace(0, -3, 12))
    grads = [(D + 1e-5 * torch.randn(12, 12, generator=draw)).to(DEVICE) for _ in range(STEPS)]
    outs = []
    for back_end in ("reference", "triton"):
        monkeypatch.setenv("STIEFEL_KERNELS", back_end)
        p = torch.nn.Parameter(torch.zeros(12, 12, device=DEVICE))
        optimizer = Fira([p], lr=1.0, rank=2, variant=variant, eps=1e-5, **form)
        outs.append([W[0] for W in run(optimizer, [p], [grads])])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))
    assert float(outs[0][0].abs().max()) < 100


def refused(*args):
    raise AssertionError("state or a stack was copied")


@pytest.mark.parametrize("name", HANDLES_NONFINITE)
def test_flags_that_arrive_late_skip_what_the_host_would_have_skipped(name, monkeypatch):
    """Gradients are narrow, so that they are seen as they are; and nothing is kept aside."""
    given = {"dtype": torch.bfloat16, "bad": [(0, 2), (2, 2), (1, 3)]}
    waited = trained(METHODS[name], "triton", monkeypatch, wait=True, **given)
    monkeypatch.setattr(buckets.Bucket, "clone_state", refused)
    late = trained(METHODS[name], "triton", monkeypatch, wait=False, **given)
    assert waited[3] == late[3] == {0: 1, 1: 1, 2: 1}
    assert all(bool(W.isfinite().all()) for W in late[0][-1])
    assert same(waited[0], late[0]) and same(waited[1], late[1])


@pytest.mark.parametrize(
    "name", ["muon", "muon-plain", "auon", "auon-hybrid", "rownorm", "spectral"]
)
def test_weights_of_a_stack_are_written_where_they_lie(name, monkeypatch):
    shapes = [(24, 10)] * 3 + [(10, 24)] * 2
    waited = trained(METHODS[name], "triton", monkeypatch, wait=True, shapes=shapes)
    for method in ("load", "store", "gradient"):
        monkeypatch.setattr(buckets.Bucket, method, refused)
    late = trained(METHODS[name], "triton", monkeypatch, wait=False, shapes=shapes)
    assert {"read", "scaled_add"} <= {*late[2]} and same(waited[0], late[0])


INSIDE = [
    {"projection": "dct"}, {"projection": "topk"}, {"projection": "randk"}, {"inner": "lion"},
    {"inner": "adafactor"}, {"inner": "lion", "proj_type": "full"},
]  # fmt: skip


@pytest.mark.parametrize("options", INSIDE, ids=str)
def test_all_that_galore_is_made_of_takes_flags(options, monkeypatch):
    given = {"dtype": torch.bfloat16, "bad": [(0, 2), (2, 3)], **options}
    waited, late = (
        trained(METHODS["galore"], "triton", monkeypatch, wait=wait, **given)
        for wait in (True, False)
    )
    assert waited[3] == late[3] == {0: 1, 2: 1}
    assert same(waited[0], late[0]) and same(waited[1], late[1])


@pytest.mark.parametrize("name", ["galore", "fira", "muon-normuon", "frugal-rows", "dctadamw"])
def test_a_block_waits_for_the_whole_of_its_parameter(name, monkeypatch):
    """The entry that is bad lies in the other block, so nothing here but the flag tells."""
    given = {"shapes": [(24, 10), (20, 8)], "bad": [(0, 2)], "view": "heads:2"}
    waited, late = (
        trained(METHODS[name], "triton", monkeypatch, wait=wait, **given) for wait in (True, False)
    )
    assert waited[3] == late[3] == {0: 1}
    assert same(waited[0], late[0]) and same(waited[1], late[1])


@pytest.mark.parametrize("name", ["muon-normuon", "auon", "rownorm", "trion", "dctadamw", "aro"])
def test_narrow_state_changes_nothing_in_that(name, monkeypatch):
    bad, narrow = [(0, 2), (2, 2)], {"state_dtype": "bfloat16"}
    narrow |= {"nesterov": True} if name == "aro" else {}  # then the step of a bad G is no buffer
    waited, late = (
        trained(METHODS[name], "triton", monkeypatch, torch.bfloat16, wait, bad, **narrow)
        for wait in (True, False)
    )
    assert waited[3] == late[3] == {0: 1, 2: 1}
    assert same(waited[0], late[0]) and same(waited[1], late[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chosen_cosines_are_the_same_by_kernels_around_the_fft(dtype, monkeypatch):
    fft = {"transform": "fft"}
    plain = trained(METHODS["dctadamw"], "reference", monkeypatch, dtype, **fft)
    ours = trained(METHODS["dctadamw"], "triton", monkeypatch, dtype, **fft)
    assert {"dct_reorder", "dct_twiddle", "dct_take", "adam_lift_"} <= {*ours[2]}
    assert all(same(plain[1][key], X) for key, X in ours[1].items() if "index" in str(key))
    least = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(plain[0][-1], ours[0][-1], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=least, atol=1e-5)
    bad = [(0, 2), (1, 3)]
    waited, late = (
        trained(METHODS["dctadamw"], "triton", monkeypatch, dtype, wait, bad, **fft)
        for wait in (True, False)
    )
    assert same(waited[0], late[0]) and same(waited[1], late[1])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_sizes_of_cosines_come_with_them(norm, monkeypatch):
    monkeypatch.setenv("STIEFEL_KERNELS", "triton")
    G, D = gaussian(3, 17, 200), DctProjector(norm, path="fft")
    S, row_scores = D.spectrum(G)
    for name in ("SPECTRUM_PANEL", "SPECTRUM_PANEL_ACCELERATOR"):
        monkeypatch.setattr(f"stiefel.optimizers._toolkit.index_projectors.{name}", 17 * 70)
    parts, summed = D.spectrum(G)
    assert torch.equal(D.choose(S, 5), D.choose(S, 5, row_scores=row_scores))
    torch.testing.assert_close(parts, S, rtol=0, atol=1e-6)
    if norm == "l2":  # squares may overflow, and what is to be scaled is known only afterwards
        assert row_scores is None and summed is None
        return
    for found in (row_scores, summed):
        torch.testing.assert_close(found, S.abs().sum(-1), rtol=1e-5, atol=0)
    old = torch.tensor([[3, 4, 9]], dtype=torch.int32)
    S, row_scores = D.spectrum(torch.zeros(1, 17, 8))
    assert torch.equal(D.choose(S, 3, old, row_scores=row_scores), old)


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled there")
def test_the_process_interprets():
    assert os.environ["TRITON_INTERPRET"] == "1"
