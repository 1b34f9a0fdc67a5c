"""Random uses of every optimizer are right, or refused by one sentence with nothing changed.

``pytest tests/driver/test_fuzz.py --cases 100000 --fuzz-seed 1 -s`` runs more of them; the report
says how many were right, and how many were refused because of what.
"""

import copy
import itertools
import random
from dataclasses import replace

import hypothesis
import pytest
import torch
from helpers import fuzz, fuzz_cases, fuzz_values
from helpers.fuzz_checkpoints import mutate
from hypothesis import strategies

from stiefel import optimizers


@pytest.mark.slow
def test_a_use_is_right_or_refused_by_one_sentence_with_nothing_changed(request):
    count, seed = (request.config.getoption(f"--{name}") for name in ("cases", "fuzz-seed"))
    report = fuzz.Report()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.randoms(use_true_random=True))
    def run(draw):
        case = fuzz_cases.draw_case(draw.getrandbits(62))
        outcome = fuzz.run_case(case)
        if outcome.finding and outcome.finding not in report.findings:
            print(f"\n{' | '.join(outcome.finding)}\n{case}", flush=True)
        report.add(case, outcome)
        if report.cases % 5000 == 0:  # a long run shows how far it is
            print(f"\n{report}", flush=True)

    run()
    print(f"\n{report}")
    assert not report.findings, f"{report}\n\n{report.reproducers()}"
    assert 2 * report.stepped >= report.cases, str(report)


def plain_case(**changes):
    """A use of Muon with nothing odd in it."""
    params = (fuzz_cases.Param((4, 3)), fuzz_cases.Param((3,)))
    case = fuzz_cases.Case(1, "Muon", "list", params, grads=(("normal", "normal"),) * 2)
    return replace(case, **changes)


def test_a_seed_gives_one_case():
    cases = [[fuzz_cases.draw_case(seed) for seed in range(200)] for _ in range(2)]
    assert cases[0] == cases[1]
    assert {case.cls for case in cases[0]} == set(fuzz_values.CLASSES)
    assert {case.site for case in cases[0]} == {"plain", *fuzz_values.KINDS}


def test_any_two_mutations_of_a_checkpoint_go_together():
    """Both may meet one tensor, or what the first has left of an entry."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = optimizers.GaLore([("w", p)], rank=2)
    p.grad = torch.eye(4)
    optimizer.step()
    kinds = fuzz_values.CHECKPOINT_MUTATIONS
    for first, second in itertools.product(kinds, kinds):
        for seed in range(3):
            saved, rng = copy.deepcopy(optimizer.state_dict()), random.Random(seed)
            mutate(mutate(saved, first, rng), second, rng)


def test_a_plain_case_is_right_and_a_bad_value_is_refused():
    outcome = fuzz.run_case(plain_case())
    assert (outcome.verdict, outcome.stepped) == ("right", True)
    bad = plain_case(options=(("lr", "-1"),), site="keyword")
    assert fuzz.run_case(bad).verdict == "keyword"
    late = plain_case(writes=((1, "adjust_lr_fn", "'x'"),), site="write")
    outcome = fuzz.run_case(late)
    assert (outcome.verdict, outcome.stepped) == ("write", True)


BROKEN = {
    "raises anything else": "KeyError in step",
    "says nothing": "ValueError in step names nothing",
    "changes a weight first": "changed by a refused step",
    "makes a weight infinite": "is not finite",
    "draws at random": "other bits",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_fuzzer_finds(fault, monkeypatch):
    """A fault put into the step of Muon comes out, and the reducer keeps it."""
    from stiefel.optimizers import Muon

    step = Muon.step

    def broken(self, closure=None):
        W = self.param_groups[0]["params"][0]
        with torch.no_grad():
            if fault == "raises anything else":
                raise KeyError("lr")
            if fault == "says nothing":
                raise ValueError("something is wrong")
            if fault == "changes a weight first":
                W.add_(1)
                raise ValueError("lr is wrong")
            step(self, closure)
            if fault == "makes a weight infinite":
                W.fill_(torch.inf)
            if fault == "draws at random":
                W.copy_(torch.rand_like(W))

    monkeypatch.setattr(Muon, "step", broken)
    case = plain_case(options=(("lr", "0.1"), ("nesterov", "False")))
    outcome = fuzz.run_case(case)
    assert outcome.verdict == "finding" and BROKEN[fault] in " ".join(outcome.finding)
    small = fuzz.reduce_case(case, outcome.finding)
    assert fuzz.run_case(small).finding == outcome.finding
    assert len(small.params) == 1 and not any(key == "nesterov" for key, _ in small.options)


@pytest.mark.parametrize("eps", ["0", "0.0", "-0.0"])
@pytest.mark.parametrize("kinds", [("zeros",), ("zeros", "none", "normal"), ("one entry",)])
def test_an_eps_of_zero_is_right_where_torch_divides_by_zero_too(kinds, eps):
    grads = tuple(("normal", kind) for kind in kinds)
    outcome = fuzz.run_case(plain_case(options=(("adamw_eps", eps),), grads=grads))
    assert (outcome.verdict, outcome.stepped) == ("right", True)


def test_an_eps_of_zero_excuses_nothing_that_torch_keeps_finite(monkeypatch):
    from stiefel.optimizers import Muon

    step = Muon.step

    def broken(self, closure=None):
        step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][1].fill_(torch.nan)

    monkeypatch.setattr(Muon, "step", broken)
    case = plain_case(options=(("adamw_eps", "0"),), grads=(("normal", "normal"),))
    assert fuzz.run_case(case).finding[0] == "AdamW parameter is not finite"
