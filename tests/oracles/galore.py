"""GaLore once, naively: one matrix, float64. What galore.py is judged by."""

import math

import torch

from oracles.common import signs


def galore(
    W, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128,
    update_proj_gap=200, scale=0.25, proj_type="std", moments="keep", reference=False, bases=None,
):  # fmt: skip
    """GaLore, torch's Adam order or the published one; `bases` replaces the SVDs, as (P, Q)."""
    W, M, V, out, P, Q, clock = W.double().clone(), None, None, [], None, None, 0
    m, n = W.shape
    right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}.get(proj_type)
    for step, G in enumerate(grads):
        G = G.double()
        if step % update_proj_gap == 0:
            old = (P, Q)
            if bases is not None:
                P, Q = bases[step // update_proj_gap]
            else:
                left, _, rows = torch.linalg.svd(G, full_matrices=False)
                P, Q = signs(left[:, :rank]), signs(rows[:rank].T)
            if right is not None:
                P, Q = (None, Q) if right else (P, None)
            if moments == "reset":
                M, V, clock = None, None, 0
            if moments == "rotate" and M is not None:
                C = torch.eye(M.shape[0]).double() if P is None else P.T @ old[0]
                D = torch.eye(M.shape[1]).double() if Q is None else Q.T @ old[1]
                M, V = C @ M @ D.T, (C * C) @ V @ (D * D).T
        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        clock += 1
        M = (1 - betas[0]) * R + (0 if M is None else betas[0] * M)
        V = (1 - betas[1]) * R * R + (0 if V is None else betas[1] * V)
        c1, c2 = 1 - betas[0] ** clock, 1 - betas[1] ** clock
        if reference:
            N = M / (V.sqrt() + eps) * math.sqrt(c2) / c1
        else:
            N = (M / c1) / ((V / c2).sqrt() + eps)
        N = N if P is None else P @ N
        N = N if Q is None else N @ Q.T
        if not reference:
            W = (1 - lr * weight_decay) * W
        W = W - lr * scale * N
        if reference:
            W = (1 - lr * weight_decay) * W
        out.append(W.clone())
    return out
