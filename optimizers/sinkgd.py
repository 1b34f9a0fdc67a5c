"""SinkGD: the gradient with rows and columns brought to equal norms, and no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import sinkhorn
from ._core.rule import Dense, Direction, Member, Rule, Slot
from ._core.validation import check_ints, check_numbers
from ._driver.optimizer import StackedOptimizer
from ._toolkit.moments import momentum_slots, momentum_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class SinkGDRule(Rule):
    """Step along S(M): rows to norm sqrt(n), columns to norm sqrt(m), in turn; M = G by default."""

    handles_nonfinite: ClassVar[bool] = True
    needs_full_matrix: ClassVar[bool] = True
    splits: ClassVar[frozenset[str]] = frozenset(("rows", "cols"))

    iterations: int = 5
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_ints(self, iterations="[1, 1000]")
        check_numbers(self, momentum="[0, 1)")

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        return momentum_slots(self.momentum)

    @override
    def capture_obstacle(self) -> str | None:
        return None

    @override
    def update(self, w: Member) -> Direction:
        """M <- momentum M + (1 - momentum) G, or G; step along S(M)."""
        M = w.grad  # (K, m, n)
        assert M is not None
        if self.momentum:
            M = momentum_step(w.state["momentum_buffer"], M, self.momentum, finite=w.finite)
        M = M.to(torch.promote_types(M.dtype, torch.float32))
        balance = partial(sinkhorn, iterations=self.iterations)
        return w.step(Dense(w.reductions.on_full_matrix(balance, M)))


class SinkGD(StackedOptimizer):
    """SinkGD: gradient descent on a gradient whose rows and columns have equal norms; no state.

    For each matrix W with gradient G (m x n)::

        S <- G;  iterations times:  rows of S to norm sqrt(n), then columns to norm sqrt(m)
        W <- (1 - lr * weight_decay) W - lr * S

    S has RMS 1: each entry moves by about lr, as under Adam's first step. Vectors, and by roles
    embeddings and heads, go to AdamW. :class:`ARO` is this map in a rotated frame, with momentum.

    Source: *Gradient Multi-Normalization for Stateless and Scalable LLM Training*,
    arXiv 2502.06742.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them.
        lr: Learning rate (default: 1e-3). S is two to five times as large as AdamW's steps are.
        weight_decay: Decoupled weight decay (default: 0.0).
        iterations: Rounds of rows and columns (default: 5).
        momentum: Decay of an average of gradients that takes the place of G (default: 0.0, none),
            an addition, which needs a buffer.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range.
        TypeError: For an unknown keyword.

    State: ``step``, a host number; with momentum ``momentum_buffer`` (like W). Peak temporary
    memory: one m x n matrix, S itself.

    Caveat: without momentum a step follows the noise of one batch; take large batches. A row or
    column below 1e-8 of the root mean square of G is not scaled up to full length.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import SinkGD
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = SinkGD(model, lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        iterations: int = 5,
        momentum: float = 0.0,
        **options: Unpack[Common],
    ) -> None:
        rule = SinkGDRule(iterations=iterations, momentum=momentum)
        super().__init__(params, rule, lr, weight_decay, **options)
