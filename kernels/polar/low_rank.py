"""The randomized low-rank polar factor: that of a matrix inside a sketch of its range."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..random import random_signs
from ..reference.matmul import placed

SKETCHES = ("signs", "gaussian", "kaczmarz")
SKETCH_BASES = ("longer", "rows")


def low_rank(
    X: Tensor,
    factor: Callable[[Tensor], Tensor],
    *,
    rank: int | float = 0.125,
    oversample: int = 10,
    power: int = 1,
    sketch: str | Tensor = "signs",
    key: int | Sequence[int] = 0,
    basis: str = "longer",
) -> Tensor:
    """Q polar(Q^T X), where the r columns of Q span nearly the leading singular directions of X.

    With m > n (any other X is transposed over first), r = rank + oversample::

        Y = X Omega                        n x r test matrix Omega
        power times  Y <- X (X^T Y)        orthonormalized between two of them
        Q = orth(Y)
        O = Q factor(Q^T X)                the polar step sees n x r entries, not m x n

    O has rank r at most and is exactly zero on the complement of Q. If ``factor`` is exact then
    <X, O> = ||Q^T X||_*. For r = n it is ``factor`` itself. Its work grows as m n r, so it pays
    where r is below about a quarter of n. The sketch and its basis are in float32 (float64 for
    float64). Directions whose singular value is below about eps^(1 / (2 power + 1)) of the largest
    are lost to rounding when ``power`` is 1, as published.

    Args:
        X: (..., m, n), any floating dtype. It is not modified.
        factor: the polar step for (n, r), in the dtype of the sketch.
        rank: an int is a count, a float a fraction of min(m, n): 1 is rank one, 1.0 all.
        oversample: columns beyond the rank, which stay in O.
        power: power steps.
        sketch: "signs", +1 and -1 from a hash of ``key`` and place, made on the device of X,
            bit-identical everywhere and free of waiting; "gaussian" from a CPU generator seeded
            by ``key``; "kaczmarz", columns of X drawn on the CPU with replacement, with a
            probability in proportion to their squares, which they are divided by the root of
            (where one comes twice, a direction of Q is left to rounding). Or
            a tensor: a test matrix (n, r), or r whole numbers, the columns to take.
        key: what the random numbers depend on, one for all matrices or one for each.
        basis: "longer", Q spans the longer side; "rows", always the rows (the image code of the
            source; then its r is the first side that the polar step sees).

    Returns:
        A new contiguous tensor of X's shape and dtype. On the CPU each matrix comes out as it
        would alone. A matrix with a NaN or an infinity gives NaN.

    Source: Xiaoran-Cheng/muon-randomized-svd, the code of arXiv 2605.06884; range finder Halko,
    Martinsson, Tropp, arXiv 0909.4061.
    """
    m, n = X.shape[-2:]
    r = low_rank_size(m, n, rank, oversample)
    _check(power, sketch, basis)
    if X.numel() == 0 or r == min(m, n):
        return factor(X)
    stack = X.detach().reshape(-1, m, n)
    keys = [key] * len(stack) if isinstance(key, int) else list(key)
    if len(keys) != len(stack):
        raise ValueError(
            f"key has {len(keys)} entries for {len(stack)} matrices: one is needed each"
        )
    work = stack.to(torch.float64 if X.dtype == torch.float64 else torch.float32)
    transposed = basis == "longer" and m <= n

    def run(M: Tensor, key: int | list[int]) -> Tensor:
        A = M.mT if transposed else M  # its rows are compressed
        Q, Z = _compressed(A, _sketched(A, sketch, key, r), power, factor)
        return Z.mT @ Q.mT if transposed else Q @ Z

    if X.device.type != "cpu":
        return run(work, keys).to(X.dtype).reshape(X.shape)
    out = [run(placed(x), k) for x, k in zip(work, keys, strict=True)]
    whole = out[0] if len(out) == 1 else torch.stack(out)
    return whole.to(X.dtype).reshape(X.shape)


def low_rank_size(m: int, n: int, rank: int | float, oversample: int) -> int:
    """The rank r of the factor of an m x n matrix: ``rank`` and ``oversample``, at most min(m, n).

    Args:
        m: Rows of the matrix.
        n: Columns of the matrix.
        rank: Columns of the sketch: an int is a count, a float a fraction of min(m, n).
        oversample: Columns beyond ``rank``.

    Raises:
        ValueError: If one of them is out of range.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, float) and 0.0 < rank <= 1.0):
        raise ValueError(f"rank must be a positive int or a fraction in (0, 1], got rank={rank!r}")
    if not isinstance(oversample, int) or oversample < 0:
        raise ValueError(f"oversample={oversample!r} must be an int and not negative: pass 10")
    k = min(m, n)
    count = int(rank) if whole else max(1, round(rank * k))
    return min(count + oversample, k)


def _check(power: int, sketch: str | Tensor, basis: str) -> None:
    if not isinstance(power, int) or not 0 <= power < 100:
        raise ValueError(f"power={power!r} must be an int from 0 to 99: pass 1")
    if not isinstance(sketch, Tensor) and sketch not in SKETCHES:
        raise ValueError(f"sketch={sketch!r} is unknown: pass one of {', '.join(SKETCHES)}")
    if basis not in SKETCH_BASES:
        raise ValueError(f"basis={basis!r} is unknown: pass longer or rows")


def _sketched(X: Tensor, sketch: str | Tensor, key: int | list[int], r: int) -> Tensor:
    """X Omega, (..., m, r), for one matrix (m, n) and its key or for a stack and its keys."""
    if isinstance(key, list):
        if sketch == "signs":
            return X @ torch.stack([random_signs(X.shape[-1], r, k, X) for k in key])
        return torch.stack([_sketched(x, sketch, k, r) for x, k in zip(X, key, strict=True)])
    if isinstance(sketch, Tensor):
        return X @ sketch.to(X) if sketch.is_floating_point() else _columns(X, sketch)
    if sketch == "signs":
        return X @ random_signs(X.shape[-1], r, key, X)
    draw = torch.Generator("cpu").manual_seed(key % 2**63)
    if sketch == "gaussian":
        shape = X.shape[-1], r
        return X @ torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32).to(X)
    index = torch.multinomial(_weights(X).cpu(), r, replacement=True, generator=draw)
    return _columns(X, index.to(X.device))


def _weights(X: Tensor) -> Tensor:
    """The share of each column in ||X||_F^2; equal ones for a matrix that is zero or not finite."""
    norms = torch.linalg.vector_norm(X, dim=0)
    shares = (norms / norms.max()).square()
    shares = shares / shares.sum()
    return torch.where(shares.isfinite().all(), shares, torch.full_like(shares, 1 / len(shares)))


def _columns(X: Tensor, index: Tensor) -> Tensor:
    """The columns ``index`` of X (m, n), each over the root of the expected count of its draws."""
    expected = len(index) * _weights(X)[index].clamp(min=1e-30)
    return X[:, index] / expected.sqrt()


def _compressed(
    X: Tensor, Y: Tensor, power: int, factor: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Q (..., m, r) and Z = factor(Q^T X), (..., r, n)."""
    Y = _unit(Y)
    for i in range(power):
        Y = torch.linalg.qr(Y).Q if i else Y
        Y = _unit(X @ _unit(X.mT @ Y))
    Q = torch.linalg.qr(Y).Q
    return Q, factor(Q.mT @ X)


def _unit(Y: Tensor) -> Tensor:
    """Y over its largest entry, in place, so that no power of X overflows or vanishes."""
    size = torch.linalg.vector_norm(Y, ord=float("inf"), dim=(-2, -1), keepdim=True)
    return Y.div_(size.clamp(min=torch.finfo(Y.dtype).tiny))
