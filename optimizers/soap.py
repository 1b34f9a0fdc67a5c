"""SOAP: Adam in the eigenbasis of Shampoo's Gram matrices, and the same before Muon's polar step.

Read :meth:`SOAPRule.update` beside the algorithm in :class:`SOAP`. :class:`EigenbasisRule` keeps
Gram matrices and bases, finds the bases, and turns the moments when they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import (
    POLAR_METHODS,
    completed_eigenbasis,
    gram_stack,
    polar_factor,
    product,
    rotated,
)
from ._core.rule import Dense, Direction, Factored, Member, Rule, Slot, Term
from ._core.validation import (
    check,
    check_adam,
    check_choices,
    check_eps,
    check_flags,
    check_ints,
    check_numbers,
    shown,
)
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.moments import (
    adam,
    adam_reference,
    column_squares,
    ema_where_safe,
    max_safe_value,
    momentum_step,
    safe_square_scale,
    total,
)
from ._toolkit.norm_floor import norm_floor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

SIDES = ("both", "short")
FACTORS = ("gram", "kl")
FIRST_EIGENVALUE = 0.1
"""What KL takes for every eigenvalue before the first step."""
LARGEST_WHITENING = 4000.0
"""Bound of 1 / sqrt(eigenvalue) in KL."""
SCALE_RULES = (
    *("auto", "original", "match_rms_adamw", "spectral", "spectral_unclamped", "none"),
    None,
)


@dataclass(frozen=True)
class EigenbasisRule(Rule, abstract=True):
    """L, R: averages of G G^T and G^T G; Q_L, Q_R: their eigenvectors, refreshed now and then.

    The fields are arguments of :class:`SOAP`, whose docstring explains them.
    """

    refresh_offset: ClassVar[int] = -1

    eps: float = 1e-8
    shampoo_beta: float | None = None
    precondition_frequency: int = 10
    precondition_sides: str = "both"
    max_precond_dim: int = 10000
    basis: str = "qr"
    moments: str = "permute"

    def __post_init__(self) -> None:
        check_numbers(self, shampoo_beta="[0, 1) or None")
        check_ints(self, precondition_frequency="[1, inf)", max_precond_dim="[0, inf)")
        check_choices(self, basis=("qr", "eigh"), moments=("permute", "rotate"))
        sides = self.precondition_sides
        check(
            isinstance(sides, str) and sides in SIDES,
            f"sides must be one of {', '.join(SIDES)}, got {shown(sides)}",
        )
        check_eps(self, may_be_none=False)

    # what a subclass says -------------------------------------------------------------------------

    @property
    def gram_beta(self) -> float:
        """Decay of the Gram matrices."""
        raise NotImplementedError

    @property
    def turning_slots(self) -> tuple[str, ...]:
        """Names of slots in the bases that turn as vectors do."""
        return ()

    def gram_weight(self, m: int, n: int) -> float:
        """What multiplies G G^T, the start of L; m rows, n columns."""
        return 1 - self.gram_beta

    @property
    def sorts(self) -> bool:
        """Whether a refresh sorts the columns of a basis by eigenvalue."""
        return True

    # what the driver asks -------------------------------------------------------------------------

    @property
    @override
    def refresh_interval(self) -> int:
        return self.precondition_frequency

    @override
    def refresh_due(self, t: int, refreshed: int, shift: int = 0) -> bool:
        """At the first gradient, then before update u > 2 where (u - 2) mod the frequency is 0.

        A refresh that met a gradient of zeros is made up for.
        """
        if refreshed == 0:
            return True
        f = self.precondition_frequency
        since = shift + self.refresh_offset - 1
        return (t + since) // f > (max(refreshed, 2) + since) // f

    @property
    @override
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """The columns where the rows alone have a basis."""
        return frozenset(("cols",) if self.precondition_sides == "short" else ())

    @override
    def transpose(self, m: int, n: int) -> bool:
        return self.precondition_sides == "short" and m > n

    def sided(self, m: int, n: int) -> dict[str, int]:
        """Sizes of the sides that have a basis, by the end of the names of their slots."""
        found = {"": m} if m <= self.max_precond_dim else {}
        if self.precondition_sides == "both" and n <= self.max_precond_dim:
            found["_right"] = n
        return found

    def basis_slots(self, m: int, n: int) -> dict[str, Slot]:
        """Slots of Gram matrices and bases, in full precision: rounding would enter all steps."""
        slots = {}
        for end in self.sided(m, n):
            axes = "nn" if end else "mm"
            slots["gram" + end] = Slot(axes, "full")
            slots["basis" + end] = Slot(axes, "full", fill="eye")
        return slots

    # bases ----------------------------------------------------------------------------------------

    @override
    def refresh(self, w: Member) -> None:
        """Q <- eigenvectors: of the first gradient, afterwards one power step; moments follow."""
        ends = self.sided(w.m, w.n)
        if w.is_first_refresh:
            assert w.grad is not None
            G = w.grad * safe_square_scale(w.grad, w.reductions)
            for end in ends:
                Q = w.state["basis" + end]
                find = partial(completed_eigenbasis, rank=min(w.m, w.n))
                Q.copy_(w.reductions.on_one_rank(find, self.gram_of(w, G, end), Q))
            return
        bases = {end: self.next_basis(w, end) for end in ends}
        self.carry(w, bases)
        for end, (Q, _) in bases.items():
            w.state["basis" + end].copy_(Q)

    def gram_of(self, w: Member, G: Tensor, end: str) -> Tensor:
        """G G^T (K, m, m), or G^T G (K, n, n) for the right side."""
        if end:
            return w.reductions.rows(gram_stack(G.mT))
        return w.reductions.cols(gram_stack(G))

    def next_basis(self, w: Member, end: str) -> tuple[Tensor, Tensor]:
        """The new basis of a side, and (K, 1, side) which old column each column follows."""
        S, Q = w.state["gram" + end], w.state["basis" + end]
        new, order = w.reductions.on_one_rank(self.power_step, S, Q)
        return new, order

    def power_step(self, S: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Q of S Q, or eigenvectors of S (K, m, m), and the order that the old columns take."""
        # by columns, though LAPACK works on rows: its own transposed copy is the cheapest one
        P, (K, m, _) = product(S, Q), S.shape
        if self.sorts:
            sizes = product(S.new_ones(K, 1, m), Q * P)  # the diagonal of Q^T S Q
            order = sizes.argsort(dim=-1, descending=True, stable=True)
            P, Q = permuted_columns(P, order), permuted_columns(Q, order)
        else:
            order = torch.arange(m, dtype=torch.int64, device=S.device).expand(K, 1, m)
        if self.basis == "eigh":
            return completed_eigenbasis(S, Q), order
        return rotated(P, Q), order

    def carry(self, w: Member, bases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Turn the moments from the old bases into the new ones."""
        old = {end: w.state["basis" + end] for end in bases}
        for name in self.turning_slots:
            X = w.state[name]
            Y = X.to(torch.promote_types(X.dtype, torch.float32))
            for end, (Q, _) in bases.items():
                Y = turn(Y, old[end], Q, end)
            X.copy_(Y)
        for name in self.squares(w):
            X = w.state[name]
            Y = X.to(torch.promote_types(X.dtype, torch.float32))
            for end, (Q, order) in bases.items():
                if Y.shape[-1 if end else -2] == 1:
                    continue  # eigenvalues of the other side
                if self.moments == "rotate":
                    C = product(Q.mT, old[end]).square_()
                    Y = product(Y, C.mT) if end else product(C, Y)
                elif self.sorts:
                    Y = permuted_columns(Y, order) if end else permuted_rows(Y, order)
            X.copy_(Y)

    def squares(self, w: Member) -> tuple[str, ...]:
        """Names of slots in the bases that turn as squares do."""
        return ("exp_avg_sq",)

    def project(self, w: Member, G: Tensor) -> Tensor:
        """Q_L^T G Q_R (K, m, n); G itself where no side has a basis."""
        if "basis_right" in w.state:
            G = product(G, w.state["basis_right"])
        return self.project_rows(w, G)

    def project_rows(self, w: Member, G: Tensor) -> Tensor:
        """Q_L^T G (K, m, n), or G."""
        if "basis" not in w.state:
            return G
        return w.reductions.rows(product(w.state["basis"].mT, G))

    def lifted_term(self, w: Member, D: Tensor) -> Term:
        """The term Q_L D Q_R^T, whose last product rides in the write."""
        if "basis_right" in w.state:
            D = product(D, w.state["basis_right"].mT)
        return Factored(w.state["basis"], D) if "basis" in w.state else Dense(D)

    def has_bases(self, w: Member) -> bool:
        """Whether this update works in bases: those of the first gradient serve the next one."""
        return w.refreshed > 0 and not w.is_first_refresh

    def start_grams(self, w: Member, G: Tensor) -> None:
        """L and R <- their start, from the first gradient."""
        weight = self.gram_weight
        for end in self.sided(w.m, w.n):
            S = self.gram_of(w, G, end)
            gram, c = w.state["gram" + end], weight(w.n, w.m) if end else weight(w.m, w.n)
            ema_where_safe(gram.zero_(), S, 1 - c, w.finite)

    def move_grams(self, w: Member, G: Tensor) -> None:
        """L <- beta L + (1 - beta) G G^T, and R."""
        for end in self.sided(w.m, w.n):
            gram = w.state["gram" + end]
            ema_where_safe(gram, self.gram_of(w, G, end), self.gram_beta, w.finite)


def turn(X: Tensor, old: Tensor, new: Tensor, end: str) -> Tensor:
    """new^T old X (K, m, n), or X old^T new of the right side, in the cheaper order."""
    if end:
        return turn(X.mT, old, new, "").mT
    if X.shape[-1] < X.shape[-2]:
        return product(new.mT, product(old, X))
    return product(product(new.mT, old), X)


def permuted_rows(X: Tensor, order: Tensor) -> Tensor:
    """Rows of every matrix of X (K, m, n) in its order (K, 1, m)."""
    if len(X) == 1:  # several times as fast
        return X[0].index_select(0, order.flatten()).unsqueeze(0)
    return X.gather(-2, order.mT.expand_as(X))


def permuted_columns(X: Tensor, order: Tensor) -> Tensor:
    """Columns of every matrix of X (K, m, n) in its order (K, 1, n)."""
    if len(X) == 1:
        return X[0].index_select(1, order.flatten()).unsqueeze(0)
    return X.gather(-1, order.expand_as(X))


def whitening(eigenvalues: Tensor) -> Tensor:
    """1 / sqrt(eigenvalues), bounded."""
    return eigenvalues.rsqrt().clamp_(max=LARGEST_WHITENING)


@dataclass(frozen=True)
class SOAPRule(EigenbasisRule):
    """N = Q_L^T G Q_R; D = Adam's direction of N; W along Q_L D Q_R^T; then L, R <- averages."""

    betas: tuple[float, float] = (0.95, 0.95)
    factors: str = "gram"
    correct_bias: bool = True
    normalize_update: bool = False
    compat: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam(self)
        check_choices(self, factors=FACTORS, compat=(None, "reference"))
        check_flags(self, "correct_bias", "normalize_update")
        check(
            self.factors == "gram" or self.precondition_sides == "both",
            "factors='kl' whitens each side by the other; set sides='both'",
        )

    # the step -------------------------------------------------------------------------------------

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """Both moments, in the bases; Gram matrices, bases, and for KL the eigenvalues."""
        slots = {"exp_avg": Slot("mn"), "exp_avg_sq": Slot("mn"), **self.basis_slots(m, n)}
        if self.whitens(m, n):
            slots["eigen"] = Slot("m1", "full", fill=FIRST_EIGENVALUE)
            slots["eigen_right"] = Slot("1n", "full", fill=FIRST_EIGENVALUE)
        return slots

    def update(self, w: Member) -> Iterator[Direction]:
        """One step of K equal weights (m, n); none for the first gradient that is not zero."""
        assert w.grad is not None
        G = w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        if w.is_first_refresh:
            self.start_grams(w, G)
            return
        if not self.has_bases(w):  # gradients of zeros so far: decay alone
            yield w.step(Dense(torch.zeros_like(G)))
            return
        N = self.project(w, G)
        D, lr_factor = self.direction(w, N)
        if self.normalize_update:
            D = normalized(w, D)
        yield w.step(self.lifted_term(w, D), lr_factor=lr_factor, decay_last=self.published)
        if self.whitens(w.m, w.n):
            self.move_whitened_grams(w, G, N)
        else:
            self.move_grams(w, G)

    def direction(self, w: Member, N: Tensor) -> tuple[Tensor, float]:
        """Adam's direction of N (K, m, n), and what multiplies lr."""
        M, V, t = w.state["exp_avg"], w.state["exp_avg_sq"], w.t - 1
        beta1, beta2 = self.betas
        if not self.published and self.correct_bias:
            D = adam(N, M, V, t, beta1=beta1, beta2=beta2, eps=self.eps, finite=w.finite)
            return D, 1.0
        D, factor = adam_reference(N, M, V, t, beta1=beta1, beta2=beta2, eps=self.eps)
        return D, factor if self.correct_bias else 1.0

    def move_whitened_grams(self, w: Member, G: Tensor, N: Tensor) -> None:
        """L <- average of A A^T / n with A = G whitened on the right, R alike, then eigenvalues."""
        l, r, beta = w.state["eigen"], w.state["eigen_right"], self.gram_beta
        A = product(G, w.state["basis_right"]).mul_(whitening(r))
        B = product(w.state["basis"].mT, G).mul_(whitening(l))
        N = N.square()
        for end, X, count in (("", A, w.n), ("_right", B, w.m)):
            gram = w.state["gram" + end]
            ema_where_safe(gram, self.gram_of(w, X, end).div_(count), beta, w.finite)
        l_new = row_means(N / r)
        r_new = row_means((N / l).mT).mT
        for stored, new in ((l, l_new), (r, r_new)):
            ema_where_safe(stored, new, beta, w.finite)

    def whitens(self, m: int, n: int) -> bool:
        """Whether Gram matrices are KL's, which takes a basis on both sides."""
        return self.factors == "kl" and len(self.sided(m, n)) == 2

    # hooks ----------------------------------------------------------------------------------------

    @property
    def published(self) -> bool:
        """Whether the order of the published code is asked for."""
        return self.compat == "reference"

    @property
    @override
    def gram_beta(self) -> float:
        return self.betas[1] if self.shampoo_beta is None else self.shampoo_beta

    @override
    def gram_weight(self, m: int, n: int) -> float:
        return 1 / n if self.whitens(m, n) else super().gram_weight(m, n)

    @property
    @override
    def turning_slots(self) -> tuple[str, ...]:
        return ("exp_avg",)

    @override
    def squares(self, w: Member) -> tuple[str, ...]:
        return tuple(x for x in ("exp_avg_sq", "eigen", "eigen_right") if x in w.state)

    @property
    @override
    def sorts(self) -> bool:
        """False for KL's power steps: the columns keep their places, as published."""
        return self.factors == "gram" or self.basis == "eigh"

    @property
    @override
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """False in the published order, whose moments take no flags."""
        return not self.published and self.correct_bias

    @override
    def adamw_order(self) -> tuple[bool, float] | None:
        return (self.correct_bias, self.eps) if self.published else None


def normalized(w: Member, D: Tensor) -> Tensor:
    """D (K, m, n) over its root mean square, which is that of the step: bases are orthogonal."""
    c = safe_square_scale(D, w.reductions)
    D = D * c
    rms = w.reductions.both(total(column_squares(D))).div_(w.m * w.n).sqrt_()
    return D.div_(rms.add_(1e-30 * c))


def row_means(X: Tensor) -> Tensor:
    """Means of the rows of X (K, m, n) as (K, m, 1), in bits that do not depend on K."""
    return product(X, X.new_full((len(X), X.shape[-1], 1), 1 / X.shape[-1]))


@dataclass(frozen=True)
class SOAPMuonRule(EigenbasisRule):
    """U = momentum; N = Q_L^T U Q_R / sqrt(V); W along polar(Q_L N Q_R^T); L, R <- averages."""

    momentum: float = 0.95
    nesterov: bool = True
    beta2: float = 0.9
    precondition_frequency: int = 1
    polar: str = "auto"
    adjust_lr_fn: str | None = "auto"

    needs_full_matrix = True
    handles_nonfinite = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, momentum="[0, 1)", beta2="[0, 1)")
        check_flags(self, "nesterov")
        check_choices(self, polar=("auto", *POLAR_METHODS), adjust_lr_fn=SCALE_RULES)

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The momentum as W lies, its second moment in the bases, Gram matrices and bases."""
        moments = {"momentum_buffer": Slot("mn"), "exp_avg_sq": Slot("mn")}
        return {**moments, **self.basis_slots(m, n)}

    def update(self, w: Member) -> Iterator[Direction]:
        """One step of K equal weights (m, n): Muon's for the first gradient."""
        assert w.grad is not None
        G = w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        B = w.state["momentum_buffer"]
        U = momentum_step(B, G, self.momentum, self.nesterov, finite=w.finite)
        if self.has_bases(w):
            U = self.preconditioned(w, U)
        factor = partial(polar_factor, method=self.polar, eps=norm_floor(None, U.dtype))
        O = w.reductions.on_full_matrix(factor, U)
        yield w.step(Dense(O), lr_factor=self.lr_factor(w.m, w.n))
        if w.is_first_refresh:
            self.start_grams(w, G)
        elif self.has_bases(w):
            self.move_grams(w, G)

    def preconditioned(self, w: Member, U: Tensor) -> Tensor:
        """Q_L [N / sqrt(V)] Q_R^T of N = Q_L^T U Q_R (K, m, n), and V follows."""
        N = self.project(w, U)
        stored = w.state["exp_avg_sq"]
        V = stored.to(N.dtype, copy=True).mul_(self.beta2).add_(N.square().mul_(1 - self.beta2))
        stored.copy_(w.where_finite(V.clamp_(max=max_safe_value(stored, V)), stored))
        D = N / V.sqrt_().clamp_(min=self.eps)
        if "basis_right" in w.state:
            D = product(D, w.state["basis_right"].mT)
        return product(w.state["basis"], D) if "basis" in w.state else D

    def lr_factor(self, m: int, n: int) -> float:
        """Factor of lr in the update; weight decay takes the bare lr."""
        name = self.adjust_lr_fn or "original"
        return adjust_lr("match_rms_adamw" if name == "auto" else name, m, n, min(m, n))

    @property
    @override
    def gram_beta(self) -> float:
        return self.beta2 if self.shampoo_beta is None else self.shampoo_beta

    @override
    def eco_obstacle(self) -> str | None:
        return "SOAPMuon, whose step has no fixed scale"


class EigenbasisOptimizer(StackedOptimizer):
    """Base class of SOAP and SOAPMuon, whose groups may name ``sides``."""

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``sides`` is its key ``precondition_sides``, as a list has that name."""
        if isinstance(param_group, dict) and isinstance(param_group.get("sides"), str):
            param_group = {**param_group, "precondition_sides": param_group["sides"]}
            del param_group["sides"]
        super().add_param_group(param_group)


class SOAP(EigenbasisOptimizer):
    """SOAP: Adam in slowly turning eigenbases of the gradients' second moments.

    For each matrix W (m x n); its first gradient G starts L, R, Q_L, Q_R and moves nothing else::

        N = Q_L^T G Q_R                                       in the bases
        M <- beta1 M + (1 - beta1) N                          first moment
        V <- beta2 V + (1 - beta2) N * N                      second moment
        W <- (1 - lr * weight_decay) W                        decay with the bare lr
        W <- W - lr * Q_L [Mhat / (sqrt(Vhat) + eps)] Q_R^T   hats: bias-corrected
        L <- shampoo_beta L + (1 - shampoo_beta) G G^T        m x m
        R <- shampoo_beta R + (1 - shampoo_beta) G^T G        n x n
        every precondition_frequency steps:
            sort the columns of Q_L by diag(Q_L^T L Q_L), and the rows of V with them; Q_R alike
            Q_L <- Q factor of L Q_L, Q_R <- Q factor of R Q_R
            M <- M in the new bases

    Sources: *SOAP: Improving and Stabilizing Shampoo using Adam*, arXiv 2409.11321, and its code
    (``nikhilvyas/SOAP``), whose recorded steps are tested; KL-Shampoo, arXiv 2509.03378. A fixed
    rule for eigenvectors that the first gradient leaves open, ``sides="short"``, ``moments``
    and ``basis`` are additions; no dimensions are merged, ``view`` says what the matrices are.
    ``ARO(base="adam", rotation="eigh", gram_beta=...)`` is the one-sided relative whose moments do
    not turn; :class:`SOAPMuon` takes a polar step of the same coordinates.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
        lr: Learning rate (default: 3e-3).
        betas: Decays of the moments (default: (0.95, 0.95)).
        eps: Added to the bias-corrected root (default: 1e-8).
        weight_decay: Decoupled weight decay (default: 0.01).
        shampoo_beta: Decay of L and R (default: None, beta2).
        precondition_frequency: Steps between two changes of the bases (default: 10).
        sides: ``"both"`` (default), or ``"short"``: Q of the shorter side alone, of equal ones the
            rows. Far cheaper for weights that are long. Written into a group that exists, it is
            the key ``precondition_sides``.
        max_precond_dim: Longest side that has a Q (default: 10000). 0: Adam.
        factors: ``"gram"`` (default), or ``"kl"``, KL-Shampoo's: L averages A A^T / n of A =
            G Q_R diag(r)^(-1/2), with r averages of N * N / l over rows; R and l alike. There
            columns keep their places. A side without Q whitens nothing.
        basis: ``"qr"`` (default), the power step above, or ``"eigh"``, eigenvectors of L and R.
        moments: V under new bases: ``"permute"`` (default), sorted with the columns, or
            ``"rotate"``, (C*C) V (D*D)^T, with C and D what turns M to C M D^T.
        correct_bias: Bias correction of both moments (default: True).
        normalize_update: Divide the direction by its root mean square (default: False). Published
            for a ``precondition_frequency`` near 100.
        compat: ``"reference"`` has the published order: eps on the uncorrected root, and decay
            last (default: None).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range or unknown; the text names it.
        TypeError: If a keyword is unknown.

    State: ``exp_avg``, ``exp_avg_sq`` (like W, in the bases), ``gram``, ``basis`` (m x m),
    ``gram_right``, ``basis_right`` (n x n), for ``"kl"`` ``eigen`` and ``eigen_right`` (m and n
    numbers), and ``step``; float32. ``state_dtype`` is that of the moments alone. Peak temporary
    memory: two m x n and two square matrices.

    Caveat: The first gradient of a matrix makes no step, as published: in its own bases it is
    diagonal, and Adam would make steps of full size of the rounding beside the diagonal. Gradients
    of zeros before it leave decay alone. Vectors step at once, in torch's AdamW. A step costs
    6 m n (m + n) multiplications and additions, those of Muon's five polynomials 30 n^3 where
    m = n; a change of bases about 5 (m^3 + n^3) more.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import SOAP
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = SOAP(model, lr=3e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        sides: str = "both",
        max_precond_dim: int = 10000,
        factors: str = "gram",
        basis: str = "qr",
        moments: str = "permute",
        correct_bias: bool = True,
        normalize_update: bool = False,
        compat: str | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = SOAPRule(
            eps=eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            precondition_sides=sides,
            max_precond_dim=max_precond_dim,
            basis=basis,
            moments=moments,
            betas=betas,
            factors=factors,
            correct_bias=correct_bias,
            normalize_update=normalize_update,
            compat=compat,
        )
        super().__init__(params, rule, lr, weight_decay, **options)


class SOAPMuon(EigenbasisOptimizer):
    """SOAP-Muon: momentum whitened in SOAP's bases, then Muon's orthogonal factor of it.

    For each matrix W (m x n) with gradient G; the first gradient makes a step of Muon::

        B <- B + (1 - momentum) (G - B)                       momentum
        U  = G + momentum (B - G)   if nesterov else   B
        N  = Q_L^T U Q_R                                      in the bases
        V <- beta2 V + (1 - beta2) N * N
        O  = polar(Q_L [N / max(sqrt(V), eps)] Q_R^T)         all singular values near 1
        W <- (1 - lr * weight_decay) W
        W <- W - lr * ratio(m, n) * O                         RMS 0.2 by default, as AdamW's
        L, R, Q_L, Q_R, and the order of V: as in SOAP, from G

    Sources: a record of June 2026 in the third track of ``KellerJordan/modded-nanogpt``, whose
    recorded momenta are tested, without its gate for attention weights; *SOAP*, arXiv 2409.11321.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        momentum: Decay of the momentum average (default: 0.95).
        weight_decay: Decoupled weight decay (default: 0.1).
        nesterov: Look ahead by one gradient (default: True).
        beta2: Decay of V (default: 0.9).
        eps: Smallest root that is divided by (default: 1e-8).
        shampoo_beta: Decay of L and R (default: None, ``beta2``).
        precondition_frequency: Steps between two changes of the bases (default: 1).
        sides: ``"both"`` (default), or ``"short"``: Q of the shorter side alone.
        max_precond_dim: Longest side that has a Q (default: 10000).
        basis: ``"qr"`` (default), one power step, or ``"eigh"``, eigenvectors of L and R.
        moments: V under new bases: ``"permute"`` (default) or ``"rotate"``, as in :class:`SOAP`.
        polar: Method of the polar factor, a name of :func:`stiefel.kernels.polar_factor` but
            ``"low_rank"`` (default: ``"auto"``).
        adjust_lr_fn: ratio(m, n), by the names of :class:`Muon` (default: ``"auto"``, 0.2
            sqrt(max(m, n))).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range or unknown; the text names it.
        TypeError: If a keyword is unknown.

    State: ``momentum_buffer`` (like W), ``exp_avg_sq`` (like W, in the bases), ``gram``, ``basis``
    (m x m), ``gram_right``, ``basis_right`` (n x n) and ``step``; float32. Peak temporary memory:
    that of Muon, and two square matrices.

    Caveat: The dearest step of the package: Muon's, SOAP's, and at the default frequency a QR
    factorization of both sides every time.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import SOAPMuon
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = SOAPMuon(model, lr=1e-3)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        beta2: float = 0.9,
        eps: float = 1e-8,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 1,
        sides: str = "both",
        max_precond_dim: int = 10000,
        basis: str = "qr",
        moments: str = "permute",
        polar: str = "auto",
        adjust_lr_fn: str | None = "auto",
        **options: Unpack[Common],
    ) -> None:
        rule = SOAPMuonRule(
            eps=eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            precondition_sides=sides,
            max_precond_dim=max_precond_dim,
            basis=basis,
            moments=moments,
            momentum=momentum,
            nesterov=nesterov,
            beta2=beta2,
            polar=polar,
            adjust_lr_fn=adjust_lr_fn,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
