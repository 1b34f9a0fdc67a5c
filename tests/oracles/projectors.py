"""Naive float64 versions of the projectors and moments, one matrix at a time, nothing shared."""

import math

import numpy as np


def top_vectors(G, r):
    """G (m, n) -> U (m, r), V (n, r), sigma (all): signed so that largest entries are positive."""
    U, sigma, Vh = np.linalg.svd(np.asarray(G, dtype=np.float64), full_matrices=False)
    return signed(U[:, :r]), signed(Vh[:r].T), sigma


def signed(P):
    P = np.array(P, dtype=np.float64)
    for j in range(P.shape[1]):
        best = 0
        for i in range(P.shape[0]):
            if abs(P[i, j]) > abs(P[best, j]):
                best = i
        if P[best, j] < 0:
            P[:, j] = -P[:, j]
    return P


def adam(grads, beta1, beta2, eps, reference=False):
    """Lists of (r, n) gradients -> the direction after each, and both moments at the end.

    ``reference`` adds eps to the uncorrected root and corrects the quotient afterwards.
    """
    shape = np.shape(grads[0])
    M, V, directions = np.zeros(shape), np.zeros(shape), []
    for t, grad in enumerate(grads, start=1):
        N = np.zeros(shape)
        for i, g in np.ndenumerate(np.asarray(grad, dtype=np.float64)):
            M[i] = beta1 * M[i] + (1 - beta1) * g
            V[i] = beta2 * V[i] + (1 - beta2) * g * g
            c1, c2 = 1 - beta1**t, 1 - beta2**t
            if reference:
                N[i] = M[i] / (math.sqrt(V[i]) + eps) * (math.sqrt(c2) / c1)
            else:
                N[i] = (M[i] / c1) / (math.sqrt(V[i] / c2) + eps)
        directions.append(N)
    return directions, M, V


def rotated(M, V, P_old, P_new):
    """Moments (r, n) of the old basis (d, r) in the new one, coordinate by coordinate."""
    r, n = np.shape(M)
    new_M, new_V = np.zeros((r, n)), np.zeros((r, n))
    for i in range(r):
        for j in range(r):
            c = sum(P_new[k][i] * P_old[k][j] for k in range(len(P_old)))
            for x in range(n):
                new_M[i, x] += c * M[j][x]
                new_V[i, x] += c * c * V[j][x]
    return new_M, new_V


def ldadam(M, V, P_old, P_new, t, beta1, beta2):
    """LDAdam's moments (r, n) in the new basis, entry by entry; t updates are behind them."""
    r, n = np.shape(M)
    new_M, new_V = np.zeros((r, n)), np.zeros((r, n))
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    for i in range(r):
        for x in range(n):
            mean = variance = 0.0
            for j in range(r):
                c = sum(P_new[k][i] * P_old[k][j] for k in range(len(P_old)))
                m, v = M[j][x] / c1, V[j][x] / c2
                mean += c * m
                variance += c * c * (v - m * m)
            new_M[i, x] = c1 * mean
            new_V[i, x] = c2 * abs(variance + mean * mean)
    return new_M, new_V


def cosine_matrix(n):
    """The orthonormal DCT-II, one entry at a time."""
    C = np.zeros((n, n))
    for k in range(n):
        for j in range(n):
            scale = math.sqrt((1 if k == 0 else 2) / n)
            C[k, j] = scale * math.cos(math.pi * k * (2 * j + 1) / (2 * n))
    return C


def choose(scores, r):
    """Numbers of the r largest scores, the lowest number first among equals, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:r])


def power_step(G, P):
    """orth(G G^T P) for one matrix."""
    G = np.asarray(G, dtype=np.float64)
    return np.linalg.qr(G @ (G.T @ np.asarray(P, dtype=np.float64)))[0]
