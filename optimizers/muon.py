"""Muon: momentum, then the orthogonal factor of the momentum.

Read :meth:`MuonRule.update` beside the algorithm in :class:`Muon`. ``momentum_step`` is in
``_toolkit/moments.py``, ``polar_factor`` in ``stiefel.kernels``; the rest is below.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import (
    POLAR_METHODS,
    SKETCHES,
    PolarReport,
    equal_rows,
    low_rank_size,
    polar_factor,
    polar_report,
    product,
    sinkhorn,
)
from ._core.rule import (
    LOCAL_REDUCTIONS,
    Carry,
    Dense,
    Direction,
    Member,
    Reductions,
    Rule,
    Scaled,
    Slot,
    Term,
)
from ._core.validation import (
    check,
    check_choices,
    check_coefficients,
    check_count_or_share,
    check_eps,
    check_flags,
    check_ints,
    check_numbers,
    dtype_name,
    function_name,
    is_number,
    naming,
    shown,
)
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.moments import column_squares, ema, momentum_step, safe_square_scale, total
from ._toolkit.norm_floor import norm_floor
from ._toolkit.polar_waits import polar_obstacle
from ._toolkit.random_keys import StackRNG

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

ADJUST_LR_FNS = (
    *("auto", "original", "match_rms_adamw", "spectral", "spectral_unclamped", "none"),
    None,
)
TORCH_EPS = 1e-7  # the norm floor of torch.optim.Muon


@dataclass(frozen=True)
class MuonRule(Rule):
    """B <- B + (1 - mu)(G - B); U = G + mu (B - G); step along polar(U), scaled by its shape."""

    # momentum
    momentum: float = 0.95
    nesterov: bool = True
    momentum_kind: str = "ema"
    # polar factor
    polar: str | Callable[[Tensor], Tensor] = "auto"
    ns_steps: int | None = None
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None
    eps: float | None = None
    compat: str | None = None
    polar_norm: str | None = None
    polar_dtype: str | None = None
    equilibrate: str | None = None
    renormalize: bool = False
    # polar factor inside a sketch, for polar="low_rank"
    rank: int | float = 0.125
    oversample: int = 10
    power: int = 1
    sketch: str = "signs"
    inner: str = "polar_express"
    rank_compensate: bool = False
    seed: int = 0
    # second moment and scale
    second_moment: str | None = None
    beta2: float | None = None
    adjust_lr_fn: str | None = "auto"
    # guards of the gradient, reports of the factor
    clip_grad_rms: float | None = None
    normalize_grad: bool = False
    spike_ratio: float | None = None
    report_steps: int = 0

    needs_full_matrix = True

    # the step -------------------------------------------------------------------------------------

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The buffer, in the weight's dtype under ``compat`` as torch keeps it, and extras."""
        slots = {"momentum_buffer": Slot("mn", dtype="weight" if self.compat else None)}
        if self.second_moment == "normuon":
            slots["row_second_moment"] = Slot("m1")
        if self.second_moment == "adamuon":
            slots["second_moment"] = Slot("mn")
        if self.spike_ratio is not None:
            slots["grad_norm"] = Slot("11")
        if self.report_steps:
            slots["polar_report"] = Slot("f", dtype=torch.float32, f=5)
        return slots

    def update(self, w: Member) -> Direction:
        """One step of K equal weights (m, n), in the order of the algorithm."""
        B = w.state["momentum_buffer"]  # (K, m, n)
        U = self.momentum_of(w, B)
        O = self.polar_step(w, U.sign() if self.second_moment == "adamuon" else U)
        O, term = self.second_moment_step(w, O)
        return w.step(
            term,
            lr_factor=self.lr_factor(w.m, w.n),
            torch_bits=self.compat == "torch",
            carry=self.carry_of(w, B, U, O) if w.carries_errors else None,
        )

    def carry_of(self, w: Member, B: Tensor, U: Tensor, O: Tensor) -> Carry:
        """How the momentum B takes errors E of the weight: T(U) = s O, T^-1[E] = E (U^T U)^1/2 / s.

        The root is O^T U, on the shorter side.
        """
        # a change of B changes U by momentum times as much where U looks ahead
        beta, s = self.momentum, self.lr_factor(w.m, w.n)
        s *= self.momentum if self.nesterov else 1.0

        def inverse(E: Tensor, ks: slice) -> Tensor:
            u, o = U[ks].to(E.dtype), O[ks].to(E.dtype)
            # products that give a matrix the same bits in a stack and alone
            root = product(o, u.mT) if w.m <= w.n else product(o.mT, u)
            root = (root + root.mT) / (2 * s)  # that of an inexact factor is nearly symmetric
            return product(root, E) if w.m <= w.n else product(E, root)

        return Carry(B, beta, inverse)

    def momentum_of(self, w: Member, B: Tensor) -> Tensor:
        """The step of the momentum B (K, m, n), which moves."""
        G = self.clipped_grad(w)
        if not self.compat or len(B) == 1:
            G = G.to(B.dtype) if self.compat else G
            return momentum_step(B, G, self.momentum, self.nesterov, self.momentum_kind, w.finite)
        # one by one: on a CPU what is left over at a tensor's end, and fills no vector, is rounded
        # in another way
        G = G.to(B.dtype)
        parts = ((B[k : k + 1], G[k : k + 1]) for k in range(len(B)))
        return torch.cat([momentum_step(b, g, self.momentum, self.nesterov) for b, g in parts])

    def polar_step(self, w: Member, U: Tensor) -> Tensor:
        """The polar factor of U (K, m, n); every ``report_steps`` updates its quality is stored."""
        if self.polar == "low_rank":
            rng = StackRNG(self.seed, w.indices, w.t)
            keys = [rng.key(k) for k in range(len(U))]
            O = w.reductions.on_full_matrix(self.orthogonalize, U, keys)
        elif self.may_overwrite(w):
            O = self.orthogonalize(U, overwrite=True)
        else:
            O = w.reductions.on_full_matrix(self.orthogonalize, U)
        if self.report_steps and w.t % self.report_steps == 0:
            rows = [_report_row(M.clone(), P.clone()) for M, P in zip(U, O, strict=True)]
            w.state["polar_report"].copy_(U.new_tensor(rows, dtype=torch.float32))
        return O

    def may_overwrite(self, w: Member) -> bool:
        """Whether the U of this step is no buffer, and is not read once its factor is known."""
        is_new = self.nesterov or self.second_moment == "adamuon"
        is_read = w.carries_errors or (self.report_steps and w.t % self.report_steps == 0)
        return is_new and not is_read and w.reductions is LOCAL_REDUCTIONS

    def orthogonalize(self, U: Tensor, keys: Sequence[int] = (), overwrite: bool = False) -> Tensor:
        """The polar factor of every matrix of U (K, m, n), with what is done before and after it.

        Args:
            U: The momentum, not changed unless ``overwrite`` is True.
            keys: One key per matrix for the random numbers of its sketch.
            overwrite: Whether U may hold the result.
        """
        if self.equilibrate is not None:  # of equal norms up to one factor, which the factor loses
            U = equal_rows(U) if self.equilibrate == "rows" else sinkhorn(U, 2)
        is_named = isinstance(self.polar, str)
        if is_named:
            O = self.factor(U, keys, overwrite)
        else:
            O = factor_by(self.polar, U)  # type: ignore[arg-type]
        if not self.renormalize:
            return O
        m, n = U.shape[-2:]
        is_low_rank = self.polar == "low_rank"
        rank = low_rank_size(m, n, self.rank, self.oversample) if is_low_rank else min(m, n)
        norm = total(column_squares(O)).sqrt()  # (K, 1, 1)
        scale = (math.sqrt(rank) / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(O.dtype)
        return O.mul_(scale) if is_named else O * scale

    def factor(self, U: Tensor, keys: Sequence[int] = (), overwrite: bool = False) -> Tensor:
        """The polar factor of every matrix of U (K, m, n) by the method that ``polar`` names."""
        options: dict[str, Any] = {
            "steps": self.ns_steps,
            "coefficients": self.ns_coefficients,
            "eps": norm_floor(self.eps, U.dtype, TORCH_EPS if self.compat else None),
        }
        if self.compat == "torch":
            U = U.bfloat16()  # torch adds a factor of this dtype
            O = polar_factor(U, "ns5", dtype=U.dtype, exact=True, **options)
            # torch adds the factor of a tall matrix as a transposed view; bfloat16 weights round
            # such a sum differently
            return O if U.shape[-2] <= U.shape[-1] else O.mT.contiguous().mT
        if self.polar_norm is not None:
            options["norm"] = self.polar_norm
        if self.polar_dtype is not None:
            options["dtype"] = getattr(torch, self.polar_dtype, None) or self.polar_dtype
        if self.polar == "low_rank":
            for name in ("rank", "oversample", "power", "sketch", "inner"):
                options[name] = getattr(self, name)
            options["key"] = keys or 0
        assert isinstance(self.polar, str)
        return polar_factor(U, self.polar, overwrite=overwrite, **options)

    def second_moment_step(self, w: Member, O: Tensor) -> tuple[Tensor, Term]:
        """O (K, m, n), whose entries AdaMuon divides by their size, and the term to write."""
        if self.second_moment == "normuon":
            V, beta2 = w.state["row_second_moment"], self.second_moment_decay
            return O, Scaled(O, normuon_scale(O, V, beta2, w.reductions, w.n, finite=w.finite))
        if self.second_moment == "adamuon":
            V, beta2 = w.state["second_moment"], self.second_moment_decay
            exact_norm = math.sqrt(min(w.m, w.n))
            O, scale = adamuon_scale(O, V, beta2, w.reductions, exact_norm, finite=w.finite)
            return O, Scaled(O, scale)
        return O, Dense(O)

    @property
    def second_moment_decay(self) -> float:
        """Decay of the second moment."""
        if self.beta2 is not None:
            return self.beta2
        return self.momentum if self.second_moment == "adamuon" else 0.95

    def lr_factor(self, m: int, n: int) -> float:
        """Factor of lr in the update; weight decay takes the bare lr."""
        name = self.adjust_lr_fn or "original"
        if name == "auto":
            name = "original" if self.compat else "match_rms_adamw"
        factor = adjust_lr(name, m, n, min(m, n))
        if self.rank_compensate and self.polar == "low_rank":
            factor *= math.sqrt(min(m, n) / low_rank_size(m, n, self.rank, self.oversample))
        return factor

    def clipped_grad(self, w: Member) -> Tensor:
        """The gradient (K, m, n), normalized or limited in norm as the options ask."""
        assert w.grad is not None
        clip, ratio = self.clip_grad_rms, self.spike_ratio
        if not self.normalize_grad and clip is None and ratio is None:
            return w.grad
        G = w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        square_scale = safe_square_scale(G, w.reductions)  # (K, 1, 1), a power of two
        G = G * square_scale
        norm = w.reductions.both(total(column_squares(G))).sqrt()  # of the scaled G
        if self.normalize_grad:
            return G.div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))
        scale = square_scale.reciprocal()  # (K, 1, 1)
        if clip is not None:
            scale = torch.minimum(clip * math.sqrt(w.m * w.n) / norm, scale)
        if ratio is not None:
            stored = w.state["grad_norm"]
            scale = scale * spike_factor(norm * scale, stored, ratio, finite=w.finite)
        return G.mul_(scale)

    # checks ---------------------------------------------------------------------------------------

    @override
    def eco_obstacle(self) -> str | None:
        obstacles = {
            "momentum=0, which keeps no buffer": self.momentum == 0.0,
            "momentum=1, whose buffer never moves": self.momentum == 1.0,
            f"compat={self.compat!r}, whose buffer has the weight's precision": self.compat,
            f"second_moment={self.second_moment!r}, whose step has no fixed scale": (
                self.second_moment
            ),
            "polar='low_rank', whose step leaves out what errors need": self.polar == "low_rank",
            "a function as polar, which need not be a polar factor": callable(self.polar),
            f"equilibrate={self.equilibrate!r}, whose factor is of another matrix": (
                self.equilibrate
            ),
            "renormalize=True, whose step has no fixed scale": self.renormalize,
        }
        return next((text for text, is_so in obstacles.items() if is_so), None)

    @override
    def capture_obstacle(self) -> str | None:
        obstacles = {
            f"compat={self.compat!r}, whose step has torch's own scalars": self.compat,
            "polar='low_rank', which draws by the number of the update": self.polar == "low_rank",
            f"report_steps={self.report_steps}, which reads results": self.report_steps,
        }
        found = next((text for text, is_so in obstacles.items() if is_so), None)
        return found or polar_obstacle(self.polar)

    @property
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """None under ``compat``, and where a report takes the whole of U."""
        return frozenset() if self.compat or self.report_steps else frozenset(("rows", "cols"))

    @property
    def needs_own_strides(self) -> bool:  # type: ignore[override]
        """True under ``compat``: on a CPU torch adds to a transposed bfloat16 weight in scalars."""
        return self.compat is not None

    @property
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """False under ``compat``, and where a report or a Kaczmarz sketch reads the gradient."""
        drawn = self.polar == "low_rank" and self.sketch == "kaczmarz"
        is_named = isinstance(self.polar, str)
        return self.compat is None and is_named and not drawn and not self.report_steps

    def __post_init__(self) -> None:
        self._check_torch_options()
        self._check_compat()
        self._check_polar()
        self._check_second_moment()
        self._check_guards()
        if callable(self.polar):
            is_hashable = isinstance(self.polar, Hashable)
            (try_function if is_hashable else try_function.__wrapped__)(self.polar)
            return
        with naming("ns_steps", "ns_coefficients", "polar_norm", "polar_dtype", "inner"):
            # raises here for what the kernel refuses
            self.factor(torch.empty(1, 0, 1, dtype=torch.float32, device="cpu"))

    def _check_torch_options(self) -> None:
        """Check the options that torch.optim.Muon has too, with its error texts."""
        check(
            is_number(self.momentum) and self.momentum >= 0,
            f"momentum should be >= 0 but is: {shown(self.momentum)}; it must be in [0, 1]",
        )
        check_numbers(self, momentum="[0, 1]")
        check_flags(self, "nesterov")
        check_eps(self)
        name, coefficients = self.adjust_lr_fn, self.ns_coefficients
        text = name if isinstance(name, str) else shown(name)
        check(
            (name is None or isinstance(name, str)) and name in ADJUST_LR_FNS,
            f"Adjust learning rate function {text} is not supported; adjust_lr_fn must be one of "
            f"{tuple(ADJUST_LR_FNS)}",
        )
        check(
            not isinstance(coefficients, str),
            f"ns_coefficients must be numbers, got {coefficients!r}; name a polar method by "
            f"keyword, polar={coefficients!r}",
        )
        check_coefficients(self, "ns_coefficients")
        steps = self.ns_steps
        check(
            not is_number(steps, numbers.Integral) or 1 <= steps < 100,  # type: ignore[operator]
            "Number of steps must be less than 100 for computational efficiency; ns_steps must be "
            f"from 1 to 99, got {shown(steps)}",
        )
        check_ints(self, ns_steps="[1, 99] or None")

    def _check_compat(self) -> None:
        """Refuse options that contradict ``compat="torch"``, which fixes iteration and momentum."""
        check(
            self.compat is None or (isinstance(self.compat, str) and self.compat == "torch"),
            f"compat must be None or 'torch', got {shown(self.compat)}",
        )
        object.__setattr__(self, "polar_dtype", dtype_name(self.polar_dtype))
        if self.compat is None:
            return
        check(
            isinstance(self.polar, str) and self.polar in ("auto", "ns5"),
            f"compat='torch' iterates with ns5; leave polar unset instead of {shown(self.polar)}",
        )
        check(
            self.equilibrate is None and not self.renormalize,
            "compat='torch' takes the factor as it is; leave equilibrate and renormalize unset",
        )
        check(
            self.polar_norm is None,
            "compat='torch' divides by the Frobenius norm; leave polar_norm unset",
        )
        check(
            self.polar_dtype is None,
            "compat='torch' iterates in bfloat16; leave polar_dtype unset",
        )
        check(
            isinstance(self.momentum_kind, str)
            and self.momentum_kind == "ema"
            and self.second_moment is None,
            "compat='torch' averages, and once; leave momentum_kind and second_moment unset",
        )

    def _check_polar(self) -> None:
        """Check the method of the polar factor, its sketch and its reports."""
        known = (*POLAR_METHODS, "low_rank")
        is_named = isinstance(self.polar, str) and self.polar in ("auto", *known)
        check(
            is_named or (callable(self.polar) and not isinstance(self.polar, type)),
            f"polar must be 'auto', a function of a stack of matrices, or one of "
            f"{', '.join(known)}, got {shown(self.polar)}",
        )
        for name in ("ns_steps", "ns_coefficients", "polar_norm", "polar_dtype"):
            check(
                is_named or getattr(self, name) is None,
                f"{name} belongs to a method that polar names, and polar is the function "
                f"{function_name(self.polar)}; bind it there and leave {name} unset",
            )
        check_choices(self, equilibrate=(None, "rows", "both"))
        check_flags(self, "renormalize")
        for name in ("polar_norm", "polar_dtype"):
            value = getattr(self, name)
            check(
                value is None or isinstance(value, str),
                f"{name} must be None or a name, got {shown(value)}",
            )
        check_choices(self, sketch=SKETCHES, inner=tuple(POLAR_METHODS))
        check_count_or_share(self, "rank")
        check_ints(
            self, oversample="[0, inf)", power="[0, 99]", seed="[0, inf)", report_steps="[0, inf)"
        )

    def _check_second_moment(self) -> None:
        """Check the kinds of momentum and second moment."""
        check_choices(
            self,
            momentum_kind=("ema", "sum"),
            second_moment=(None, "normuon", "adamuon"),
        )
        check_numbers(self, beta2="[0, 1) or None")
        check_flags(self, "rank_compensate")
        decay = self.second_moment_decay
        check(0.0 <= decay < 1.0, f"beta2 must be in [0, 1), got {decay}; it follows momentum")
        check(
            not (self.rank_compensate and self.second_moment == "adamuon"),
            "second_moment='adamuon' has an exact RMS; leave rank_compensate unset",
        )

    def _check_guards(self) -> None:
        """Check the limits of the gradient."""
        check_numbers(self, clip_grad_rms="(0, inf) or None", spike_ratio="(1, inf) or None")
        check_flags(self, "normalize_grad")
        check(
            not self.normalize_grad or (self.clip_grad_rms is None and self.spike_ratio is None),
            "normalize_grad fixes the norm; leave clip_grad_rms and spike_ratio unset",
        )


class Muon(StackedOptimizer):
    """Muon: orthogonalized momentum for matrices, AdamW for everything else.

    For each matrix W (m x n) with gradient G::

        B <- B + (1 - momentum) (G - B)                       momentum
        U  = G + momentum (B - G)   if nesterov else   B
        O  = polar(U)                                         all singular values near 1
        W <- (1 - lr * weight_decay) W                        decay with the bare lr
        W <- W - lr * ratio(m, n) * O                         RMS 0.2 by default, as AdamW's

    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024; *Muon is
    Scalable for LLM Training*, arXiv 2502.16982; low rank 2605.06884, NorMuon 2510.05491, AdaMuon
    2507.11005. The positional arguments are those of ``torch.optim.Muon``, in its order.

    Args:
        params: A module, (named) parameters or groups (KellerJordan's with ``use_muon`` too). Every
            argument below is a group key too.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.1).
        momentum: Decay of the momentum average (default: 0.95).
        nesterov: Look ahead by one gradient (default: True).
        ns_coefficients: Coefficients (a, b, c) of a polynomial method, or one triple for each step
            (default: None, the method's own).
        eps: Smallest norm to divide by. None (default): the smallest normal number of the dtype;
            under ``compat`` torch's 1e-7.
        ns_steps: Iterations of a polynomial method (default: None, the method's own number).
        adjust_lr_fn: ratio(m, n): ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)); ``"original"`` (or
            None, as in torch) sqrt(max(1, m / n)); ``"spectral"`` or torch's
            ``"spectral_unclamped"`` sqrt(m / n); ``"none"`` 1; ``"auto"`` (default)
            ``"match_rms_adamw"``, under ``compat`` ``"original"``.
        polar: Method of the polar factor, a name of :func:`stiefel.kernels.polar_factor` or
            ``"low_rank"``. ``"auto"`` (default): ``"zolo"`` on a CPU; ``"ns5"`` in bfloat16 on
            accelerators and wherever ``ns_steps``, ``ns_coefficients`` or ``polar_norm`` is given.
            Or a function of your own: it gets a stack U (K, m, n), any K, float32 at least, leaves
            it as it is, and returns one of its shape, each matrix by itself, zero for zero. Other
            weights may lie in one stack, and a rank may get some of them; on accelerators it may
            see NaN. A checkpoint holds its name, so the optimizer that loads it must have it.
        compat: ``"torch"`` has the arithmetic of ``torch.optim.Muon``, bit for bit: ns5 in
            bfloat16 and the buffer in the gradient's dtype, which is slow on a CPU (default: None).
        polar_norm: What a polynomial method divides by: ``"frobenius"``, ``"schatten4"``,
            ``"aol"``, ``"power:k"`` (default: None, the method's own).
        polar_dtype: Name of the iteration's dtype (default: None, that of ``polar_factor``).
        equilibrate: What U gets before its factor: ``"rows"`` of equal norm, as in MuonEq (arXiv
            2603.28254), or rows and columns, ``"both"``, twice in turn. Either breaks equivariance
            under rotations of that side (default: None, neither).
        renormalize: Whether O is scaled to the norm sqrt(min(m, n)) of an exact factor, as in Muon+
            (arXiv 2602.21545); for ``"low_rank"`` to that of its rank (default: False).
        rank: Of ``polar="low_rank"``: columns of its sketch, a count or a fraction of min(m, n)
            (default: 0.125).
        oversample: Of ``"low_rank"``: columns of the sketch beyond ``rank`` (default: 10).
        power: Of ``"low_rank"``: power steps (default: 1).
        sketch: Of ``"low_rank"``: ``"signs"`` (default), from a hash on W's device;
            ``"gaussian"`` or ``"kaczmarz"``, drawn on the CPU. All are functions of ``seed``, the
            position of W and the step.
        inner: Of ``"low_rank"``: the method inside the sketch, to which ``ns_steps`` and
            ``ns_coefficients`` belong (default: ``"polar_express"``).
        rank_compensate: Of ``"low_rank"``: whether ratio grows by sqrt(min(m, n) / rank of O), so
            that the RMS stays (default: False).
        seed: Of ``"low_rank"``: seed of the sketches (default: 0).
        momentum_kind: ``"ema"`` (default), or ``"sum"``: B <- momentum B + G, U = G + momentum B,
            the same direction with a buffer 1 / (1 - momentum) times as large.
        second_moment: ``"normuon"`` divides rows of O by their running size and keeps its norm;
            ``"adamuon"`` takes polar(sign(U)), divides entries, and makes the norm exact
            (default: None).
        beta2: Decay of the second moment (default: None, which is 0.95 for NorMuon and
            ``momentum`` for AdaMuon).
        clip_grad_rms: Limit of the RMS of G, which guards B against heavy tails (default: None).
        normalize_grad: Whether G / ||G||_F takes the place of G (default: False).
        spike_ratio: Limit of ||G||_F relative to its running average of decay 0.9 (default: None).
        report_steps: Keep a :class:`PolarReport` of every so many steps for :meth:`reports`. Steps
            stay the same; one with a report takes an SVD of U and waits for the device
            (default: 0, never).
        matrix_view: ``view`` by another name: ``"auto"``, ``"batch"``, or ``"flatten"``, which a
            Conv1d needs (default: None, ``view`` counts).
        split_sizes: Rows of fused weights, such as q, k, v, each orthogonalized by itself
            (default: None).
        num_heads: Number of equal runs of rows, each orthogonalized by itself (default: None).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range, unknown, or excluded by another one; the text
            names it.
        TypeError: If a keyword is unknown.

    State: ``momentum_buffer`` (like W, float32) and ``step``; ``row_second_moment`` (m x 1) or
    ``second_moment`` (like W), ``grad_norm`` (1 x 1), ``polar_report`` (5) where asked for.
    Checkpoints of ``torch.optim.Muon`` load. Peak temporary memory: five matrices of the largest
    weight, one more each under AdaMuon, ``equilibrate`` and the guards of G; half of it for
    ``"low_rank"``.

    Caveat: O is orthogonal up to the band that :func:`stiefel.kernels.polar_factor` states:
    singular values 0.87 to 1.13 for ``"zolo"`` (0.94 to 1.06 above a shorter side of 256), falling
    to zero where those of U are below about 1/300 (1/1000) of its norm. ``"low_rank"`` leaves out
    what its sketch misses. Embeddings and heads belong to AdamW, where a module or parameter names
    route them.

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
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
        eps: float | None = None,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = "auto",
        *,
        polar: str | Callable[[Tensor], Tensor] = "auto",
        compat: str | None = None,
        polar_norm: str | None = None,
        polar_dtype: str | None = None,
        equilibrate: str | None = None,
        renormalize: bool = False,
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
            momentum=momentum,
            nesterov=nesterov,
            momentum_kind=momentum_kind,
            polar=polar,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            eps=eps,
            compat=compat,
            polar_norm=polar_norm,
            polar_dtype=polar_dtype,
            equilibrate=equilibrate,
            renormalize=renormalize,
            rank=rank,
            oversample=oversample,
            power=power,
            sketch=sketch,
            inner=inner,
            rank_compensate=rank_compensate,
            seed=seed,
            second_moment=second_moment,
            beta2=beta2,
            adjust_lr_fn=adjust_lr_fn,
            clip_grad_rms=clip_grad_rms,
            normalize_grad=normalize_grad,
            spike_ratio=spike_ratio,
            report_steps=report_steps,
        )
        shape = {"matrix_view": matrix_view, "split_sizes": split_sizes, "num_heads": num_heads}
        super().__init__(params, rule, lr, weight_decay, **settings_with_view({**options, **shape}))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may name ``matrix_view``, ``split_sizes`` or ``num_heads``."""
        is_group = isinstance(param_group, dict)  # torch refuses anything else
        super().add_param_group(settings_with_view(param_group) if is_group else param_group)

    def reports(self) -> dict[str, list[PolarReport | None]]:
        """The last report of each matrix under ``report_steps``, by its parameter's name.

        A parameter without a name is called by its position; a matrix that was zero has None.
        """
        return collect_reports(self.param_groups, self.state)


def factor_by(function: Callable[[Tensor], Tensor], U: Tensor) -> Tensor:
    """What a user's function makes of U (K, m, n), refused if it cannot be a factor of U."""
    return _checked_factor(function, U, function(U))


def _checked_factor(function: Callable[[Tensor], Tensor], U: Tensor, O: Any) -> Tensor:
    """A factor O that a function made of U, in U's dtype."""
    if not isinstance(O, Tensor) or O.shape != U.shape or O.device != U.device:
        got = f"{tuple(O.shape)} on {O.device}" if isinstance(O, Tensor) else shown(O)
        raise ValueError(
            f"polar={function_name(function)} must return a tensor of the shape {tuple(U.shape)} "
            f"that it got on {U.device}, but returned {got}"
        )
    return O.detach().to(U.dtype)


@lru_cache(maxsize=64)
def try_function(function: Callable[[Tensor], Tensor]) -> None:
    """Refuse a function by what it makes of small stacks, before a step has moved a momentum.

    One that fails here may be written for a device or for larger sides: that is no refusal.
    """
    for m, n in ((2, 3), (3, 2)):
        U = torch.eye(m, n, dtype=torch.float32, device="cpu").repeat(2, 1, 1)
        try:
            O: Any = function(U)
        except Exception:
            continue
        _checked_factor(function, U, O)


def spike_factor(
    norm: Tensor, stored: Tensor, ratio: float, beta: float = 0.9, finite: Tensor | None = None
) -> Tensor:
    """The factor by which a gradient's norm becomes at most ratio times the norms' average.

    Args:
        norm: (K, 1, 1) norms of this step.
        stored: (K, 1, 1) average of the limited norms, changed in place; 0 where there is none yet.
            What would not be finite is not stored, and an infinite one counts as none.
        ratio: The limit, above 1.
        beta: Decay of the average (default: 0.9).
        finite: None (default), or flags (K,): where one is 0 nothing is stored.

    Returns:
        (K, 1, 1), at most 1.
    """
    previous = stored.to(norm.dtype)
    has_average, limit = (previous > 0) & previous.isfinite(), ratio * previous
    limited_norm = torch.where(has_average, torch.minimum(norm, limit), norm)
    updated = torch.where(has_average, previous.lerp(limited_norm, 1 - beta), limited_norm)
    updated = updated.to(stored.dtype)
    is_sound = updated.isfinite()
    if finite is not None:
        is_sound &= finite.view(-1, 1, 1) != 0
    stored.copy_(torch.where(is_sound, updated, stored))
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
    """NorMuon's scale of rows: each is divided by its own running size, and ||O||_F is kept.

    v <- beta2 v + (1 - beta2) mean over columns of O*O; O' = O / (sqrt(v) + eps), then scaled to
    the norm of O. A bias of v is one factor for all rows, so it cancels. Both norms come from the
    squares of the rows of O. Source: NorMuon, arXiv 2510.05491.

    Args:
        O: (K, m, n), not changed.
        second_moment: v, (K, m, 1), changed in place.
        beta2: Decay of v.
        reductions: Sums over the weight's indices.
        n: Columns of the whole weight.
        eps: Added to the root and to the norm of O' (default: 1e-10).
        finite: None (default), or flags (K,): where one is 0 v stays.

    Returns:
        (K, m, 1), the factors of the rows of O.
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
    """AdaMuon's step: entries of O divided by their running size, then scaled to a given norm.

    V <- beta2 V + (1 - beta2) O*O; O' = O / (sqrt(V) + eps), without bias correction, which would
    cancel. Source: AdaMuon, arXiv 2507.11005.

    Args:
        O: (K, m, n), not changed.
        second_moment: V, (K, m, n), changed in place.
        beta2: Decay of V.
        reductions: Sums over the weight's indices.
        norm: The Frobenius norm to scale to.
        eps: Added to the root and to the norm of O' (default: 1e-8).
        finite: None (default), or flags (K,): where one is 0 V stays.

    Returns:
        O' (K, m, n), a new tensor, and its factor (K, 1, 1).
    """
    V = ema(second_moment, O.square(), beta2, finite)
    scaled = O / V.sqrt().add_(eps)
    norm_now = reductions.both(total(column_squares(scaled))).sqrt()
    return scaled, norm / (norm_now + eps)


def _report_row(M: Tensor, O: Tensor) -> list[float]:
    """The five figures of a report; all 0 for a zero matrix, which has no report."""
    try:
        quality = polar_report(M, O)
    except ValueError:
        return [0.0] * 5
    return [getattr(quality, name) for name in PolarReport.__dataclass_fields__]


def collect_reports(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, list[PolarReport | None]]:
    """The last recorded report of every matrix, by the parameter's name or else its position."""
    quality: dict[str, list[PolarReport | None]] = {}
    params = [
        (p, name)
        for group in groups
        for p, name in zip(
            group["params"],
            chain(group.get("param_names") or (), repeat(None)),  # late parameters have no name
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
    """Replace Muon's options for shapes by the key ``view``, in a copy of the settings.

    ``matrix_view="flatten" | "batch" | "auto"`` is taken as it is, ``split_sizes=(a, b, c)`` is
    ``rows:a,b,c`` and ``num_heads=h`` is ``heads:h``; ``_core/views.py`` reads them.
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
            isinstance(value, str) and value in ("auto", "flatten", "batch"),
            f"matrix_view must be 'auto', 'flatten' or 'batch', got {shown(value)}",
        )
        settings["view"] = value
    elif name == "split_sizes":
        is_sequence = isinstance(value, (tuple, list))
        sizes = list(value) if is_sequence else []
        check(
            bool(sizes) and all(map(_is_count, sizes)),
            f"split_sizes must be a list of ints of at least 1, got {shown(value)}",
        )
        settings["view"] = "rows:" + ",".join(map(str, sizes))
    else:
        check(_is_count(value), f"num_heads must be an int of at least 1, got {shown(value)}")
        settings["view"] = f"heads:{value}"
    return settings


def _is_count(value: Any) -> bool:
    return is_number(value, numbers.Integral) and 1 <= value < 2**63


def heavy_tail_schedule(T: int, alpha: float | None = None) -> tuple[float, float]:
    """Learning rate multiplier and momentum for T steps of gradients with heavy-tailed noise.

    Only the moment E ||noise||^alpha of the noise is finite, 1 < alpha <= 2. The drift, bias and
    noise terms lr / (1 - mu) + (1 - mu)^((alpha - 1) / alpha) + 1 / (lr T) balance at

        1 - mu = T^(-alpha / (3 alpha - 2)),    lr ~ T^(-(2 alpha - 1) / (3 alpha - 2)).

    The balance is our own, the rate T^(-(alpha - 1) / (3 alpha - 2)) that of arXiv 2605.06884.

    Args:
        T: Number of steps, at least 1.
        alpha: The moment. None (default): not known, then the exponents are 1/2 and 3/4, which are
            those of alpha = 2, at the rate T^(-(alpha - 1) / (2 alpha)).

    Returns:
        (factor of the learning rate, momentum).

    Raises:
        ValueError: If T or alpha is out of range.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    if alpha is None:
        alpha = 2.0
    if not 1.0 < alpha <= 2.0:
        raise ValueError(f"alpha must lie in (1, 2], got {alpha}: pass None if it is not known")
    d = 3 * alpha - 2
    return T ** (-(2 * alpha - 1) / d), 1 - T ** (-alpha / d)
