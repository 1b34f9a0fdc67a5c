"""Fira once, naively: one matrix, float64, two lifts, no sharing. What fira.py is judged by."""

import math

import torch

from oracles.common import signs

TINY = 1e-8


def side(shape, proj_type):
    """Whether the right side is projected; None for both."""
    m, n = shape
    return {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}.get(proj_type)


def basis_of(G, rank, proj_type):
    """(P, Q) of the leading singular vectors; None for a side that is not projected."""
    left, _, rows = torch.linalg.svd(G, full_matrices=False)
    P, Q, right = signs(left[:, :rank]), signs(rows[:rank].T), side(G.shape, proj_type)
    return P if right in (False, None) else None, Q if right in (True, None) else None


def lift(R, P, Q):
    """The full matrix of coordinates R."""
    R = R if P is None else P @ R
    return R if Q is None else R @ Q.T


def factors(N, R, G, right, scaling, guards):
    """The sizes of Adam's direction over those of the gradient, per column or for the matrix.

    With guards no factor times G has more than 3 times the root mean square of N, and no column of
    G times its factor is longer than 96 of them.
    """

    def limited(n, of_n, r, g, of_g, columns):
        rms = n / of_n**0.5
        tops = (n / r, 3 * rms * of_g**0.5 / g, 96 * rms / columns)
        tops = torch.broadcast_tensors(*(torch.nan_to_num(x, nan=0.0) for x in tops))
        return torch.stack(tops).amin(0)

    dim, both = 1 if right else 0, right is None
    whole = N.norm() / (R.norm() + TINY)
    columns = G.norm(dim=dim, keepdim=True)
    if guards:
        longest = columns.max() if both else columns
        whole = limited(N.norm(), N.numel(), R.norm(), G.norm(), G.numel(), longest)
        if R.norm() <= 1e-6 * G.norm():
            whole = torch.zeros_like(whole)
    if scaling == "matrix" or both:
        return whole
    n, r = N.norm(dim=dim, keepdim=True), R.norm(dim=dim, keepdim=True)
    if not guards:
        return n / (r + TINY)
    phi = limited(n, N.shape[dim], r, columns, G.shape[dim], columns)
    return torch.where(r <= TINY * R.norm(), whole, phi)


def fira(
    W, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128,
    update_proj_gap=200, alpha=0.25, proj_type="std", variant="reference", scaling="column",
    limiter=True, gamma=1.01, limiter_floor=1e-8, correct_bias=True, compat=None, bases=None,
):  # fmt: skip
    """The weights and what happened to the residual, step by step.

    `bases` replaces the SVDs, as (P, Q). Each entry has W, P, Q, the residual before and after the
    limiter, its factor L, the stored norm, phi, and R.
    """
    W, M, V, stored, out = W.double().clone(), None, None, None, []
    exact, right = compat == "reference", side(W.shape, proj_type)
    for step, G in enumerate(grads):
        G = G.double()
        if step % update_proj_gap == 0:
            P, Q = basis_of(G, rank, proj_type) if bases is None else bases[step // update_proj_gap]
        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        M = (1 - betas[0]) * R + (0 if M is None else betas[0] * M)
        V = (1 - betas[1]) * R * R + (0 if V is None else betas[1] * V)
        c1, c2 = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
        c = math.sqrt(c2) / c1
        # eps belongs on the root that is corrected, in the published code on the one that is not
        psi = M / (V.sqrt() + eps) if exact else M / (V.sqrt() + eps * math.sqrt(c2))
        c = c if correct_bias else 1.0
        N = c * psi if variant == "paper" else psi
        phi = factors(N, R, G, right, scaling, not exact)
        a = 1.0 if variant == "paper" else alpha
        before = phi * (G - a * lift(R, P, Q))
        norm, L = float(before.norm()), 1.0
        if limiter:
            if stored is not None and (exact or stored > limiter_floor):
                L = max(norm / (stored + TINY), gamma) / gamma
            stored = norm / L
        S = before / L
        size = lr * alpha if variant == "paper" else lr * c
        U = lift(N, P, Q) + S if variant == "paper" else alpha * lift(N, P, Q) + S
        if exact:
            W = (1 - lr * weight_decay) * (W - size * U)
        else:
            W = (1 - lr * weight_decay) * W - size * U
        out.append({"W": W, "P": P, "Q": Q, "before": before, "S": S, "L": L, "stored": stored,
                    "phi": phi, "R": R})  # fmt: skip
    return out
