"""Muon: momentum, then the orthogonal factor of the momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import (
    POLAR_METHODS,
    SKETCHES,
    PolarReport,
    low_rank_size,
    polar_factor,
    polar_report,
)
from ._core.rule import Dense, Direction, Member, Reductions, Rule, Scaled, Slot, Term
from ._core.validation import check, check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.moments import column_squares, ema, momentum_step, safe_square_scale, total
from ._toolkit.random_keys import StackRNG

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

ADJUST_LR_FNS = ("auto", "original", "match_rms_adamw", "spectral", "none", None)


@dataclass(frozen=True)
class OrthogonalRule(Rule, abstract=True):
    """A polar step, its scale, and guards of the gradient, as Muon's docstring explains them."""

    polar: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None
    eps: float = 1e-7
    adjust_lr_fn: str | None = "auto"
    compat: str | None = None
    polar_norm: str | None = None
    polar_dtype: str | None = None
    rank: int | float = 0.125
    oversample: int = 10
    power: int = 1
    sketch: str = "signs"
    inner: str = "polar_express"
    rank_compensate: bool = False
    seed: int = 0
    report_steps: int = 0
    clip_grad_rms: float | None = None
    normalize_grad: bool = False
    spike_ratio: float | None = None

    def __post_init__(self) -> None:
        check(0.0 <= self.eps, f"Invalid epsilon value: {self.eps}")
        check(
            self.adjust_lr_fn in ADJUST_LR_FNS,
            f"Adjust learning rate function {self.adjust_lr_fn} is not supported",
        )
        check(
            self.compat in (None, "torch"), f"compat must be None or 'torch', got {self.compat!r}"
        )
        known = (*POLAR_METHODS, "low_rank")
        check(
            self.polar in ("auto", *known),
            f"polar must be 'auto' or one of {', '.join(known)}, got {self.polar!r}",
        )
        check(
            self.compat is None or self.polar in ("auto", "ns5"),
            f"compat='torch' iterates with ns5; leave polar unset instead of {self.polar!r}",
        )
        check(
            self.compat is None or self.polar_norm is None,
            "compat='torch' divides by the Frobenius norm; leave polar_norm unset",
        )
        check(
            self.compat is None or self.polar_dtype is None,
            "compat='torch' iterates in bfloat16; leave polar_dtype unset",
        )
        steps = self.ns_steps
        check(
            steps is None or (isinstance(steps, int) and not isinstance(steps, bool)),
            f"ns_steps must be None or an int, got {steps!r}",
        )
        check(
            steps is None or 1 <= steps < 100,
            "Number of steps must be less than 100 for computational efficiency",
        )
        check(
            self.sketch in SKETCHES,
            f"sketch must be one of {', '.join(SKETCHES)}, got {self.sketch!r}",
        )
        for name in ("seed", "report_steps"):
            value = getattr(self, name)
            check(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                f"{name} must be an int of at least 0, got {value!r}",
            )
        clip, ratio = self.clip_grad_rms, self.spike_ratio
        check(clip is None or clip > 0, f"clip_grad_rms must be above 0, got {clip}")
        check(ratio is None or ratio > 1, f"spike_ratio must be above 1, got {ratio}")
        check(
            not self.normalize_grad or (clip is None and ratio is None),
            "normalize_grad fixes the norm; leave clip_grad_rms and spike_ratio unset",
        )
        low_rank_size(1, 1, self.rank, self.oversample)
        self.orthogonalize(torch.empty(1, 0, 1))  # what the kernel refuses is refused here

    @property
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """Where nothing is reported, and no draw looks at G."""
        drawn = self.polar == "low_rank" and self.sketch == "kaczmarz"
        return self.compat is None and not drawn and not self.report_steps

    def extra_slots(self) -> dict[str, Slot]:
        """The state of ``clipped_grad`` and ``polar_step``."""
        slots = {}
        if self.spike_ratio is not None:
            slots["grad_norm"] = Slot("11")
        if self.report_steps:
            slots["polar_report"] = Slot("f", dtype=torch.float32, f=5)
        return slots

    def clipped_grad(self, w: Member) -> Tensor:
        """The gradient (K, m, n), normalised or limited where the rule is told so."""
        assert w.grad is not None
        clip, ratio = self.clip_grad_rms, self.spike_ratio
        if not self.normalize_grad and clip is None and ratio is None:
            return w.grad
        G = w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        square_scale = safe_square_scale(G)  # (K, 1, 1), a power of two
        G = G * square_scale
        norm = w.reductions.both(total(column_squares(G))).sqrt()  # that of c times the gradient
        if self.normalize_grad:
            return G.div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))
        row_scale = square_scale.reciprocal()
        if clip is not None:
            row_scale = torch.minimum(clip * math.sqrt(w.m * w.n) / norm, row_scale)
        if ratio is not None:
            row_scale = row_scale * spike_factor(
                norm * row_scale, w.state["grad_norm"], ratio, finite=w.finite
            )
        return G.mul_(row_scale)

    def polar_step(self, w: Member, U: Tensor) -> Tensor:
        """The polar factor of U (K, m, n) for a step of w; its quality goes into the state."""
        rng = StackRNG(self.seed, w.indices, w.t)
        keys = [rng.key(k) for k in range(len(U))] if self.polar == "low_rank" else []

        def factor_with_report(X: Tensor) -> Tensor:
            O = self.orthogonalize(X, keys)
            if self.report_steps and w.t % self.report_steps == 0:
                rows = [_report_row(M.clone(), P.clone()) for M, P in zip(X, O, strict=True)]
                w.state["polar_report"].copy_(torch.tensor(rows))
            return O

        return w.reductions.on_full_matrix(factor_with_report, U)

    def orthogonalize(self, U: Tensor, keys: Sequence[int] = ()) -> Tensor:
        """The polar factor of every matrix of U (K, m, n); ``keys`` for their sketches."""
        factor = partial(
            polar_factor, steps=self.ns_steps, coefficients=self.ns_coefficients, eps=self.eps
        )
        if self.compat == "torch":
            O = factor(U, "ns5", dtype=torch.bfloat16, exact=True)
            # torch adds the factor of a tall matrix as a transposed view; bfloat16 weights round
            # such a sum otherwise
            return O if U.shape[-2] <= U.shape[-1] else O.mT.contiguous().mT
        options: dict[str, Any] = {}
        if self.polar_norm is not None:
            options["norm"] = self.polar_norm
        if self.polar_dtype is not None:
            options["dtype"] = getattr(torch, self.polar_dtype, None) or self.polar_dtype
        if self.polar == "low_rank":
            for name in ("rank", "oversample", "power", "sketch", "inner"):
                options[name] = getattr(self, name)
            options["key"] = keys or 0
        return factor(U, self.polar, **options)

    def lr_factor(self, m: int, n: int) -> float:
        """What multiplies lr in the update, never in the decay."""
        name = self.adjust_lr_fn
        if name == "auto":
            name = "original" if self.compat else "match_rms_adamw"
        ratio = {
            "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
            "spectral": math.sqrt(m / n),
            "none": 1.0,
        }.get(name or "original", math.sqrt(max(1, m / n)))
        if self.rank_compensate and self.polar == "low_rank":
            ratio *= math.sqrt(min(m, n) / low_rank_size(m, n, self.rank, self.oversample))
        return ratio


@dataclass(frozen=True)
class MuonRule(OrthogonalRule):
    """B <- B + (1 - mu)(G - B); U = G + mu (B - G); step along polar(U), scaled by its shape."""

    momentum: float = 0.95
    nesterov: bool = True
    momentum_kind: str = "ema"
    second_moment: str | None = None
    beta2: float | None = None
    cautious: bool = False
    decay_schedule: str = "lr"

    def __post_init__(self) -> None:
        check(0.0 <= self.momentum, f"momentum should be >= 0 but is: {self.momentum}")
        super().__post_init__()
        check_choices(
            self,
            momentum_kind=("ema", "sum"),
            second_moment=(None, "normuon", "adamuon"),
            decay_schedule=("lr", "lr2"),
        )
        check(
            0.0 <= self.second_moment_decay < 1.0,
            f"beta2 must lie in [0, 1), got {self.second_moment_decay}",
        )
        corrected_twice = self.rank_compensate and self.second_moment == "adamuon"
        check(
            not corrected_twice,
            "second_moment='adamuon' has an exact RMS; leave rank_compensate unset",
        )
        matches_torch = self.momentum_kind == "ema" and self.second_moment is None
        check(
            self.compat is None or matches_torch,
            "compat='torch' averages, and once; leave momentum_kind and second_moment unset",
        )

    @property
    def second_moment_decay(self) -> float:
        """Decay of the second moment."""
        if self.beta2 is not None:
            return self.beta2
        return self.momentum if self.second_moment == "adamuon" else 0.95

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The buffer, in the gradient's dtype under ``compat`` as torch keeps it, and extras."""
        slots = {"momentum_buffer": Slot("mn", dtype="weight" if self.compat else None)}
        if self.second_moment == "normuon":
            slots["row_second_moment"] = Slot("m1")
        if self.second_moment == "adamuon":
            slots["second_moment"] = Slot("mn")
        return {**slots, **self.extra_slots()}

    def update(self, w: Member) -> Direction:
        """One step for a stack."""
        B, mu = w.state["momentum_buffer"], self.momentum
        G = self.clipped_grad(w).to(B.dtype) if self.compat else self.clipped_grad(w)
        U = momentum_step(B, G, mu, self.nesterov, self.momentum_kind, w.finite)  # (K, m, n)
        O = self.polar_step(w, U.sign() if self.second_moment == "adamuon" else U)
        term: Term = Dense(O)
        if self.second_moment == "normuon":
            V = w.state["row_second_moment"]
            term = Scaled(
                O, normuon_scale(O, V, self.second_moment_decay, w.reductions, w.n, finite=w.finite)
            )
        elif self.second_moment == "adamuon":
            norm, V = math.sqrt(min(w.m, w.n)), w.state["second_moment"]  # of an exact factor
            O, row_scale = adamuon_scale(
                O, V, self.second_moment_decay, w.reductions, norm, finite=w.finite
            )
            term = Scaled(O, row_scale)
        # what scales O above is never negative, so O has the signs of the step
        decay = O * w.value.to(O.dtype) >= 0 if self.cautious else None
        power = 2 if self.decay_schedule == "lr2" else 1
        return w.step(
            term,
            lr_factor=self.lr_factor(w.m, w.n),
            decay=decay,
            decay_power=power,
            torch_bits=self.compat == "torch",
        )


def spike_factor(
    norm: Tensor, stored: Tensor, ratio: float, beta: float = 0.9, finite: Tensor | None = None
) -> Tensor:
    """What a gradient is multiplied by so that its norm is at most ratio times their average.

    Args:
        norm: (K, 1, 1) norms of this step.
        stored: (K, 1, 1) the average of the limited norms, changed in place; 0: none yet. A norm
            that is not finite is not stored.
        ratio: Above 1.
        beta: Decay of the average.
        finite: None, or flags (K,): where one is 0 nothing is stored.

    Returns:
        (K, 1, 1), at most 1.
    """
    previous = stored.to(norm.dtype)
    has_average, limit = previous > 0, ratio * previous
    limited_norm = torch.where(has_average, torch.minimum(norm, limit), norm)
    updated = torch.where(has_average, previous.lerp(limited_norm, 1 - beta), limited_norm)
    finite = (
        limited_norm.isfinite()
        if finite is None
        else limited_norm.isfinite() & (finite.view(-1, 1, 1) != 0)
    )
    stored.copy_(torch.where(finite, updated, previous))
    return torch.where(has_average & (norm > limit), limit / norm, 1.0)


def normuon_scale(
    O: Tensor,
    second_moment: Tensor,
    beta2: float,
    reductions: Reductions,
    n: int,
    eps: float = 1e-10,
    finite: Tensor | None = None,
) -> Tensor:
    """NorMuon's: rows of O divided by their own running size, ||O||_F kept.

    v <- beta2 v + (1 - beta2) mean over columns of O*O; O' = O / (sqrt(v) + eps), then scaled to
    the norm of O. A bias of v is one factor for all rows, so it cancels. Both norms come from the
    squares of the rows of O. Source: NorMuon, arXiv 2510.05491.

    Args:
        O: (K, m, n), not changed.
        second_moment: v, (K, m, 1), changed in place.
        beta2: Decay of v.
        reductions: Sums over the weight's indices.
        n: Columns of the whole weight.
        eps: Added to the root and to the norm of O'.
        finite: As for :func:`momentum_step`.

    Returns:
        (K, m, 1), by which the rows of O are multiplied.
    """
    squares = reductions.cols(column_squares(O.mT).mT)
    row_scale = ema(second_moment, squares / n, beta2, finite).sqrt().add(eps).reciprocal()
    old, new = (
        reductions.rows(total(x.mT)).sqrt() for x in (squares, squares * row_scale * row_scale)
    )
    return row_scale * (old / (new + eps))


def adamuon_scale(
    O: Tensor,
    second_moment: Tensor,
    beta2: float,
    reductions: Reductions,
    norm: float,
    eps: float = 1e-8,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """AdaMuon's: entries of O divided by their own running size, then scaled to a given norm.

    V <- beta2 V + (1 - beta2) O*O; O' = O / (sqrt(V) + eps), without bias correction, which would
    cancel. Source: AdaMuon, arXiv 2507.11005.

    Args:
        O: (K, m, n), not changed.
        second_moment: V, (K, m, n), changed in place.
        beta2: Decay of V.
        reductions: Sums over the weight's indices.
        norm: The Frobenius norm to scale to.
        eps: Added to the root and to the norm of O'.
        finite: As for :func:`momentum_step`.

    Returns:
        O' (K, m, n), a new tensor, and what it is to be multiplied by, (K, 1, 1).
    """
    V = ema(second_moment, O.square(), beta2, finite)
    scaled = O / V.sqrt().add_(eps)
    norm_now = reductions.both(total(column_squares(scaled))).sqrt()
    return scaled, norm / (norm_now + eps)


def _report_row(M: Tensor, O: Tensor) -> list[float]:
    """The five figures of a report; zeros for a zero matrix, which has none."""
    try:
        quality = polar_report(M, O)
    except ValueError:
        return [0.0] * 5
    return [getattr(quality, name) for name in PolarReport.__dataclass_fields__]


def reports(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, list[PolarReport | None]]:
    """The last recorded report of every matrix, by the parameter's name or else its position."""
    quality: dict[str, list[PolarReport | None]] = {}
    params = [
        (p, name)
        for group in groups
        for p, name in zip(
            group["params"],
            chain(group.get("param_names") or (), repeat(None)),  # some were appended later
            strict=False,
        )
    ]
    for i, (p, name) in enumerate(params):
        for key, rows in state.get(p, {}).items():
            if key.partition(".")[0] == "polar_report":
                for row in rows.view(-1, 5).tolist():
                    report = PolarReport(*row) if any(row) else None
                    quality.setdefault(name or str(i), []).append(report)
    return quality


def settings_with_view(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with Muon's words for shapes put into ``view``'s: see ``views.py``.

    ``matrix_view="flatten" | "batch" | "auto"`` is taken as it is, ``split_sizes=(a, b, c)`` is
    ``rows:a,b,c`` and ``num_heads=h`` is ``heads:h``.
    """
    settings = dict(settings)
    view_options = {
        name: value
        for name in ("matrix_view", "split_sizes", "num_heads")
        if (value := settings.pop(name, None)) is not None
    }
    if not view_options:
        return settings
    option_names = [*view_options, *(["view"] if "view" in settings else [])]
    check(
        len(option_names) == 1, f"{' and '.join(option_names)} exclude each other: pass one of them"
    )
    ((name, value),) = view_options.items()
    if name == "matrix_view":
        check(
            value in ("auto", "flatten", "batch"),
            f"matrix_view must be 'auto', 'flatten' or 'batch', got {value!r}",
        )
        settings["view"] = value
    elif name == "split_sizes":
        is_sequence = isinstance(value, Iterable) and not isinstance(value, str)
        sizes = list(value) if is_sequence else []
        check(
            bool(sizes) and all(map(_is_count, sizes)),
            f"split_sizes must be a list of ints of at least 1, got {value!r}",
        )
        settings["view"] = "rows:" + ",".join(map(str, sizes))
    else:
        check(_is_count(value), f"num_heads must be an int of at least 1, got {value!r}")
        settings["view"] = f"heads:{value}"
    return settings


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def heavy_tail_schedule(T: int, alpha: float | None = None) -> tuple[float, float]:
    """Learning rate multiplier and momentum for T steps of gradients with heavy-tailed noise.

    Of noise only the moment E ||noise||^alpha is finite, 1 < alpha <= 2. What balances the drift,
    bias and noise terms lr / (1 - mu) + (1 - mu)^((alpha - 1) / alpha) + 1 / (lr T) is

        1 - mu = T^(-alpha / (3 alpha - 2)),    lr ~ T^(-(2 alpha - 1) / (3 alpha - 2)).

    The balance is our own, the rate T^(-(alpha - 1) / (3 alpha - 2)) that of arXiv 2605.06884.

    Args:
        T: Number of steps, at least 1.
        alpha: The moment; None: not known, then the exponents are 1/2 and 3/4, which are those of
            alpha = 2, at the rate T^(-(alpha - 1) / (2 alpha)).

    Returns:
        (what the learning rate is multiplied by, momentum).

    Raises:
        ValueError: T or alpha is out of range.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    if alpha is None:
        alpha = 2.0
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"alpha must lie in (1, 2], got {alpha}: pass None if it is not known")
    d = 3 * alpha - 2
    return T ** (-(2 * alpha - 1) / d), 1 - T ** (-alpha / d)


class Muon(StackedOptimizer):
    """Muon: orthogonalised momentum for matrices, AdamW for everything else.

    For each matrix W (m x n) with gradient G::

        B <- B + (1 - momentum) (G - B)                       momentum
        U  = G + momentum (B - G)   if nesterov else   B
        O  = polar(U)                                         all singular values near 1
        W <- (1 - lr * weight_decay) W                        decay with the bare lr
        W <- W - lr * ratio(m, n) * O                         RMS 0.2 by default, as AdamW's

    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024; *Muon is
    Scalable for LLM Training*, arXiv 2502.16982; low rank 2605.06884, NorMuon 2510.05491, AdaMuon
    2507.11005. All that follows ``compat`` is off by default, and each a group key too.

    Args:
        params: A module, (named) parameters or groups (KellerJordan's with ``use_muon`` too).
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.1).
        momentum: Decay of the momentum average (default: 0.95).
        nesterov: Look ahead by one gradient (default: True).
        polar: ``"auto"`` (``"zolo"`` on CPU, ``"ns5"`` in bfloat16 on accelerators, and wherever
            ``ns_steps``, ``ns_coefficients`` or ``polar_norm`` is given), ``"low_rank"``, or
            another method of :func:`stiefel.kernels.polar_factor`.
        ns_steps: Iterations of a polynomial method; None: its own number.
        ns_coefficients: One triple (a, b, c), or one for each step; None: the method's own.
        eps: Smallest norm to divide by (default: 1e-7).
        adjust_lr_fn: ratio(m, n): ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)); ``"original"`` (or
            None, as in torch) sqrt(max(1, m / n)); ``"spectral"`` sqrt(m / n); ``"none"`` 1.
            ``"auto"`` (default): ``"match_rms_adamw"``, under ``compat`` ``"original"``.
        compat: ``"torch"`` has the arithmetic of ``torch.optim.Muon``, bit for bit: ns5 in
            bfloat16 and the buffer in the gradient's dtype. It is slow on a CPU.
        polar_norm: What a polynomial method divides by: ``"frobenius"``, ``"schatten4"``,
            ``"aol"``, ``"power:k"``; None: the method's own.
        polar_dtype: Name of the iteration's dtype; None: as ``polar_factor`` has it.
        rank: Of ``"low_rank"``: columns of its sketch, a count or a fraction of min(m, n) (0.125);
        oversample: columns beyond them (10);
        power: power steps (1);
        sketch: ``"signs"`` from a hash on W's device, ``"gaussian"`` or ``"kaczmarz"``, which are
            drawn on the CPU, all from (``seed``, position, step);
        inner: the method inside, to which ``ns_steps`` and ``ns_coefficients`` belong;
        rank_compensate: whether ratio grows by sqrt(min(m, n) / rank of O), to keep the RMS;
        seed: and the seed (0).
        momentum_kind: ``"ema"``, or ``"sum"``: B <- momentum B + G, U = G + momentum B. The same
            direction, but B is 1 / (1 - momentum) as large.
        second_moment: ``"normuon"`` divides rows of O by their running size and keeps its norm;
            ``"adamuon"`` takes polar(sign(U)), divides entries, and makes the norm exact.
        beta2: Its decay; None: 0.95 (NorMuon) or ``momentum`` (AdaMuon).
        cautious: Decay only entries where O * W >= 0.
        decay_schedule: ``"lr"``, or ``"lr2"``: W <- (1 - lr^2 * weight_decay) W.
        clip_grad_rms: Limit of the RMS of G; like the next two it guards B against heavy tails.
        normalize_grad: Take G / ||G||_F.
        spike_ratio: Limit of ||G||_F, relative to its running average (decay 0.9).
        report_steps: Keep a :class:`PolarReport` of every so many steps for :meth:`reports`; the
            steps are the same, but such a one takes an SVD of U and waits for the device. 0: never.
        matrix_view: ``view`` by other names: ``"auto"``, ``"flatten"`` (a Conv1d needs it), or
            ``"batch"``;
        split_sizes: rows of fused weights, such as q, k, v, each orthogonalised by itself;
        num_heads: or equal runs of rows.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State: ``momentum_buffer`` (like W, float32) and ``step``; ``row_second_moment`` (m x 1) or
    ``second_moment`` (like W), ``grad_norm`` (1 x 1), ``polar_report`` (5) where asked for.
    Checkpoints of ``torch.optim.Muon`` load. Peak temporary memory: five matrices of the largest
    weight, one more each under AdaMuon and the guards of G; half of it for ``"low_rank"``.

    What it is not: exactly orthogonal. Singular values of O lie in the band that
    :func:`stiefel.kernels.polar_factor` states, 0.87 to 1.13 for ``"zolo"`` (0.94 to 1.06 above a
    shorter side of 256), and fall to zero for singular values of U below about 1/300 (1/1000) of
    its norm. ``"low_rank"`` leaves out what its sketch does not span. Embeddings and heads belong
    to AdamW, where a module or parameter names route them.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Muon
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Muon(model, lr=1e-3)
        >>> loss = model(torch.ones(2, 8)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
    """

    _reference_key = "use_muon"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        polar: str = "auto",
        ns_steps: int | None = None,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
        eps: float = 1e-7,
        adjust_lr_fn: str | None = "auto",
        compat: str | None = None,
        polar_norm: str | None = None,
        polar_dtype: str | None = None,
        rank: int | float = 0.125,
        oversample: int = 10,
        power: int = 1,
        sketch: str = "signs",
        inner: str = "polar_express",
        rank_compensate: bool = False,
        seed: int = 0,
        momentum_kind: str = "ema",
        second_moment: str | None = None,
        beta2: float | None = None,
        cautious: bool = False,
        decay_schedule: str = "lr",
        clip_grad_rms: float | None = None,
        normalize_grad: bool = False,
        spike_ratio: float | None = None,
        report_steps: int = 0,
        matrix_view: str | None = None,
        split_sizes: Sequence[int] | None = None,
        num_heads: int | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = MuonRule(
            polar,
            ns_steps,
            ns_coefficients,
            eps,
            adjust_lr_fn,
            compat,
            polar_norm,
            polar_dtype,
            rank,
            oversample,
            power,
            sketch,
            inner,
            rank_compensate,
            seed,
            report_steps,
            clip_grad_rms,
            normalize_grad,
            spike_ratio,
            momentum,
            nesterov,
            momentum_kind,
            second_moment,
            beta2,
            cautious,
            decay_schedule,
        )
        shape = {"matrix_view": matrix_view, "split_sizes": split_sizes, "num_heads": num_heads}
        super().__init__(params, rule, lr, weight_decay, **settings_with_view({**options, **shape}))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Knows ``matrix_view``, ``split_sizes``, ``num_heads``."""
        is_group = isinstance(param_group, dict)  # else torch refuses it
        super().add_param_group(settings_with_view(param_group) if is_group else param_group)

    def reports(self) -> dict[str, list[PolarReport | None]]:
        """The last report of each matrix under ``report_steps``, by name or position."""
        return reports(self.param_groups, self.state)
