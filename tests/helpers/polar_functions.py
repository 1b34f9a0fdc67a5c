"""Functions for ``Muon(polar=)``, where other processes and pickles find them."""

import torch

from stiefel.kernels import polar_factor


def by_svd(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def alone(X):
    """Matrix by matrix, as a stack and a single one then have the same bits."""
    return torch.stack([polar_factor(x, "ns5") for x in X])


class Steps:
    """A function with a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, X):
        return polar_factor(X, "ns5", steps=self.steps)
