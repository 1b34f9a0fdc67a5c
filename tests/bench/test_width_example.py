"""What examples/width.py draws, in a small form: rates carry over by the rule, and not without."""

import importlib.util
import math

import pytest
import torch
from helpers.paths import EXAMPLES


@pytest.fixture(scope="module")
def width():
    spec = importlib.util.spec_from_file_location("width_example", EXAMPLES / "width.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_output_moves_more_and_more_without_the_rule(width):
    for who in width.CONTENDERS.values():
        plain, ruled = (
            width.movement(who, 128, base, 2) / width.movement(who, 16, base, 2)
            for base in (None, 16)
        )
        assert ruled < 1.5 < plain and plain > 2.5 * ruled


def test_the_best_rate_stays_with_the_rule_only(width):
    for name, steps in (("AdamW", 30), ("Muon", 12)):
        who = width.CONTENDERS[name]
        rates = [who.rate * 4.0**k for k in (-3, -2, -1, 0, 1)]
        start, _ = width.best_rate(who, 16, None, rates, steps)
        plain, _ = width.best_rate(who, 256, None, rates, steps)
        ruled, losses = width.best_rate(who, 256, 16, rates, steps)
        assert abs(math.log2(ruled / start)) <= 2 <= math.log2(start / plain)
        assert min(losses) < math.inf


def test_networks_of_a_seed_are_equal(width):
    a, b = (width.network(8) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
