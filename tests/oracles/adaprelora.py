"""AdaPreLoRA once, naively: one pair, float64, dense matrices. What adaprelora.py is judged by."""

import torch


def inv(S, relative=0.0, absolute=0.0):
    """(S + damping)^-1, 0 for 0."""
    if not S.any():
        return torch.zeros_like(S)
    r = S.shape[0]
    delta = relative * float(S.trace()) / r + absolute
    return torch.linalg.inv(S + delta * torch.eye(r, dtype=S.dtype))


def dense_visible(A, B, GA, GB, s):
    """What both gradients show of G, as a dense m x n: by rows from G_B, and by columns from G_A.

    The two agree for gradients of one G.
    """
    m, n = B.shape[0], A.shape[1]
    KA, KB = inv(A @ A.T), inv(B.T @ B)
    PA, PB = A.T @ KA @ A, B @ KB @ B.T
    In, Im = torch.eye(n, dtype=A.dtype), torch.eye(m, dtype=A.dtype)
    zero = torch.zeros(m, n, dtype=A.dtype)
    if GA is None:
        only = GB @ KA @ A / s
        return only, only
    if GB is None:
        only = B @ KB @ GA / s
        return only, only
    left, right = B @ KB @ GA / s, GB @ KA @ A / s
    return zero + right + left @ (In - PA), zero + left + (Im - PB) @ right


def visible(A, B, GA, GB, s, rescale=True):
    """r2 (m,), c2 (n,)."""
    by_rows, by_columns = dense_visible(A, B, GA, GB, s)
    m, n, r = *by_rows.shape, A.shape[0]
    a = min(r, n) / n if A.any() and GB is not None else 0.0
    b = min(r, m) / m if B.any() and GA is not None else 0.0
    share = (a + b - a * b) if rescale and a + b > 0 else 1.0
    return by_rows.square().sum(1) / share, by_columns.square().sum(0) / share


class Metric:
    """L, R, and p, q from them."""

    def __init__(self, m, n, beta2, floor):
        self.L, self.R = torch.zeros(m, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        self.beta2, self.floor, self.t = beta2, floor, 0

    def take(self, r2, c2):
        m, n = len(self.L), len(self.R)
        self.t += 1
        self.L = self.beta2 * self.L + (1 - self.beta2) * r2 / n
        self.R = self.beta2 * self.R + (1 - self.beta2) * c2 / m
        if not self.L.any() or not self.R.any():
            return torch.ones_like(self.L), torch.ones_like(self.R)
        L, R = (x / (1 - self.beta2**self.t) for x in (self.L, self.R))
        p, q = (L / L.mean()).sqrt(), R.sqrt()
        return p.clamp(min=self.floor * float(p.max())), q.clamp(min=self.floor * float(q.max()))


def solution(A, B, MA, MB, p, q, s, eps_rel=0.0, eps=0.0):
    """The preconditioned steps (dA, dB); MA or MB None: the other factor alone."""
    KP = inv(B.T @ torch.diag(p) @ B, eps_rel, eps)
    KQ = inv(A @ torch.diag(q) @ A.T, eps_rel, eps)
    half = 0.5 if MA is not None and MB is not None else 0.0
    dA = dB = None
    if MA is not None:
        dA = KP @ MA @ torch.diag(1 / q) - half * KP @ (MA @ A.T) @ KQ @ A
        dA = dA / s**2
    if MB is not None:
        dB = torch.diag(1 / p) @ MB @ KQ - half * B @ KP @ (B.T @ MB) @ KQ
        dB = dB / s**2
    return dA, dB


class Adam:
    def __init__(self):
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, D, betas, eps=1e-8):
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * D
        self.v = betas[1] * self.v + (1 - betas[1]) * D * D
        corrected = self.v / (1 - betas[1] ** self.t)
        return self.m / (1 - betas[0] ** self.t) / (corrected.sqrt() + eps)


def adaprelora(
    A, B, grads, s=1.0, lr=1e-3, betas=(0.9, 0.99), eps_rel=1e-6, eps=0.0, variant="momentum",
    stats="tangent", weight_decay=0.0, floor=1e-3, rescale_visible=True, scale_aware=True,
    max_rel_step=None, steps=None,
):  # fmt: skip
    """(A, B) after each step; `grads` has (G_A, G_B), or is a function of (A, B), giving G too.

    "exact" needs the function.
    """
    A, B, out = A.double().clone(), B.double().clone(), []
    metric = Metric(B.shape[0], A.shape[1], betas[1], floor)
    M, clock, adams = [0.0, 0.0], [0, 0], (Adam(), Adam())
    for t in range(len(grads) if steps is None else steps):
        G = None
        if callable(grads):
            G = grads(A, B)
            pair = [s * B.T @ G, s * G @ A.T]
        else:
            pair = [None if g is None else g.double() for g in grads[t]]
        if pair[0] is None and pair[1] is None:
            out.append((A.clone(), B.clone()))
            continue
        p, q = torch.ones_like(metric.L), torch.ones_like(metric.R)
        if stats == "tangent":
            p, q = metric.take(*visible(A, B, *pair, s, rescale_visible))
        elif stats == "exact":
            p, q = metric.take(G.square().sum(1), G.square().sum(0))
        given = list(pair)
        if variant == "momentum":
            for i in (0, 1):
                if pair[i] is not None:
                    clock[i] += 1
                    M[i] = betas[0] * M[i] + (1 - betas[0]) * pair[i]
                    given[i] = M[i] / (1 - betas[0] ** clock[i])
        D = solution(A, B, *given, p, q, s, eps_rel, eps)
        new = []
        for W, d, adam in zip((A, B), D, adams, strict=True):
            if d is None:
                new.append(W)
                continue
            d = d if scale_aware else d * s**2
            step = lr * (adam(d, betas) if variant == "adamw" else d)
            if max_rel_step is not None and W.any():
                limit = max_rel_step * float(W.norm())
                step = step * min(1.0, limit / max(float(step.norm()), 1e-300))
            new.append((1 - lr * weight_decay) * W - step)
        A, B = new
        out.append((A.clone(), B.clone()))
    return out
