"""ARO in plain loops on one float64 matrix: an independent statement of the method."""

import math

import torch


def sinkhorn(X, iterations=5):
    """Rows to norm sqrt(n), then columns to norm sqrt(m), one by one."""
    X = X.clone()
    m, n = X.shape
    for _ in range(iterations):
        for i in range(m):
            X[i] *= math.sqrt(n) / max(float(X[i].norm()), 1e-300)
        for j in range(n):
            X[:, j] *= math.sqrt(m) / max(float(X[:, j].norm()), 1e-300)
    return X


def row_norm(X):
    return torch.stack([x * math.sqrt(len(x)) / max(float(x.norm()), 1e-300) for x in X])


MAPS = {"sinkhorn": sinkhorn, "row_norm": row_norm, "sign": torch.sign}


def gram_schmidt(A):
    """Q of A = Q T, T with a positive diagonal: twice is enough."""
    Q = torch.zeros_like(A)
    for j in range(A.shape[1]):
        a = A[:, j].clone()
        for _ in range(2):
            for i in range(j):
                a -= (Q[:, i] @ a) * Q[:, i]
        Q[:, j] = a / a.norm()
    return Q


def polar(A):
    U, _, Vh = torch.linalg.svd(A)
    return U @ Vh


FACTORS = {"qr": gram_schmidt, "polar": polar}


def objective(M, R, f):
    """<M, R f(R^T M)>."""
    return float((M * (R @ f(R.mT @ M))).sum())


def aro(
    W, grads, lr, momentum, wd, base, rotation="qr", every=1, rms=0.2, nesterov=False, beta2=0.95,
    eps=1e-8,
):  # fmt: skip
    """Weights and rotations after every step."""
    W, m = W.clone(), W.shape[0]
    M, V, R = torch.zeros_like(W), torch.zeros_like(W), torch.eye(m, dtype=W.dtype)
    out = []
    for t, G in enumerate(grads):
        M = momentum * M + (1 - momentum) * G
        U = momentum * M + (1 - momentum) * G if nesterov else M
        if rotation != "none" and t % every == 0:
            X = R.mT @ U
            if base == "adam":
                F = X / ((beta2 * V + (1 - beta2) * X * X).sqrt() + eps)
            else:
                F = MAPS[base](X)
            R = FACTORS[rotation](U @ F.mT)
        X = R.mT @ U
        if base == "adam":
            V = beta2 * V + (1 - beta2) * X * X
            D = R @ (X / (V.sqrt() + eps))
        else:
            D = R @ MAPS[base](X)
        if rms is not None:
            D = D * rms / float(D.square().mean().sqrt())
        W = W * (1 - lr * wd) - lr * D
        out.append((W.clone(), R.clone()))
    return out


def one_sided_soap(W, grads, lr, gram_beta, beta2, eps=1e-8):
    """SOAP on the rows with beta1 = 0: Adam of Q^T G, Q the eigenvectors of an average of G G^T."""
    W, L, V = W.clone(), torch.zeros(len(W), len(W), dtype=W.dtype), torch.zeros_like(W)
    out = []
    for G in grads:
        L = gram_beta * L + (1 - gram_beta) * G @ G.mT
        Q = torch.linalg.eigh(L)[1].flip(-1)
        X = Q.mT @ G
        V = beta2 * V + (1 - beta2) * X * X
        W = W - lr * Q @ (X / (V.sqrt() + eps))
        out.append(W.clone())
    return out
