"""APOLLO once, naively: one matrix, float64, column by column. What apollo.py is judged by."""

import math

import torch

TINY = 1e-8


def norm(x):
    """The length of a vector, by a loop."""
    return math.sqrt(sum(float(v) ** 2 for v in x))


def factor(n, r, g, rms, gain, rows, exact):
    """The length of Adam's direction over that of what it saw, for a column or the matrix.

    Unless exact, the factor times g has at most 3 times the root mean square of the direction, in
    the units of an orthonormal projection.
    """
    top = n / (r + TINY)
    return top if exact or g == 0 else min(top, 3 * rms * math.sqrt(rows) / (math.sqrt(gain) * g))


def factors(N, R, G, scaling, gain, exact):
    """One factor for each column of G."""
    r, n = N.shape
    m = G.shape[0]
    lengths = [[norm(X[:, j]) for j in range(n)] for X in (N, R, G)]
    of_N, of_R, of_G = (norm(x) for x in lengths)
    is_noise = not exact and of_R <= 1e-6 * of_G
    if scaling in ("tensor", "matrix"):
        phi = factor(of_N, of_R, of_G, of_N / math.sqrt(r * n), gain, m * n, exact)
        return [0.0 if is_noise else phi] * n
    out = []
    for a, b, g in zip(*lengths, strict=True):
        if not exact and b <= TINY * of_R:  # takes the means of all columns for its own
            a, b = 0.0 if is_noise else of_N / math.sqrt(n), of_R / math.sqrt(n)
        out.append(factor(a, b, g, a / math.sqrt(r), gain, m, exact))
    return out


def is_transposed(shape, proj_type):
    """Whether the columns are projected."""
    m, n = shape
    return {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[proj_type]


def apollo(
    W, grads, bases, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, update_proj_gap=200,
    scaling="channel", projection="random", scale=1.0, scale_front=False, proj_type="std",
    limiter=True, gamma=1.01, limiter_floor=1e-8, correct_bias=True, compat=None, rank=None,
    moments="keep",
):  # fmt: skip
    """The weights, factors and stored norms after every step.

    `bases` has a P for every window, (m, r) for the matrix whose rows are projected.
    """
    right, exact = is_transposed(W.shape, proj_type), compat == "reference"
    W = W.double().mT.clone() if right else W.double().clone()
    M = V = 0.0
    stored, out, since = None, [], 0
    for step, G in enumerate(grads):
        G = G.double().mT if right else G.double()
        P = bases[step // update_proj_gap].double()
        if moments == "reset" and step % update_proj_gap == 0:
            M, V, since = 0.0, 0.0, step
        R = P.mT @ G
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R * R
        t = step - since + 1
        c = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct_bias else 1.0
        # eps belongs on the root that is corrected, in the published code on the one that is not
        N = M / (V.sqrt() + (eps if exact else eps * math.sqrt(1 - betas[1] ** t)))
        m, r = P.shape
        gain = m / r if projection == "gaussian" else 1.0
        phi = torch.tensor(factors(N, R, G, scaling, gain, exact), dtype=torch.float64)
        root = math.sqrt(gain if scale == "auto" else scale)
        S = phi * G * (root if scale_front else 1.0)
        size, L = norm(S.flatten()), 1.0
        if limiter:
            if stored is not None and (exact or stored > limiter_floor):
                L = max(size / (stored + TINY), gamma) / gamma
            stored = size / L
        S = S / L * (1.0 if scale_front else root)
        if exact:
            W = (1 - lr * weight_decay) * (W - lr * c * S)
        else:
            W = (1 - lr * weight_decay) * W - lr * c * S
        out.append({"W": W.mT if right else W, "phi": phi, "stored": stored, "L": L})
    return out
