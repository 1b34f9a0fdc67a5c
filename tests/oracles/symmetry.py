"""Row norm, spectral and hybrid steps in float64, in plain loops."""

import math

import torch

from oracles.common import polar


def centred(X):
    """X less the mean of its rows."""
    m = len(X)
    mean = [math.fsum(float(X[i, j]) for i in range(m)) / m for j in range(X.shape[1])]
    return X - torch.tensor(mean, dtype=X.dtype)


def row_norm(X, mode="inverse_eps", eps=1e-8):
    """Rows at length one, in each of the forms."""
    sizes = [math.sqrt(math.fsum(float(x) ** 2 for x in row)) for row in X]
    rms = math.sqrt(math.fsum(s * s for s in sizes) / len(sizes))
    out = X.clone()
    for i, s in enumerate(sizes):
        if mode == "relative":
            by = s + 1e-2 * rms
        else:
            by = s + eps if mode == "inverse_eps" else max(s, eps)
        out[i] = X[i] / by if by > 0 else 0.0
    return out


def nuclear(X, U, alpha, eps=1e-8):
    """U times the nuclear norm of X to this power."""
    return max(float((X * U).sum()), eps) ** alpha * U if alpha else U


def hybrid(X, order="row_then_polar", alpha=0.0, centre=False, mode="inverse_eps", eps=1e-8):
    """Both orders."""
    c = centred if centre else lambda Y: Y
    X = c(X)
    if order == "polar_then_row":
        return c(row_norm(nuclear(X, polar(X), alpha, eps), mode, eps))
    Y = c(row_norm(X, mode, eps))
    return c(nuclear(Y, polar(Y), alpha, eps))


def update(kind, X, alpha=0.0, centre=False, eps=1e-8, **options):
    """U of a momentum X whose rows are what counts as rows."""
    if kind == "hybrid":
        return hybrid(X, alpha=alpha, centre=centre, eps=eps, **options)
    c = centred if centre else lambda Y: Y
    X = c(X)
    if kind == "rownorm":
        return c(row_norm(X, eps=eps, **options))
    return c(nuclear(X, polar(X), alpha, eps))


def matched(U, target=0.2):
    """U with this root mean square over the rows that are not zero."""
    rows = [i for i in range(len(U)) if float(U[i].abs().max()) > 0]
    if not rows:
        return U
    squares = math.fsum(float(x) ** 2 for i in rows for x in U[i])
    return U * target / math.sqrt(squares / (len(rows) * U.shape[1]))


def nominal(kind, U, centre):
    """What the RMS is matched with: row norm without centring has rows of length one by name."""
    return U * (0.2 * math.sqrt(U.shape[1])) if kind == "rownorm" and not centre else matched(U)


def run(kind, W, grads, lr, mu=0.95, wd=0.0, axis="rows", match=True, **options):
    """Weights after each step of one matrix."""
    W = W.double().clone()
    M, out = torch.zeros_like(W), []
    for G in grads:
        M = mu * M + (1 - mu) * G.double()
        X = M.T if axis == "cols" else M
        U = update(kind, X, **options)
        if match:
            U = nominal(kind, U, options.get("centre", False))
        W = (1 - lr * wd) * W - lr * (U.T if axis == "cols" else U)
        out.append(W.clone())
    return out
