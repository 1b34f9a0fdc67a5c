"""SwitchLoRA: LoRA whose vectors are exchanged, so that the sum of its updates has full rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ._core.rule import Dense, Direction, Member, Slot
from ._core.validation import (
    check,
    check_adam,
    check_choices,
    check_flags,
    check_ints,
    check_numbers,
)
from ._lora.pair_groups import LoRARule, Scale, accepts_groups
from ._lora.switching import (
    drop_residual_,
    exchange_vectors_,
    fold_into_weight_,
    reset_vectors_,
    switch_rate,
)
from ._lora.vector_pools import (
    CHOICE_STREAM,
    POOL_STREAM,
    ROUNDING_STREAM,
    TripleOptimizer,
    VectorPool,
    max_exchanges,
    pool_slots,
    rng_for,
    start_pools_,
)
from ._toolkit.moments import adam

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class SwitchLoRARule(LoRARule):
    """Exchange k vectors of A and of B, fold the difference into W0, then Adam on A and B."""

    members = ("A", "B", "W0")  # type: ignore[assignment]
    writes_in_refresh = True
    optional_state = frozenset(("pool",))
    total_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    interval0: float = 40
    ratio: float | None = 0.1
    freeze_steps: int = 5
    rounding: str = "accumulate"
    seed: int = 0
    choice: str = "fifo"
    count_frozen_steps: bool = False
    save_pools: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam(self)
        check_choices(self, rounding=("accumulate", "stochastic"), choice=("fifo", "random"))
        check_numbers(self, ratio="(0, inf) or None", interval0="(0, inf]")
        check(
            self.ratio is None or self.total_steps is not None,
            "total_steps must be the number of updates of the whole run, got None; leave it out "
            "only with ratio=None, which never slows switching down",
        )
        check_ints(self, total_steps="[1, inf) or None", freeze_steps="[-1, inf)", seed="[0, inf)")
        check_flags(self, "count_frozen_steps", "save_pools")
        N = self.freeze_steps
        check(
            self.interval0 >= 2 * N,
            f"interval0 must be positive and at least 2 * freeze_steps = {2 * N}, got "
            f"{self.interval0!r}: else vectors would be switched while they are frozen",
        )

    @override
    def refresh(self, A: Member, B: Member, W: Member) -> None:
        """Exchange vectors; without a gradient of both factors the exchange is left out."""
        if A.grad is None or B.grad is None:
            return
        ks = [self.exchange_count(A, j) for j in range(len(A.indices))]
        if not any(ks):
            return
        X, Y, W0 = A.value, B.value, W.value
        for j, k in enumerate(ks):
            a, b = VectorPool(A, j), VectorPool(B, j)
            if not a.is_filled:
                start_pools_(
                    a, b, self.s, rng_for(self.seed, A.indices, A.t, POOL_STREAM).generator(j)
                )
            k = min(k, max_exchanges(a, b))
            if k:
                rng = rng_for(self.seed, A.indices, A.t, CHOICE_STREAM)
                generator = rng.generator(j) if self.choice == "random" else None
                I, C = a.exchange(k, X[j], generator)
                J, D = b.exchange(k, Y[j].mT, generator)
                P, N = exchange_vectors_(X[j], Y[j], I, C, J, D)
                rounding = None if W.rounding is None else W.rounding.part((slice(j, j + 1),))
                fold_into_weight_(W0[j], P, N, self.s, rounding)
                drop_residual_(A, j, I)
                drop_residual_(B, j, J)
                reset_vectors_(B, j, I, self.freeze_steps)
                reset_vectors_(A, j, J, self.freeze_steps)
        for w, value in ((A, X), (B, Y), (W, W0)):
            w.write_back(value)

    def exchange_count(self, A: Member, j: int) -> int:
        """The schedule's number k of vectors of each factor, rounded without changing the mean."""
        rate = 1.0 if self.ratio is None else switch_rate(A.t, self.ratio * (self.total_steps or 1))
        k = A.m * rate / self.interval0
        if self.rounding == "stochastic":
            rng = rng_for(self.seed, A.indices, A.t, ROUNDING_STREAM)
            return math.floor(k) + (rng.key(j) / 2**64 < k % 1)
        due = A.state["due"][j]
        k += float(due)
        due.fill_(k % 1)
        return math.floor(k)

    @override
    def update(self, A: Member, B: Member, W: Member) -> Iterator[Direction]:
        """Adam for every vector that is not frozen."""
        for w in (A, B):
            if w.grad is not None:
                yield self.factor_step(w)

    def factor_step(self, w: Member) -> Direction:
        """One factor: a clock per vector, which stops while the vector is frozen."""
        assert w.grad is not None
        G, state = w.grad, w.state
        beta1, beta2 = self.betas
        frozen = state["frozen"] > 0  # on the host, as the clock is
        any_frozen, frozen_steps = bool(frozen.any()), frozen.to(torch.int32)
        mask = frozen.to(G.device)
        clock = state["count"].add_(1 if self.count_frozen_steps else 1 - frozen_steps)
        if any_frozen:
            G = G.masked_fill(mask, 0)
            state["frozen"].sub_(frozen_steps)
        M, V, t = state["exp_avg"], state["exp_avg_sq"], clock.clamp(min=1).to(G.device)
        N = adam(G, M, V, t, beta1=beta1, beta2=beta2, eps=self.eps)
        if any_frozen:
            N.masked_fill_(mask, 0)  # 0 / 0 where eps is 0
        lr_factor = self.lr_factor_b if w.number else 1.0
        return w.step(Dense(N), lr_factor=lr_factor, decay=~mask if any_frozen else None)

    @property
    @override
    def refresh_interval(self) -> int:
        return 1  # every update may exchange vectors

    @override
    def state(self, *sides: tuple[int, int]) -> tuple[dict[str, Slot], ...]:
        (r, n), (m, _), _ = sides
        moments = {"exp_avg": Slot("mn"), "exp_avg_sq": Slot("mn")}
        A, B = ({**moments, **slots} for slots in pool_slots(m, n, r))
        due = Slot("", torch.float64, device="cpu")  # a fraction of a vector
        return {**A, "due": due}, B, {}

    @override
    def index_counts(self, sides: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        (r, n), (m, _), _ = sides
        return {"slots": max(r, min(m, n)), "cursor": r}


class SwitchLoRA(TripleOptimizer):
    """SwitchLoRA: pre-training W = W0 + s B A by A and B alone; AdamW for everything else.

    At update t, with a_i row i of A (r x n) and b_i column i of B (m x r)::

        k = r / interval, interval = interval0 / 0.3^(t / (ratio total_steps)), rounded
        k vectors a_i, and k others b_j, trade places with the next ones of their pools
        W0 <- W0 + s (B A before - B A after)          so W has not moved
        b_i, a_j: moments and clock <- 0, no step and no decay for freeze_steps updates
        A, B <- Adam with a clock per vector

    Source: *SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information*,
    arXiv 2406.06564, and its published code.

    Args:
        params: A model, its named parameters, or groups of ``[A1, B1, W1, A2, ...]`` as
            ``lora_param_groups(model, base_weight=True)`` and :func:`pairs_to_groups` make them.
            W0 is frozen; the optimizer writes it.
        lr: Learning rate (default: 1e-3); published runs have 2e-2 where full rank has 1e-3.
        betas: Decays of the moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled decay of A and B, never of W0 (default: 0.0).
        total_steps: Updates of the whole run; needed unless ``ratio`` is None (default: None).
        interval0: Updates in which every vector is exchanged once, at first (default: 40); at
            least twice ``freeze_steps``; ``math.inf`` for no switching.
        ratio: Part of the run after which 0.3 of the switches are left (default: 0.1); None:
            ``interval0`` throughout.
        freeze_steps: Updates for which the counterpart of a new vector stays frozen, the update
            of the switch included (default: 5); -1: none.
        rounding: Rounding of k: ``"accumulate"`` (default) carries the fraction, ``"stochastic"``
            draws.
        seed: Decides pools and draws (default: 0).
        scale: s of triples whose group or module names none; None (default): all must name theirs.
        choice: ``"fifo"`` (default): vectors of a pool take turns; ``"random"``: any that wait.
        count_frozen_steps: Whether clocks of frozen vectors go on, as published, which halves the
            first step after the freeze (default: False).
        save_pools: Whether checkpoints hold the pools (default: True). Without them loading draws
            new ones.
        lr_ratio_b: Multiplies the step of B; decay keeps the plain lr. None (default): 1.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, ``total_steps`` missing, a list of bare tensors, a
            triple that does not fit or whose factor is frozen, or a base weight that trains.
        TypeError: For an unknown keyword, a quantized base weight, or ``params`` given under its
            old name ``groups`` too.

    State of A and B in all: ``exp_avg``, ``exp_avg_sq``, 2 r (m + n). On the host, pinned for CUDA:
    ``pool``, min(m, n) (m + n) in the weight's dtype; ``count``, ``frozen``, ``slots``, 6 r int32;
    ``cursor``, ``due``. Peak temporary memory: four matrices of the largest factor; of a
    low-precision W0 also two float32 panels, and two more of a factor.

    Caveat: pools take 1 + min / max of the sides times W0's bytes of host memory. A bfloat16 W0
    rounds at every switch. The model is W0, A and B together, so adapters alone, as peft and
    Trainer save them, are no checkpoint: save ``model.state_dict()`` whole, or in a callback beside
    the adapters ``{k: v for k, v in model.state_dict().items() if "base_layer" in k}``, and load it
    (``strict=False``) before the first step. A step after a load with another W0 raises ValueError.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import SwitchLoRA, pairs_to_groups, switchlora_init_
        >>> W0, A, B = torch.randn(6, 8), torch.empty(2, 8), torch.empty(6, 2)
        >>> switchlora_init_(W0, A, B, scale=0.5)
        >>> triple = (A.requires_grad_(), B.requires_grad_(), W0)
        >>> optimizer = SwitchLoRA(pairs_to_groups([triple], scale=0.5), lr=1e-2, total_steps=100)
        >>> (torch.ones(3, 8) @ (W0 + 0.5 * B @ A).mT - 1).square().mean().backward()
        >>> optimizer.step()
    """

    @accepts_groups
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        total_steps: int | None = None,
        interval0: float = 40,
        ratio: float | None = 0.1,
        freeze_steps: int = 5,
        rounding: str = "accumulate",
        seed: int = 0,
        scale: Scale = None,
        choice: str = "fifo",
        count_frozen_steps: bool = False,
        save_pools: bool = True,
        lr_ratio_b: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        if not isinstance(betas, Sequence):
            raise TypeError(f"betas must be two numbers, got {betas!r}; total_steps is a keyword")
        rule = SwitchLoRARule(
            total_steps=total_steps,
            betas=betas,
            eps=eps,
            interval0=interval0,
            ratio=ratio,
            freeze_steps=freeze_steps,
            rounding=rounding,
            seed=seed,
            choice=choice,
            count_frozen_steps=count_frozen_steps,
            save_pools=save_pools,
            lr_ratio_b=lr_ratio_b,
        )
        super().__init__(params, rule, lr, weight_decay, scale=scale, **options)
