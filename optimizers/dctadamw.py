"""DCT-AdamW: Adam on the largest cosine coefficients of the gradient, chosen anew every T steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import dequantize_rows, quantize_rows
from ._core.rule import AdamFactored, Direction, Member, Rule, Slot
from ._core.validation import check, check_adam, check_choices, resolve_rank
from ._driver.optimizer import StackedOptimizer
from ._driver.param_groups import warn_user
from ._toolkit.moments import IndexBasisChange
from ._toolkit.projectors import DctProjector, clear_rows_, take_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

DCT_MOMENT_POLICIES = ("match", "slot", "reset", "keep_if_same")
CARRIED_KEYS = ("exp_avg", "exp_avg_sq", "age")
FEEDBACK_KINDS = (None, "full", "int8", "int4")
_CODED_PANEL = 2**18  # entries that are coded at a time, so that no buffer of E's size is made


@dataclass(frozen=True)
class DCTAdamWRule(Rule):
    """S = D^T G; I its r largest rows every T updates; N = adam(S[I]); step along D[:, I] N.

    ``refresh`` is left empty: that the driver calls it (G is finite and not zero, the schedule or
    a first choice that is still open asks for it) is all ``update`` must know, and the coefficients
    S in which it chooses are those that it goes on with. With T = 1 there is no schedule: every
    update chooses, no host number decides, so no device is waited for.
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
        check_adam(self.betas, self.eps)
        resolve_rank(self.rank, 2**62)  # raises for what is neither a count nor a fraction
        gap, text = self.update_proj_gap, "update_proj_gap must be an int of at least 1"
        check(isinstance(gap, int) and gap >= 1, f"{text}, got {gap!r}")
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
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """Without error feedback, whose stores know no flags."""
        return self.error_feedback is None

    @property
    def refresh_interval(self) -> int:
        """Updates between two choices, for the driver to count; 0 where every update chooses."""
        return self.update_proj_gap if self.update_proj_gap > 1 else 0

    @property
    def cosines(self) -> DctProjector:
        """The system D, one for all matrices of a size."""
        return DctProjector(self.norm, self.basis, self.transform)

    def transpose(self, m: int, n: int) -> bool:
        """The shorter side is transformed; of a square, as published, the columns."""
        return m >= n if self.side == "auto" else self.side == "right"

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """Numbers instead of a basis; -1 where none was chosen yet."""
        r = resolve_rank(self.rank, m)
        slots = {"index": Slot("r", torch.int32, fill=-1, r=r)}
        if self.bias_correction == "age":
            slots["age"] = Slot("r1", torch.int32, r=r)
        slots |= {"exp_avg": Slot("rn", r=r), "exp_avg_sq": Slot("rn", r=r)}
        feedback = make_error_feedback(self.error_feedback)
        return slots if feedback is None else slots | feedback.slots(n)

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """The cosines."""
        return self.cosines.shared(m)

    def update(self, w: Member) -> Direction:
        """One step for a stack; after turning, rows are transformed."""
        assert w.grad is not None
        G, D, state, feedback = (
            w.grad,
            self.cosines,
            w.state,
            make_error_feedback(self.error_feedback),
        )
        choose_now, S, row_scores = not self.refresh_interval or w.age == 0, None, None
        if feedback is not None:  # E waits as coefficients: nothing is lifted to be subtracted
            S = D.transform(G, onto=feedback.load(state, w.n, G.dtype))  # (K, m, n), D^T G + E
        elif choose_now:
            S, row_scores = D.spectrum(G)
        if choose_now and S is not None:
            self.choose(w, D, S, row_scores)
        index = state["index"].clamp(min=0)
        R = (
            w.reductions.rows(D.project_onto(G, index)) if S is None else take_rows(S, index)
        )  # (K, r, n)
        P = D.selected_columns(index, w.m, R.dtype)  # (K, m, r)
        if feedback is not None and S is not None:
            feedback.store(state, clear_rows_(S, index))
        counted = 1 if w.finite is None else w.finite.to(torch.int32).view(-1, 1, 1)
        t: int | Tensor = state["age"].add_(counted) if self.bias_correction == "age" else w.t
        M, V = state["exp_avg"], state["exp_avg_sq"]
        return w.step(AdamFactored(P, R, M, V, t, self.betas, self.eps, w.finite))

    def choose(self, w: Member, D: DctProjector, S: Tensor, row_scores: Tensor | None) -> None:
        """A new index; moments and ages follow theirs, and start at 0 where one enters."""
        state, old = w.state, w.state["index"]
        new = w.where_finite(D.choose(S, old.shape[-1], old, w.reductions, row_scores), old)
        change, carried_rows = (
            IndexBasisChange(old, new),
            [X for X in map(state.get, CARRIED_KEYS) if X is not None],
        )
        min_share = {"reset": 2.0, "keep_if_same": 0.5}.get(self.moments, 0.0)  # share to stay
        too_few_stay = (change.source >= 0).sum(-1) < min_share * old.shape[-1]
        for X in carried_rows if self.moments != "slot" else ():
            X.copy_(change.apply(X).masked_fill_(too_few_stay.view(-1, 1, 1), 0))
        if "age" in state:  # a slot that was empty begins now, whatever the policy
            state["age"].masked_fill_((old < 0).unsqueeze(-1), 0)
        old.copy_(new)


@dataclass(frozen=True)
class ErrorFeedback:
    """A store for one matrix E (m, n) per weight: exact, or codes with a range for every row.

    Attributes:
        kind: ``"full"`` (in the state's dtype), ``"int8"`` or ``"int4"``.
    """

    kind: str

    @property
    def bits(self) -> int:
        """Bits per entry of the quantised kinds."""
        return 8 if self.kind == "int8" else 4

    def slots(self, n: int) -> dict[str, Slot]:
        """State of a matrix with n columns: m n floats, or m n (m n / 2) bytes and 2 m floats."""
        if self.kind == "full":
            return {"error": Slot("mn")}
        row, byte = torch.float32, torch.uint8
        codes = Slot("mn", byte) if self.kind == "int8" else Slot("mh", byte, h=(n + 1) // 2)
        return {"error": codes, "error_low": Slot("m1", row), "error_high": Slot("m1", row)}

    def load(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """E (K, m, n) in this dtype: the state itself where it is kept so, else a new tensor."""
        E = state["error"]
        if self.kind == "full":
            return E.to(dtype)
        low, high = state["error_low"], state["error_high"]
        shape = (*E.shape[:-1], n)  # codes of 8 bits lie in memory as the weight does
        weight_shaped = E.shape == shape
        out = (
            torch.empty_like(E, dtype=dtype) if weight_shaped else low.new_empty(shape, dtype=dtype)
        )
        for i in _row_panels(out):
            part = dequantize_rows(E[:, i], low[:, i], high[:, i], self.bits, n)
            out[:, i].copy_(part)
        return out

    def store(self, state: Mapping[str, Tensor], E: Tensor) -> None:
        """Keep E (K, m, n); nothing happens if it is the state itself."""
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


def make_error_feedback(kind: str | None) -> ErrorFeedback | None:
    """The store that a user names in ``error_feedback=``."""
    return None if kind is None else ErrorFeedback(kind)


def _row_panels(X: Tensor) -> list[slice]:
    """Rows of X (K, m, n) in pieces of one size."""
    K, m, n = X.shape
    carried_rows = max(1, _CODED_PANEL // (K * n))
    return [slice(i, i + carried_rows) for i in range(0, m, carried_rows)]


class DCTAdamW(StackedOptimizer):
    """DCT-AdamW: Adam's moments for r cosines of the gradient, without any factorisation.

    For each matrix W with gradient G (m x n, turned so that m <= n; a square is turned), D the
    orthonormal cosines of length m, one matrix for all weights of that side::

        S = D^T G + E                     E: error feedback, zero without it
        t = 1, T, 2T, ...:  I <- the r rows of S of largest norm; M, V, ages follow, or begin at 0
        R = S[I];  E <- S with rows I zeroed
        M, V <- Adam's moments of R;  N = Mhat / (sqrt(Vhat) + eps), every row at its own age
        W <- (1 - lr * weight_decay) W - lr * D[:, I] N

    Source: *FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
    Language Models*, arXiv 2505.17967.

    Args:
        params: As for :class:`StackedOptimizer`; where some group names ``rank``, others are AdamW.
        lr: Learning rate (default: 1e-3); there is no further scale.
        betas: Decays of the moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled weight decay (default: 0).
        rank: r, a count or a fraction of the transformed side (default: 128).
        update_proj_gap: Updates between two choices, T (default: 1).
        norm: Norm of a row of S: ``"l1"`` (default, as published) or ``"l2"``, which captures the
            most of S, at least the share r / m.
        moments: At a new choice: ``"match"`` (default) rows of equal index, ``"reset"`` all,
            ``"keep_if_same"`` match where at least half of the indices stay and else reset, or
            ``"slot"`` leave them where they are, as published: they then belong to other cosines.
        error_feedback: What the step leaves out waits as E: None (default), ``"full"``, or
            ``"int8"`` and ``"int4"`` with one range per row of E. Use T >= 10 with it: what was
            just used is empty in the next step, so T = 1 changes I wholly every time, and matched
            moments never grow old.
        bias_correction: ``"age"`` (default): of every row by the updates since it entered;
            ``"global"``: by t, as published, which moves a new row up to 6.6 times too far.
        basis: ``"dct2"`` (default), or ``"dct3"``, D transposed, as in the published product path.
        transform: ``"fft"``, ``"matmul"``, or by length and device ``"auto"`` (default).
        side: ``"auto"`` (default) transforms the shorter side, ``"left"`` the columns of W (its
            first dimension), ``"right"`` its rows.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State of an m x n weight, m <= n: ``index`` (r,) and ``age`` (r, 1) int32, ``exp_avg`` and
    ``exp_avg_sq`` (r, n); ``error`` (m, n) float32 in the weight's layout, or uint8 codes (m, n),
    packed (m, ceil(n / 2)), with ``error_low`` and ``error_high`` (m, 1). An index of -1 is not
    chosen yet. Peak temporary memory: r x n buffers and P (m x r); where S is made (at a choice,
    or always with feedback) also S, one matrix like W, and panels; ``"full"`` makes S in E.

    What it is not: near an SVD on any gradient. Cosines capture as much only where neighbouring
    rows are alike; else as much as any fixed vectors, about r / m. A gradient of zeros chooses
    nothing. E is kept as coefficients D^T E, where the published code keeps E itself: in exact
    arithmetic the same, one product cheaper, what was used stays exactly zero when quantised, and
    the range of a row is that of one cosine. The published quantisers' slips are not copied.

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
            betas,
            eps,
            rank,
            update_proj_gap,
            norm,
            moments,
            error_feedback,
            bias_correction,
            basis,
            transform,
            side,
        )
        super().__init__(params, rule, lr, weight_decay, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`StackedOptimizer`; warns where feedback empties the moments."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        for group in self.param_groups[before:]:
            policy, has_feedback = (
                group["moments"],
                group["error_feedback"] and group["rule"] != "adamw",
            )
            if has_feedback and group["update_proj_gap"] == 1 and policy not in ("slot", "reset"):
                warn_user(
                    "error_feedback with update_proj_gap=1 chooses other cosines at every step, so "
                    f"moments={policy!r} empties them; use update_proj_gap >= 10"
                )
