"""Muown: Muon for the directions of the rows of a weight, Adam for their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import POLAR_METHODS, polar_factor
from ._core.rule import Dense, Direction, Member, RowNorms, Rule, Slot
from ._core.validation import check_choices, check_ints, check_numbers, naming, two_decays
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.moments import adam, momentum_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

SMALLEST_NORM = 1e-12
LARGEST_DRIFT = 0.01
"""Largest share by which rows may leave their stored norms, as rounding makes them."""


@dataclass(frozen=True)
class MuownRule(Rule):
    """W = g v / |v| by rows: Muon moves v, Adam moves g."""

    momentum: float = 0.95
    norm_betas: tuple[float, float] = (0.9, 0.95)
    norm_eps: float = 1e-8
    polar: str = "auto"
    ns_steps: int | None = None
    adjust_lr_fn: str = "match_rms_adamw"

    needs_full_matrix = True

    def __post_init__(self) -> None:
        check_numbers(self, momentum="[0, 1)")
        betas = two_decays("norm_betas", self.norm_betas, "Invalid norm_betas parameter")
        object.__setattr__(self, "norm_betas", betas)
        check_numbers(self, norm_eps="[0, inf)")
        check_ints(self, ns_steps="[1, 99] or None")
        check_choices(
            self,
            polar=("auto", *POLAR_METHODS),
            adjust_lr_fn=("match_rms_adamw", "original", "spectral", "none"),
        )
        with naming("ns_steps"):  # raises here for what the kernel refuses
            self.orthogonalize(torch.empty(1, 0, 1, dtype=torch.float32, device="cpu"))

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        """Norms below 0 are not measured yet."""
        norm = Slot("m1", dtype="full", fill=-1.0)
        return {
            "momentum_buffer": Slot("mn"),
            "row_norm": norm,
            "direction_norm": norm,
            "exp_avg": Slot("m1"),
            "exp_avg_sq": Slot("m1"),
        }

    @override
    def update(self, w: Member) -> Direction:
        """G in the coordinates g and v, then Adam for g and Muon for v."""
        G, g, v = w.grad, w.state["row_norm"], w.state["direction_norm"]  # (K, m, n), (K, m, 1)
        assert G is not None
        W = w.value.to(G.dtype)
        rows = w.reductions.cols(row_sums(W * W)).sqrt()
        measure_(g, v, rows.clamp(min=SMALLEST_NORM))
        R = torch.where(rows > SMALLEST_NORM, W / rows, 0.0)
        along = w.reductions.cols(row_sums(G * R))  # the gradient of g
        G_v = (g / v) * (G - R * along)
        B = momentum_step(w.state["momentum_buffer"], G_v, self.momentum, nesterov=False)
        O = w.reductions.on_full_matrix(self.orthogonalize, B)
        beta1, beta2 = self.norm_betas
        moments = w.state["exp_avg"], w.state["exp_avg_sq"]
        change = adam(along, *moments, w.t, beta1=beta1, beta2=beta2, eps=self.norm_eps)
        factor = adjust_lr(self.adjust_lr_fn, w.m, w.n, min(w.m, w.n))
        return w.step(Dense(O), lr_factor=factor, row_norms=RowNorms(g, v, change))

    def orthogonalize(self, B: Tensor) -> Tensor:
        """The polar factor of every matrix of B (K, m, n)."""
        return polar_factor(B, self.polar, steps=self.ns_steps)

    @override
    def weight_norm_obstacle(self) -> str | None:
        return "Muown, which keeps norms of rows itself"


def row_sums(X: Tensor) -> Tensor:
    """Sums of the rows of X (K, m, n), (K, m, 1), along memory: then a stack changes no bit."""
    return X.contiguous().sum(-1, keepdim=True)


def measure_(g: Tensor, v: Tensor, rows: Tensor) -> None:
    """Take norms of rows of W where none are known yet, or other code has written W; in place."""
    v.copy_(torch.where(v < 0, rows, v))
    drifts = (rows - g.abs()).abs() > LARGEST_DRIFT * rows
    g.copy_(torch.where(drifts | (g == -1.0), rows, g))


class Muown(StackedOptimizer):
    """Muown: Muon for the directions of the rows of a weight, Adam for their norms.

    For each matrix W (m x n) with gradient G, W = g v / |v| row by row, R = W / g::

        G_g = rowsum(G R),   G_v = (g / |v|) (G - R G_g)       rows orthogonal to v
        B <- momentum B + (1 - momentum) G_v
        v <- v - lr * ratio(m, n) * polar(B)
        g <- (1 - lr * weight_decay) (g - lr * Adam(G_g))
        W <- g v / |v|

    v is never stored: it is R |v|. Rows of v grow at every step, so that the angle of a step falls.
    AdamW takes everything else. :class:`Muon` with ``weight_norm="sphere:rows"`` keeps g as it is.

    Source: arXiv 2605.10797, as in NVIDIA's Emerging-Optimizers, whose recorded steps are tested.
    Its scale is sqrt(max(m, n)), five times that of ``"match_rms_adamw"``.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
        lr: Learning rate (default: 1e-3).
        weight_decay: Decoupled weight decay of g, and so of W (default: 0.0).
        momentum: Decay of the momentum average (default: 0.95).
        norm_betas: Decays of Adam's moments of g (default: (0.9, 0.95)).
        norm_eps: Added to the root of the second moment of g (default: 1e-8).
        polar: Method of the polar factor, a name of :func:`stiefel.kernels.polar_factor`
            (default: ``"auto"``).
        ns_steps: Iterations of a polynomial method (default: None, the method's own number).
        adjust_lr_fn: ratio(m, n): ``"match_rms_adamw"`` (default) 0.2 sqrt(max(m, n));
            ``"original"`` sqrt(max(1, m / n)); ``"spectral"`` sqrt(m / n); ``"none"`` 1.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`. ``cautious`` lets g
            decay where its change does not oppose it; ``weight_norm`` is refused.

    Raises:
        ValueError: For a value out of range.
        TypeError: For an unknown keyword.

    State: ``momentum_buffer`` (like W), ``row_norm``, ``direction_norm``, ``exp_avg`` and
    ``exp_avg_sq`` (one number per row) and ``step``. Peak temporary memory: five m x n matrices.

    Caveat: a row that is zero has no direction and leaves zero slowly. Rows whose norm other code
    has changed by more than 1 % start from the norm that they have.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Muown
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Muown(model, lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        norm_betas: tuple[float, float] = (0.9, 0.95),
        norm_eps: float = 1e-8,
        polar: str = "auto",
        ns_steps: int | None = None,
        adjust_lr_fn: str = "match_rms_adamw",
        **options: Unpack[Common],
    ) -> None:
        rule = MuownRule(
            momentum=momentum,
            norm_betas=norm_betas,
            norm_eps=norm_eps,
            polar=polar,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
