"""The largest attention logit of every head over the passes of a step, as QK-clip asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._core.validation import check, shown

__all__ = ["MaxLogits"]


class MaxLogits:
    """Records the largest logit of each head over all micro batches of a step.

    An attention hands over its logits, or the largest ones of every query, where it has them;
    :meth:`take` gives all maxima to :func:`qk_clip_` and begins anew. Numbers stay where they are
    and nothing waits for a device. What activation checkpointing computes again counts once, as a
    maximum does. Fused attention that returns sums of exponentials only (SDPA, varlen attention)
    has no maximum to record.

    Args:
        model: None (default), or the model, whose modules are then called by their names in it.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import MaxLogits
        >>> record = MaxLogits()
        >>> logits = torch.tensor([[[[1.0, 2.0]], [[5.0, -3.0]]]])  # (batch, heads, queries, keys)
        >>> weights = record("attn", logits).softmax(-1)
        >>> record.take()
        {'attn': tensor([2., 5.])}
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model, self._names = model, dict[int, str]()
        self._maxima: dict[str, Tensor] = {}

    def __call__(self, module: str | nn.Module, scores: Tensor) -> Tensor:
        """Record the logits of a pass and return them.

        Args:
            module: The attention module, or its name in the model.
            scores: Logits before the softmax (and before a soft cap), after the scale, with a mask
                or without: (batch, heads, queries, keys); or the ``max_scores`` of FlexAttention,
                (batch, heads, queries).

        Raises:
            ValueError: If the module is not in the model, or scores have another number of sides or
                of heads than before.
        """
        name = module if isinstance(module, str) else self._name_of(module)
        check(
            isinstance(scores, Tensor) and scores.ndim in (3, 4),
            "scores must be (batch, heads, queries, keys) or (batch, heads, queries), got "
            f"{tuple(scores.shape) if isinstance(scores, Tensor) else shown(scores)}",
        )
        if scores.numel() > 0:
            found = scores.detach().amax([i for i in range(scores.ndim) if i != 1])
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            last = self._maxima.get(name, found)
            check(
                last.shape == found.shape,
                f"{name!r} had {len(last)} heads before and has {len(found)} now",
            )
            self._maxima[name] = torch.maximum(last, found)
        return scores

    def flex_attention(
        self, module: str | nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Call torch's ``flex_attention``, record its ``max_scores`` and return the output.

        A ``score_mod`` is part of what torch calls scores: with a soft cap in it, maxima are those
        after the cap, and nothing is to be clipped. On a CPU torch refuses to return them.

        Args:
            module: The attention module, or its name in the model.
            query: (batch, heads, queries, size).
            key: (batch, key heads, keys, size).
            value: (batch, key heads, keys, size of values).
            **options: Further keywords of ``flex_attention``, but ``return_aux``; ``function``, a
                compiled one to call in place of torch's.
        """
        from torch.nn.attention import flex_attention as flex

        request: Any = getattr(flex, "AuxRequest", None)  # torch below 2.10 may lack it
        check(
            request is not None,
            f"flex_attention of torch {torch.__version__} returns no max_scores; record the "
            "logits of eager attention, or take a newer torch",
        )
        function = options.pop("function", flex.flex_attention)
        out, found = function(query, key, value, return_aux=request(max_scores=True), **options)
        self(module, found.max_scores)
        result: Tensor = out
        return result

    def take(self) -> dict[str, Tensor]:
        """Maxima (heads,) of all modules since the last call, by name; recording begins anew."""
        found, self._maxima = self._maxima, {}
        return found

    def _name_of(self, module: nn.Module) -> str:
        if id(module) not in self._names and self._model is not None:
            self._names = {id(x): name for name, x in self._model.named_modules()}
        check(
            id(module) in self._names,
            f"{type(module).__name__} is no module of the model; pass its name, or "
            "MaxLogits(model)",
        )
        return self._names[id(module)]
