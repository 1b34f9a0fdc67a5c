"""SwitchLoRA once, naively: a triple, float64, vector by vector. It judges switchlora.py."""

import math

import torch


class Factor:
    """The vectors of one factor: what each is, was, keeps, and what waits for its turn."""

    def __init__(self, vectors, waiting, shift):
        r = len(vectors)
        self.x = [v.clone() for v in vectors]
        self.M = [torch.zeros_like(v) for v in vectors]
        self.V = [torch.zeros_like(v) for v in vectors]
        self.t, self.frozen = [0] * r, [0] * r
        self.waiting = [v.clone() for v in waiting]  # the first is the next to come
        # those in use leave in the order of the slots, beginning at the cursor
        self.cursor = shift

    def switch(self, i, other, fold, N):
        """Vector i gives way to the first that waits and queues up behind the last."""
        new = self.waiting.pop(0)
        fold(i, self.x[i] - new)
        self.waiting.append(self.x[i])
        self.x[i] = new.clone()
        other.M[i].zero_()
        other.V[i].zero_()
        other.t[i], other.frozen[i] = 0, N

    def step(self, G, *, lr, betas, eps, weight_decay, counted):
        (b1, b2) = betas
        for i, g in enumerate(G):
            still = self.frozen[i] > 0
            if still:
                g = torch.zeros_like(g)
            if counted or not still:
                self.t[i] += 1
            self.M[i] = b1 * self.M[i] + (1 - b1) * g
            self.V[i] = b2 * self.V[i] + (1 - b2) * g * g
            if still:
                self.frozen[i] -= 1
                continue
            m, v = self.M[i] / (1 - b1 ** self.t[i]), self.V[i] / (1 - b2 ** self.t[i])
            self.x[i] = (1 - lr * weight_decay) * self.x[i] - lr * m / (v.sqrt() + eps)


class SwitchLoRA:
    """State of one triple; `step` takes gradients and how many vectors are wanted."""

    def __init__(self, W0, A, B, s, pool_a, pool_b, *, N=5, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0, counted=False, lr_ratio_b=1.0):  # fmt: skip
        r = len(A)
        self.W0, self.s, self.N, self.ratio = W0.clone(), s, N, lr_ratio_b
        self.a = Factor(A, pool_a[: len(pool_a) - r], 0)
        self.b = Factor(B.mT, pool_b[: len(pool_b) - r], r // 2)
        self.options = {"betas": betas, "eps": eps, "weight_decay": weight_decay,
                        "counted": counted}  # fmt: skip
        self.lr, self.switches = lr, 0

    @property
    def A(self):
        return torch.stack(self.a.x)

    @property
    def B(self):
        return torch.stack(self.b.x).mT

    def step(self, GA, GB, wanted):
        a, b, r = self.a, self.b, len(self.a.x)
        k = min(wanted, len(a.waiting), self._gap(a, b), self._gap(b, a))
        for factor, other in ((a, b), (b, a)):
            for _ in range(k):
                i = factor.cursor
                factor.switch(i, other, self._fold(factor is a), max(self.N, 0))
                factor.cursor = (i + 1) % r
        self.switches += k
        a.step(GA, lr=self.lr, **self.options)
        b.step(GB.mT, lr=self.lr * self.ratio, **self._same_decay())

    def _same_decay(self):
        """lr_ratio_b multiplies the step, not the decay."""
        return {**self.options, "weight_decay": self.options["weight_decay"] / self.ratio}

    def _fold(self, first):
        def fold(i, change):
            left, right = (self.b.x[i], change) if first else (change, self.a.x[i])
            self.W0 += self.s * torch.outer(left, right)

        return fold

    @staticmethod
    def _gap(one, other):
        """How far `one` may go: up to the vectors of its own that the other's switches froze."""
        r, i, free = len(one.x), one.cursor, 0
        while free < r and i != other.cursor and not one.frozen[i]:
            free, i = free + 1, (i + 1) % r
        return free


def wanted(t, r, interval0, ratio, T, due):
    """(vectors of update t = 1, 2, ..., what is left over), by the exponential form."""
    theta = 0.0 if ratio is None else math.log(1 / 0.3) / (ratio * T)
    interval = min(interval0 * math.exp(theta * t), interval0 * 1e8)
    due += r / interval
    return math.floor(due), due - math.floor(due)
