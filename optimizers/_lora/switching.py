"""Exchange of vectors of LoRA factors: schedule, fold into W0, initialization, export.

W = W0 + s B A, with row i of A and column i of B each other's counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import Rounding, update_weight_
from .._core.rule import Factored, Member
from .._core.validation import check
from .._core.views import split_view
from .._driver.decay import Decay
from .._driver.param_groups import describe, parameters_of
from .._driver.write import write_
from .pair_groups import refuse_quantized

if TYPE_CHECKING:
    from .._driver.buckets import StepPlan

__all__ = [
    "base_sums",
    "check_triples",
    "drop_residual_",
    "exchange_vectors_",
    "fold_into_weight_",
    "init_stds",
    "merge_weights",
    "refuse_other_base_weights",
    "reset_vectors_",
    "store_base_sums",
    "switch_rate",
    "switchlora_init_",
]

SUM_PANEL = 2**20
"""Entries of a base weight that are summed in float64 at a time."""


def switch_rate(t: int, horizon: float) -> float:
    """Share of the switches left at update t, from 1: 0.3^(t / horizon), at least 1e-8."""
    return max(math.pow(0.3, t / horizon), 1e-8)


def exchange_vectors_(
    A: Tensor, B: Tensor, I: Tensor, C: Tensor, J: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """Set A[I] <- C, then B[:, J] <- D^T, in place; return the loss of B A as two factors.

    Args:
        A: (r, n).
        B: (m, r).
        I: (k,) rows of A that leave; J may name the same.
        C: (k, n) vectors that enter.
        J: (l,) columns of B that leave.
        D: (l, m) vectors that enter, as rows.

    Returns:
        P (m, k + l) and N (k + l, n) with (B A before) = (B A after) + P N, at least float32.
    """
    work = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    old_rows, kept_columns = A[I].to(work), B[:, I].to(work)
    update_weight_(A, lambda X: X.index_put_((I,), C.to(X)), A.dtype)
    old_columns = B[:, J].to(work)
    update_weight_(B.mT, lambda X: X.index_put_((J,), D.to(X)), B.dtype)
    P = torch.cat([kept_columns, old_columns - D.mT.to(work)], 1)
    return P, torch.cat([old_rows - C.to(work), A[J].to(work)])


def fold_into_weight_(
    W: Tensor, P: Tensor, N: Tensor, s: float, rounding: Rounding | None = None
) -> None:
    """W (m, n) <- W + s P N, panel by panel in at least float32 and rounded once."""
    m, n = W.shape
    w = Member(None, lambda: W, {}, t=0, refreshed=0, m=m, n=n, indices=(0,))
    step = w.step(Factored(P[None], N[None]), lr_factor=-s)
    write_(W[None], step, 1.0, Decay(0.0), None, rounding)


def reset_vectors_(w: Member, j: int, at: Tensor, freeze: int) -> None:
    """Zero the state of vectors ``at`` of matrix j, whose counterparts are new, and freeze them."""
    values = {"exp_avg": 0, "exp_avg_sq": 0, "count": 0, "frozen": max(freeze, 0)}
    for key, value in values.items():
        X = w.state[key][j]
        X.index_fill_(w.number, at.to(X.device), value)


def drop_residual_(w: Member, j: int, at: Tensor) -> None:
    """Zero what rounding had cut off from the vectors ``at`` of matrix j, which are new."""
    if w.rounding is not None and w.rounding.residual is not None:
        X = w.rounding.residual[j]
        X.index_fill_(w.number, at.to(X.device), 0)


# initialization -----------------------------------------------------------------------------------


def init_stds(m: int, n: int, r: int, s: float) -> tuple[float, float]:
    """Standard deviations of the entries of A and of B.

    With them s B A has entries as ``torch.nn.Linear`` draws them, gain / sqrt(n) with gain
    1 / sqrt(3), and a step of A changes W as much as a step of B.
    """
    std = math.sqrt(1 / (math.sqrt(3) * s * math.sqrt(r * n)))
    return std * (m / n) ** 0.125, std * (n / m) ** 0.125


@torch.no_grad()
def switchlora_init_(
    W0: Tensor, A: Tensor, B: Tensor, scale: float, generator: torch.Generator | None = None
) -> None:
    """Draw both factors as SwitchLoRA does, and subtract s B A from W0: the layer's weight stays.

    The optimizer draws its pools from the same distribution.

    Args:
        W0: (m, n), changed in place; ``weight.mT`` of a layer that stores it transposed.
        A: (r, n), overwritten by uniform numbers.
        B: (m, r), overwritten by uniform numbers.
        scale: s of W = W0 + s B A; 1 / r in the published runs.
        generator: Source of random numbers on the factors' device; None (default): torch's global
            one.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import switchlora_init_
        >>> W = torch.randn(6, 8)
        >>> W0, A, B = W.clone(), torch.empty(2, 8), torch.empty(6, 2)
        >>> switchlora_init_(W0, A, B, scale=0.5)
        >>> torch.allclose(W0 + 0.5 * B @ A, W, atol=1e-6)
        True
    """
    (r, n), m = A.shape, B.shape[0]
    check(
        B.shape[1] == r and W0.shape == (m, n),
        f"W0, A and B must be (m, n), (r, n) and (m, r), got {tuple(W0.shape)}, {tuple(A.shape)} "
        f"and {tuple(B.shape)}",
    )
    for X, std in zip((A, B), init_stds(m, n, r, scale), strict=True):
        X.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
    work = torch.promote_types(A.dtype, torch.float32)
    fold_into_weight_(W0, B.to(work), A.to(work), -scale)


# export -------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_weights(plan: StepPlan, names: Sequence[str | None]) -> dict[str | int, Tensor]:
    """W0 + s B A of every triple, by W0's name or, without one, its position."""
    weights: dict[str | int, Tensor] = {}
    for unit in plan.units:
        rule, at = plan.rule(unit), unit.positions[-1]
        if rule is None or rule.members != ("A", "B", "W0"):
            continue
        W = unit.params[2].detach().clone()
        A, B, X = (
            view.to_matrices(p.detach())
            for view, p in zip(unit.views, (*unit.params[:2], W), strict=True)
        )
        work = torch.promote_types(A.dtype, torch.float32)
        for a, b, x in zip(A, B, X, strict=True):
            fold_into_weight_(x, b.to(work), a.to(work), rule.scale)  # type: ignore[attr-defined]
        weights[names[at] or at] = unit.views[2].from_matrices(X, tuple(W.shape))
    return weights


# base weights of a checkpoint ---------------------------------------------------------------------


@torch.no_grad()
def base_sums(W: Tensor) -> list[float]:
    """Sum and sum of squares of a weight in float64: they change with every switch."""
    flat, total, squares = W.detach().reshape(-1), 0.0, 0.0
    for x in torch.split(flat, SUM_PANEL):
        x = x.double()
        total, squares = total + float(x.sum()), squares + float(x.square().sum())
    return [total, squares, float(torch.finfo(W.dtype).eps)]


def store_base_sums(groups: Sequence[dict[str, Any]]) -> None:
    """Put the sums of all base weights into their groups, as a list beside ``params``."""
    for group in groups:
        if group["rule"] != "adamw":
            count = len(group["params"])
            group["base_sums"] = [
                base_sums(p) if i % 3 == 2 and not p.is_meta else None
                for i, p in zip(range(count), group["params"], strict=True)
            ]


def refuse_other_base_weights(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a base weight is not the one that a checkpoint was saved with.

    Args:
        groups: Groups of triples, with the sums that were saved; None: nothing is known.

    Raises:
        ValueError: With the way to save base weights.
    """
    for group in groups:
        sums = group.get("base_sums") if group["rule"] != "adamw" else None
        names = group.get("param_names")
        for i, p in enumerate(group["params"] if sums is not None else ()):
            saved = sums[i] if i < len(sums) else None  # type: ignore[index, arg-type]
            if saved is None or p.is_meta or _are_equal_sums(saved, base_sums(p), p.numel()):
                continue
            text = describe(names[i] if names and i < len(names) else None, p, i)
            raise ValueError(
                f"{text} is not the base weight that this checkpoint was saved with: SwitchLoRA "
                "changes base weights, which adapter files (peft, Trainer) leave out; save "
                "model.state_dict() whole, and load it before the first step, as the docstring of "
                "SwitchLoRA shows"
            )


def _are_equal_sums(saved: Sequence[float], found: Sequence[float], count: int) -> bool:
    """Whether sums may be of one weight, whose dtype may have changed in between."""
    (total, squares, eps), (new_total, new_squares, new_eps) = saved, found
    # equal dtypes: only the order of the sum differs
    tolerance = 1e-9 if eps == new_eps else max(eps, new_eps)
    near_total = abs(new_total - total) <= tolerance * math.sqrt(count * max(squares, new_squares))
    return near_total and abs(new_squares - squares) <= tolerance * max(squares, new_squares)


# checks -------------------------------------------------------------------------------------------


def check_triples(group: Mapping[str, Any]) -> None:
    """Refuse triples A, B, W0 that cannot be switched; pairs of factors are checked already."""
    params, names = parameters_of(group)
    views = [group["view"]] * 3 if isinstance(group["view"], str) else list(group["view"])
    used: set[int] = set()
    for i in range(0, len(params), 3):
        texts = [describe(names[i + k], params[i + k], i + k) for k in range(3)]
        for p, text in zip(params[i : i + 3], texts, strict=True):
            if not isinstance(p, Tensor):
                raise TypeError(f"{text} must be a tensor, got {type(p).__name__}")
        _check_trained(params[i : i + 3], texts)
        base_weight = params[i + 2]
        check(
            id(base_weight) not in used,
            f"{texts[2]} is the base weight of two pairs; only one of them can be switched",
        )
        used.add(id(base_weight))
        _check_shapes(params[i : i + 3], texts, views)


def _check_trained(triple: Sequence[Tensor], texts: Sequence[str]) -> None:
    """Both factors must train, and W0 must be a frozen plain weight."""
    *factors, W = triple
    refuse_quantized(W, texts[0])
    for p, text in zip(factors, texts, strict=False):
        check(
            p.requires_grad,
            f"{text} is frozen, but SwitchLoRA trains both factors; set requires_grad or leave "
            "the triple out",
        )
    check(
        not W.requires_grad,
        f"{texts[2]} is a base weight, which SwitchLoRA writes itself; call requires_grad_(False)",
    )


def _check_shapes(triple: Sequence[Tensor], texts: Sequence[str], views: Sequence[str]) -> None:
    """W0 must have the sides of B A, and the rank must leave a vector to switch."""
    A, B, W = (split_view(view, tuple(p.shape))[0] for view, p in zip(views, triple, strict=True))
    check(
        (W.k, W.m, W.n) == (A.k, B.m, A.n),
        f"{texts[2]} must hold {A.k} matrices of {B.m} x {A.n} for its factors, got shape "
        f"{tuple(triple[2].shape)}; give it view 'transposed' if it is stored (in, out)",
    )
    check(
        A.m >= 2,
        f"{texts[0]} has rank 1, but switching needs rank 2 at least: a vector stays still while "
        "its counterpart is new",
    )
