"""AuON in float64, from the paper's formula: mean of cosh^2 and all."""

import math

import torch

E1, E2 = 1e-7, 1e-8  # the published constants
TINY = torch.finfo(torch.float64).tiny
QUINTIC = (3.4445, -4.7750, 2.0315)


def crms(Y):
    """Root mean square of cosh over all entries, the mean in plain loops where they are few."""
    if Y.numel() > 1000:
        return float(Y.cosh().square().mean().sqrt())
    entries = [math.cosh(float(y)) ** 2 for y in Y.flatten()]
    return math.sqrt(math.fsum(entries) / len(entries))


def newton_schulz(X, steps):
    """Steps of the quintic on X, which is not divided by anything."""
    a, b, c = QUINTIC
    Y = X.T if X.shape[0] > X.shape[1] else X
    for _ in range(steps):
        A = Y @ Y.T
        Y = a * Y + (b * A + c * A @ A) @ Y
    return Y.T if X.shape[0] > X.shape[1] else Y


def scale(name, shape):
    """What multiplies U, of norm 1 / r."""
    m, n = shape
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(m * n)
    return math.sqrt(max(1, m / n)) if name == "aspect" else 1.0


def direction(
    V, variant="paper", gamma=None, ns_steps=0, adjust="match_rms_adamw", init="fro", eps=None
):
    """What is multiplied by lr, for a matrix V."""
    gamma = gamma or (1.0 if variant == "paper" else 1.5)
    if eps is None:
        eps = TINY if variant == "paper" else E1
    X = V / (V.norm() + eps)
    if not ns_steps:
        U = X if variant == "paper" else V
        s = scale(adjust, V.shape) if variant == "paper" else 1.0
        return s * U / (crms(gamma * X) + E2)
    if init == "spectral-bound":
        short = X if X.shape[0] <= X.shape[1] else X.T
        X = X / max(float((short @ short.T).abs().sum(1).max()) ** 0.5, 1e-30)
    Y = newton_schulz(X, ns_steps)
    if variant == "repo2026":
        return Y / (crms(gamma * Y / (Y.norm() + eps)) + E2)
    if adjust == "match_rms_adamw":
        return scale(adjust, V.shape) * Y / (Y.norm() + eps)
    return scale(adjust, V.shape) * Y / (crms(gamma * Y) + E2)


def auon(W, grads, lr=1e-3, momentum=0.95, nesterov=True, wd=0.0, **options):
    """Weights after every step."""
    W, M, out = W.double().clone(), torch.zeros_like(W, dtype=torch.float64), []
    for G in grads:
        G = G.double()
        M = momentum * M + (1 - momentum) * G
        V = (1 - momentum) * G + momentum * M if nesterov else M
        W = W * (1 - lr * wd)
        W = W - lr * direction(V, **options)
        out.append(W.clone())
    return out
