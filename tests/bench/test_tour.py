"""What the tour claims in words holds in its numbers."""

import importlib.util
from functools import partial

import pytest
import torch
from helpers.paths import EXAMPLES


@pytest.fixture(scope="module")
def tour():
    spec = importlib.util.spec_from_file_location("tour", EXAMPLES / "tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ends(tour, name):
    """Loss after 60 steps in the valley along the axes, and in the rotated one."""
    found = []
    for angle in (0.0, 0.6):
        c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        x, y = tour.START
        value = tour.valley(angle)
        path = tour.walk(tour.VALLEY[name], value, torch.stack((c * x - s * y, s * x + c * y)))
        found.append(float(value(path[-1])))
    return found


def test_gradient_descent_rotates_with_the_valley_and_adam_does_not(tour):
    for name in ("SGD", "SGD, momentum 0.9"):
        straight, rotated = ends(tour, name)
        assert rotated == pytest.approx(straight, rel=1e-2)
    straight, rotated = ends(tour, "Adam")
    assert rotated > 10 * straight


def test_a_quiet_direction_is_learned_by_muon_and_hardly_by_the_others(tour):
    learned = {}
    for name, lr in (("SGD, momentum 0.9", 0.3), ("AdamW", 0.03), ("Muon", 0.03)):
        losses, shares = tour.train(partial(tour.MATRIX[name][1], lr=lr))
        assert losses[-1] < 0.05 * losses[0]
        learned[name] = shares[:, 3]  # direction 32
    assert learned["Muon"][-1] == pytest.approx(1, abs=0.01) and learned["Muon"][50] > 0.7
    assert learned["SGD, momentum 0.9"][-1] < 0.3 < learned["AdamW"][-1] < 0.8


def test_learning_rates_of_the_picture_are_among_those_tried(tour):
    for name, lr in (("SGD, momentum 0.9", 0.3), ("AdamW", 0.03), ("Muon", 0.03)):
        unit = tour.MATRIX[name][0]
        assert any(k * unit == pytest.approx(lr) for k in tour.RATES)
