"""AltLoRA once, naively: one pair, float64, dense solves. What altlora.py is judged by."""

import torch


def inverse(S, delta, mode):
    r = S.shape[0]
    delta = delta * float(S.trace()) / r if mode == "relative" else delta
    return torch.linalg.inv(S + delta * torch.eye(r, dtype=S.dtype))


class Half:
    """What one factor keeps, in the letters of A: X is the other factor, tall."""

    def __init__(self):
        self.M = self.V = self.X = None
        self.t = 0

    def step(self, W, G, X, *, lr, s, betas, delta, mode, plus, eps, weight_decay, published, cap):
        """The new factor."""
        S = X.T @ X
        first = W if published else (1 - lr * weight_decay) * W
        if not published and not S.any():
            return first
        K = inverse(S, delta, mode)
        Z = K @ G / (1.0 if published else s * s)
        carried = torch.zeros_like(Z)
        if self.M is not None:
            moved = published or not torch.equal(self.X, X)
            carried = K @ X.T @ self.X @ self.M if moved else self.M
        self.t += 1
        M = betas[0] * carried + (1 - betas[0]) * Z
        U = M / (1 - betas[0] ** self.t)
        stored = M
        if plus:
            self.V = (1 - betas[1]) * Z * Z + (0 if self.V is None else betas[1] * self.V)
            corrected = self.V if published else self.V / (1 - betas[1] ** self.t)
            U = U / (corrected.sqrt() + eps)
            if published:
                stored = (0 if self.M is None else betas[0] * self.M) + (1 - betas[0]) * Z
        self.M, self.X = stored, X.clone()
        step = lr * U
        if cap is not None and W.norm() > 0 and step.norm() > cap * W.norm():
            step = step * (cap * W.norm() / step.norm())
        new = first - step
        return (1 - lr * weight_decay) * new if published else new


def altlora(
    A, B, grads, s=1.0, lr=1e-3, betas=(0.9, 0.999), delta=1e-5, schedule="both", switch_every=1,
    first="B", second_moment=None, weight_decay=0.0, compat=None, eps=None, delta_mode="absolute",
    max_rel_step=None,
):  # fmt: skip
    """(A, B) after each step; `grads` has (G_A, G_B), or asks: a function of (A, B)."""
    A, B, halves, out = A.double().clone(), B.double().clone(), (Half(), Half()), []
    published = compat == "reference"
    eps = (1e-4 if published else 1e-8) if eps is None else eps
    settings = {"lr": lr, "s": s, "betas": betas, "delta": delta, "mode": delta_mode, "eps": eps,
                "plus": second_moment is not None, "weight_decay": weight_decay,
                "published": published, "cap": max_rel_step}  # fmt: skip
    steps = len(grads) if isinstance(grads, list) else grads[1]
    for t in range(steps):
        GA, GB = grads[t] if isinstance(grads, list) else grads[0](A, B)
        turn = None
        if schedule == "alternate":
            turn = first if t // switch_every % 2 == 0 else {"A": "B", "B": "A"}[first]
        if GA is not None and turn != "B":
            A = halves[0].step(A, GA.double(), B, **settings)
        if GB is not None and turn != "A":
            B = halves[1].step(B.T, GB.double().T, A.T, **settings).T
        out.append((A.clone(), B.clone()))
    return out
