"""Muon: momentum, then the orthogonal factor of the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels import PolarReport
from .base import StackedOptimizer
from .lowrank import check_known
from .moments import blend, entry_correction, row_correction
from .orthogonal import OrthogonalRule, reports, with_view
from .rule import Dense, Direction, Member, Scaled, Slot, Term, check

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .groups import Common


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
        check_known(
            self, momentum_kind=("ema", "sum"), second_moment=(None, "normuon", "adamuon"),
            decay_schedule=("lr", "lr2"),
        )  # fmt: skip
        check(0.0 <= self.decay2 < 1.0, f"beta2 must lie in [0, 1), got {self.decay2}")
        twice = self.rank_compensate and self.second_moment == "adamuon"
        check(not twice, "second_moment='adamuon' has an exact RMS; leave rank_compensate unset")
        plain = self.momentum_kind == "ema" and self.second_moment is None
        check(
            self.compat is None or plain,
            "compat='torch' averages, and once; leave momentum_kind and second_moment unset",
        )

    @property
    def decay2(self) -> float:
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
        return {**slots, **self.more_slots()}

    def update(self, w: Member) -> Direction:
        """One step for a stack."""
        B, mu = w.state["momentum_buffer"], self.momentum
        G = self.calmed(w).to(B.dtype) if self.compat else self.calmed(w)
        U = blend(B, G, mu, self.nesterov, self.momentum_kind, w.ok)  # (K, m, n)
        O = self.orthogonal(w, U.sign() if self.second_moment == "adamuon" else U)
        term: Term = Dense(O)
        if self.second_moment == "normuon":
            V = w.state["row_second_moment"]
            term = Scaled(O, row_correction(O, V, self.decay2, w.sums, w.n, ok=w.ok))
        elif self.second_moment == "adamuon":
            norm, V = math.sqrt(min(w.m, w.n)), w.state["second_moment"]  # of an exact factor
            O, by = entry_correction(O, V, self.decay2, w.sums, norm, ok=w.ok)
            term = Scaled(O, by)
        # what scales O above is never negative, so O has the signs of the step
        decay = O * w.value.to(O.dtype) >= 0 if self.cautious else None
        power = 2 if self.decay_schedule == "lr2" else 1
        return w.step(
            term, scale=self.ratio(w.m, w.n), decay=decay, decay_power=power,
            exact=self.compat == "torch",
        )  # fmt: skip


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
            polar, ns_steps, ns_coefficients, eps, adjust_lr_fn, compat, polar_norm, polar_dtype,
            rank, oversample, power, sketch, inner, rank_compensate, seed, report_steps,
            clip_grad_rms, normalize_grad, spike_ratio, momentum, nesterov, momentum_kind,
            second_moment, beta2, cautious, decay_schedule,
        )  # fmt: skip
        shape = {"matrix_view": matrix_view, "split_sizes": split_sizes, "num_heads": num_heads}
        super().__init__(params, rule, lr, weight_decay, **with_view({**options, **shape}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See :class:`StackedOptimizer`; knows ``matrix_view``, ``split_sizes``, ``num_heads``."""
        is_group = isinstance(param_group, dict)  # else torch refuses it
        super().add_param_group(with_view(param_group) if is_group else param_group)

    def reports(self) -> dict[str, list[PolarReport | None]]:
        """The last report of each matrix under ``report_steps``, by name or position."""
        return reports(self.param_groups, self.state)
