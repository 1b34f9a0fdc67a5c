"""GaLore and Fira with their bases in 8 bits."""

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.problems import gradients, run, same, tensors, weight

from stiefel.kernels import dequantize_basis
from stiefel.optimizers import FRUGAL, Fira, GaLore, MemoryReport
from stiefel.optimizers._driver import buckets, units

CLASSES = {"galore": GaLore, "fira": Fira}
CASES = {
    "std": ((64, 96), {"rank": 64}),
    "transposed": ((96, 64), {"rank": 64}),
    "reverse": ((64, 300), {"rank": 20, "proj_type": "reverse_std"}),
    "left": ((300, 64), {"rank": 20, "proj_type": "left"}),
    "full": ((70, 96), {"rank": 64, "proj_type": "full"}),
    "batch": ((3, 48, 64), {"rank": 40}),
    "rows": ((160, 70), {"rank": 64, "view": "rows:80,80"}),
    "heads": ((160, 70), {"rank": 64, "view": "heads:2"}),
    "convolution": ((64, 8, 3, 3), {"rank": 64}),
    "rotate": ((64, 96), {"rank": 64, "moments": "rotate"}),
    "power": ((64, 96), {"rank": 64, "projection": "power"}),
    "random": ((64, 96), {"rank": 64, "projection": "random"}),
}


def build(kind, case, state_dtype="int8", **options):
    shape, settings = CASES[case]
    p = weight(shape)
    options = {"lr": 0.02, "update_proj_gap": 4, "state_dtype": state_dtype, **settings, **options}
    return p, CLASSES[kind]([p], **options)


def series(p, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g) for _ in range(steps)]


def step(optimizer, p, grads):
    return [W[0] for W in run(optimizer, [p], [grads])]


def bases(entry):
    """Every basis of a parameter: codes and scales, by key."""
    found = {}
    for key in entry:
        name, dot, tag = key.partition(".")
        if name in ("basis", "basis_right"):
            found[key] = entry[key], entry.get(f"{name}_scale{dot}{tag}")
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_bases_are_bytes_with_a_scale_for_256_entries_of_a_vector(kind, case):
    p, optimizer = build(kind, case)
    step(optimizer, p, series(p, 3))
    found = bases(optimizer.state[p])
    assert len(found) == {"full": 2, "rows": 2, "heads": 1}.get(case, 1)
    for codes, scales in found.values():
        *k, m, r = codes.shape
        assert codes.dtype == torch.int8 and scales.dtype == torch.float32
        assert scales.shape == (*k, -(-m // 256), r)
        P = dequantize_basis(codes, scales).double()
        assert float((P.mT @ P - torch.eye(r).double()).abs().max()) < 0.02
    report = MemoryReport.of(build(kind, case)[1])
    stored = [X for X in optimizer.state[p].values() if isinstance(X, torch.Tensor)]
    assert report.state == sum(X.numel() * X.element_size() for X in stored)


@pytest.mark.parametrize("kind", CLASSES)
def test_small_bases_and_chosen_rows_stay_as_they_are(kind):
    p, optimizer = build(kind, "std", rank=63)
    step(optimizer, p, series(p, 2))
    assert optimizer.state[p]["basis"].dtype == torch.float32
    p, optimizer = build(kind, "std", projection="topk")
    step(optimizer, p, series(p, 2))
    assert optimizer.state[p]["index"].dtype == torch.int32


@pytest.mark.parametrize("cls", [GaLore, Fira])
def test_the_published_code_keeps_its_basis_and_its_rounding(cls):
    p = weight((64, 96))
    optimizer = cls([p], lr=0.02, rank=64, compat="reference", state_dtype="int8")
    step(optimizer, p, series(p, 3))
    entry = optimizer.state[p]
    assert entry["basis"].dtype == torch.float32 and "basis_scale" not in entry
    assert entry["exp_avg_sq"].dtype == torch.uint8
    assert not any(unit.stochastic_squares for unit in optimizer._get_plan().units)


def test_frugal_keeps_its_basis_in_float32():
    p = weight((128, 130))
    optimizer = FRUGAL([p], lr=0.02, split="svd", density=0.5, state_dtype="int8")
    step(optimizer, p, series(p, 2))
    entry = optimizer.state[p]
    assert entry["basis"].dtype == torch.float32 and entry["basis"].numel() > 4096
    assert entry["exp_avg"].dtype == torch.int8


@pytest.mark.parametrize("gap", [1, 4])
def test_every_step_lies_in_the_decoded_basis_that_of_a_refresh_too(gap):
    shape = (96, 300)
    p = weight(shape)
    optimizer = GaLore([p], lr=0.02, rank=48, update_proj_gap=gap, state_dtype="int8")
    before = p.detach().clone()
    for G in series(p, 3):
        p.grad = G
        optimizer.step()
        P = dequantize_basis(optimizer.state[p]["basis"], optimizer.state[p]["basis_scale"])
        change, before = p.detach() - before, p.detach().clone()
        Q = torch.linalg.qr(P)[0]
        assert float((change - Q @ (Q.mT @ change)).norm()) < 1e-4 * float(change.norm())


@pytest.mark.parametrize("case", ["std", "full", "rows"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_basis_is_coded_at_refreshes_and_decoded_once_a_step(kind, case, monkeypatch):
    calls = {"quantize_basis": 0, "dequantize_basis": 0}
    for name in calls:
        function = getattr(buckets, name)

        def counted(*args, name=name, function=function):
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(buckets, name, counted)
    p, optimizer = build(kind, case)
    count = 2 if case in ("full", "rows") else 1
    grads = series(p, 6)
    for t, G in enumerate(grads, 1):
        old = [X.clone() for pair in bases(optimizer.state.get(p, {})).values() for X in pair]
        calls.update(dict.fromkeys(calls, 0))
        step(optimizer, p, [G])
        refreshes = t in (1, 5)
        assert calls["quantize_basis"] == count * refreshes
        assert calls["dequantize_basis"] == count * (1 + refreshes)
        new = [X for pair in bases(optimizer.state[p]).values() for X in pair]
        assert t == 1 or same(old, new) == (not refreshes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_run_stays_close_to_that_of_float32(kind, case):
    p, coded = build(kind, case, eps=1e-3)
    q, plain = build(kind, case, None, eps=1e-3)
    grads = gradients(p.shape, 7) if p.dim() < 4 else [
        G.view(p.shape) for G in gradients((p.shape[0], p[0].numel()), 7)
    ]  # fmt: skip
    start = p.detach().clone()
    W, V = step(coded, p, grads)[-1], step(plain, q, grads)[-1]
    # two bases of this very gradient make R diagonal but for the loss, along which Adam steps too
    limit = 0.7 if case == "full" else 0.25
    assert float((W - V).norm()) < limit * float((V - start).norm())


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_resume_is_bit_identical_in_the_middle_of_a_window_too(kind, case, stop):
    p, whole = build(kind, case)
    grads = series(p, 7)
    step(whole, p, grads[:stop])
    q, resumed = build(kind, case)
    with torch.no_grad():
        q.copy_(p)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert same(step(whole, p, grads[stop:]), step(resumed, q, grads[stop:]))
    assert same(tensors(whole), tensors(resumed))


@pytest.mark.parametrize("case", ["std", "transposed", "full"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_stack_has_the_bits_of_its_matrices(kind, case, monkeypatch):
    monkeypatch.setattr(units, "MIN_QUANTIZED_NUMEL", 16)
    shape, settings = CASES[case]
    shape = (shape[0] // 4, shape[1] // 4)
    settings = {"lr": 0.02, "update_proj_gap": 3, "state_dtype": "int8", **settings, "rank": 8}
    params = [weight(shape, i) for i in range(3)]
    stack = CLASSES[kind](params, **settings)
    grads = [series(p, 5, i) for i, p in enumerate(params)]
    grads[1][3] = torch.full(shape, torch.inf)
    W = run(stack, params, grads)
    assert stack.state[params[0]]["basis"].dtype == torch.int8
    for i in range(3):
        p = weight(shape, i)
        pads = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(i)]
        alone = CLASSES[kind]([*pads, p], **settings)
        V = run(alone, [*pads, p], [*([None] * 5 for _ in pads), grads[i]])
        assert same([a[i] for a in W], [b[-1] for b in V])


@pytest.mark.parametrize("kind", CLASSES)
def test_a_file_with_a_float32_basis_loads_and_one_with_bytes_needs_their_setting(kind):
    p, optimizer = build(kind, "std")
    step(optimizer, p, series(p, 2))
    saved = through_a_file(optimizer.state_dict())
    entry = saved["state"][0]
    P = dequantize_basis(entry["basis"], entry.pop("basis_scale"))
    coded, entry["basis"] = entry["basis"], P
    q, loaded = build(kind, "std")
    loaded.load_state_dict(saved)
    assert same(loaded.state[q]["basis"], coded)
    saved = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["state_dtype"] = None
    before = tensors(loaded)
    with pytest.raises(ValueError, match="basis_scale"):
        loaded.load_state_dict(saved)
    assert same(before, tensors(loaded))


@pytest.mark.parametrize("kind", CLASSES)
def test_bad_gradients_leave_codes_and_scales(kind):
    p, optimizer = build(kind, "std")
    step(optimizer, p, series(p, 2))
    before = tensors(optimizer)
    with pytest.warns(UserWarning, match="non-finite"):
        step(optimizer, p, [torch.full(p.shape, torch.nan)])
    assert same(before, tensors(optimizer))
