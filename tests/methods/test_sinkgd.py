"""SinkGD: its balance, its lack of state; and no buffer of ARO and RowNorm without momentum."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers.checkpoints import check_resume
from helpers.problems import check_refusal, doubles, gradients, run, same, tensors, weight
from helpers.shapes import SHAPES, SQUARE, TALL, WIDE

from stiefel.optimizers import ARO, Hybrid, RowNorm, SinkGD, Spectral, memory_report

DOUBLE = torch.float64
PLAIN_ARO = {"base": "sinkhorn", "rotation": "none", "rms_target": None, "weight_decay": 0.0}


def balanced(G, iterations=5):
    """Rows to norm sqrt(n), then columns to norm sqrt(m), by loops."""
    S = G.double().clone()
    m, n = S.shape
    for _ in range(iterations):
        for i in range(m):
            S[i] *= math.sqrt(n) / math.sqrt(sum(float(x) ** 2 for x in S[i]))
        for j in range(n):
            S[:, j] *= math.sqrt(m) / math.sqrt(sum(float(x) ** 2 for x in S[:, j]))
    return S


@pytest.mark.parametrize("iterations, momentum", [(5, 0.0), (1, 0.0), (3, 0.8)])
def test_equals_the_loops(iterations, momentum):
    for shape in SHAPES:
        p, M = weight(shape, dtype=DOUBLE), torch.zeros(shape, dtype=DOUBLE)
        W = p.detach().clone()
        optimizer = SinkGD([p], 0.02, weight_decay=0.1, iterations=iterations, momentum=momentum)
        for G in doubles(shape, 4):
            M = momentum * M + (1 - momentum) * G
            W = (1 - 0.02 * 0.1) * W - 0.02 * balanced(M, iterations)
            p.grad = G.clone()
            optimizer.step()
            torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-9)
            assert torch.equal(p.grad, G)


def test_is_aro_without_rotation_and_momentum():
    for shape in (TALL, WIDE, SQUARE):
        p, q, grads = weight(shape), weight(shape), gradients(shape, 6)
        run(SinkGD([p], 0.02), [p], [grads])
        run(ARO([q], 0.02, momentum=0.0, side="rows", **PLAIN_ARO), [q], [grads])
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_scale_of_a_gradient_and_of_its_rows_does_not_matter():
    for size in (1e-20, 1e-3, 1e15):
        p, q = weight(WIDE), weight(WIDE)
        (G,) = gradients(WIDE, 1)
        rows = torch.linspace(0.5, 2, WIDE[0])[:, None]
        run(SinkGD([p], 0.02, iterations=50), [p], [[G]])
        run(SinkGD([q], 0.02, iterations=50), [q], [[size * rows * G]])
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_keeps_no_state():
    p = weight(WIDE)
    optimizer = SinkGD([p], state_dtype="int8")
    run(optimizer, [p], [gradients(WIDE, 3)])
    assert optimizer.state[p] == {"step": 3}
    assert memory_report([p], SinkGD).state == 0
    assert memory_report([p], SinkGD, momentum=0.9).state == 4 * p.numel()


def test_momentum_is_not_switched_on_in_the_middle_of_a_run():
    p = weight(WIDE)
    optimizer = SinkGD([p])
    run(optimizer, [p], [gradients(WIDE, 2)])
    before = p.detach().clone()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="add state 'momentum_buffer' in the middle of a run"):
        run(optimizer, [p], [gradients(WIDE, 1)])
    assert torch.equal(p, before) and optimizer.state[p] == {"step": 2}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resume(momentum):
    def make():
        p = weight(WIDE)
        return [p], SinkGD([p], momentum=momentum)

    check_resume(make, [gradients(WIDE, 5)], 2)


BUFFERED = {
    "aro": partial(ARO),
    "aro-plain": partial(ARO, **PLAIN_ARO),
    "aro-adam": partial(ARO, base="adam", nesterov=True),
    "aro-eigh": partial(ARO, rotation="eigh", gram_beta=0.9, init="svd"),
    "rownorm": RowNorm,
    "rownorm-centred": partial(RowNorm, centred=True, row_mode="relative"),
    "rownorm-eps": partial(RowNorm, eps=1e-8, row_mode="unit", adjust_lr_fn="none"),
    "rownorm-halves": partial(RowNorm, pair="halves"),
    "rownorm-columns": partial(RowNorm, axis="cols"),
    "spectral": Spectral,
    "hybrid": partial(Hybrid, centred=True),
}


@pytest.mark.parametrize("name", BUFFERED)
def test_no_momentum_needs_no_buffer(name):
    """The steps are those of a momentum so small that it adds nothing, in bits."""
    make = BUFFERED[name]
    for shape in (TALL, WIDE):
        p, q, grads = weight(shape), weight(shape), gradients(shape, 4)
        kept = [G.clone() for G in grads]
        without, tiny = make([p], momentum=0.0), make([q], momentum=1e-30)
        run(without, [p], [grads])
        run(tiny, [q], [grads])
        assert same([p.detach()], [q.detach()]) and same(grads, kept)
        assert "momentum_buffer" in tiny.state[q] and "momentum_buffer" not in without.state[p]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_files_that_hold_a_buffer_of_no_use_still_load(dtype):
    """As version 0.2 wrote them; what nothing reads is left out."""
    shape = (64, 80)
    for make in (ARO, RowNorm, partial(RowNorm, pair="halves")):
        make, grads = partial(make, momentum=0.0, state_dtype=dtype), gradients(shape, 5)
        p, q = weight(shape), weight(shape)
        optimizer, straight = make([p]), make([q])
        run(straight, [q], [grads])
        run(optimizer, [p], [grads[:3]])
        saved = deepcopy(optimizer.state_dict())
        saved["state"][0]["momentum_buffer"] = torch.zeros(shape)
        resumed = make([p])
        resumed.load_state_dict(saved)
        assert same(tensors(resumed), tensors(optimizer))
        run(resumed, [p], [grads[3:]])
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"iterations": 0}, "iterations must be an int"),
        ({"iterations": 2.5}, "iterations must be an int"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
    ],
)
def test_bad_settings_are_one_sentence(bad, text):
    check_refusal(SinkGD, bad, text)
