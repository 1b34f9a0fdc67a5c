"""DCT-AdamW once, naively: one matrix, float64, feedback as the published code keeps it."""

import math

import numpy as np

from oracles.projectors import choose, cosine_matrix


def quantised(row, bits):
    """What is left of one row of numbers after coding and decoding, and half a step."""
    low, high, most = min(row), max(row), 2**bits - 1
    if low == high:
        return list(row), 0.0
    u = (high - low) / most
    codes = [min(max(math.floor((x - low) / u + 0.5), 0), most) for x in row]
    return [low + q * u for q in codes], u / 2


def scores(S, norm):
    return [sum(abs(x) if norm == "l1" else x * x for x in row) for row in S.tolist()]


def dctadamw(
    W, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128, update_proj_gap=1,
    norm="l1", moments="match", error_feedback=None, bias_correction="age", basis="dct2",
    side="auto",
):  # fmt: skip
    """Weights after every step, then (sets, E) after every step: E is not transformed."""
    W = np.asarray(W, dtype=np.float64)
    right = W.shape[0] >= W.shape[1] if side == "auto" else side == "right"
    W = W.T if right else W
    m, n = W.shape
    r, C = min(rank, m), cosine_matrix(m)
    D = C if basis == "dct3" else C.T
    E, I, rows = np.zeros((m, n)), None, {}
    weights, notes = [], []
    for t, G in enumerate(grads, 1):
        G = np.asarray(G, dtype=np.float64)
        A = (G.T if right else G) + E
        if t == 1 or t % update_proj_gap == 0:
            old, I = I, choose(scores(D.T @ A, norm), r)
            fresh = {i: (np.zeros(n), np.zeros(n), 0) for i in I}
            if old is None or moments == "reset":
                rows = fresh
            elif moments == "slot":
                rows = {new: rows[was] for was, new in zip(old, I, strict=True)}
            elif moments == "match" or 2 * len(set(old) & set(I)) >= r:
                rows = {i: rows.get(i, fresh[i]) for i in I}
            else:
                rows = fresh
        a = D[:, I].T @ A
        if error_feedback == "full":
            E = A - D[:, I] @ a
        N = np.zeros((r, n))
        for b, i in enumerate(I):
            M, V, age = rows[i]
            M = betas[0] * M + (1 - betas[0]) * a[b]
            V = betas[1] * V + (1 - betas[1]) * a[b] ** 2
            rows[i] = (M, V, age + 1)
            clock = age + 1 if bias_correction == "age" else t
            c1, c2 = (1 - beta**clock for beta in betas)
            N[b] = (M / c1) / (np.sqrt(V / c2) + eps)
        W = (1 - lr * weight_decay) * W - lr * D[:, I] @ N
        weights.append(W.T if right else W)
        notes.append((I, E.T if right else E))
    return weights, notes
