"""FRUGAL once, naively: one matrix, float64, whole residuals. What frugal.py is judged by."""

import torch

from oracles.common import signs

COORDINATES = ("columns", "rows", "randk")


def down(G, split, choice):
    """The state-full part of G in its own coordinates."""
    if split == "columns":
        return G[:, choice]
    if split == "rows":
        return G[choice]
    if split == "randk":
        return G.flatten()[choice]
    if split == "block":
        return G if choice else G[:0]
    P, Q = choice
    G = G if P is None else P.T @ G
    return G if Q is None else G @ Q


def up(X, shape, split, choice):
    """Back among zeros."""
    if split == "block":
        return X if choice else torch.zeros(shape, dtype=X.dtype)
    if split not in COORDINATES:
        P, Q = choice
        X = X if P is None else P @ X
        return X if Q is None else X @ Q.T
    U = torch.zeros(shape, dtype=X.dtype)
    if split == "columns":
        U[:, choice] = X
    elif split == "rows":
        U[choice] = X
    else:
        U.view(-1)[choice] = X
    return U


def by_slot(k, split):
    """A number per coordinate, against the state-full part."""
    return k[:, None] if split == "rows" else k


def moved(X, split, old, new):
    """State of coordinates that stay, zeros where one enters."""
    out, dim = torch.zeros_like(X), 1 if split == "columns" and X.dim() == 2 else 0
    for j, entry in enumerate(new):
        if entry in old:
            out.select(dim, j).copy_(X.select(dim, old.index(entry)))
    return out


def rotated(X, old, new, square):
    """State in a new basis: M <- C M D^T, V <- (C*C) V (D*D)^T."""
    C, D = (None if a is None else b.T @ a for a, b in zip(old, new, strict=True))
    if square:
        C, D = (None if A is None else A * A for A in (C, D))
    X = X if C is None else C @ X
    return X if D is None else X @ D.T


def leading(G, rank, proj_type):
    """(P, Q) of the leading singular vectors; None for a side that is not projected."""
    m, n = G.shape
    right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}.get(proj_type)
    left, _, rows = torch.linalg.svd(G, full_matrices=False)
    P, Q = signs(left[:, :rank]), signs(rows[:rank].T)
    return P if right in (False, None) else None, Q if right in (True, None) else None


def frugal(
    W, grads, choices, split, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
    update_gap=200, state_free="sign_sgd", state_free_lr_scale=1.0, proj_lr_scale=1.0,
    reset="all", inner="adamw", whole=lambda step: False,
):  # fmt: skip
    """Weights after every step, and the last state (M, V, k).

    `choices` has one entry per window: numbers of columns, rows or entries, a pair of bases, or
    whether the block is active. Where `whole(step)` holds the residual is exactly 0.
    """
    W, out, (b1, b2) = W.double().clone(), [], betas
    shape, M, V, k, old = W.shape, None, None, None, None
    for step, G in enumerate(grads):
        G, choice = G.double(), choices[step // update_gap]
        g = down(G, split, choice)
        if step % update_gap == 0:
            fresh = M is None or reset == "all" or (split == "block" and not (choice and old))
            if fresh:
                M, V = torch.zeros_like(g), torch.zeros_like(g)
                k = torch.zeros(len(choice) if split in COORDINATES else ()).double()
            elif reset == "changed" and split in COORDINATES:
                M, V = (moved(X, split, old, choice) for X in (M, V))
                k = moved(k, "randk", old, choice)
            elif reset == "changed" and split != "block":
                M, V = rotated(M, old, choice, False), rotated(V, old, choice, True)
            old = choice
        k = k + 1
        W = (1 - lr * weight_decay) * W
        if inner == "adamw":
            M, V = b1 * M + (1 - b1) * g, b2 * V + (1 - b2) * g * g
            c1, c2 = (1 - b ** by_slot(k, split) for b in betas)
            N = (M / c1) / ((V / c2).sqrt() + eps)
        elif inner == "lion":
            N = torch.sign(b1 * M + (1 - b1) * g)
            M = b2 * M + (1 - b2) * g
        else:
            M = b1 * M + g
            N = M
        rest = G - up(g, shape, split, choice)
        rest = torch.zeros_like(rest) if whole(step) or state_free == "no" else rest
        rest = torch.sign(rest) if state_free == "sign_sgd" else rest
        step_ = up(N, shape, split, choice) + state_free_lr_scale * rest
        W = W - lr * proj_lr_scale * step_
        out.append(W.clone())
    return out, (M, V, k)
