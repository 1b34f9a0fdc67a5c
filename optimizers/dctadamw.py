"""DCT-AdamW: Adam on the largest cosine coefficients of the gradient, chosen anew every T steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import dequantize_rows, quantize_rows
from ._core.rule import AdamFactored, Direction, Member, Rule, Slot
from ._core.validation import (
    check_adam,
    check_choices,
    check_count_or_share,
    check_ints,
    resolve_rank,
)
from ._driver.optimizer import StackedOptimizer
from ._driver.param_groups import warn_user
from ._toolkit.moments import IndexBasisChange
from ._toolkit.projectors import DctProjector, clear_rows_, take_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

DCT_MOMENT_POLICIES = ("match", "slot", "reset", "keep_if_same")
MIN_COMMON_SHARE = {"match": 0.0, "keep_if_same": 0.5, "reset": 2.0}
"""Share of the indices that must stay for moments to be carried; above 1 none ever are."""
FEEDBACK_KINDS = (None, "full", "int8", "int4")


@dataclass(frozen=True)
class DCTAdamWRule(Rule):
    """S = D^T G; I its r largest rows every T updates; N = adam(S[I]); step along D[:, I] N.

    ``refresh`` stays empty. The driver calls it where G is finite and not zero and a choice is due,
    which makes ``Member.age`` 0, and ``update`` then chooses by the coefficients S that it needs
    anyway. With T = 1 there is no schedule: every update chooses, so the host decides nothing and
    waits for no device.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rank: int | float = 128
    update_proj_gap: int = 1
    norm: str = "l1"
    moments: str = "match"
    error_feedback: str | None = None
    bias_correction: str = "age"
    basis: str = "dct2"
    transform: str = "auto"
    side: str = "auto"

    refresh_offset = 1

    def __post_init__(self) -> None:
        check_adam(self)
        check_count_or_share(self, "rank")
        check_ints(self, update_proj_gap="[1, inf)")
        check_choices(
            self,
            norm=("l1", "l2"),
            moments=DCT_MOMENT_POLICIES,
            error_feedback=FEEDBACK_KINDS,
            bias_correction=("age", "global"),
            basis=("dct2", "dct3"),
            transform=("auto", "matmul", "fft"),
            side=("auto", "left", "right"),
        )

    @property
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """The columns; none where rows of the error are coded, with a scale for all of a row."""
        return frozenset(("cols",) if self.error_feedback in (None, "full") else ())

    @override
    def update(self, w: Member) -> Direction:
        """S = D^T G + E; choose I; R = S[I]; E <- S with rows I zeroed; step along D[:, I] adam(R).

        S is made only where all of it is needed: to choose, or for the error feedback.
        """
        assert w.grad is not None
        G = w.grad
        state = w.state
        D = self.cosines
        feedback = self.feedback
        choose_now = self.refresh_interval == 0 or w.age == 0
        if not (choose_now and self.moments in ("slot", "reset")) and self.takes_all(w):
            return self.full_step(w)

        S = None  # (K, m, n)
        row_scores = None
        if feedback is not None:  # E is stored as coefficients, so nothing is lifted to be added
            S = D.transform(G, onto=feedback.load(state, w.n, G.dtype))
        elif choose_now:
            S, row_scores = D.spectrum(G)
        if choose_now and S is not None:
            self.choose(w, D, S, row_scores)

        index = state["index"].clamp(min=0)  # -1 where none was chosen yet
        if S is None:
            R = w.reductions.rows(D.project_onto(G, index))  # (K, r, n)
        else:
            R = take_rows(S, index)
        P = D.selected_columns(index, w.m, R.dtype)  # (K, m, r)
        if feedback is not None and S is not None:
            feedback.store(state, clear_rows_(S, index))
        return self.step_along(w, P, R)

    def takes_all(self, w: Member) -> bool:
        """Whether every matrix has all cosines, in order, which the CPU alone says at once."""
        index = w.state["index"]
        if self.feedback is not None or index.shape[-1] < w.m or index.device.type != "cpu":
            return False
        return bool((index == torch.arange(w.m, dtype=index.dtype, device="cpu")).all())

    def full_step(self, w: Member) -> Direction:
        """The step along D N in which nothing is left to choose: R = D^T G."""
        assert w.grad is not None
        D = self.cosines
        R = w.reductions.rows(D.transform(w.grad))
        P = D.columns(w.m, R.dtype, R.device).expand(len(R), -1, -1)
        return self.step_along(w, P, R)

    def step_along(self, w: Member, P: Tensor, R: Tensor) -> Direction:
        """The step along P N with N = adam(R), each row at its own age."""
        M, V = w.state["exp_avg"], w.state["exp_avg_sq"]
        t, finite = self.adam_step(w), w.finite
        term = AdamFactored(P, R, M, V, t, self.betas, self.eps, finite, overwrites=True)
        return w.step(term)

    def choose(self, w: Member, D: DctProjector, S: Tensor, row_scores: Tensor | None) -> None:
        """Choose a new index: rows that stay keep their moments and ages, new ones begin at 0."""
        state = w.state
        old = state["index"]
        r = old.shape[-1]
        new = w.where_finite(D.choose(S, r, old, w.reductions, row_scores), old)
        if old.device.type == "cpu" and self.moments != "reset" and _is_unchanged(old, new):
            return  # nothing moves, which other devices would not say without a wait
        if self.moments != "slot":
            change = IndexBasisChange(old, new)
            common = (change.source >= 0).sum(-1)
            too_few_stay = (common < MIN_COMMON_SHARE[self.moments] * r).view(-1, 1, 1)
            for key in ("exp_avg", "exp_avg_sq", "age"):
                if key in state:
                    X = state[key]
                    X.copy_(w.where_finite(change.apply(X).masked_fill_(too_few_stay, 0), X))
        if "age" in state:  # a slot that was empty begins now, whatever the policy
            state["age"].masked_fill_((old < 0).unsqueeze(-1), 0)
        old.copy_(new)

    def adam_step(self, w: Member) -> int | Tensor:
        """Adam's t: the ages of the rows, counted here, or the number of the update."""
        if self.bias_correction == "global":
            return w.count()
        counted = 1 if w.finite is None else w.finite.to(torch.int32).view(-1, 1, 1)
        return w.state["age"].add_(counted)

    @override
    def capture_obstacle(self) -> str | None:
        return None

    @property
    def cosines(self) -> DctProjector:
        """The system D, one for all matrices of a size."""
        return DctProjector(self.norm, self.basis, self.transform)

    @property
    def feedback(self) -> ErrorFeedback | None:
        """The store of E, if ``error_feedback`` names one."""
        return None if self.error_feedback is None else ErrorFeedback(self.error_feedback)

    @property
    @override
    def refresh_interval(self) -> int:
        """Updates between two choices that the driver counts; 0 where every update chooses."""
        return self.update_proj_gap if self.update_proj_gap > 1 else 0

    @property
    @override
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """True without error feedback, whose store takes no flags."""
        return self.error_feedback is None

    @override
    def transpose(self, m: int, n: int) -> bool:
        """The shorter side is transformed; of a square, as published, the columns."""
        return m >= n if self.side == "auto" else self.side == "right"

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        r = resolve_rank(self.rank, m)
        slots = {"index": Slot("r", torch.int32, fill=-1, r=r)}
        if self.bias_correction == "age":
            slots["age"] = Slot("r1", torch.int32, r=r)
        slots["exp_avg"] = Slot("rn", r=r)
        slots["exp_avg_sq"] = Slot("rn", r=r)
        if self.feedback is not None:
            slots |= self.feedback.slots(n)
        return slots

    @override
    def index_counts(self, sides: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        return {"index": sides[0][0]}

    @override
    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        return self.cosines.shared(m)


def _is_unchanged(old: Tensor, new: Tensor) -> bool:
    """Whether every matrix had chosen rows before and chooses the same ones again."""
    return torch.equal(old, new) and bool((old >= 0).all())


class DCTAdamW(StackedOptimizer):
    """DCT-AdamW: Adam's moments for r cosines of the gradient, without any factorization.

    For each matrix W with gradient G (m x n, transposed so that m <= n; a square is transposed), D
    the orthonormal cosines of length m, one matrix for all weights of that side::

        S = D^T G + E                     E: error feedback, zero without it
        t = 1, T, 2T, ...:  I <- the r rows of S of largest norm; M, V, ages follow, or begin at 0
        R = S[I];  E <- S with rows I zeroed
        M, V <- Adam's moments of R;  N = Mhat / (sqrt(Vhat) + eps), every row at its own age
        W <- (1 - lr * weight_decay) W - lr * D[:, I] N

    Source: *FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
    Language Models*, arXiv 2505.17967.

    Args:
        params: A module, (named) parameters or groups, as :class:`StackedOptimizer` takes them;
            where some group names ``rank``, the groups without it are AdamW.
        lr: Learning rate (default: 1e-3); there is no further scale.
        betas: Decays of the two moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled weight decay (default: 0.0).
        rank: Number r of cosines (default: 128). An int is a count, a float a fraction of the
            transformed side.
        update_proj_gap: Updates T between two choices (default: 1).
        norm: Norm of a row of S by which it is chosen (default: ``"l1"``, as published). ``"l2"``
            captures most of S, at least the share r / m.
        moments: What a new choice does to the moments (default: ``"match"``). ``"match"`` moves
            rows of equal index, ``"reset"`` zeroes all, ``"keep_if_same"`` matches where at least
            half of the indices stay and else resets, ``"slot"`` leaves rows where they are, as
            published, though they belong to other cosines from then on.
        error_feedback: Store E of what a step leaves out (default: None, no store). ``"full"`` is
            exact, ``"int8"`` and ``"int4"`` have one range for each row of E. Use T >= 10 with it:
            rows that were just used are empty in the next step, so T = 1 changes all of I every
            time and matched moments never grow old.
        bias_correction: Which clock corrects the moments (default: ``"age"``). ``"age"`` counts for
            each row the updates since it entered; ``"global"`` uses t, as published, which moves a
            new row up to 6.6 times too far.
        basis: The matrix D (default: ``"dct2"``). ``"dct3"`` is its transpose, as in the published
            code's path by products.
        transform: How S is made (default: ``"auto"``, by length and device). ``"fft"`` or
            ``"matmul"`` fixes it.
        side: Transformed side (default: ``"auto"``, the shorter one). ``"left"`` transforms the
            columns of W (its first dimension), ``"right"`` its rows.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range.
        TypeError: For an unknown keyword.

    State of an m x n weight, m <= n: ``index`` (r,) and ``age`` (r, 1) int32, ``exp_avg`` and
    ``exp_avg_sq`` (r, n); ``error`` (m, n) float32 in the weight's layout, or uint8 codes (m, n),
    packed (m, ceil(n / 2)), with ``error_low`` and ``error_high`` (m, 1). An index of -1 is not
    chosen yet. Peak temporary memory: buffers of r x n elements and P (m x r); where S is made (at
    a choice, or always with feedback) also S, one matrix like W, and panels; ``"full"`` makes S in
    place of E.

    Caveat: cosines come near an SVD only where neighbouring rows are alike; elsewhere they capture
    as much as any fixed vectors, about r / m. A gradient of zeros chooses nothing. E is stored as
    the coefficients D^T E, where the published code stores E: equal in exact arithmetic, one
    product cheaper, exactly zero in rows that were used even when quantized, and with the range of
    one cosine for each row. The published quantizers' slips are not repeated.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import DCTAdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = DCTAdamW(model, lr=1e-2, rank=2, update_proj_gap=10)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _reference_key = "rank"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        update_proj_gap: int = 1,
        norm: str = "l1",
        moments: str = "match",
        error_feedback: str | None = None,
        bias_correction: str = "age",
        basis: str = "dct2",
        transform: str = "auto",
        side: str = "auto",
        **options: Unpack[Common],
    ) -> None:
        rule = DCTAdamWRule(
            betas=betas,
            eps=eps,
            rank=rank,
            update_proj_gap=update_proj_gap,
            norm=norm,
            moments=moments,
            error_feedback=error_feedback,
            bias_correction=bias_correction,
            basis=basis,
            transform=transform,
            side=side,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`StackedOptimizer`; warns where feedback empties the moments."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        for group in self.param_groups[before:]:
            policy = group["moments"]
            has_feedback = group["error_feedback"] and group["rule"] != "adamw"
            if has_feedback and group["update_proj_gap"] == 1 and policy not in ("slot", "reset"):
                try:
                    warn_user(
                        "error_feedback with update_proj_gap=1 chooses other cosines at every "
                        f"step, so moments={policy!r} empties them; use update_proj_gap >= 10"
                    )
                except UserWarning:  # where warnings are errors
                    del self.param_groups[before:]
                    raise


QUANTIZE_PANEL = 2**18
"""Entries that are quantized at a time, so that no second buffer of E's size is made."""


@dataclass(frozen=True)
class ErrorFeedback:
    """A store for one matrix E (m, n) per weight: exact, or codes with a range for every row.

    Attributes:
        kind: ``"full"`` (in the state's dtype), ``"int8"`` or ``"int4"``.
    """

    kind: str

    @property
    def bits(self) -> int:
        """Bits per entry of the quantized kinds."""
        return 8 if self.kind == "int8" else 4

    def slots(self, n: int) -> dict[str, Slot]:
        """State of a matrix with n columns: m n floats, or m n (m n / 2) bytes and 2 m floats."""
        if self.kind == "full":
            return {"error": Slot("mn")}
        if self.kind == "int8":
            codes = Slot("mn", torch.uint8)
        else:
            codes = Slot("mh", torch.uint8, h=(n + 1) // 2)
        row = Slot("m1", torch.float32)
        return {"error": codes, "error_low": row, "error_high": row}

    def load(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """E (K, m, n) in this dtype: the state itself where it has that form, else a new tensor."""
        stored = state["error"]
        if self.kind == "full":
            return stored.to(dtype)
        low = state["error_low"]
        high = state["error_high"]
        shape = (*stored.shape[:-1], n)
        if stored.shape == shape:  # codes of 8 bits have the weight's layout, so E gets it too
            E = torch.empty_like(stored, dtype=dtype)
        else:
            E = low.new_empty(shape, dtype=dtype)
        for i in _row_panels(E):
            part = dequantize_rows(stored[:, i], low[:, i], high[:, i], self.bits, n)
            E[:, i].copy_(part)
        return E

    def store(self, state: Mapping[str, Tensor], E: Tensor) -> None:
        """Write E (K, m, n) into the state, unless E is the state itself."""
        stored = state["error"]
        if self.kind == "full":
            if stored is not E:
                stored.copy_(E)
            return
        for i in _row_panels(E):
            codes, low, high = quantize_rows(E[:, i].float(), self.bits)
            stored[:, i].copy_(codes)
            state["error_low"][:, i].copy_(low)
            state["error_high"][:, i].copy_(high)


def _row_panels(X: Tensor) -> list[slice]:
    """Rows of X (K, m, n) in pieces of one size."""
    K, m, n = X.shape
    height = max(1, QUANTIZE_PANEL // (K * n))
    return [slice(i, i + height) for i in range(0, m, height)]
