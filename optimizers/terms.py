"""Parts of a direction in their cheapest forms, and how each is put into a weight.

A term is written in panels by torch, or whole by one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .. import kernels
from ..kernels import Stack, add_product_


def _rows(x: Tensor, ks: slice, rows: slice) -> Tensor:
    """Slice matrices and rows of x (K or 1, m or 1, n); broadcast axes stay."""
    x = x if x.shape[0] == 1 else x[ks]
    return x if x.shape[-2] == 1 else x[:, rows]


class Factors(NamedTuple):
    """What multiplies a weight, and all that is added to it, where a kernel writes.

    Attributes:
        keep: The weight's.
        alpha: That of the terms.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. Where the flag is 0 the weight stays, with all state that belongs to the terms.
    """

    keep: float
    alpha: float
    control: Tensor | None = None

    def times(self, c: float) -> Factors:
        """The same with terms c times as large."""
        if self.control is None or c == 1.0:
            return self._replace(alpha=self.alpha * c)
        control = self.control.clone()
        control[:, 2] *= c  # a number, which goes along with the launch: nothing waits for a copy
        return self._replace(control=control)


class Term:
    """A part of a direction in its cheapest form; ``add_`` puts alpha times it into a panel."""

    whole_rows: ClassVar[bool] = True
    """Whether the term can be written a panel of rows at a time."""
    fused: ClassVar[bool] = False
    """Whether ``write_`` does it with the decay inside."""
    apart: ClassVar[bool] = False
    """Whether ``kernel_`` takes a list of matrices, wherever they lie, for W."""

    @property
    def mT(self) -> Term:
        """The same term for the transposed weight."""
        raise NotImplementedError

    def scaled(self, c: Tensor) -> Term:
        """The term times c (K, 1, 1) or (), multiplied into its smallest tensor."""
        raise NotImplementedError

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """Add alpha times rows `rows` of matrices `ks` to panel, in place."""
        raise NotImplementedError

    def write_(self, panel: Tensor, ks: slice, rows: slice, keep: float, alpha: float) -> None:
        """Panel <- keep * panel + alpha times these rows, in place and in one go."""
        raise NotImplementedError

    def kernel_(self, W: Any, by: Factors, beside: Term | None = None) -> bool:
        """W (K, m, n) <- keep W + alpha (term + beside) by one kernel; False if there is none.

        W is a list of K matrices only where all terms are ``apart``.
        """
        return False


@dataclass(frozen=True)
class Dense(Term):
    """A new tensor U (K, m, n)."""

    apart: ClassVar[bool] = True
    U: Tensor

    @property
    def mT(self) -> Dense:
        """See :class:`Term`."""
        return Dense(self.U.mT)

    def scaled(self, c: Tensor) -> Dense:
        """See :class:`Term`."""
        return Dense(self.U * c)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        panel.add_(self.U[ks, rows], alpha=alpha)

    def kernel_(self, W: Stack, by: Factors, beside: Term | None = None) -> bool:
        """See :class:`Term`."""
        if beside is not None:
            return False
        kernels.scaled_add_(W, self.U, None, *by)
        return True


@dataclass(frozen=True)
class Factored(Term):
    """P @ N with P (K, m, r) and N (K, r, n): never formed at full precision weights."""

    fused: ClassVar[bool] = True
    P: Tensor
    N: Tensor

    @property
    def mT(self) -> Factored:
        """See :class:`Term`."""
        return Factored(self.N.mT, self.P.mT)

    def scaled(self, c: Tensor) -> Factored:
        """See :class:`Term`."""
        if self.P.numel() <= self.N.numel():
            return Factored(self.P * c, self.N)
        return Factored(self.P, self.N * c)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        self.write_(panel, ks, rows, 1.0, alpha)

    def write_(self, panel: Tensor, ks: slice, rows: slice, keep: float, alpha: float) -> None:
        """Panel <- keep * panel + alpha * P @ N in one fused product: decay costs nothing."""
        P, N = self.P[ks, rows], self.N[ks]
        P, N = P.to(panel.dtype), N.to(panel.dtype)
        add_product_(panel, P, N, beta=keep, alpha=alpha)

    def kernel_(self, W: Tensor, by: Factors, beside: Term | None = None) -> bool:
        """See :class:`Term`; beside it there may be what exists (Scaled) or a residual's sign."""
        if beside is not None and not isinstance(beside, Scaled | Residual):
            return False
        rest = {} if beside is None else beside.rest()
        kernels.lift_(W, self.P, self.N, by.keep, by.alpha, control=by.control, **rest)
        return True


class Deferred(Term):
    """A term that is made when it is written, so that its state moves in the same pass."""

    def made(self) -> Term:
        """What the term is; asked for at most once."""
        raise NotImplementedError

    @cached_property
    def whole(self) -> Term:
        """The term, made."""
        return self.made()

    @property
    def mT(self) -> Term:
        """See :class:`Term`."""
        return self.whole.mT

    def scaled(self, c: Tensor) -> Term:
        """See :class:`Term`."""
        return self.whole.scaled(c)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        self.whole.add_(panel, ks, rows, alpha)

    def write_(self, panel: Tensor, ks: slice, rows: slice, keep: float, alpha: float) -> None:
        """See :class:`Term`."""
        self.whole.write_(panel, ks, rows, keep, alpha)


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
        ok: None, or flags (K,): where one is 0 the moments stay.
    """

    fused: ClassVar[bool] = True
    P: Tensor
    R: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    t: int | Tensor
    betas: tuple[float, float]
    eps: float
    ok: Tensor | None = None

    def made(self) -> Factored:
        """See :class:`Deferred`."""
        beta1, beta2 = self.betas
        N = kernels.adam(
            self.R, self.exp_avg, self.exp_avg_sq, self.t,
            beta1=beta1, beta2=beta2, eps=self.eps, finite=self.ok,
        )  # fmt: skip
        return Factored(self.P, N)

    def kernel_(self, W: Tensor, by: Factors, beside: Term | None = None) -> bool:
        """See :class:`Term`; N stays on chip where it fits."""
        if isinstance(beside, Scaled):
            return self.whole.kernel_(W, by, beside)
        if beside is not None and not isinstance(beside, Residual):
            return False
        rest = {} if beside is None else beside.rest()
        rest.pop("R", None)  # it is this R
        (beta1, beta2), P, M, V = self.betas, self.P, self.exp_avg, self.exp_avg_sq
        kernels.adam_lift_(
            W, P, self.R, M, V, self.t, by.keep, by.alpha,
            beta1=beta1, beta2=beta2, eps=self.eps, control=by.control, **rest,
        )  # fmt: skip
        return True


@dataclass(frozen=True)
class Scaled(Term):
    """X (K, m, n) that already exists, times by (K, m, 1), (K, 1, n) or (K, 1, 1)."""

    apart: ClassVar[bool] = True
    X: Tensor
    by: Tensor

    @property
    def mT(self) -> Scaled:
        """See :class:`Term`."""
        return Scaled(self.X.mT, self.by.mT)

    def scaled(self, c: Tensor) -> Scaled:
        """See :class:`Term`."""
        return Scaled(self.X, self.by * c)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        X = self.X[ks, rows].to(panel.dtype)  # a guarded rule's gradient may be narrower
        panel.addcmul_(X, _rows(self.by, ks, rows), value=alpha)

    def rest(self) -> dict[str, Any]:
        """The same as arguments of ``lift_``."""
        return {"X": self.X, "by": self.by}

    def kernel_(self, W: Stack, by: Factors, beside: Term | None = None) -> bool:
        """See :class:`Term`; beside it there may be another of its kind."""
        if beside is not None and not isinstance(beside, Scaled):
            return False
        second: dict[str, Any] = {} if beside is None else {"Y": beside.X, "by_Y": beside.by}
        kernels.scaled_add_(W, self.X, self.by, *by, **second)
        return True


@dataclass(frozen=True)
class Selected(Term):
    """`block` on the rows (dim -2) or columns (dim -1) listed in index (K, c)."""

    dim: int
    index: Tensor
    block: Tensor

    @property
    def mT(self) -> Selected:
        """See :class:`Term`."""
        return Selected(-3 - self.dim, self.index, self.block.mT)

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """Chosen rows lie anywhere, so they need the whole matrix; chosen columns do not."""
        return self.dim == -1

    def scaled(self, c: Tensor) -> Selected:
        """See :class:`Term`."""
        return Selected(self.dim, self.index, self.block * c)

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        block = self.block[ks, rows] if self.dim == -1 else self.block[ks]
        # gather and scatter take int64 only; the stored index is int32
        index = self.index[ks].long().unsqueeze(-2 if self.dim == -1 else -1).expand_as(block)
        part = panel.gather(self.dim, index).add_(block, alpha=alpha)
        panel.scatter_(self.dim, index, part)


@dataclass(frozen=True)
class Blocks(Term):
    """Never whole: fn(k, i, j) makes rows i and columns j (slices) of the matrices k."""

    fn: Callable[[slice, slice, slice], Tensor]

    @property
    def mT(self) -> Blocks:
        """See :class:`Term`."""
        return Blocks(lambda k, i, j: self.fn(k, j, i).mT)

    def scaled(self, c: Tensor) -> Blocks:
        """See :class:`Term`."""
        c = c.reshape(1, 1, 1) if c.dim() == 0 else c
        return Blocks(lambda k, i, j: self.fn(k, i, j) * _rows(c, k, i))

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        panel.add_(self.fn(ks, rows, slice(None)), alpha=alpha)


@dataclass(frozen=True)
class Residual(Blocks):
    """The sign of G - P R, of what a subspace leaves of G, times `free`; made in blocks.

    Attributes:
        fn: See :class:`Blocks`.
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

    def rest(self) -> dict[str, Any]:
        """The same as arguments of ``lift_``."""
        return {"X": self.G, "R": self.R, "free": self.free, "floor": self.floor}
