"""Muon's small options: rows made equal, an exact norm, functions and presets as polar=."""

import copy
import inspect
import io
import math
import pickle
from functools import partial

import pytest
import torch
from helpers.polar_functions import Steps, alone, by_svd
from helpers.problems import gradients, run, weight
from helpers.shapes import SQUARE, TALL, WIDE
from helpers.sharded import Case, Piece, check

from stiefel.kernels import POLAR_METHODS, composite_map, low_rank_size, polar_factor
from stiefel.optimizers import Muon

SHAPES = [TALL, WIDE, SQUARE]
CANS = ((8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162))  # fmt: skip
CUBIC5 = ((3.3656576, -3.3420992, 0), (2.5744352, -1.4957376, 0), (2.5368962, -1.4312570, 0),
          (2.4418906, -1.2764040, 0), (2.2230472, -0.9630650, 0))  # fmt: skip
DEEPSEEKV4 = ((3.4445, -4.7750, 2.0315),) * 8 + ((2, -1.5, 0.5),) * 2


def update_of(G, lr=1.0, **options):
    """The step of a zero weight by G alone."""
    p = torch.nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    Muon([p], lr=lr, weight_decay=0.0, adjust_lr_fn="none", **options).step()
    return -p.detach()


def equal_rows(U, floor=1e-6):
    m = U.shape[-2]
    norms = U.norm(dim=-1, keepdim=True)
    return U * U.norm() / math.sqrt(m) / norms.clamp(min=floor)


def equal_both(U, rounds=2):
    m, n = U.shape
    for _ in range(rounds):
        U = U * math.sqrt(n) / U.norm(dim=1, keepdim=True)
        U = U * math.sqrt(m) / U.norm(dim=0, keepdim=True)
    return U


# rows made equal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_equilibrate_takes_the_factor_of_a_matrix_of_equal_rows(shape):
    G = gradients(shape, 1, dtype=torch.float64)[0]
    G = G * torch.logspace(0, -3, shape[0], dtype=torch.float64)[:, None]  # rows of many sizes
    plain = update_of(G, polar="svd")
    for word, oracle in (("rows", equal_rows), ("both", equal_both)):
        found = update_of(G, polar="svd", equilibrate=word)
        torch.testing.assert_close(found, polar_factor(oracle(G), "svd"), rtol=0, atol=1e-9)
        assert not torch.allclose(found, plain, atol=1e-2)
        torch.testing.assert_close(
            update_of(1e-25 * G, polar="svd", equilibrate=word), found, rtol=0, atol=1e-9
        )


def test_rows_of_any_size_count_alike_and_a_zero_row_stays_zero():
    G = gradients(WIDE, 1)[0]
    sizes = torch.tensor([10.0 ** -(i % 4) for i in range(WIDE[0])])[:, None]
    for word in ("rows", "both"):
        found = update_of(sizes * G, polar="svd", equilibrate=word)
        if word == "rows":
            torch.testing.assert_close(
                found, update_of(G, polar="svd", equilibrate=word), rtol=0, atol=1e-5
            )
        with_zero = G.clone()
        with_zero[1] = 0
        found = update_of(with_zero, equilibrate=word)
        assert found.isfinite().all() and not found[1].any()
        assert not update_of(torch.zeros_like(G), equilibrate=word).any()


# the norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("polar", [*POLAR_METHODS, "auto", "low_rank", by_svd])
def test_renormalize_gives_any_solver_the_norm_of_an_exact_factor(polar):
    options = {"rank": 3, "oversample": 1} if polar == "low_rank" else {}
    for shape in SHAPES:
        G = gradients(shape, 1)[0]
        found = update_of(G, polar=polar, renormalize=True, **options)
        rank = low_rank_size(*shape, 3, 1) if polar == "low_rank" else min(shape)
        assert math.isclose(float(found.norm()), math.sqrt(rank), rel_tol=1e-5)
        plain = update_of(G, polar=polar, **options)
        torch.testing.assert_close(found, plain * found.norm() / plain.norm())
    if polar is not by_svd:  # which makes the identity of zero
        assert not update_of(torch.zeros(4, 5), polar=polar, renormalize=True, **options).any()


@pytest.mark.parametrize("shape", [*SHAPES, (3, *WIDE)])
def test_stack_and_shared_steps_are_those_of_single_weights(shape):
    """Equal weights run as one stack, with the bits of each alone."""
    for options in (
        {"equilibrate": "rows", "renormalize": True}, {"equilibrate": "both"}, {"polar": alone},
        {"polar": alone, "equilibrate": "rows", "renormalize": True},
    ):  # fmt: skip
        stacked = [weight(shape, seed=i) for i in range(3)]
        single = [weight(shape, seed=i) for i in range(3)]
        grads = [gradients(shape, 3, seed=i) for i in range(3)]
        run(Muon(stacked, lr=0.1, **options), stacked, grads)
        for p, g in zip(single, grads, strict=True):
            run(Muon([p], lr=0.1, **options), [p], [g])
        for p, q in zip(stacked, single, strict=True):
            assert torch.equal(p, q)


# presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "polar, triples", [("deepseekv4", DEEPSEEKV4), ("cubic5", CUBIC5), ("cans", CANS)]
)
def test_presets_are_the_published_triples(polar, triples):
    """As ``ns_coefficients``; cans divides by a norm that is 1 % larger, and maps as published."""
    x = torch.logspace(-3, 0, 1000, dtype=torch.float64)
    y = x
    for a, b, c in triples:
        y = a * y + b * y**3 + c * y**5
    torch.testing.assert_close(composite_map(polar, x), y)
    z = 2 * y - 1.5 * y**3 + 0.5 * y**5 if polar == "deepseekv4" else None
    if z is not None:  # more steps repeat the last
        torch.testing.assert_close(composite_map(polar, x, 11), z)
    for shape in SHAPES:
        G = gradients(shape, 1, dtype=torch.float64)[0]
        if polar != "cans":
            theirs = update_of(G, polar="ns5", ns_coefficients=triples)
            torch.testing.assert_close(update_of(G, polar=polar), theirs, rtol=0, atol=1e-12)


def test_the_quintic_that_settles_needs_no_name():
    """Twelve times 2 x - 1.5 x^3 + 0.5 x^5 over the Schatten-4 norm: all near 1, slope 2^12."""
    s = torch.logspace(-2, 0, 40, dtype=torch.float64)
    options = {"ns_coefficients": (2, -1.5, 0.5), "ns_steps": 12, "polar_norm": "schatten4"}
    found = update_of(torch.diag(s), polar="ns5", **options).diagonal()
    assert float((found - 1).abs().max()) < 5e-5
    tiny = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    slope = float(update_of(tiny, polar="ns5", **options)[1, 1]) / 1e-12
    assert slope == pytest.approx(4096, rel=1e-3)


# functions ----------------------------------------------------------------------------------------


def test_a_function_is_given_stacks_and_named():
    seen = []

    def factor(X):
        seen.append((X.shape, X.dtype))
        return by_svd(X)

    params = [weight(WIDE, seed=i) for i in range(2)] + [weight((3, *TALL))]
    grads = [gradients(p.shape, 2) for p in params]
    optimizer = Muon(params, lr=0.1, polar=factor)
    ours = run(optimizer, params, grads)
    assert all(len(shape) == 3 and dtype == torch.float32 for shape, dtype in seen)
    assert {shape[0] for shape, _ in seen} >= {2, 3}
    text = str(optimizer.assignment())
    assert "test_muon_options.test_a_function_is_given" in text and "factor" in text
    others = [weight(WIDE, seed=i) for i in range(2)] + [weight((3, *TALL))]
    theirs = run(Muon(others, lr=0.1, polar="svd"), others, grads)
    for a, b in zip(ours[-1], theirs[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("polar", [by_svd, Steps(3), partial(polar_factor, method="taylor5")])
def test_a_function_is_copied_pickled_and_named_in_files(polar):
    p, G = weight(WIDE), gradients(WIDE, 5)
    optimizer = Muon([p], lr=0.1, polar=polar)
    run(optimizer, [p], [G[:3]])
    (q, other), (s, third) = (
        pickle.loads(pickle.dumps((p, optimizer))), copy.deepcopy((p, optimizer)),
    )  # fmt: skip
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert isinstance(saved["param_groups"][0]["polar"], str)
    r = torch.nn.Parameter(p.detach().clone())
    resumed = Muon([r], lr=0.3, polar=polar)
    resumed.load_state_dict(saved)
    assert type(resumed.param_groups[0]["polar"]) is type(polar)
    for x, opt in ((p, optimizer), (q, other), (s, third), (r, resumed)):
        run(opt, [x], [G[3:]])
    assert torch.equal(p, q) and torch.equal(p, s) and torch.equal(p, r)


def test_a_file_of_another_function_is_refused_with_nothing_changed():
    p = weight(WIDE)
    optimizer = Muon([p], lr=0.1, polar=by_svd)
    run(optimizer, [p], [gradients(WIDE, 2)])
    saved = optimizer.state_dict()
    for polar in ("auto", alone):
        q = weight(WIDE)
        other = Muon([q], lr=0.2, polar=polar)
        run(other, [q], [gradients(WIDE, 1)])
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"polar_functions\.by_svd as polar.*polar=by_svd"):
            other.load_state_dict(saved)
        after = other.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert torch.equal(
            after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"]
        )
    named = Muon([weight(WIDE)], polar="svd").state_dict()
    optimizer.load_state_dict(named)  # as any setting, polar comes with the file
    assert optimizer.param_groups[0]["polar"] == "svd"


@pytest.mark.parametrize(
    "polar", [lambda X: X[0], lambda X: X.mT, lambda X: None, lambda X: X.to("meta")]
)
def test_what_is_no_factor_is_refused_before_anything_moves(polar):
    p, G = weight((3, 5)), gradients((3, 5), 2)
    optimizer = Muon([p], polar="svd")
    run(optimizer, [p], [G[:1]])
    before = copy.deepcopy((p.detach(), optimizer.state[p]["momentum_buffer"]))
    text = r"polar=.*<lambda> must return a tensor of the shape"
    with pytest.raises(ValueError, match=text):
        Muon([weight((3, 5))], polar=polar)
    optimizer.param_groups[0]["polar"] = polar
    p.grad = G[1]
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(optimizer.state[p]["momentum_buffer"], before[1])
    optimizer.param_groups[0]["polar"] = by_svd
    optimizer.step()
    assert not torch.equal(p, before[0])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"polar": by_svd, "ns_steps": 3}, "ns_steps belongs to a method that polar names"),
        ({"polar": by_svd, "polar_norm": "aol"}, "polar_norm belongs to a method"),
        ({"polar": by_svd, "polar_dtype": "float64"}, "polar_dtype belongs to a method"),
        ({"polar": by_svd, "ns_coefficients": (1.5, -0.5, 0)}, "ns_coefficients belongs"),
        ({"polar": by_svd, "compat": "torch"}, "compat='torch' iterates with ns5"),
        ({"polar": by_svd, "write": "eco"}, "a function as polar"),
        ({"polar": Steps}, "polar must be 'auto', a function"),
        ({"polar": 3}, "polar must be 'auto', a function"),
        ({"polar": "svdd"}, "polar must be 'auto', a function"),
        ({"equilibrate": "columns"}, r"equilibrate must be one of \(None, 'rows', 'both'\)"),
        ({"equilibrate": True}, "equilibrate must be one of"),
        ({"renormalize": 1}, "renormalize must be True or False"),
        ({"equilibrate": "rows", "compat": "torch"}, "leave equilibrate and renormalize unset"),
        ({"renormalize": True, "compat": "torch"}, "leave equilibrate and renormalize unset"),
        ({"equilibrate": "rows", "write": "eco"}, "factor is of another matrix"),
        ({"renormalize": True, "write": "eco"}, "step has no fixed scale"),
    ],
)
def test_what_does_not_go_stacked_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Muon([weight(WIDE)], **options)


def test_a_function_never_sees_a_bad_gradient_on_the_cpu():
    p = weight(WIDE)
    before = p.detach().clone()
    optimizer = Muon([p], polar=by_svd)  # LAPACK raises for NaN
    p.grad = torch.full(WIDE, math.nan)
    with pytest.warns(UserWarning, match="non-finite"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("world", [2, 3])
def test_options_on_shards(world):
    pieces = (*(Piece(s, d) for s in ((37, 23), (7, 16)) for d in (0, 1)), Piece((3, 6, 8), 0))
    for options in ({"polar": alone}, {"equilibrate": "rows", "renormalize": True}):
        check(Case("muon", pieces, steps=2, options=options), world)


# torch's name of a scale --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_unclamped_is_torchs_or_an_alias(shape):
    """Equal to ``torch.optim.Muon`` from 2.14 on, else to our ``"spectral"``, in all forms."""
    source = inspect.getsource(inspect.getmodule(torch.optim.Muon))
    G = gradients(shape, 2)
    ours, q = weight(shape), weight(shape)
    options = {"lr": 0.1, "weight_decay": 0.1}
    run(Muon([ours], adjust_lr_fn="spectral_unclamped", compat="torch", **options), [ours], [G])
    if "spectral_unclamped" in source:
        theirs = torch.optim.Muon([q], adjust_lr_fn="spectral_unclamped", **options)
    else:
        theirs = Muon([q], adjust_lr_fn="spectral", compat="torch", **options)
    run(theirs, [q], [G])
    assert torch.equal(ours, q)
    unit = update_of(G[0], polar="svd")
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = G[0].clone()
    scaled = Muon([p], lr=1.0, weight_decay=0.0, polar="svd", adjust_lr_fn="spectral_unclamped")
    scaled.step()
    torch.testing.assert_close(-p.detach(), math.sqrt(shape[0] / shape[1]) * unit)
