"""One step of each method in plain torch operations, which kernels are held against.

W (m, n) and G are of the model's dtype, state and arithmetic are float32. W is transposed so that
the rows are projected, m <= n. New bases are left out. All of it runs on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.999), 1e-8
MU = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
State = dict[str, Tensor]


def adam(R: Tensor, M: Tensor, V: Tensor, t: int = 10) -> Tensor:
    """Adam's direction."""
    (b1, b2), c = BETAS, (1 - BETAS[1] ** t) ** 0.5
    M.lerp_(R, 1 - b1)
    V.mul_(b2).addcmul_(R, R, value=1 - b2)
    return M / V.sqrt().div_(c).add_(EPS)  # the other correction rides in the rate


def write(W: Tensor, U: Tensor, rate: float = LR) -> None:
    """Decay, then the step."""
    W.mul_(1 - LR * DECAY)
    W.add_(U, alpha=-rate)


def adamw(W: Tensor, G: Tensor, s: State) -> None:
    """AdamW with float32 moments."""
    write(W, adam(G.float(), s["M"], s["V"]))


def galore(W: Tensor, G: Tensor, s: State) -> None:
    """GaLore."""
    R = s["P"].mT @ G.float()
    N = adam(R, s["M"], s["V"])
    write(W, s["P"] @ N, LR * 0.25)


def fira(W: Tensor, G: Tensor, s: State) -> None:
    """Fira with factors per column and its limiter."""
    G = G.float()
    R = s["P"].mT @ G
    N = adam(R, s["M"], s["V"])
    phi = N.norm(dim=0, keepdim=True) / (R.norm(dim=0, keepdim=True) + EPS)
    S = torch.addmm(G, s["P"], R, alpha=-1).mul_(phi)
    size = S.norm()
    limit = (size / (s["norm"] + EPS)).div_(1.01).clamp_(min=1.0)
    s["norm"].copy_(size / limit)
    write(W, torch.addmm(S.div_(limit), s["P"], N), LR * 0.25)


def frugal_columns(W: Tensor, G: Tensor, s: State) -> None:
    """FRUGAL: Adam on chosen columns, signs on the others."""
    G = G.float()
    N = adam(G.index_select(1, s["index"]), s["M"], s["V"])
    write(W, G.sign_().index_copy_(1, s["index"], N))


def frugal_svd(W: Tensor, G: Tensor, s: State) -> None:
    """FRUGAL: Adam in a subspace, signs of the residual."""
    G = G.float()
    R = s["P"].mT @ G
    N = adam(R, s["M"], s["V"])
    rest = torch.addmm(G, s["P"], R, alpha=-1).sign_()
    write(W, rest.addmm_(s["P"], N))


def newton_schulz(X: Tensor, steps: int = 5) -> Tensor:
    """Quintics of X (m, n), m <= n, with whole products."""
    a, b, c = QUINTIC
    for _ in range(steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def muon(W: Tensor, G: Tensor, s: State) -> None:
    """Muon."""
    G = G.float()
    s["M"].lerp_(G, 1 - MU)
    X = G.lerp_(s["M"], MU).bfloat16()
    X.div_(X.norm().clamp(min=1e-7))
    write(W, newton_schulz(X), LR * 0.2 * W.shape[-1] ** 0.5)


def auon(W: Tensor, G: Tensor, s: State) -> None:
    """AuON."""
    G = G.float()
    s["M"].lerp_(G, 1 - MU)
    X = G.lerp_(s["M"], MU)
    X.div_(X.norm() + 1e-7)
    write(W, X / (X.cosh().square_().mean().sqrt_() + EPS))


def rownorm(W: Tensor, G: Tensor, s: State) -> None:
    """RowNorm."""
    s["M"].lerp_(G.float(), 1 - MU)
    write(W, s["M"] / (s["M"].norm(dim=-1, keepdim=True) + EPS))


@dataclass(frozen=True)
class Plain:
    """A step and the state that it needs.

    Attributes:
        run: The step.
        axes: Shapes of the float32 state in letters: m, n, r (rank), c (chosen columns), 1.
    """

    run: Callable[[Tensor, Tensor, State], None]
    axes: dict[str, str]

    def step(self, m: int, n: int, rank: int = 0, device: str = "meta") -> Callable[[], None]:
        """The step of an m x n weight, m <= n, ready to run."""
        m, n = min(m, n), max(m, n)
        sides = {"m": m, "n": n, "r": rank, "c": n // 4, "1": 1}
        W, G = (torch.zeros(m, n, dtype=torch.bfloat16, device=device) for _ in range(2))
        state = {
            name: torch.zeros([sides[letter] for letter in axes], device=device)
            for name, axes in self.axes.items()
        }
        if "index" in state:
            state["index"] = torch.arange(sides["c"], device=device)
        return lambda: self.run(W, G, state)


_MOMENTS = {"M": "mn", "V": "mn"}
_INSIDE = {"P": "mr", "M": "rn", "V": "rn"}
PLAIN = {
    "AdamW": Plain(adamw, _MOMENTS),
    "GaLore": Plain(galore, _INSIDE),
    "Fira": Plain(fira, {**_INSIDE, "norm": "1"}),
    "FRUGAL columns": Plain(frugal_columns, {"M": "mc", "V": "mc", "index": "c"}),
    "FRUGAL svd": Plain(frugal_svd, _INSIDE),
    "Muon": Plain(muon, {"M": "mn"}),
    "AuON": Plain(auon, {"M": "mn"}),
    "RowNorm": Plain(rownorm, {"M": "mn"}),
}
