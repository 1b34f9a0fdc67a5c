"""Parts of a direction in their cheapest forms, and how each is put into a weight.

Torch adds a term to panels, which ``update_weight_`` hands over and rounds into the weight; or one
kernel, ``fused_write_``, reads, changes and rounds the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import Rounding, Stack, add_product_

ALL = slice(None)
"""Of matrices or rows: all; it cuts nothing, so what exists is taken without a view."""


def cut(X: Tensor, ks: slice, rows: slice) -> Tensor:
    """These matrices and rows of X (K, m, n)."""
    return X if ks is ALL and rows is ALL else X[ks, rows]


def slice_rows(x: Tensor, ks: slice, rows: slice) -> Tensor:
    """Slice matrices and rows of x (K or 1, m or 1, n); broadcast axes stay."""
    if ks is ALL and rows is ALL:
        return x
    x = x if x.shape[0] == 1 else x[ks]
    return x if x.shape[-2] == 1 else x[:, rows]


def _slice_matrices(x: Tensor, ks: slice) -> Tensor:
    """Slice matrices of x (K or 1, ...); an axis that broadcasts stays."""
    return x if x.shape[0] == 1 else x[ks]


class WriteScalars(NamedTuple):
    """What multiplies a weight, and all that is added to it, where a kernel writes.

    Attributes:
        decay_factor: The weight's.
        alpha: That of the terms.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. Where the flag is 0 the weight stays, with all state that belongs to the terms.
        rounding: How the weight is rounded where its precision is low; None: to nearest.
    """

    decay_factor: float
    alpha: float
    control: Tensor | None = None
    rounding: Rounding | None = None

    def scale_alpha(self, c: float) -> WriteScalars:
        """The same with terms c times as large."""
        if self.control is None or c == 1.0:
            return self._replace(alpha=self.alpha * c)
        control = self.control.clone()
        control[:, 2] *= c  # a number, which goes along with the launch: nothing waits for a copy
        return self._replace(control=control)


class Term:
    """A part of a direction in its cheapest form; ``add_`` puts alpha times it into a panel.

    A panel holds values of a weight in the accumulation dtype: it may be the weight's own memory or
    a copy. Only ``fused_write_`` is given the weight.
    """

    supports_row_panels: ClassVar[bool] = True
    """Whether the term can be written a panel of rows at a time."""
    fuses_decay: ClassVar[bool] = False
    """Whether ``write_`` does it with the decay inside."""
    accepts_list: ClassVar[bool] = False
    """Whether ``fused_write_`` takes a list of matrices, wherever they lie, for W."""

    @property
    def mT(self) -> Term:
        """The same term for the transposed weight."""
        raise NotImplementedError

    def scaled(self, c: Tensor) -> Term:
        """The term times c (K, 1, 1) or (), multiplied into its smallest tensor."""
        raise NotImplementedError

    def matrices(self, ks: slice) -> Term:
        """The part of the matrices `ks`, for a write of these alone."""
        return _Matrices(self, ks)

    def scaled_matrices(self, ks: slice, c: Tensor) -> Term:
        """The matrices ``ks`` times c: (), or (k, ...) for each of them.

        A term that moves state as it is made overrides it, and makes these matrices alone.
        """
        if c.dim() == 3:  # the whole term wants a factor for every matrix
            full = c.new_ones(ks.stop, 1, 1)
            full[ks] = c
            c = full
        return _Matrices(self.scaled(c), ks)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """Add alpha times rows `rows` of matrices `ks` to panel, in place."""
        raise NotImplementedError

    def write_(
        self, panel: Tensor, ks: slice, rows: slice, decay_factor: float, alpha: float
    ) -> None:
        """Panel <- decay_factor * panel + alpha times these rows, in place and in one go."""
        raise NotImplementedError

    def fused_write_(self, W: Any, by: WriteScalars, other: Term | None = None) -> bool:
        """W (K, m, n) <- decay_factor W + alpha (term + other), one kernel; False if there is none.

        W is a list of K matrices only where all terms are ``accepts_list``.
        """
        return False


@dataclass(frozen=True)
class _Matrices(Term):
    """Some matrices of a term that is made a panel at a time.

    Attributes:
        whole: The term of all matrices.
        ks: Which of them, a slice with both ends.
    """

    whole: Term
    ks: slice

    @property
    def supports_row_panels(self) -> bool:  # type: ignore[override]
        """As the whole term."""
        return self.whole.supports_row_panels

    @property
    def fuses_decay(self) -> bool:  # type: ignore[override]
        """As the whole term."""
        return self.whole.fuses_decay

    @property
    @override
    def mT(self) -> Term:
        return _Matrices(self.whole.mT, self.ks)

    @override
    def scaled(self, c: Tensor) -> Term:
        return self.whole.scaled_matrices(self.ks, c)

    def _of_whole(self, ks: slice) -> slice:
        start, stop, _ = ks.indices(self.ks.stop - self.ks.start)
        return slice(self.ks.start + start, self.ks.start + stop)

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        self.whole.add_(panel, self._of_whole(ks), rows, alpha)

    @override
    def write_(
        self, panel: Tensor, ks: slice, rows: slice, decay_factor: float, alpha: float
    ) -> None:
        self.whole.write_(panel, self._of_whole(ks), rows, decay_factor, alpha)


@dataclass(frozen=True)
class Dense(Term):
    """A new tensor U (K, m, n)."""

    accepts_list: ClassVar[bool] = True
    U: Tensor

    @property
    @override
    def mT(self) -> Dense:
        return Dense(self.U.mT)

    @override
    def scaled(self, c: Tensor) -> Dense:
        return Dense(self.U * c)

    @override
    def matrices(self, ks: slice) -> Dense:
        return Dense(self.U[ks])

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        panel.add_(cut(self.U, ks, rows), alpha=alpha)

    @override
    def fused_write_(self, W: Stack, by: WriteScalars, other: Term | None = None) -> bool:
        if other is not None:
            return False
        keep, alpha, control, rounding = by
        kernels.scaled_add_(W, self.U, None, keep, alpha, control, rounding=rounding)
        return True


@dataclass(frozen=True)
class Factored(Term):
    """P @ N with P (K, m, r) and N (K, r, n): never formed at full precision weights."""

    fuses_decay: ClassVar[bool] = True
    P: Tensor
    N: Tensor

    @property
    @override
    def mT(self) -> Factored:
        return Factored(self.N.mT, self.P.mT)

    @override
    def scaled(self, c: Tensor) -> Factored:
        if self.P.numel() <= self.N.numel():
            return Factored(self.P * c, self.N)
        return Factored(self.P, self.N * c)

    @override
    def matrices(self, ks: slice) -> Factored:
        return Factored(self.P[ks], self.N[ks])

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        self.write_(panel, ks, rows, 1.0, alpha)

    def write_(
        self, panel: Tensor, ks: slice, rows: slice, decay_factor: float, alpha: float
    ) -> None:
        """Panel <- decay_factor * panel + alpha * P @ N in one fused product: decay is free."""
        P, N = self.P[ks, rows], self.N[ks]
        P, N = P.to(panel.dtype), N.to(panel.dtype)
        add_product_(panel, P, N, beta=decay_factor, alpha=alpha)

    @override
    def fused_write_(self, W: Tensor, by: WriteScalars, other: Term | None = None) -> bool:
        """Beside it there may be what exists (Scaled) or a residual's sign."""
        if other is not None and not isinstance(other, Scaled | Residual):
            return False
        lift_kwargs = {} if other is None else other.lift_kwargs()
        keep, alpha, control, rounding = by
        kernels.lift_(
            W, self.P, self.N, keep, alpha, control=control, rounding=rounding, **lift_kwargs
        )
        return True


class Deferred(Term):
    """A term that is made when it is written, so that its state moves in the same pass."""

    def materialize(self) -> Term:
        """What the term is; asked for at most once."""
        raise NotImplementedError

    @cached_property
    def materialized(self) -> Term:
        """The term, made."""
        return self.materialize()

    @property
    @override
    def mT(self) -> Term:
        return self.materialized.mT

    @override
    def scaled(self, c: Tensor) -> Term:
        return self.materialized.scaled(c)

    @override
    def matrices(self, ks: slice) -> Term:
        return self.materialized.matrices(ks)

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        self.materialized.add_(panel, ks, rows, alpha)

    @override
    def write_(
        self, panel: Tensor, ks: slice, rows: slice, decay_factor: float, alpha: float
    ) -> None:
        self.materialized.write_(panel, ks, rows, decay_factor, alpha)


@dataclass(frozen=True, eq=False)
class AdamFactored(Deferred):
    """P @ N with N = adam(R) still to be made: moments move while the weight is written.

    Attributes:
        P: (K, m, r).
        R: (K, r, n), the coordinates.
        exp_avg: (K, r, n), first moment.
        exp_avg_sq: (K, r, n), second moment.
        t: Number of this update, or clocks that broadcast against R.
        betas: Decays of the moments.
        eps: Added to the bias-corrected root.
        finite: None, or flags (K,): where one is 0 the moments stay.
        overwrites: Whether R is not needed afterwards, so that N may take its place.
    """

    fuses_decay: ClassVar[bool] = True
    P: Tensor
    R: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    t: int | Tensor
    betas: tuple[float, float]
    eps: float
    finite: Tensor | None = None
    overwrites: bool = False

    @override
    def materialize(self) -> Factored:
        beta1, beta2 = self.betas
        N = kernels.adam(
            self.R,
            self.exp_avg,
            self.exp_avg_sq,
            self.t,
            beta1=beta1,
            beta2=beta2,
            eps=self.eps,
            finite=self.finite,
            overwrite=self.overwrites,
        )
        return Factored(self.P, N)

    @override
    def fused_write_(self, W: Tensor, by: WriteScalars, other: Term | None = None) -> bool:
        """N stays on chip where it fits."""
        if isinstance(other, Scaled):
            return self.materialized.fused_write_(W, by, other)
        if other is not None and not isinstance(other, Residual):
            return False
        lift_kwargs = {} if other is None else other.lift_kwargs()
        lift_kwargs.pop("R", None)  # it is this R
        (beta1, beta2), P, M, V = self.betas, self.P, self.exp_avg, self.exp_avg_sq
        kernels.adam_lift_(
            W,
            P,
            self.R,
            M,
            V,
            self.t,
            by.decay_factor,
            by.alpha,
            beta1=beta1,
            beta2=beta2,
            eps=self.eps,
            control=by.control,
            rounding=by.rounding,
            **lift_kwargs,
        )
        return True


@dataclass(frozen=True)
class Scaled(Term):
    """X (K, m, n) that already exists, times by (K, m, 1), (K, 1, n) or (K, 1, 1)."""

    accepts_list: ClassVar[bool] = True
    X: Tensor
    by: Tensor

    @property
    @override
    def mT(self) -> Scaled:
        return Scaled(self.X.mT, self.by.mT)

    @override
    def scaled(self, c: Tensor) -> Scaled:
        return Scaled(self.X, self.by * c)

    @override
    def matrices(self, ks: slice) -> Scaled:
        return Scaled(self.X[ks], _slice_matrices(self.by, ks))

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        X = cut(self.X, ks, rows).to(panel.dtype)  # an unmasked gradient may be narrower
        panel.addcmul_(X, slice_rows(self.by, ks, rows), value=alpha)

    def lift_kwargs(self) -> dict[str, Any]:
        """The same as arguments of ``lift_``."""
        return {"X": self.X, "by": self.by}

    @override
    def fused_write_(self, W: Stack, by: WriteScalars, other: Term | None = None) -> bool:
        """Beside it there may be another of its kind."""
        if other is not None and not isinstance(other, Scaled):
            return False
        Y, by_Y = (None, None) if other is None else (other.X, other.by)
        keep, alpha, control, rounding = by
        kernels.scaled_add_(
            W, self.X, self.by, keep, alpha, control, Y=Y, by_Y=by_Y, rounding=rounding
        )
        return True


@dataclass(frozen=True)
class Selected(Term):
    """`values` on the rows (dim -2) or columns (dim -1) listed in index (K, c)."""

    dim: int
    index: Tensor
    values: Tensor

    @property
    @override
    def mT(self) -> Selected:
        return Selected(-3 - self.dim, self.index, self.values.mT)

    @property
    def supports_row_panels(self) -> bool:  # type: ignore[override]
        """Chosen rows lie anywhere, so they need the whole matrix; chosen columns do not."""
        return self.dim == -1

    @override
    def scaled(self, c: Tensor) -> Selected:
        return Selected(self.dim, self.index, self.values * c)

    @override
    def matrices(self, ks: slice) -> Selected:
        return Selected(self.dim, self.index[ks], self.values[ks])

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        values = self.values[ks, rows] if self.dim == -1 else self.values[ks]
        # gather and scatter take int64 only; the stored index is int32
        index = self.index[ks].long().unsqueeze(-2 if self.dim == -1 else -1).expand_as(values)
        part = panel.gather(self.dim, index).add_(values, alpha=alpha)
        panel.scatter_(self.dim, index, part)


@dataclass(frozen=True)
class PanelTerm(Term):
    """Never whole: fn(k, i, j) makes rows i and columns j (slices) of the matrices k."""

    fn: Callable[[slice, slice, slice], Tensor]

    @property
    @override
    def mT(self) -> PanelTerm:
        return PanelTerm(lambda k, i, j: self.fn(k, j, i).mT)

    @override
    def scaled(self, c: Tensor) -> PanelTerm:
        c = c.reshape(1, 1, 1) if c.dim() == 0 else c
        return PanelTerm(lambda k, i, j: self.fn(k, i, j) * slice_rows(c, k, i))

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        panel.add_(self.fn(ks, rows, slice(None)), alpha=alpha)


@dataclass(frozen=True)
class Residual(PanelTerm):
    """The sign of G - P R, of what a subspace leaves of G, times `free`; made in blocks.

    Attributes:
        fn: Makes the sign of the rows i and columns j of the matrices k.
        P: (K, m, r).
        R: (K, r, n) = P^T G.
        G: (K, m, n).
        free: Multiplies the sign.
        floor: None, or (K, 1, 1): entries up to it in magnitude have the sign 0.
    """

    P: Tensor
    R: Tensor
    G: Tensor
    free: float
    floor: Tensor | None = None

    def lift_kwargs(self) -> dict[str, Any]:
        """The same as arguments of ``lift_``."""
        return {"X": self.G, "R": self.R, "free": self.free, "floor": self.floor}
