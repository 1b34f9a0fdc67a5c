"""SOAP in plain float64 formulas on one matrix: an independent statement of the methods."""

import math

import torch


def falling_eigenvectors(S):
    return torch.linalg.eigh(S)[1].flip(-1)


def power_step(S, Q, sort=True):
    """Q of S Q with columns sorted by falling diag(Q^T S Q), and the order of the columns."""
    P = S @ Q
    order = torch.argsort((Q * P).sum(0), descending=True) if sort else torch.arange(len(Q))
    return torch.linalg.qr(P[:, order])[0], order


class Side:
    """One side of a weight: its Gram matrix, its basis, and for KL its eigenvalues."""

    def __init__(self, size, on):
        self.on, self.Q = on, torch.eye(size, dtype=torch.float64)
        self.S = torch.zeros(size, size, dtype=torch.float64)
        self.e = torch.full((size,), 0.1, dtype=torch.float64)

    def start(self, S, Q=None):
        if self.on:
            self.S = S
            self.Q = falling_eigenvectors(S) if Q is None else Q

    def refresh(self, basis, sort):
        """The old basis, the order of columns before the power step; the basis moves."""
        old = self.Q
        if not self.on:
            return old, torch.arange(len(old))
        new, order = power_step(self.S, self.Q, sort)
        self.Q = falling_eigenvectors(self.S) if basis == "eigh" else new
        return old, order


def capped_rsqrt(x):
    return x.rsqrt().clamp(max=4000)


def add_grams(left, right, G, N, bs, factors):
    m, n = G.shape
    if factors == "gram":
        left.S = bs * left.S + (1 - bs) * G @ G.mT
        right.S = bs * right.S + (1 - bs) * G.mT @ G
        return
    one = torch.ones((), dtype=G.dtype)
    A = G @ right.Q * (capped_rsqrt(right.e) if right.on else one)
    B = (left.Q.mT @ G) * (capped_rsqrt(left.e)[:, None] if left.on else one)
    left.S = bs * left.S + (1 - bs) * A @ A.mT / n
    right.S = bs * right.S + (1 - bs) * B.mT @ B / m
    l, r = left.e, right.e
    if left.on and right.on:
        left.e = bs * l + (1 - bs) * (N * N / r).mean(1)
        right.e = bs * r + (1 - bs) * (N * N / l[:, None]).mean(0)


def carry(M, V, sides, basis, moments, sort):
    """Both moments in the new bases, which are found here."""
    (a, s), (b, d) = (side.refresh(basis, sort) for side in sides)
    C, D = sides[0].Q.mT @ a, sides[1].Q.mT @ b
    M = C @ M @ D.mT
    if moments == "rotate":
        for side, X in zip(sides, (C, D), strict=True):
            side.e = (X * X) @ side.e
        return M, (C * C) @ V @ (D * D).mT
    for side, order in zip(sides, (s, d), strict=True):
        side.e = side.e[order]
    return M, V[s][:, d]


def soap(
    W, grads, lr, betas=(0.95, 0.95), eps=1e-8, wd=0.01, bs=None, every=10, on=(True, True),
    factors="gram", basis="qr", moments="permute", correct_bias=True, normalize=False,
    reference=False, bases=(None, None), sort=True, write=None,
):  # fmt: skip
    """Weights after every gradient, and the state after the last."""
    W, (m, n) = W.clone(), W.shape
    b1, b2 = betas
    bs = b2 if bs is None else bs
    left, right = Side(m, on[0]), Side(n, on[1])
    M, V, out = torch.zeros_like(W), torch.zeros_like(W), []
    for t, G in enumerate(grads):
        if t == 0:
            weights = (1 / n, 1 / m) if factors == "kl" else (1 - bs, 1 - bs)
            left.start(weights[0] * G @ G.mT, bases[0])
            right.start(weights[1] * G.mT @ G, bases[1])
            out.append(W.clone())
            continue
        N = left.Q.mT @ G @ right.Q
        M = b1 * M + (1 - b1) * N
        V = b2 * V + (1 - b2) * N * N
        c1, c2 = (1 - b1**t, 1 - b2**t) if correct_bias else (1, 1)
        if reference:
            D = left.Q @ (M / (V.sqrt() + eps)) @ right.Q.mT * math.sqrt(c2) / c1
        else:
            D = left.Q @ (M / c1 / ((V / c2).sqrt() + eps)) @ right.Q.mT
        if normalize:
            D = D / D.square().mean().sqrt() * (math.sqrt(c2) / c1 if reference else 1)
        if write is not None:
            W = write(W, D, lr)
        elif reference:
            W = (W - lr * D) * (1 - lr * wd)
        else:
            W = W * (1 - lr * wd) - lr * D
        add_grams(left, right, G, N, bs, factors)
        if t % every == 0:
            M, V = carry(M, V, (left, right), basis, moments, sort)
        out.append(W.clone())
    return out, {"exp_avg": M, "exp_avg_sq": V, "left": left, "right": right}


def hyperball(W, D, lr):
    """The step of a fixed norm, on the sphere of W."""
    R = W.norm()
    W = W - lr * R * D / D.norm()
    return W * R / W.norm()


def preconditioned_momentum(
    grads, momentum=0.95, beta2=0.9, bs=0.9, eps=1e-8, every=1, bases=(None, None), nesterov=True,
    on=(True, True),
):  # fmt: skip
    """What SOAP-Muon hands to the polar step, after every gradient, of no fixed scale."""
    m, n = grads[0].shape
    left, right = Side(m, on[0]), Side(n, on[1])
    M = torch.zeros_like(grads[0])
    V, out = torch.zeros_like(M), []
    for t, G in enumerate(grads):
        M = momentum * M + (1 - momentum) * G
        U = (1 - momentum) * G + momentum * M if nesterov else M
        if t == 0:
            out.append(U)
            left.start((1 - bs) * G @ G.mT, bases[0])
            right.start((1 - bs) * G.mT @ G, bases[1])
            continue
        N = left.Q.mT @ U @ right.Q
        V = beta2 * V + (1 - beta2) * N * N
        out.append(left.Q @ (N / V.sqrt().clamp(min=eps)) @ right.Q.mT)
        add_grams(left, right, G, N, bs, "gram")
        if t % every == 0:
            _, V = carry(V, V, (left, right), "qr", "permute", True)
    return out
