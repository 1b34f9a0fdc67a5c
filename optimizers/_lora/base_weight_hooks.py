"""Row and column sums of G*G of the frozen weights under LoRA pairs, read by hooks.

A factor's gradient shows a part of G only. For sums over all of G autograd has to form G: each
base weight gets a gradient, which a hook reads and drops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from .._core.validation import check
from .._core.views import MatrixView, split_view
from .._driver.layout import is_sharded
from .._driver.param_groups import parameters_of
from .._toolkit.moments import column_squares
from .pair_groups import PAIR_KINDS, PairOptimizer, lora_param_groups

__all__ = ["BaseWeights", "WatchingOptimizer"]


class BaseWeights:
    """Hooks that leave row and column sums of G*G in the state of pairs.

    Args:
        source: The model, or groups of triples ``[A, B, W0, ...]``, as ``pairs_to_groups`` makes.
        pairs: {A: B} of the wanted pairs.
        optimizer: Its ``state[A]["seen"]`` and ``state[B]["seen"]`` receive the sums.
        reduce: None (default), or a function that averages a vector over processes, in place.

    Raises:
        ValueError: If a wanted pair has no base weight there, one that trains, or sharded weights.
    """

    def __init__(
        self,
        source: nn.Module | Iterable[Mapping[str, Any]],
        pairs: Mapping[Tensor, Tensor],
        optimizer: Optimizer,
        reduce: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self._optimizer, self._reduce = optimizer, reduce  # not the state, which loading replaces
        self._pairs_over: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
        self._views: dict[Tensor, MatrixView] = {}
        self._passes: dict[Tensor, int] = {}  # by W0: backward passes since the last step
        self._base: dict[Tensor, Tensor] = {}
        for A, B, W, view in _triples(source):
            if pairs.get(A) is B:
                check(
                    not W.requires_grad,
                    f"a base weight of shape {tuple(W.shape)} trains; freeze it, or use another "
                    "kind of stats",
                )
                for p in (A, B, W):  # the sums of a shard are not those of the weight
                    check(
                        not is_sharded(p),
                        f"stats='exact' needs whole weights, and one of shape {tuple(p.shape)} is "
                        "sharded; use stats='tangent'",
                    )
                self._pairs_over.setdefault(W, []).append((A, B))
                self._views[W], self._base[A] = split_view(view, tuple(W.shape))[0], W
        for A in pairs:
            check(
                A in self._base,
                f"the pair whose A has shape {tuple(A.shape)} has no base weight here; give the "
                "model, or pairs_to_groups([(A, B, W0), ...])",
            )
        for W in self._pairs_over:
            W.requires_grad_(True)
        self._handles = [
            W.register_post_accumulate_grad_hook(self._accumulate_squares)  # type: ignore[no-untyped-call]
            for W in self._pairs_over
        ]

    def _accumulate_squares(self, W: Tensor) -> None:
        """Average the sums of this backward pass into ``seen``, and drop the gradient."""
        assert W.grad is not None
        G, W.grad = self._views[W].to_matrices(W.grad), None
        G = G if G.dtype == torch.float64 else G.float()
        k = self._passes[W] = self._passes.get(W, 0) + 1
        columns, rows = column_squares(G), column_squares(G.mT).mT
        for A, B in self._pairs_over[W]:
            for p, x in ((A, columns), (B, rows)):
                seen = self._optimizer.state[p]["seen"]
                # from an infinite average the next one would be no number
                limit = min(torch.finfo(dtype).max for dtype in (x.dtype, seen.dtype)) / 4
                x = x.view_as(seen).clamp(max=limit).to(seen.dtype)
                seen.clamp_(max=limit).lerp_(x, 1 / k)

    def has_gradient_of(self, A: Tensor) -> bool:
        """Whether a backward pass has run since the last step."""
        return self._base.get(A) in self._passes

    def average(self) -> None:
        """Average the sums over processes."""
        if self._reduce is not None:
            seen = self._seen()
            flat = torch.cat([x.flatten() for x in seen])
            self._reduce(flat)
            for x, part in zip(seen, torch.split(flat, [x.numel() for x in seen]), strict=True):
                x.copy_(part.view_as(x))

    def clear(self) -> None:
        """Set the sums to zero after a step, or after one that was left out."""
        self._passes.clear()
        torch._foreach_zero_(self._seen())

    def remove(self) -> None:
        """Remove the hooks and freeze the base weights again."""
        for handle in self._handles:
            handle.remove()
        for W in self._pairs_over:
            W.requires_grad_(False)

    def _seen(self) -> list[Tensor]:
        pairs = [pair for pairs_over in self._pairs_over.values() for pair in pairs_over]
        return [self._optimizer.state[p]["seen"] for pair in pairs for p in pair]


class WatchingOptimizer(PairOptimizer):
    """An optimizer of pairs whose groups with ``stats="exact"`` take statistics from base weights.

    Their rule finds the mean sums of G*G of this step in ``seen``.
    """

    _base: BaseWeights | None = None

    def watch(self, source: Any, reduce: Callable[[Tensor], Any] | None = None) -> None:
        """Let the base weights of ``stats="exact"`` have gradients, which hooks read and drop.

        Costs for each such weight of m x n and N tokens 2 N m n operations more in the backward
        pass, and one gradient of m x n, which is gone before the next one comes. Call it after
        parameters were gathered for this or another optimizer, after wrappers and copies, and
        again after loading into a new optimizer. Squares are averaged over the backward passes
        between two steps. The hooks run before a GradScaler or clipping scales gradients, so a
        constant scale changes what lr means.

        Args:
            source: The model, or ``pairs_to_groups([(A, B, W0), ...], scale=...)``.
            reduce: For data parallelism a function that averages a vector over processes, in place
                (default: None).

        Raises:
            ValueError: If a pair's base weight is not there, or trains, or a weight is sharded.
        """
        self.unwatch()
        self.init_state()
        self._base = BaseWeights(source, self._exact_pairs(), self, reduce)

    def unwatch(self) -> None:
        """Remove the hooks and freeze the base weights again."""
        if self._base is not None:
            self._base.remove()
        self._base = None

    def _exact_pairs(self) -> dict[Tensor, Tensor]:
        """Pairs {A: B} whose statistics come from base weights."""
        exact_groups = [
            g["params"]
            for g in self.param_groups
            if self._holds_pairs(g) and isinstance(g["stats"], str) and g["stats"] == "exact"
        ]
        return {
            A: B for params in exact_groups for A, B in zip(params[::2], params[1::2], strict=True)
        }

    @override
    def _update(self) -> None:
        self._step_with_sums(super()._update)

    @override
    def _steps_at_end(self, params: Sequence[Tensor]) -> bool:
        return any(p in self._exact_pairs() for p in params)

    @override
    def _step_at_end(self, step: Callable[[], None]) -> None:
        self._step_with_sums(step)

    def _step_with_sums(self, step: Callable[[], None]) -> None:
        """Step with the sums of the base weights, and clear them."""
        exact, base = self._exact_pairs(), self._base
        if not exact:
            return step()
        for i, (A, B) in enumerate(exact.items()):
            if A.grad is not None or B.grad is not None:
                if base is None or not base.has_gradient_of(A):
                    raise RuntimeError(
                        f"stats='exact' has seen no gradient of the base weight of pair {i}; call "
                        "optimizer.watch(model) once before the first backward pass"
                    )
        try:
            if base is not None:
                base.average()
            step()
        finally:
            if base is not None:
                base.clear()


def _triples(
    source: nn.Module | Iterable[Mapping[str, Any]],
) -> Iterable[tuple[Tensor, Tensor, Tensor, str]]:
    """(A, B, W0, the view of W0) of all pairs."""
    if isinstance(source, nn.Module):
        source = lora_param_groups(
            source, scale=1.0, kinds=PAIR_KINDS, base_weight=True, unpaired="fallback"
        )
    for group in source:
        if group.get("rule") == "adamw":
            continue
        params, view = parameters_of(group)[0], group.get("view", "auto")
        check(len(params) % 3 == 0, "base weights are read from triples [A, B, W0, ...]")
        base_view = view if isinstance(view, str) else view[2]
        for i in range(0, len(params), 3):
            A, B, W = params[i : i + 3]
            yield A, B, W, base_view
