"""Muon and its variants for one matrix in float64, in plain loops, with any polar factor."""

import math

import torch

from oracles.common import polar


def muon(
    W,
    grads,
    *,
    lr=0.02,
    weight_decay=0.1,
    mu=0.95,
    nesterov=True,
    kind="ema",
    second_moment=None,
    beta2=0.95,
    cautious=False,
    decay_power=1,
    clip=None,
    normalize=False,
    spike=None,
    factor=polar,
    scale="rms",
):
    """The weight after each step; lr may be a list."""
    W = W.double().clone()
    m, n = W.shape
    ratio = 0.2 * math.sqrt(max(m, n)) if scale == "rms" else math.sqrt(max(1, m / n))
    B, V, rows, average = torch.zeros_like(W), torch.zeros_like(W), [0.0] * m, None
    out = []
    for t, G in enumerate(grads):
        G, eta = G.double(), lr[t] if isinstance(lr, list) else lr
        norm = math.sqrt(float((G**2).sum()))
        if normalize and norm > 0:
            G, norm = G / norm, 1.0
        if clip is not None and norm > clip * math.sqrt(m * n):
            G = G * (clip * math.sqrt(m * n) / norm)
            norm = clip * math.sqrt(m * n)
        if spike is not None:
            if average is None:
                average = norm
            else:
                if norm > spike * average:
                    G, norm = G * (spike * average / norm), spike * average
                average = 0.9 * average + 0.1 * norm
        if kind == "sum":
            B = mu * B + G
            U = G + mu * B if nesterov else B
        else:
            B = mu * B + (1 - mu) * G
            U = (1 - mu) * G + mu * B if nesterov else B
        if second_moment == "adamuon":
            O = factor(U.sign())
            V = beta2 * V + (1 - beta2) * O**2
            O = O / (V.sqrt() + 1e-8)
            step = O * (0.2 * math.sqrt(m * n) / O.norm())
        else:
            O = factor(U)
            if second_moment == "normuon":
                before = O.norm()
                O = O.clone()
                for i in range(m):
                    rows[i] = beta2 * rows[i] + (1 - beta2) * float((O[i] ** 2).mean())
                    O[i] = O[i] / (math.sqrt(rows[i]) + 1e-10)
                O = O * (before / O.norm())
            step = ratio * O
        keep = torch.full_like(W, 1 - eta**decay_power * weight_decay)
        if cautious:
            keep[step * W < 0] = 1.0
        W = keep * W - eta * step
        out.append(W.clone())
    return out
