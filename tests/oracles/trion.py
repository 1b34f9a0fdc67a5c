"""Trion in float64, in plain loops over the columns of a tall matrix."""

import math

import torch


def cosines(n, basis="dct2"):
    """D, whose columns are the basis vectors."""
    C = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        for j in range(n):
            s = math.sqrt((1 if k == 0 else 2) / n)
            C[k, j] = s * math.cos(math.pi * k * (2 * j + 1) / (2 * n))
    return C.T if basis == "dct2" else C


def ns5(X, steps=5):
    """The quintic of Muon on X / ||X||_F."""
    if X.norm() == 0:
        return X
    Y = X.T if X.shape[0] > X.shape[1] else X
    Y = Y / Y.norm()
    for _ in range(steps):
        A = Y @ Y.T
        Y = 3.4445 * Y + (-4.7750 * A + 2.0315 * A @ A) @ Y
    return Y.T if X.shape[0] > X.shape[1] else Y


def exact(X):
    """The polar factor on the range of X."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    keep = s > 1e-12 * s.max()
    return U[:, keep] @ Vh[keep]


def ratio(name, R, C, r):
    """What multiplies lr."""
    if name == "kj":
        return math.sqrt(max(1, R / C))
    if name == "dion":
        return math.sqrt(R / C)
    if name == "kimi":
        return 0.2 * math.sqrt(max(R, C))
    return 1.0 if name == "none" else 0.2 * math.sqrt(R * C / r)


def chosen(S, r, norm="l1"):
    """The r columns of S of largest score, of equal ones the first, in ascending order."""
    power = 1 if norm == "l1" else 2
    scores = [sum(abs(float(x)) ** power for x in S[:, j]) for j in range(S.shape[1])]
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:r])


def step(M, G, r, mu=0.95, norm="l1", basis="dct2", factor=ns5):
    """The new M, I, the small factor O and U = O D_I^T, for rows >= columns."""
    D = cosines(G.shape[1], basis)
    M = M + G
    S = M @ D
    index = chosen(S, r, norm)
    a = S[:, index]
    M = M - (1 - mu) * a @ D[:, index].T
    O = factor(a)
    return M, index, O, O @ D[:, index].T


def trion(W, grads, r, lr, mu=0.95, wd=0.0, scale="rms", norm="l1", basis="dct2", factor=ns5):
    """Per step: weight, momentum, indices, small factor and the step's direction U."""
    W, M, out = W.double().clone(), torch.zeros_like(W, dtype=torch.float64), []
    R, C = W.shape
    for G in grads:
        G, wide = G.double(), R < C
        if wide:
            M, index, O, U = step(M.T, G.T, r, mu, norm, basis, factor)
            M, O, U = M.T, O.T, U.T
        else:
            M, index, O, U = step(M, G, r, mu, norm, basis, factor)
        W = W * (1 - lr * wd)
        W = W - lr * ratio(scale, R, C, r) * U
        out.append({"W": W, "M": M, "index": index, "O": O, "U": U})
    return out
