"""Spectral: momentum with all singular values at one, optionally centred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from ._core.rule import Member
from ._core.validation import check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.row_rules import RowPolarRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class SpectralRule(RowPolarRule):
    """M <- momentum M + (1 - momentum) G; U = nu^alpha polar(M); centred: C polar(C M)."""

    side: str = "right"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, side=("left", "right"))

    @override
    def base_map(self, X: Tensor, w: Member) -> tuple[Tensor, Tensor | None]:
        """Polar factor of X (K, m, n), and nu^alpha."""
        U = self.orthogonalize(X, w, self.side == "left")
        return U, self.nuclear_scale(X, U, w)


class Spectral(StackedOptimizer):
    """Spectral: the polar factor of the momentum, for rows or columns that may be rotated.

    For each matrix W (m x n) with gradient G, C X = X less the mean of its rows::

        M <- momentum M + (1 - momentum) G
        U  = M (M^T M)^(-1/2)  right,   (M M^T)^(-1/2) M  left:   the same matrix, polar(M)
        U  = C polar(C M)                      if centred
        W <- (1 - lr * weight_decay) W         decay with the bare lr
        W <- W - lr * s * U                    s = 0.2 / rms of the rows of U that are not zero

    The map commutes with orthogonal maps of rows and of columns. Centred, it commutes with
    permutations of the rows and orthogonal maps of the columns, and adding one vector to all rows
    of G changes nothing.

    Source: *Symmetry-Compatible Principle for Optimizer Design: Embeddings, LM Heads, SwiGLU MLPs,
    and MoE Routers*, arXiv 2605.18106, whose published steps are tested (``polar="inverse_root",
    eps=1e-8, alpha=1, adjust_lr_fn="none"``); ``alpha=1`` alone is PolarGrad, arXiv 2505.21799. The
    damping that follows the size of M, and the match of the RMS, are additions. :class:`Muon` has
    neither centring nor alpha, and an RMS by shape instead of a measured one.

    Args:
        params: A module, (named) parameters or groups; see :class:`RowNorm`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.0).
        momentum: Decay of the momentum average (default: 0.95).
        side: ``"right"`` (default) or ``"left"``: the Gram matrix that ``polar="inverse_root"``
            takes where ``eps`` is a number, as published. Without one the smaller is taken.
        centred: Whether the mean row is taken off M and off U (default: False). A weight of one
            row then has no step.
        axis: ``"rows"`` (default) or ``"cols"``: what counts as rows.
        pair: Gate and up with one row for each neuron, see :class:`RowNorm`; None (default): rows
            as they are.
        polar: ``"auto"`` (default) or another method of :func:`stiefel.kernels.polar_factor` but
            ``"turbo"``, which is not equivariant. ``"svd"``, ``"eigh"`` and ``"qdwh"`` are exact.
            ``"inverse_root"``: the published iteration on the Gram matrix.
        ns_steps: Steps of an iteration. None (default): its own number, 5 for ``"inverse_root"``,
            where 8 leave no error to speak of.
        eps: Damping of ``"inverse_root"``, added to the Gram matrix. None (default): 1e-8
            (float32: 1e-7) of the mean eigenvalue, and the smallest normal number as the least
            norm that other methods divide by and the least nu, so that the size of the gradient
            does not matter. Published: 1e-8, which swallows gradients of norm 1e-4 and less.
        alpha: Power of nu = <M, polar(M)>, the nuclear norm, that multiplies U (default: 0.0).
            Published: 1, which makes a step grow with the gradient and with the size of W.
        adjust_lr_fn: ``"match_rms_adamw"`` (default), or ``"none"``: s = nu^alpha, as published.
        rms_target: Root mean square of a step under ``"match_rms_adamw"`` (default: 0.2).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, ``alpha`` without ``adjust_lr_fn="none"``, ``pair``
            with ``axis="cols"``, an unknown group key, or a parameter that is no matrix under
            ``rule="Spectral"``.
        TypeError: For an unknown keyword.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Peak temporary memory: five matrices,
    for ``"inverse_root"`` eight.

    Caveat: left and right are one method where M has full rank; they differ in cost and damping
    only. Published steps are five of an iteration that needs eight.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Spectral
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Spectral(model, lr=1e-3)
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
        side: str = "right",
        centred: bool = False,
        axis: str = "rows",
        pair: str | None = None,
        polar: str = "auto",
        ns_steps: int | None = None,
        eps: float | None = None,
        alpha: float = 0.0,
        adjust_lr_fn: str = "match_rms_adamw",
        rms_target: float = 0.2,
        **options: Unpack[Common],
    ) -> None:
        rule = SpectralRule(
            momentum=momentum,
            side=side,
            centred=centred,
            axis=axis,
            pair=pair,
            polar=polar,
            ns_steps=ns_steps,
            eps=eps,
            alpha=alpha,
            adjust_lr_fn=adjust_lr_fn,
            rms_target=rms_target,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
