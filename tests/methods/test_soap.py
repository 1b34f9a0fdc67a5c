"""SOAP and SOAP-Muon: recorded steps, the oracle, symmetries, refreshes, gradients that are odd."""

import copy
import importlib
import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from helpers.paths import FIXTURES
from helpers.problems import gradients, run, same, weight
from helpers.shapes import SQUARE, TALL, WIDE
from oracles import soap as oracle

from stiefel.kernels import completed_eigenbasis, polar_factor
from stiefel.optimizers import SOAP, Muon, SOAPMuon, StackedOptimizer, memory_report
from stiefel.optimizers import soap as module
from stiefel.optimizers._toolkit.moments import adam_reference
from stiefel.optimizers.soap import EigenbasisRule, SOAPRule

DOUBLE = torch.float64
ENDS = ("", "_right")
FORMS = {
    "both": {},
    "rotate": {"moments": "rotate"},
    "eigh": {"basis": "eigh"},
    "eigh, rotate": {"basis": "eigh", "moments": "rotate"},
    "kl": {"factors": "kl"},
    "kl, eigh": {"factors": "kl", "basis": "eigh"},
    "kl, rotate": {"factors": "kl", "moments": "rotate"},
    "no bias": {"correct_bias": False},
    "normalized": {"normalize_update": True},
    "reference": {"compat": "reference"},
    "reference, no bias": {"compat": "reference", "correct_bias": False},
    "short": {"sides": "short"},
    "beta": {"shampoo_beta": 0.7, "betas": (0.8, 0.9)},
}


def doubles(shape, steps, seed=0):
    return [G.double() for G in gradients(shape, steps, seed)]


def tensor(rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


def recorded(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def feed(optimizer, p, bases):
    """Put the recorded first bases into the state: their null space was LAPACK's choice."""
    for side, key in (("left", "basis"), ("right", "basis_right")):
        if key in optimizer.state[p]:
            optimizer.state[p][key].copy_(tensor(bases[side]))


def orthogonal(m, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, m, generator=draw, dtype=DOUBLE))[0]


def defect(Q):
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def sides_of(shape, settings):
    """Which sides, rows and columns, have a basis."""
    is_short, m_is_longer = settings.get("sides") == "short", shape[0] > shape[1]
    return (not m_is_longer, m_is_longer) if is_short else (True, True)


def first_bases(optimizer, p):
    """Copies of the bases of rows and columns, None for a side that has none."""
    state = optimizer.state[p]
    bases = [state[f"basis{end}"].clone() if f"basis{end}" in state else None for end in ENDS]
    return bases[::-1] if bases[1] is None and p.shape[0] > p.shape[1] else bases


def stepped(optimizer, p, grads):
    """The weight after every gradient."""
    out = []
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
        out.append(p.detach().clone())
    return out


# recorded steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["square", "square-normalize", "short-wide", "short-tall", "wide", "tall"]
)
@pytest.mark.parametrize("by", ["max_precond_dim", "sides"])
def test_recorded_steps(name, by):
    data = recorded(f"soap-{name}")
    given = data["settings"]["optimizer"]
    if by == "sides" and "short" not in name:
        return
    short = {"sides": "short"} if by == "sides" else {}
    p = torch.nn.Parameter(tensor(data["W0"]))
    optimizer = SOAP(
        [p],
        given["lr"],
        tuple(given["betas"]),
        given["eps"],
        given["weight_decay"],
        precondition_frequency=given["precondition_frequency"],
        normalize_update=given.get("normalize_grads", False),
        compat="reference",
        **(short or {"max_precond_dim": given.get("max_precond_dim", 10000)}),
    )
    for t, (G, W) in enumerate(zip(data["grads"], data["W"], strict=True)):
        (found,) = stepped(optimizer, p, [tensor(G)])
        torch.testing.assert_close(found, tensor(W), rtol=0, atol=5e-6)
        if t == 0 and name in ("wide", "tall"):
            feed(optimizer, p, data["bases"][0])
    V, last = optimizer.state[p]["exp_avg_sq"], data["final_state"]["exp_avg_sq"]
    # published code refreshes at the end of this step, ours before the next one
    assert torch.equal(torch.argsort(V.sum(0))[-1:], torch.argsort(tensor(last).sum(0))[-1:])


@pytest.mark.parametrize("name", ["square", "wide"])
def test_recorded_steps_of_kl_on_a_sphere(name):
    data = recorded(f"klsoap-h-{name}")
    given = data["settings"]["optimizer"]
    p = torch.nn.Parameter(tensor(data["W0"]))
    optimizer = SOAP(
        [p],
        given["lr"],
        (given["beta1"], given["beta2"]),
        given["eps"],
        0.0,
        shampoo_beta=given["shampoo_beta"],
        precondition_frequency=1,
        factors="kl",
        correct_bias=False,
        weight_norm="hyperball",
    )
    for t, (G, W) in enumerate(zip(data["grads"], data["W"], strict=True)):
        (found,) = stepped(optimizer, p, [tensor(G)])
        torch.testing.assert_close(found, tensor(W), rtol=0, atol=1e-5)
        if t == 0:
            feed(optimizer, p, data["bases"][0])


@pytest.mark.parametrize("name", ["square", "wide", "tall"])
def test_recorded_momenta_before_the_polar_step(name, monkeypatch):
    data, seen = recorded(f"soap-muon-{name}"), []

    def factor(X, method, **options):
        seen.append(X.clone())
        return polar_factor(X, method, **options)

    monkeypatch.setattr(module, "polar_factor", factor)
    p = torch.nn.Parameter(torch.zeros_like(tensor(data["grads"][0])))
    optimizer = SOAPMuon([p])
    for t, G in enumerate(data["grads"]):
        stepped(optimizer, p, [tensor(G)])
        if t == 0:
            feed(optimizer, p, data["bases"][0])
    for X, want in zip(seen, data["preconditioned"], strict=True):
        want = tensor(want)  # its norm is that before the whitening, which no polar factor sees
        torch.testing.assert_close(X[0] / X.norm(), want / want.norm(), rtol=0, atol=2e-6)


@dataclass(frozen=True)
class SOAPHRule(SOAPRule):
    """The published variant that steps at once and leaves V as it is, made of our parts."""

    def update(self, w):
        if w.is_first_refresh:
            super().refresh(w)
        M, V, (beta1, beta2) = w.state["exp_avg"], w.state["exp_avg_sq"], self.betas
        N = self.project(w, w.grad)
        D, _ = adam_reference(N, M, V, 1, beta1=beta1, beta2=beta2, eps=self.eps)
        yield w.step(self.lifted_term(w, D))
        self.move_grams(w, w.grad)
        for end in self.sided(w.m, w.n):
            new, _ = self.next_basis(w, end)
            M.copy_(module.turn(M, w.state["basis" + end], new, end))
            w.state["basis" + end].copy_(new)

    def refresh(self, w):
        pass

    @property
    def sorts(self):
        return False


def test_recorded_directions_of_the_variant_that_steps_at_once():
    data = recorded("soap-h-square")
    given = data["settings"]["optimizer"]
    rule = SOAPHRule(
        betas=(given["momentum"], given["ema_beta"]),
        eps=given["eps"],
        correct_bias=False,
        precondition_frequency=1,
    )
    p = torch.nn.Parameter(tensor(data["W0"]))
    optimizer = StackedOptimizer([p], rule, 1.0, 0.0)
    W = tensor(data["W0"])
    for G, want in zip(data["grads"], data["W"], strict=True):
        p.data.zero_()
        (D,) = stepped(optimizer, p, [tensor(G)])
        W = oracle.hyperball(W, -D, given["lr"])
        torch.testing.assert_close(W, tensor(want), rtol=0, atol=1e-5)


# the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_steps_and_state_are_the_oracles(form):
    settings = FORMS[form]
    for shape, every in ((SQUARE, 1), (SQUARE, 3), (WIDE, 2), (TALL, 3)):
        p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 8)
        optimizer = SOAP([p], lr=0.02, weight_decay=0.05, precondition_frequency=every, **settings)
        W0 = p.detach().clone()
        found = stepped(optimizer, p, grads[:1])
        bases, on = first_bases(optimizer, p), sides_of(shape, settings)
        found += stepped(optimizer, p, grads[1:])
        state = optimizer.state[p]
        names = {"compat": "reference", "normalize_update": "normalize", "shampoo_beta": "bs"}
        given = {names.get(k, k): v for k, v in settings.items() if k != "sides"}
        given["sort"] = settings.get("factors") != "kl" or "basis" in settings
        want, last = oracle.soap(W0, grads, 0.02, wd=0.05, every=every, bases=bases, on=on, **given)
        for W, V in zip(found, want, strict=True):
            torch.testing.assert_close(W, V, rtol=0, atol=1e-9)
        if (len(grads) - 1) % every:  # else the oracle has refreshed already
            torch.testing.assert_close(state["exp_avg_sq"], last["exp_avg_sq"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"sides": "short"}])
def test_steps_of_soap_muon_are_the_oracles(settings):
    for shape in (SQUARE, WIDE, TALL):
        p, grads, every = weight(shape, dtype=DOUBLE), doubles(shape, 7), 2
        optimizer = SOAPMuon(
            [p], 0.02, weight_decay=0.0, polar="svd", precondition_frequency=every,
            adjust_lr_fn="none", **settings,
        )  # fmt: skip
        W = p.detach().clone()
        found = stepped(optimizer, p, grads[:1])
        bases, on = first_bases(optimizer, p), sides_of(shape, settings)
        found += stepped(optimizer, p, grads[1:])
        wanted = oracle.preconditioned_momentum(
            grads, bases=bases, every=every, on=on, nesterov=settings.get("nesterov", True)
        )
        for V, P in zip(found, wanted, strict=True):
            U, _, Vh = torch.linalg.svd(P, full_matrices=False)
            W = W - 0.02 * U @ Vh
            torch.testing.assert_close(V, W, rtol=0, atol=1e-9)


def test_the_first_step_of_soap_muon_is_muons():
    p, q, grads = weight(WIDE), weight(WIDE), gradients(WIDE, 1)
    stepped(SOAPMuon([p], 0.02), p, grads)
    stepped(Muon([q], 0.02), q, grads)
    assert same(p, q)


@pytest.mark.parametrize("settings", [{}, {"normalize_gradient": True}])
def test_steps_are_those_of_another_package(settings):
    """Of two weights that both have every gradient: there the clock belongs to the group."""
    try:
        theirs = importlib.import_module("pytorch_optimizer").SOAP
    except ImportError:
        pytest.skip("pytorch_optimizer is not installed")
    shapes, steps = ((6, 6), (5, 5)), 9
    common = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.05, "precondition_frequency": 3}
    ours = {"compat": "reference", "normalize_update": bool(settings)}
    grads = [doubles(shape, steps, i) for i, shape in enumerate(shapes)]
    found = []
    for make, extra in ((SOAP, ours), (theirs, settings)):
        params = [weight(shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
        optimizer = make(params, **common, **extra)
        for t in range(steps):
            for p, Gs in zip(params, grads, strict=True):
                p.grad = Gs[t].float()
            optimizer.step()
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


# symmetries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["both", "rotate", "eigh", "kl", "normalized"])
def test_steps_turn_with_the_weight(form):
    A, B, grads = orthogonal(6, 1), orthogonal(6, 2), doubles((6, 6), 9)
    p, q = weight((6, 6), dtype=DOUBLE), weight((6, 6), dtype=DOUBLE)
    q.data = A @ q.data @ B
    settings = {"precondition_frequency": 2, **FORMS[form]}
    found = stepped(SOAP([p], 0.02, **settings), p, grads)
    rotated = stepped(SOAP([q], 0.02, **settings), q, [A @ G @ B for G in grads])
    for W, V in zip(found, rotated, strict=True):
        torch.testing.assert_close(A @ W @ B, V, rtol=0, atol=1e-9)


def test_signs_of_the_basis_do_not_matter():
    p, q, grads = weight((6, 6)), weight((6, 6)), gradients((6, 6), 9)
    optimizers = [SOAP([x], 0.02, precondition_frequency=3) for x in (p, q)]
    for G in grads:
        for x, optimizer in zip((p, q), optimizers, strict=True):
            stepped(optimizer, x, [G])
        state = optimizers[1].state[q]
        flips = torch.tensor([1.0, -1, 1, 1, -1, -1])
        state["basis"].mul_(flips)
        state["exp_avg"].mul_(flips.unsqueeze(1))
    assert same(p, q)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10, 1000.0])
def test_steps_do_not_depend_on_the_scale_of_gradients(factor):
    grads = doubles((6, 6), 8)
    # KL is left out: its first eigenvalues have a scale, as published
    for settings in ({}, {"basis": "eigh"}, {"moments": "rotate", "sides": "short"}):
        p, q = weight((6, 6), dtype=DOUBLE), weight((6, 6), dtype=DOUBLE)
        made = {"precondition_frequency": 2, "eps": 0.0, **settings}
        stepped(SOAP([p], 0.02, **made), p, grads)
        stepped(SOAP([q], 0.02, **made), q, [factor * G for G in grads])
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compat", [None, "reference"])
def test_without_sides_it_is_adamw_a_gradient_later(compat):
    for shape in (SQUARE, WIDE, TALL):
        p, q, grads = weight(shape), weight(shape), gradients(shape, 6)
        settings = {} if compat is None else {"compat": compat}
        decay = 0.0 if compat else 0.1
        found = stepped(
            SOAP([p], 0.02, max_precond_dim=0, weight_decay=decay, **settings), p, grads
        )
        theirs = torch.optim.AdamW([q], 0.02, betas=(0.95, 0.95), weight_decay=decay)
        wanted = [q.detach().clone(), *stepped(theirs, q, grads[1:])]
        for W, V in zip(found, wanted, strict=True):
            torch.testing.assert_close(W, V, rtol=0, atol=5e-6)


# refreshes and resumed runs -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_first_update_moves_nothing(form):
    p = weight(TALL)
    before = p.detach().clone()
    optimizer = SOAP([p], 0.5, weight_decay=0.5, **FORMS[form])
    (after,) = stepped(optimizer, p, gradients(TALL, 1))
    state = optimizer.state[p]
    assert same(before, after)
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert state["step"] == 1


@pytest.mark.parametrize("f", [1, 2, 3, 5])
def test_refreshes_come_when_they_should(f, monkeypatch):
    calls, plain = [], EigenbasisRule.power_step

    def power_step(self, S, Q):
        calls.append(len(S))
        return plain(self, S, Q)

    monkeypatch.setattr(EigenbasisRule, "power_step", power_step)
    p, seen = weight((6, 6)), []
    optimizer = SOAP([p], 0.02, precondition_frequency=f)
    for u, G in enumerate(gradients((6, 6), 14), 1):
        calls.clear()
        stepped(optimizer, p, [G])
        if calls:
            assert calls == [1, 1]
            seen.append(u)
    assert seen == [u for u in range(3, 15) if (u - 2) % f == 0]


def test_refreshes_are_spread_over_a_window():
    """Each has its own turn; the first bases do not wait."""
    shapes = [(6, 6), (6, 7), (7, 6), (5, 5)]  # equal ones are a stack, which has one turn
    params = [weight(shape) for shape in shapes]
    optimizer = SOAP(params, 0.02, precondition_frequency=4, stagger=True)
    updates = {i: [] for i in range(4)}
    for u, Gs in enumerate(zip(*(gradients(shape, 12) for shape in shapes), strict=True), 1):
        before = [optimizer.state[p].get("basis") for p in params]
        before = [None if Q is None else Q.clone() for Q in before]
        for p, G in zip(params, Gs, strict=True):
            p.grad = G.clone()
        optimizer.step()
        for i, (p, Q) in enumerate(zip(params, before, strict=True)):
            if Q is None or not torch.equal(Q, optimizer.state[p]["basis"]):
                updates[i].append(u)
    assert all(turn[0] == 1 and len(turn) >= 3 for turn in updates.values())
    assert len({turn[1] for turn in updates.values()}) == 4
    assert all(b - a == 4 for turn in updates.values() for a, b in pairwise(turn[1:]))


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
@pytest.mark.parametrize("form", ["both", "short", "kl", "int8", "muon"])
def test_resumed_runs_have_the_same_bits(stop, form):
    settings = {"both": {}, "kl": {"factors": "kl"}, "muon": {}, "int8": {"state_dtype": "int8"}}
    settings = settings.get(form, {"sides": "short", "basis": "eigh"})
    cls = SOAPMuon if form == "muon" else SOAP
    shape = (72, 64) if form == "int8" else TALL
    steps, grads = 8, gradients(shape, 8)
    p = weight(shape)
    optimizer = cls([p], 0.02, precondition_frequency=3, **settings)
    stepped(optimizer, p, grads[:stop])
    saved, at = optimizer.state_dict(), p.detach().clone()
    q = torch.nn.Parameter(at.clone())
    resumed = cls([q], 0.02, precondition_frequency=3, **settings)
    resumed.load_state_dict(copy.deepcopy(saved))
    for x, o in ((p, optimizer), (q, resumed)):
        stepped(o, x, grads[stop:steps])
    assert same(p, q)


# odd gradients and bases --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SOAP, SOAPMuon])
def test_gradients_of_zero_rank_one_and_nan(cls):
    for shape in (SQUARE, WIDE, TALL):
        m, n = shape
        u, v = torch.linspace(-1, 1, m), torch.linspace(0.5, 2, n)
        grads = [
            torch.zeros(shape),
            torch.zeros(shape),
            *[torch.outer(u, v)] * 3,
            torch.zeros(shape),
        ]
        p = weight(shape)
        before = p.detach().clone()
        optimizer = cls([p], 0.02, weight_decay=0.0, precondition_frequency=1)
        stepped(optimizer, p, grads[:2])
        assert same(before, p)
        stepped(optimizer, p, grads[2:])
        stepped(optimizer, p, gradients(shape, 3))
        state = optimizer.state[p]
        assert all(bool(x.isfinite().all()) for x in (p, state["exp_avg_sq"], state["basis"]))
        assert defect(state["basis"]) < 1e-5 and defect(state["basis_right"]) < 1e-5
        kept, t = p.detach().clone(), state["step"]
        with pytest.warns(UserWarning, match="not finite|non-finite"):
            stepped(optimizer, p, [torch.full(shape, torch.nan)])
        assert same(kept, p) and state["step"] == t


@pytest.mark.parametrize("basis", ["qr", "eigh"])
def test_bases_stay_orthogonal(basis):
    for factors in ("gram", "kl"):
        p = weight((5, 9))
        optimizer = SOAP([p], 1e-3, precondition_frequency=1, basis=basis, factors=factors)
        stepped(optimizer, p, gradients((5, 9), 202))
        state = optimizer.state[p]
        assert defect(state["basis"]) < 1e-5 and defect(state["basis_right"]) < 1e-5
        assert bool(p.isfinite().all())


def test_first_bases_do_not_hang_on_rounding():
    """Of float32 and float64 gradients they agree, in the null space of the longer side too."""
    for shape in (WIDE, TALL, (3, 12), (12, 3)):
        (G,) = gradients(shape, 1)
        found = []
        for dtype in (torch.float32, DOUBLE):
            p = weight(shape, dtype=dtype)
            optimizer = SOAP([p])
            stepped(optimizer, p, [G.to(dtype)])
            state = optimizer.state[p]
            found.append((state["basis"].double(), state["basis_right"].double()))
        for Q, P in zip(*found, strict=True):
            torch.testing.assert_close(Q, P, rtol=0, atol=1e-4)
            assert defect(P) < 1e-12


def test_completion_of_a_basis():
    """Eigenvectors first, then what the old basis gives, whatever signs they have."""
    draw = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(7, 3, generator=draw, dtype=DOUBLE))[0]
    S = (V * torch.tensor([3.0, 2.0, 1.0])) @ V.mT
    old = orthogonal(7, 3)
    Q = completed_eigenbasis(
        torch.stack([S, 0 * S, S.new_full((7, 7), torch.nan)]), old.expand(3, 7, 7)
    )
    assert torch.equal(Q[1], old) and torch.equal(Q[2], old)
    assert defect(Q[0]) < 1e-14
    torch.testing.assert_close((Q[0][:, :3].mT @ V).abs(), torch.eye(3, dtype=DOUBLE))
    near = completed_eigenbasis((S + 1e-10 * (S @ S)).unsqueeze(0), old.unsqueeze(0))
    torch.testing.assert_close(Q[:1], near, rtol=0, atol=1e-8)
    limited = completed_eigenbasis(S.unsqueeze(0), old.unsqueeze(0), rank=2)
    torch.testing.assert_close(limited[0][:, :2], Q[0][:, :2])
    assert defect(limited[0]) < 1e-14


def test_second_moments_stay_positive_when_they_rotate():
    for shape in (SQUARE, WIDE):
        p = weight(shape)
        optimizer = SOAP([p], 0.02, precondition_frequency=1, moments="rotate")
        for G in gradients(shape, 12):
            stepped(optimizer, p, [G])
            assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())


# stacks, views, state -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["both", "short", "kl", "muon"])
def test_stacks_and_views_are_matrices_of_their_own(form):
    cls = SOAPMuon if form == "muon" else SOAP
    settings = {"precondition_frequency": 2, **({} if form == "muon" else FORMS[form])}
    W, grads = weight((3, 5, 7)).detach(), gradients((3, 5, 7), 7)
    alone = [torch.nn.Parameter(x.clone()) for x in W]
    run(cls(alone, 0.02, **settings), alone, [[G[i] for G in grads] for i in range(3)])
    stack, heads = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W.reshape(15, 7).clone())
    stepped(cls([stack], 0.02, **settings), stack, grads)
    cut = cls([{"params": [heads], "view": "heads:3"}], 0.02, **settings)
    stepped(cut, heads, [G.reshape(15, 7) for G in grads])
    for i, p in enumerate(alone):
        assert same(p, stack[i]) and same(p, heads.view(3, 5, 7)[i])


def test_groups_may_name_sides():
    p, q = weight(TALL), weight(WIDE)
    optimizer = SOAP([{"params": [p], "sides": "short"}, {"params": [q]}])
    assert [g["precondition_sides"] for g in optimizer.param_groups] == ["short", "both"]
    optimizer.init_state()
    assert "basis_right" not in optimizer.state[p] and "basis_right" in optimizer.state[q]
    assert optimizer.state[p]["basis"].shape == (min(TALL),) * 2


@pytest.mark.parametrize("cls", [SOAP, SOAPMuon])
def test_state_is_what_the_docstring_says(cls):
    m, n = 64, 96
    model = torch.nn.Linear(n, m, bias=False)
    for settings, numbers in (
        ({}, 2 * m * n + 2 * m * m + 2 * n * n),
        ({"sides": "short"}, 2 * m * n + 2 * m * m),
        ({"max_precond_dim": 64}, 2 * m * n + 2 * m * m),
        ({"max_precond_dim": 0}, 2 * m * n),
    ):
        (row,) = memory_report([model.weight], cls, **settings).rows
        assert row.state == 4 * numbers
