"""Shared material of tests on LoRA pairs, and the table of methods that the general ones run."""

import torch

from helpers.problems import gradients, weight
from stiefel.optimizers import AdaPreLoRA, AltLoRA, pairs_to_groups

DOUBLE = torch.float64
SHAPES = [(10, 7, 3), (6, 9, 4), (5, 5, 1), (3, 8, 3)]
"""(m, n, r) of small pairs: tall, wide, square of rank one, full rank."""


def factors(m, n, r, seed=0, dtype=torch.float32, zero=False):
    """(A, B); zero: B starts at 0 as adapters do."""
    A, B = weight((r, n), 2 * seed, dtype), weight((m, r), 2 * seed + 1, dtype)
    if zero:
        torch.nn.init.zeros_(B)
    return A, B


def pair_gradients(m, n, r, steps, seed=0, dtype=torch.float32):
    """[G_A, ...], [G_B, ...]."""
    return (
        gradients((r, n), steps, 2 * seed, dtype),
        gradients((m, r), steps, 2 * seed + 1, dtype),
    )


class LeastSquares:
    """0.5 |(W0 + s B A - target) X|^2 / columns, as the recorded trajectories have it."""

    def __init__(self, m=30, n=40, s=2.0, columns=60, seed=0, dtype=DOUBLE):
        draw = torch.Generator().manual_seed(seed)
        self.s = s
        self.X = torch.randn(n, columns, generator=draw, dtype=dtype)
        low = torch.randn(m, 3, generator=draw, dtype=dtype)
        self.target = low @ torch.randn(3, n, generator=draw, dtype=dtype)
        self.W0 = torch.zeros(m, n, dtype=dtype)

    @classmethod
    def recorded(cls, run):
        """The problem of a fixture."""
        made = cls(2, 2)
        made.s = run["settings"]["s"]
        for name in ("W0", "target", "X"):
            setattr(made, name, torch.tensor(run[name], dtype=DOUBLE))
        return made

    def W(self, A, B):
        return self.W0 + self.s * B @ A

    def residual(self, A, B):
        return (self.W(A, B) - self.target) @ self.X

    def loss(self, A, B):
        return float(0.5 * self.residual(A, B).square().sum() / self.X.shape[1])

    def G(self, A, B):
        """The full gradient."""
        return self.residual(A, B) @ self.X.mT / self.X.shape[1]

    def grads(self, A, B):
        """Those of A and B."""
        G = self.G(A, B)
        return self.s * B.mT @ G, self.s * G @ A.mT


def follow(optimizer, A, B, problem, steps):
    """Step on fresh gradients; [(A, B), ...] after each step."""
    out = []
    for _ in range(steps):
        A.grad, B.grad = (G.to(A.dtype) for G in problem.grads(A.detach(), B.detach()))
        optimizer.step()
        out.append((A.detach().clone(), B.detach().clone()))
    return out


def close(x, y, bound):
    torch.testing.assert_close(x, y, rtol=0, atol=bound)


def invertible(r, orthogonal=False, seed=3):
    """A change of basis of r directions; unless orthogonal, its condition number is 6."""
    draw = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(r, r, generator=draw, dtype=DOUBLE))
    V, _ = torch.linalg.qr(torch.randn(r, r, generator=draw, dtype=DOUBLE))
    return U if orthogonal else U @ torch.diag(torch.linspace(0.5, 3, r, dtype=DOUBLE)) @ V


def flat(pairs):
    """[A1, B1, A2, ...], or whatever else the tuples hold, in their order."""
    return [p for pair in pairs for p in pair]


def by_altlora(**settings):
    return lambda pairs, **kw: AltLoRA(
        pairs_to_groups(pairs, scale=2.0), **{"lr": 0.02, "weight_decay": 0.1, **settings, **kw}
    )


def by_adaprelora(**settings):
    return lambda pairs, **kw: AdaPreLoRA(
        pairs_to_groups(pairs, scale=2.0), **{"lr": 0.02, "weight_decay": 0.1, **settings, **kw}
    )


PAIRS = {
    "altlora": by_altlora(),
    "altlora-plus": by_altlora(second_moment="elementwise", max_rel_step=0.1),
    "altlora-alternate": by_altlora(schedule="alternate", switch_every=2),
    "altlora-compact": by_altlora(compact_alignment=True, delta_mode="relative", cautious=True),
    "altlora-reference": by_altlora(compat="reference"),
    "altlora-plus-reference": by_altlora(second_moment="elementwise", compat="reference"),
    "adaprelora": by_adaprelora(),
    "adaprelora-sgd": by_adaprelora(variant="sgd", max_rel_step=0.1),
    "adaprelora-adamw": by_adaprelora(variant="adamw", lr_ratio_b=2.0),
    "adaprelora-none": by_adaprelora(stats="none", cautious=True),
}
"""Makers of optimizers from [(A, B), ...]: one entry makes a method take part in test_pairs.py."""
