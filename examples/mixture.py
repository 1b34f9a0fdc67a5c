"""The language model of the examples with a small mixture of experts in place of every SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Block, ByteLM, started
from torch import Tensor, nn

EXPERTS, CHOSEN = 4, 2


class Experts(nn.Module):
    """SwiGLU of many experts in two parameters; the gate's rows come first."""

    is_concatenated = True  # what transformers calls this layout

    def __init__(self, experts: int, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, hidden))

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """Sum of the experts' outputs for h (T, d) by weights (T, E), mostly zero."""
        out = torch.zeros_like(h)
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            rows = weights[:, e].nonzero().flatten()
            gate, up = F.linear(h[rows], gate_up).chunk(2, dim=-1)
            mixed = F.linear(F.silu(gate) * up, down) * weights[rows, e : e + 1]
            out = out.index_add(0, rows, mixed)
        return out


class MixtureBlock(Block):
    """A block whose feed-forward part is the sum of the experts that a softmax router chose."""

    scoring_func = "softmax"

    def __init__(self, d: int, heads: int, experts: int = EXPERTS) -> None:
        super().__init__(d, heads)
        hidden = self.gate.out_features // CHOSEN  # as many products as the dense block
        del self.gate, self.up, self.down
        self.router = nn.Linear(d, experts, bias=False)
        self.experts = Experts(experts, d, hidden)

    def feed_forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(0, -2)
        best, which = self.router(flat).topk(CHOSEN, dim=-1)
        weights = torch.zeros(len(flat), self.router.out_features, dtype=h.dtype)
        weights = weights.scatter(-1, which, best.softmax(-1))
        mixed: Tensor = self.experts(flat, weights).view_as(h)
        return mixed


class MixtureLM(ByteLM):
    """ByteLM of such blocks."""

    def __init__(self, d: int, layers: int, heads: int, seq: int, experts: int = EXPERTS) -> None:
        super().__init__(d, layers, heads, seq)
        self.blocks = nn.ModuleList(MixtureBlock(d, heads, experts) for _ in range(layers))


def build_mixture(d: int, layers: int, heads: int, seq: int, seed: int) -> ByteLM:
    return started(MixtureLM(d, layers, heads, seq), layers, seed)
