"""DCT-AdamW: recorded trajectories, a naive oracle, and error feedback and its codes."""

import importlib
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.allocations import count_second_step
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import check_refusal, gradients, run, same, unsolved, weight
from helpers.recordings import fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SQUARE, TALL, WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dctadamw as oracle
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel.kernels import adam, dct, dct_basis, dequantize_rows, idct, quantize_rows
from stiefel.optimizers import DCTAdamW, GaLore
from stiefel.optimizers._core.rule import Member
from stiefel.optimizers._toolkit import index_projectors as module
from stiefel.optimizers.dctadamw import DCTAdamWRule, ErrorFeedback

DOUBLE = torch.float64
FED = [None, "full", "int8", "int4"]
RECORDED = sorted(path.stem for path in FIXTURES.glob("dct-*.json"))
feedbacks = pytest.mark.parametrize("fed", FED, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:error_feedback with update_proj_gap=1")


def noise(shape, steps, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=DOUBLE).to(dtype) for _ in range(steps)]


def transposed(X):
    """As the rule sees a weight under side="auto"."""
    return X.mT if X.shape[-2] >= X.shape[-1] else X


# The published package


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name, monkeypatch):
    """Slots keep the recorded order, which is that of an unsorted top-k; the sets are ours."""
    data, chosen = fixture(name), []
    given = data["settings"]["optimizer"]
    gap = given.get("update_proj_gap", 1)
    if "indices" in data:
        due = [t for t in range(1, len(data["W"]) + 1) if t == 1 or t % gap == 0]
        stored, original = iter([data["indices"][t - 1] for t in due]), module.DctProjector.choose

        def choose(self, S, r, old=None, reductions=None, row_scores=None):
            chosen.append((original(self, S, r).tolist()[0], next(stored)))
            return torch.tensor([chosen[-1][1]], dtype=torch.int32)

        monkeypatch.setattr(module.DctProjector, "choose", choose)
    makhoul = given.get("sim_type") == "makhoul"
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = DCTAdamW(
        [p], lr=given["lr"], betas=tuple(given["betas"]), eps=given["eps"],
        weight_decay=given["weight_decay"], rank=given["rank"], update_proj_gap=gap,
        norm=f"l{given.get('ell_norm', 1)}", moments="slot", bias_correction="global",
        error_feedback="full" if given.get("use_ef") else None,
        basis="dct2" if makhoul else "dct3", transform="fft" if makhoul else "matmul",
    )  # fmt: skip
    near = tolerance(data, "max_abs_diff_to_float64_run")
    for G, W in zip(data["grads"], data["W"], strict=True):
        p.grad = G.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=near)
    if "indices" not in data:
        return
    assert len(chosen) == len(due) and all(ours == sorted(theirs) for ours, theirs in chosen)
    state, last = optimizer.state[p], {k: torch.tensor(v) for k, v in data["final_state"].items()}
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], transposed(last[key]), rtol=0, atol=near)
    if given.get("use_ef"):
        back = (idct if makhoul else dct)(transposed(state["error"]), -2)
        torch.testing.assert_close(back, transposed(last["error_feedback"]), rtol=0, atol=near)


def test_recorded_files_are_all_there():
    assert len(RECORDED) == 17
    kinds = [json.loads((FIXTURES / f"{n}.json").read_text())["settings"] for n in RECORDED]
    assert sum("makhoul" in str(kind) for kind in kinds) == 4


# The oracle


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN])
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"norm": "l2", "basis": "dct3"},
        {"moments": "keep_if_same", "weight_decay": 0.1},
        {"moments": "reset", "bias_correction": "global"},
        {"moments": "slot", "betas": (0.8, 0.95)},
        {"error_feedback": "full", "norm": "l2"},
        {"error_feedback": "full", "moments": "keep_if_same", "side": "left"},
        {"side": "right", "eps": 1e-4},
    ],
    ids=str,
)
def test_equals_the_oracle(shape, gap, form):
    grads = gradients(shape, 10, dtype=DOUBLE)
    p = weight(shape, dtype=DOUBLE)
    want, notes = oracle.dctadamw(
        p.detach().numpy(), [G.numpy() for G in grads], lr=0.02, rank=4, update_proj_gap=gap, **form
    )
    optimizer = DCTAdamW([p], lr=0.02, rank=4, update_proj_gap=gap, **form)
    for G, W, (I, _) in zip(grads, want, notes, strict=True):
        p.grad = G
        optimizer.step()
        assert optimizer.state[p]["index"].tolist() == I
        np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 10 * 2**-7)])
def test_equals_the_oracle_in_narrow_weights(shape, dtype, near):
    """Ten roundings of bfloat16 weights below 4 are off by 2^-7 each at most."""
    p = weight(shape, dtype=dtype)
    grads = [G.to(dtype) for G in gradients(shape, 10)]
    want, _ = oracle.dctadamw(
        p.detach().double().numpy(), [G.double().numpy() for G in grads], lr=0.02, rank=4,
        update_proj_gap=2,
    )  # fmt: skip
    optimizer = DCTAdamW([p], lr=0.02, rank=4, update_proj_gap=2)
    run(optimizer, [p], [grads])
    np.testing.assert_allclose(p.detach().double().numpy(), want[-1], rtol=0, atol=near)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


# error feedback


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("gap", [1, 4])
def test_feedback_in_coefficients_is_feedback_in_space(shape, gap):
    """The oracle keeps E = A - D a; ours is D^T E with exact zeros in the rows just used."""
    p, grads = weight(shape), noise(shape, 20)
    want, notes = oracle.dctadamw(
        p.detach().numpy(), [G.numpy() for G in grads], lr=0.01, rank=4, update_proj_gap=gap,
        error_feedback="full",
    )  # fmt: skip
    optimizer = DCTAdamW([p], lr=0.01, rank=4, update_proj_gap=gap, error_feedback="full")
    for W, (I, E), G in zip(want, notes, grads, strict=True):
        p.grad = G
        optimizer.step()
        S = transposed(optimizer.state[p]["error"])
        assert optimizer.state[p]["index"].tolist() == I and not S[I].any()
        np.testing.assert_allclose(
            idct(S, -2).numpy(), transposed(torch.tensor(E)), rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("fed", ["full", "int8", "int4"])
def test_feedback_conserves_the_gradient(shape, gap, fed, monkeypatch):
    """All that was applied and the last E are the sum of all G, but for the quantiser's halves."""
    used, slack, original = [], [], module.take_rows

    def spy(S, index):
        used.append(torch.zeros_like(S).index_copy(-2, index[0].long(), original(S, index)))
        return original(S, index)

    monkeypatch.setattr("stiefel.optimizers.dctadamw.take_rows", spy)
    p, grads = weight(shape, dtype=DOUBLE), noise(shape, 12, dtype=DOUBLE)
    optimizer = DCTAdamW([p], rank=3, update_proj_gap=gap, error_feedback=fed, moments="slot")
    store = ErrorFeedback(fed)
    for G in grads:
        p.grad = G
        optimizer.step()
        state = optimizer.state[p]
        if fed != "full":
            wide = state["error_high"] - state["error_low"]
            slack.append(wide.double() / (2**store.bits - 1) / 2)
    state = {key: X[None] for key, X in state.items() if isinstance(X, torch.Tensor)}
    if fed != "int4":
        state["error"] = transposed(state["error"])
    total = dct(transposed(sum(grads))[None], -2)
    missing = total - sum(used) - store.load(state, total.shape[-1], DOUBLE)
    bound = 1e-10 if fed == "full" else sum(slack) + 1e-5
    assert bool((missing.abs() <= bound).all())
    assert len(used) == 12 and (fed == "full" or missing.abs().max() > 1e-6)


def test_feedback_under_l2_stays_bounded():
    """||E|| <= q / (1 - q) max ||G||, q = sqrt(1 - r / m)."""
    p, grads = weight((16, 40)), noise((16, 40), 60)
    optimizer = DCTAdamW([p], rank=4, norm="l2", error_feedback="full", moments="slot")
    q = math.sqrt(1 - 4 / 16)
    for G in grads:
        p.grad = G
        optimizer.step()
        limit = q / (1 - q) * max(float(x.norm()) for x in grads)
        assert float(optimizer.state[p]["error"].norm()) <= limit


@pytest.mark.parametrize("fed", [None, "full"])
def test_feedback_at_every_step_changes_the_whole_set(fed):
    """So matched moments are empty at each step: what the warning is about."""
    p, grads = weight((64, 200)), noise((64, 200), 12)
    optimizer, sets, oldest = DCTAdamW([p], rank=8, error_feedback=fed), [], 0
    for G in grads:
        p.grad = G
        optimizer.step()
        sets.append(set(optimizer.state[p]["index"].tolist()))
        oldest = max(oldest, int(optimizer.state[p]["age"].max()))
    kept = sum(len(a & b) for a, b in itertools.pairwise(sets))
    assert (kept, oldest) == (0, 1) if fed else (kept > 4 and oldest > 1)


@pytest.mark.filterwarnings("default:error_feedback with update_proj_gap=1")
def test_feedback_at_every_step_warns_once_at_the_users_line():
    p = weight(WIDE)
    with pytest.warns(UserWarning, match="use update_proj_gap >= 10") as seen:
        optimizer = DCTAdamW([p], error_feedback="full")
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match="keep_if_same"):
        optimizer.add_param_group({"params": [weight(TALL)], "moments": "keep_if_same"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DCTAdamW([p])
        DCTAdamW([p], error_feedback="full", moments="slot")
        DCTAdamW([p], error_feedback="int8", update_proj_gap=10)
        group = {"params": [p], "rule": "adamw"}
        DCTAdamW([group], error_feedback="full", moments="match", update_proj_gap=1)


# the quantiser


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 33), st.sampled_from([8, 4]),
    st.integers(-30, 30), st.integers(0, 2**20), st.booleans(),
)  # fmt: skip
def test_codes_are_right_to_half_a_step(K, m, n, bits, power, seed, flipped):
    X = (noise((K, n, m) if flipped else (K, m, n), 1, seed)[0] + 0.5) * 10.0**power
    X = X.mT if flipped else X
    codes, low, high = quantize_rows(X, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (K, m, n if bits == 8 else (n + 1) // 2)
    back = dequantize_rows(codes, low, high, bits, n)
    u = (high - low) / (2**bits - 1)
    ulp = torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    assert bool(((back - X).abs() <= u / 2 + 2 * ulp).all())
    for row, ours, half in zip(X.flatten(0, 1), back.flatten(0, 1), u.flatten(), strict=True):
        want, step = oracle.quantised(row.double().tolist(), bits)
        assert half.item() / 2 == pytest.approx(step, rel=1e-4, abs=1e-37)
        # a number in the middle between two codes may round either way
        assert np.abs(np.array(want) - ours.double().numpy()).max() <= 2.01 * step + ulp.max()
    for k in range(K):  # a stack has the bits of its matrices
        assert all(
            torch.equal(a[k], b)
            for a, b in zip((codes, low, high), quantize_rows(X[k], bits), strict=True)
        )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_constant_rows_are_exact_and_codes_survive_packing(bits, n):
    X = torch.tensor([0.0, -3.3, 1e-40, 7e30]).unsqueeze(-1).expand(4, n).clone()
    assert torch.equal(dequantize_rows(*quantize_rows(X, bits), bits, n), X)
    whole = torch.arange(2**bits).float().roll(3)[: max(n, 2)].repeat(3, 1)
    whole[:, 0], whole[:, -1] = 0.0, 2.0**bits - 1  # the range is that of the codes
    assert torch.equal(dequantize_rows(*quantize_rows(whole, bits), bits, whole.shape[-1]), whole)
    tiny = torch.tensor([[0.0, 1e-45]])
    assert dequantize_rows(*quantize_rows(tiny, bits), bits, 2).isfinite().all()


def test_quantiser_packs_even_elements_high_and_refuses_other_widths():
    codes, _, _ = quantize_rows(torch.tensor([[0.0, 15.0, 3.0, 4.0, 9.0]]), 4)
    assert codes.tolist() == [[0x0F, 0x34, 0x90]]
    for call in (
        lambda: quantize_rows(torch.ones(1, 2), 2),
        lambda: dequantize_rows(codes, codes, codes, 2, 5),
    ):
        with pytest.raises(ValueError, match="bits must be 8 or 4"):
            call()


@pytest.mark.parametrize("kind", ["full", "int8", "int4"])
def test_feedback_is_kept_in_panels(kind, monkeypatch):
    E, store = noise((2, 9, 13), 1)[0], ErrorFeedback(kind)
    state = {
        name: torch.zeros(2, *slot.shape(9, 13), dtype=slot.dtype or torch.float32)
        for name, slot in store.slots(13).items()
    }
    store.store(state, E)
    whole, kept = store.load(state, 13, DOUBLE), {k: v.clone() for k, v in state.items()}
    monkeypatch.setattr("stiefel.optimizers.dctadamw.QUANTIZE_PANEL", 52)
    store.store(state, E)
    assert same(state, kept) and torch.equal(store.load(state, 13, DOUBLE), whole)
    assert (whole - E).abs().max() <= {"full": 0.0, "int8": 0.02, "int4": 0.3}[kind]


# full rank, gradients, resuming


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ROW, COLUMN])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
def test_full_rank_is_adamw_in_rotated_coordinates(shape, basis, gap):
    p, grads = weight(shape, dtype=DOUBLE), gradients(shape, 8, dtype=DOUBLE)
    C = dct_basis(min(shape), DOUBLE)
    C = C.mT if basis == "dct3" else C
    q = torch.nn.Parameter((C @ transposed(p.detach())).clone())
    common = {"lr": 0.02, "weight_decay": 0.1}
    ours = DCTAdamW([p], rank=1.0, update_proj_gap=gap, basis=basis, **common)
    plain = torch.optim.AdamW([q], **common)
    for G in grads:
        p.grad, q.grad = G, C @ transposed(G)
        ours.step()
        plain.step()
        torch.testing.assert_close(C @ transposed(p.detach()), q.detach(), rtol=0, atol=1e-11)


@feedbacks
@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_gradient_is_not_changed(fed, gap, shape):
    p = weight(shape)
    optimizer = DCTAdamW([p], rank=3, error_feedback=fed, update_proj_gap=gap)
    for G in gradients(shape, 5):
        p.grad = G.clone()
        held = p.grad
        optimizer.step()
        assert p.grad is held and torch.equal(p.grad, G)


@feedbacks
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical_mid_window_too(fed, gap, dtype):
    def make():
        params = [weight(TALL, 0, dtype), weight(WIDE, 1, dtype), weight((4,), 2, dtype)]
        return params, DCTAdamW(params, lr=0.02, rank=3, update_proj_gap=gap, error_feedback=fed)

    def loaded(optimizer, params):
        assert optimizer.state[params[0]]["index"].dtype == torch.int32

    grads = [gradients(TALL, 9, 0), gradients(WIDE, 9, 1), [torch.ones(4)] * 9]
    for stop in (1, 2, 3, 5):
        check_resume(make, grads, stop, loaded=loaded)


def test_indices_survive_bfloat16_weights_above_what_bfloat16_can_count():
    p = weight((600, 600), dtype=torch.bfloat16)
    optimizer = DCTAdamW([p], rank=500)
    run(optimizer, [p], [noise((600, 600), 1)])
    index = optimizer.state[p]["index"].clone()
    other = DCTAdamW([p], rank=500)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[p]["index"], index) and index.max() > 256


# Moments and ages


@pytest.mark.parametrize("b2, first, largest, at", [(0.999, 3.16, 6.57, 12), (0.99, 1.0, 2.13, 13)])
def test_a_new_row_steps_once_lr_by_age_and_up_to_six_times_by_the_global_clock(
    b2, first, largest, at
):
    """Gradients of one cosine for long, then of another of constant sign for k steps."""
    C, steps = dct_basis(8, DOUBLE), 6000 if b2 == 0.999 else 1500
    a, b = (torch.outer(C[j], torch.ones(12, dtype=DOUBLE)) for j in (2, 5))
    moved = {}
    for mode in ("age", "global"):
        p = torch.nn.Parameter(torch.zeros(8, 12, dtype=DOUBLE))
        optimizer = DCTAdamW([p], lr=1.0, rank=1, betas=(0.9, b2), bias_correction=mode, eps=1e-12)
        p.grad = a
        optimizer.step()
        optimizer.state[p]["step"] = steps
        before, out = p.detach().clone(), []
        for _ in range(30):
            p.grad = b
            optimizer.step()
            out.append(float((p.detach() - before).norm() / math.sqrt(12)))
            before = p.detach().clone()
        moved[mode] = out
    assert moved["age"] == pytest.approx([1.0] * 30, rel=1e-6)
    assert moved["global"][0] == pytest.approx(first, abs=0.01)
    assert max(moved["global"]) == pytest.approx(largest, abs=0.01)
    assert moved["global"].index(max(moved["global"])) + 1 == at


def test_ages_follow_their_cosine():
    C = dct_basis(8)
    p = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer, state = DCTAdamW([p], rank=2), None
    for pair, ages in (((1, 6), [1, 1]), ((1, 6), [2, 2]), ((0, 6), [1, 3]), ((0, 1), [2, 1])):
        p.grad = sum(torch.outer(C[j], torch.ones(12)) for j in pair)
        optimizer.step()
        state = optimizer.state[p]
        assert state["index"].tolist() == list(pair) and state["age"].flatten().tolist() == ages


# Zero gradients, devices, state, memory


@feedbacks
@pytest.mark.parametrize("gap", [1, 10])
def test_a_first_gradient_of_zeros_leaves_the_choice_open(fed, gap):
    p, q, (G,) = weight(WIDE), weight(WIDE), noise(WIDE, 1)
    settings = {"rank": 3, "update_proj_gap": gap, "error_feedback": fed}
    optimizer = DCTAdamW([p], **settings)
    before = p.detach().clone()
    run(optimizer, [p], [[torch.zeros(WIDE)] * 2])
    assert torch.equal(p.detach(), before) and optimizer.state[p]["index"].tolist() == [-1] * 3
    run(optimizer, [p], [[G]])
    run(DCTAdamW([q], **settings), [q], [[G]])
    assert torch.equal(p.detach(), q.detach())  # ages began with the choice
    chosen = optimizer.state[p]["index"].clone()
    assert chosen.min() >= 0
    if fed is None:  # feedback has something to choose from
        run(optimizer, [p], [[torch.zeros(WIDE)]])
        assert torch.equal(optimizer.state[p]["index"], chosen)


class Waiting(TorchDispatchMode):
    """Notes every operator by which the host reads a number of a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@feedbacks
@pytest.mark.parametrize("policy", ["match", "slot", "reset", "keep_if_same"])
def test_no_number_is_read_when_every_step_chooses(fed, policy, monkeypatch):
    module = importlib.import_module("stiefel.kernels.reference.adam")
    monkeypatch.setattr(module, "_READ_DEVICES", ())  # as on a device, whose clocks no host reads
    params = [weight(WIDE, 0), weight(WIDE, 1), weight((300, 400), 2)]
    optimizer = DCTAdamW(params, rank=3, error_feedback=fed, moments=policy)
    optimizer._wait = False
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = noise(tuple(p.shape), 1, 10 * step + k)[0]
        with Waiting() as waiting:
            optimizer.step()
        assert waiting.seen == []


@pytest.mark.parametrize("policy", ["match", "slot", "reset", "keep_if_same"])
def test_a_matrix_that_is_flagged_keeps_its_state(policy):
    """As on a device that is not waited for: the rule sees the bad gradient and a flag."""
    G = torch.stack(noise((6, 9), 2))
    G[1, 2, 3] = math.nan
    state = {
        "index": torch.tensor([[0, 1], [0, 1]], dtype=torch.int32),
        "age": torch.full((2, 2, 1), 4, dtype=torch.int32),
        "exp_avg": torch.ones(2, 2, 9),
        "exp_avg_sq": torch.ones(2, 2, 9),
    }
    before = {key: X.clone() for key, X in state.items()}
    w = Member(
        G,
        lambda: G,
        state,
        t=5,
        refreshed=1,
        m=6,
        n=9,
        indices=(0, 1),
        finite=torch.tensor([1.0, 0.0]),
    )
    (term,) = DCTAdamWRule(rank=2, moments=policy).update(w).terms
    term.materialize()
    for key, X in state.items():
        assert torch.equal(X[1], before[key][1]), key
        assert key == "index" or not torch.equal(X[0], before[key][0])


@pytest.mark.parametrize("fed, extra", [(None, 0), ("full", 4), ("int8", 1), ("int4", 0.5)])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, (6, 9)])
def test_state_bytes_equal_the_formula(shape, fed, extra):
    """2 L r floats, r indices, r ages; with feedback m n of them, quantised 2 floats per row."""
    r, small, large, p = 3, min(shape), max(shape), weight(shape)
    for ages in ("age", "global"):
        q = torch.nn.Parameter(p.detach().clone())
        optimizer = DCTAdamW([q], rank=r, error_feedback=fed, bias_correction=ages)
        run(optimizer, [q], [gradients(shape, 2)])
        held = [x for x in optimizer.state[q].values() if isinstance(x, torch.Tensor)]
        want = 2 * large * r * 4 + 4 * r + (4 * r if ages == "age" else 0)
        coded = small * math.ceil(large * extra) if extra else 0
        want += coded + (8 * small if fed in ("int8", "int4") else 0)
        assert sum(x.untyped_storage().nbytes() for x in held) == want


@feedbacks
@pytest.mark.parametrize("gap", [1, 100])
@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512)])
def test_temporaries_are_as_the_docstring_says(shape, gap, fed):
    params = [weight(shape, k) for k in range(2)]
    optimizer = DCTAdamW(params, rank=64, update_proj_gap=gap, error_feedback=fed, moments="slot")
    counter = count_second_step(optimizer, lambda p, seed: noise(p.shape, 1, seed)[0])
    buffers, panels, S = 4 * 64 * (2 * 2048 + 512), 8 * 4 * 2**18, 4 * 512 * 2048
    made = gap == 1 or fed is not None
    whole = S if made and fed != "full" else 0
    assert counter.peak <= buffers + whole + (panels if made else 4 * 2**17)
    assert whole == 0 or counter.peak >= whole


# Beyond the method


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_both_transforms_give_one_trajectory(shape):
    grads = noise(shape, 5)
    ends = []
    for path in ("fft", "matmul"):
        p = weight(shape)
        run(DCTAdamW([p], lr=0.02, rank=40, transform=path), [p], [grads])
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=2e-4)
    assert not torch.equal(*ends)


def test_coefficients_come_in_panels(monkeypatch):
    """A large matrix is transformed some columns at a time, onto feedback or new."""

    def once():
        p = weight((40, 300))
        optimizer = DCTAdamW([p], lr=0.02, rank=7, transform="fft", error_feedback="full",
                             norm="l2", update_proj_gap=2)  # fmt: skip
        run(optimizer, [p], [noise((40, 300), 4)])
        q = weight((300, 40))
        run(DCTAdamW([q], lr=0.02, rank=7, transform="fft"), [q], [noise((300, 40), 4)])
        return p.detach(), q.detach()

    whole = once()
    monkeypatch.setattr(module, "SPECTRUM_PANEL", 40 * 70)
    for a, b in zip(whole, once(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("power", [-60, 60])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scale_of_the_gradient_does_not_change_the_choice(power, norm):
    sets = []
    for scale in (1.0, 2.0**power):
        p = weight(WIDE)
        optimizer = DCTAdamW([p], rank=3, norm=norm)
        run(optimizer, [p], [[scale * G for G in noise(WIDE, 1)]])
        sets.append(optimizer.state[p]["index"].tolist())
    assert sets[0] == sets[1]


def test_a_schedule_that_changes_to_every_step_and_back():
    p = weight(WIDE)
    optimizer = DCTAdamW([p], rank=3, update_proj_gap=4)
    for gap, clocks in ((4, (1, 1, 1)), (1, (1, 1)), (3, (6, 6)), (1, (6,)), (5, (6, 10))):
        optimizer.param_groups[0]["update_proj_gap"] = gap
        for refreshed in clocks:
            run(optimizer, [p], [noise(WIDE, 1, optimizer.state[p].get("step", 0))])
            assert optimizer.state[p]["refreshed"] == refreshed
    assert optimizer.state[p]["step"] == 10


@feedbacks
def test_a_moving_choice_solves_what_a_fixed_subspace_cannot(fed):
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=draw)
    settings = {"lr": 0.1, "rank": 4}
    fixed = {"scale": 1.0, "update_proj_gap": 10**6}
    kept = unsolved(lambda ps: GaLore(ps, **settings, **fixed), target)
    gap = 1 if fed is None else 10
    moving = {"update_proj_gap": gap, "error_feedback": fed}
    ours = unsolved(lambda ps: DCTAdamW(ps, **settings, **moving), target)
    assert kept > 0.3 and ours < 0.05


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap must be an int of at least 1"),
        ({"update_proj_gap": 2.5}, "update_proj_gap must be an int"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"moments": "rotate"}, "moments must be one of"),
        ({"error_feedback": True}, "error_feedback must be one of"),
        ({"bias_correction": None}, "bias_correction must be one of"),
        ({"basis": "dct4"}, "basis must be one of"),
        ({"transform": "dense"}, "transform must be one of"),
        ({"side": "both"}, "side must be one of"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon value"),
    ],
)
def test_bad_settings_are_one_sentence_for_constructor_and_group(bad, text):
    check_refusal(DCTAdamW, bad, text)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_over_the_whole_range_of_floats_are_quantised(bits):
    X = torch.tensor([[2.5e38, -2.5e38, 0.0], [3e38, 3e38, 3e38], [-1e38, 1e-38, 1.0]])
    back = dequantize_rows(*quantize_rows(X, bits), bits, 3)
    step = X.amax(-1, keepdim=True) / (2**bits - 1) - X.amin(-1, keepdim=True) / (2**bits - 1)
    assert bool(back.isfinite().all())
    assert bool(((back - X).abs() <= 0.51 * step + 1e-6 * X.abs()).all())


def test_slots_that_were_empty_begin_with_their_first_gradient():
    """However long zero gradients came before: every step under a constant one is lr."""
    p = weight((12, 20))
    optimizer = DCTAdamW([p], lr=0.01, rank=12, moments="slot", eps=1e-12)
    G = gradients((12, 20), 1)[0] + 3.0
    for _ in range(50):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    for _ in range(5):
        before = p.detach().clone()
        p.grad = G.clone()
        optimizer.step()
        S = dct_basis(12, torch.float32, p.device) @ (p.detach() - before)
        torch.testing.assert_close(S.abs(), torch.full_like(S, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sides", [(4, 6), (16, 16), (5, 7), (1, 9), (3, 1), (2, 2100)], ids=str)
def test_clocks_of_rows_leave_a_stack_the_bits_of_its_matrices(sides, transposed, dtype):
    """Matrices whose rows agree in their clock take another way than those whose rows do not."""
    K, (r, n) = 5, sides
    R, M, V = (X.to(dtype) for X in noise((3, K, r, n), 1)[0])
    V = V.square()
    if transposed:
        M, V = M.mT.contiguous().mT, V.mT.contiguous().mT
    clocks = torch.tensor([3, 1, 3, 8, 40], dtype=torch.int32).view(K, 1, 1).repeat(1, r, 1)
    betas, eps = (0.9, 0.99), 1e-8
    for mixed in ([], [1, 3], range(K)):
        t = clocks.clone()
        for k in mixed:
            t[k] += torch.arange(r, dtype=torch.int32).view(r, 1)
        m, v = M.clone(), V.clone()
        N = adam(R, m, v, t, beta1=betas[0], beta2=betas[1], eps=eps)
        T = t.double()
        want_m, want_v = (M * 0.9 + R * 0.1).double(), (V * 0.99 + R * R * 0.01).double()
        want = want_m / (1 - 0.9**T) / ((want_v / (1 - 0.99**T)).sqrt() + eps)
        torch.testing.assert_close(N.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v.double(), want_v, rtol=1e-5, atol=1e-6)
        for k in range(K):
            one = slice(k, k + 1)
            m_k, v_k = M[one].clone(), V[one].clone()
            N_k = adam(R[one], m_k, v_k, t[one], beta1=betas[0], beta2=betas[1], eps=eps)
            for alone, stacked in ((N_k, N), (m_k, m), (v_k, v)):
                assert torch.equal(alone, stacked[one])


@pytest.mark.parametrize("moments", ["match", "keep_if_same", "slot", "reset"])
def test_taking_all_cosines_without_a_choice_steps_alike(moments, monkeypatch):
    """At full rank nothing is left to choose; a gradient of zeros before the first choice waits."""
    shape = (3, 8, 12)
    grads = [X * (step > 1) for step, X in enumerate(noise(shape, 6, seed=2))]
    grads[0][0], grads[4][1] = noise(shape[1:], 1)[0], 0.0

    def trajectory():
        p = torch.nn.Parameter(noise(shape, 1, seed=1)[0])
        optimizer = DCTAdamW([p], rank=99, moments=moments, weight_decay=0.1)
        return run(optimizer, [p], [grads]), optimizer.state[p]

    (ours, state), calls = trajectory(), []
    monkeypatch.setattr(DCTAdamWRule, "takes_all", lambda self, w: calls.append(w))
    wanted, wanted_state = trajectory()
    assert calls or moments in ("slot", "reset")
    for W, V in zip(ours, wanted, strict=True):
        torch.testing.assert_close(W[0], V[0], rtol=0, atol=2e-6)
    for key in ("index", "age", "exp_avg_sq"):
        torch.testing.assert_close(state[key], wanted_state[key])
