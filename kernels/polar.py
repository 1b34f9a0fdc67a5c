"""Polar factors: U V^T for a matrix U diag(s) V^T, exactly or nearly, by one option ``method``.

Every method is a short function of a stack X that is wide (m <= n) and has norm at most one; one
table maps names to them. ``polar_factor`` turns, scales and stacks around them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import coefficients as lists
from .coefficients import Rational, Scalar, Schedule, as_schedule, at_step
from .dispatch import pick

_LOW = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_LOW)

# On the CPU: entries of a small matrix, entries of a batch of them (4 MiB in float32, so that its
# temporaries stay near the cache), and the multiple that sides are padded to.
_SMALL = 2**14
_BATCH = 2**20
_LINE = 16


def polar_factor(
    X: Tensor,
    method: str = "ns5",
    *,
    steps: int | None = None,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    eps: float = 1e-7,
    **options: object,
) -> Tensor:
    """The orthogonal polar factor of each matrix of X, or an approximation of it.

    With X = U diag(s) V^T the result is U diag(phi(s / norm)) V^T, where phi belongs to the method.
    The bands are the values of phi on [l, 1], that is for singular values down to l times the norm
    that the method divides by (Frobenius, for ``zolo`` the smaller Schatten-4 norm).

    ======================  ===========================================================  =======
    method                  what it does; band of phi, first for l = 1e-3, then l = 1e-2  steps
    ======================  ===========================================================  =======
    ``svd``                 singular vectors; 1, and 0 below max(m, n) eps s_1            direct
    ``eigh``                (X X^T + 16 eps s_1^2 I)^(-1/2) X; 1 down to about 1e-3       direct
    ``zolo``                one rational step, two Cholesky inverses; 0.87..1.13 from     direct
                            l = 3e-3, slope 359 at zero
    ``ns5``                 the quintic of torch.optim.Muon; 0.47..1.20, 0.68..1.13       5
    ``ns5_tuned``           five tuned quintics; 0.47..1.15, 0.98..1.03                   5
    ``polar_express``       minimax quintics; 0.85..1.12, 0.87..1.12                      5
    ``polar_express_safe``  the same with more margin; 0.85..1.14, 0.86..1.14             5
    ``cheb_cubic``          minimax cubics; 1.00 from l = 1e-3                            10
    ``cubic``               1.5 x - 0.5 x^3; 0.13..1, 0.89..1                             12
    ``taylor5``             Taylor's quintic; 0.15..1, 0.94..1                            8
    ``turbo``               rows scaled first, so the factor of another matrix and not    4
                            left equivariant; then 0.15..1.05, 0.94..1.05
    ``auto``                ``auto_method`` chooses by shape, device and dtype
    ======================  ===========================================================  =======

    A zero matrix gives exactly zero, and a zero singular value stays zero in every method. A matrix
    with a NaN or an infinity gives NaN. On the CPU a stack equals its matrices one by one, bit for
    bit. ``zolo``, ``svd`` and ``eigh`` wait for an accelerator; the polynomial methods never do.

    Args:
        X: (..., m, n), float32, float64, bfloat16 or float16. It is not modified, and no gradient
            flows through it.
        method: a name of the table.
        steps: iterations of a polynomial method, 1 to 99. None: the method's default. The last
            triple of a schedule is repeated.
        coefficients: one triple (a, b, c), or a triple for each step, in place of a polynomial
            method's own. A list also sets the default of ``steps`` to its length.
        eps: least norm to divide by.
        **options: ``dtype``, the dtype of the iteration; None means float64 for float64, else
            float32 on the CPU, and on an accelerator bfloat16 for polynomial methods and float32
            for the others. ``method="ns5", dtype=torch.bfloat16`` has the bits of
            torch.optim.Muon on the CPU. For ``zolo`` also ``l`` (3e-3) and ``r`` (2), see
            ``stiefel.kernels.zolotarev``.

    Returns:
        A new contiguous tensor of X's shape and dtype.

    Raises:
        ValueError: for an unknown method or option, or a value out of range.

    Source: ``ns5`` Jordan et al., Muon, 2024; ``polar_express`` Amsel et al., arXiv 2505.16932;
    ``cheb_cubic`` after CANS, arXiv 2506.10935; ``turbo`` Turbo-Muon, arXiv 2512.04632; ``zolo``
    after Nakatsukasa and Freund, SIAM Review 58(3), 2016.
    """
    _check_input(X)
    if method == "auto":
        fixed = steps is not None or coefficients is not None or options.get("dtype") in _LOW
        method = "ns5" if fixed else auto_method(X.shape, X.device.type, X.dtype)
    plan = _plan(method, steps, coefficients, X, dict(options))
    X = X.detach()
    if X.numel() == 0:
        return X.clone()
    stack = X.reshape(-1, *X.shape[-2:])
    return _run_stack(stack, plan, eps).reshape(X.shape)


def auto_method(shape: Sequence[int], device_type: str, dtype: torch.dtype) -> str:
    """The method that ``method="auto"`` means. It depends on its arguments alone.

    On the CPU ``zolo``: it is faster than five quintics and nearer to the polar factor. A single
    row or column is divided by its norm there (``svd``). On an accelerator ``ns5``, in bfloat16
    unless the input is float64: triangular work is slow there against matrix products. Giving
    ``steps``, ``coefficients`` or a low-precision ``dtype`` to ``polar_factor`` makes it ``ns5``
    everywhere, since only a polynomial has those.

    Args:
        shape: (..., m, n).
        device_type: ``X.device.type``.
        dtype: the dtype of the input.

    Returns:
        A name that ``polar_factor`` takes.
    """
    del dtype  # part of the rule's signature; today every dtype is treated alike
    if device_type != "cpu":
        return "ns5"
    return "svd" if min(shape[-2:]) == 1 else "zolo"


def composite_map(method: str, x: Scalar, steps: int | None = None) -> Scalar:
    """phi(x), what a method makes of a singular value x of the normalised matrix.

    Args:
        method: the name of a polynomial or rational method.
        x: a float, or a float64 tensor of values, in [0, 1].
        steps: as for ``polar_factor``.

    Returns:
        phi(x), of the type of x.

    Raises:
        ValueError: if the method is unknown or has no such map.
    """
    entry = _entry(method)
    if method == "zolo":
        return lists.odd_rational(lists.ZOLO, x)
    if not entry.schedule:
        raise ValueError(f"method={method!r} has no composite map: pass a polynomial or zolo")
    for step in at_step(entry.schedule, _steps(steps, entry.steps)):
        x = lists.odd_quintic(step, x)
    return x


# --- The methods: X is (m, n) or (K, m, n), m <= n, of Frobenius norm at most one ---


def _polynomial(X: Tensor, schedule: Schedule) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, once for each (a, b, c)."""
    ops = pick(X)
    for a, b, c in schedule:
        if c == 0:
            X = ops.scale_and_apply(X, ops.gram(X), a, b)
            continue
        P: Tensor = ops.symmetric_poly(ops.gram(X), b, c)  # (m, m)
        X = ops.scale_and_apply(X, P, a)
        del P  # before the next product needs room
    return X


def _turbo(X: Tensor, schedule: Schedule) -> Tensor:
    """The same after X <- diag(s) X, s_i = (sum_j |A_ij|)^(-1/2) with A = X X^T.

    The scaling alone brings ||X||_2 below one, and further up than the Frobenius norm does. But the
    limit is the polar factor of diag(s) X: left orthogonal equivariance is lost.
    """
    ops = pick(X)
    A: Tensor = ops.gram(X)
    sums = torch.linalg.vector_norm(A, ord=1, dim=-1, keepdim=True)  # (m, 1)
    s = sums.clamp(min=torch.finfo(X.dtype).tiny).rsqrt()
    (a, b, c), rest = schedule[0], schedule[1:]
    A.mul_(s).mul_(s.mT)
    P: Tensor = ops.symmetric_poly(A, b, c)
    del A
    X.copy_(ops.scale_and_apply(X.mul_(s), P, a))  # in X's own room, which the caller holds anyway
    del P
    return _polynomial(X, rest)


def _svd(X: Tensor) -> Tensor:
    """U V^T over the singular values above max(m, n) eps s_1: the partial isometry."""
    X, bad = _masked(X)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    keep = s > max(X.shape[-2:]) * torch.finfo(X.dtype).eps * s[..., :1]
    O: Tensor = U.mul_(keep.unsqueeze(-2)) @ Vh
    return O.masked_fill_(bad, torch.nan)


def _eigh(X: Tensor) -> Tensor:
    """(S + 16 eps lambda_1 I)^(-1/2) X with S = X X^T.

    The damping is a few times the rounding of S. A cut in its place would lose the directions whose
    square lies below that rounding, or blow up what is left of them.
    """
    S, bad = _masked(pick(X).gram(X))
    values, V = torch.linalg.eigh(S)
    del S
    damping = 16 * torch.finfo(X.dtype).eps * values[..., -1:]
    # The floor is for the zero matrix, whose factor must come out as a finite number times zero.
    root = (values.clamp(min=0) + damping.clamp(min=torch.finfo(X.dtype).tiny)).rsqrt()
    T = ((V * root.unsqueeze(-2)) @ V.mT).masked_fill_(bad, torch.nan)  # (m, m)
    return _product(T, X)


def _zolo(X: Tensor, step: Rational) -> Tensor:
    """C (I + sum_j a_j (S + c_j I)^(-1)) X / sqrt(norm), S = X X^T / norm, norm = ||X X^T||_F.

    The inverses are summed first, so that the long side is touched by two products only.
    """
    T: Tensor = pick(X).gram(X)
    norm = torch.linalg.matrix_norm(T, keepdim=True)
    # X of norm one has norm >= m^(-1/2), so this acts only where eps did.
    norm = norm.clamp(min=0.5 * X.shape[-2] ** -0.5)
    T, fine = _sum_of_inverses(T.div_(norm), step)
    T.mul_(step.scale * norm.rsqrt())
    O = _product(T, X)
    if bool(fine.all()):
        return O
    # A shift is far above the rounding of S, so only a non-finite matrix is seen here.
    return torch.where(fine[..., None, None], O, _eigh(X))


def _sum_of_inverses(S: Tensor, step: Rational) -> tuple[Tensor, Tensor]:
    """I + sum_j a_j (S + c_j I)^(-1) and whether each factorisation worked; S is overwritten."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    entries = diagonal.clone()
    fine = torch.ones(S.shape[:-2], dtype=torch.bool, device=S.device)
    total: Tensor | None = None
    for j, (shift, weight) in enumerate(zip(step.shifts, step.weights, strict=True)):
        torch.add(entries, shift, out=diagonal)
        L = S if j == len(step.shifts) - 1 else S.clone()
        info = torch.empty(S.shape[:-2], dtype=torch.int32, device=S.device)
        # In place: LAPACK wants columns, and a symmetric matrix is its own transpose.
        torch.linalg.cholesky_ex(L.mT, out=(L.mT, info))
        fine &= info == 0
        inverse = L.mT
        torch.cholesky_inverse(inverse, out=inverse)
        total = inverse.mul_(weight) if total is None else total.add_(inverse, alpha=weight)
    assert total is not None
    total.diagonal(dim1=-2, dim2=-1).add_(1)
    return total, fine


def _product(T: Tensor, X: Tensor) -> Tensor:
    """T X in the memory layout of X, so that a turned matrix is not copied when turned back."""
    O = torch.empty_like(X)
    torch.matmul(T, X, out=O)
    return O


def _masked(X: Tensor) -> tuple[Tensor, Tensor]:
    """X with its non-finite matrices set to zero in place, and the mask (..., 1, 1) of those.

    LAPACK refuses non-finite input with an exception; here such a matrix becomes NaN instead.
    """
    bad = ~X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return X.masked_fill_(bad, 0.0), bad


class _Method(NamedTuple):
    """One line of the table."""

    run: Callable[..., Tensor]
    schedule: Schedule = ()  # empty: a direct method
    steps: int = 1
    margin: float = 1.0  # the norm is multiplied by it, so that rounding keeps X below one
    options: tuple[str, ...] = ()


METHODS: dict[str, _Method] = {
    "svd": _Method(_svd),
    "eigh": _Method(_eigh),
    "zolo": _Method(_zolo, options=("l", "r")),
    "ns5": _Method(_polynomial, lists.NS5, 5),
    "ns5_tuned": _Method(_polynomial, lists.NS5_TUNED, 5),
    "polar_express": _Method(_polynomial, lists.POLAR_EXPRESS, 5, 1.01),
    "polar_express_safe": _Method(_polynomial, lists.POLAR_EXPRESS_SAFE, 5, 1.02),
    "cheb_cubic": _Method(_polynomial, lists.CHEB_CUBIC, 10),
    "cubic": _Method(_polynomial, lists.CUBIC, 12),
    "taylor5": _Method(_polynomial, lists.TAYLOR5, 8),
    "turbo": _Method(_turbo, lists.TURBO, 4),
}


# --- Around the methods ---


class _Plan(NamedTuple):
    """What one call does to each matrix."""

    run: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    margin: float
    batches: bool  # whether zero padding is invisible and a batch pays


def _run_stack(stack: Tensor, plan: _Plan, eps: float) -> Tensor:
    """Choose how a stack (K, m, n) is run: whole, in batches of small matrices, or one by one.

    On the CPU a matrix must come out the same in whatever stack it sits. Small ones are therefore
    batched even when alone, large ones run alone even in a stack.
    """
    if stack.device.type != "cpu":
        return _factor(stack, plan, eps)
    if plan.batches and _ceil(stack.shape[-2]) * _ceil(stack.shape[-1]) <= _SMALL:
        return _run_batches(stack, plan, eps)
    if len(stack) == 1:
        return _factor(stack[0], plan, eps).unsqueeze(0)
    out = torch.empty_like(stack, memory_format=torch.contiguous_format)
    for X, O in zip(stack, out, strict=True):
        O.copy_(_factor(X, plan, eps))
    return out


def _run_batches(stack: Tensor, plan: _Plan, eps: float) -> Tensor:
    """Run small matrices many at a time; the stack is on the CPU.

    They are padded with zeros to whole cache lines, which no method sees, because the bits of a
    matrix product may depend on the alignment of its operands.
    """
    out = torch.empty_like(stack, memory_format=torch.contiguous_format)
    turned = stack.shape[-2] > stack.shape[-1]
    source, target = (stack.mT, out.mT) if turned else (stack, out)  # (K, m, n), m <= n
    m, n = source.shape[-2:]
    size = max(1, _BATCH // (_ceil(m) * _ceil(n)))
    for i in range(0, len(stack), size):
        Y = torch.nn.functional.pad(source[i : i + size], (0, _ceil(n) - n, 0, _ceil(m) - m))
        target[i : i + size].copy_(plan.run(_normalised(Y, plan, eps))[..., :m, :n])
    return out


def _ceil(side: int) -> int:
    return -(-side // _LINE) * _LINE


def _factor(X: Tensor, plan: _Plan, eps: float) -> Tensor:
    """Turn, scale, run, turn back: X is (m, n) or (K, m, n)."""
    tall = X.shape[-2] > X.shape[-1]
    O = plan.run(_normalised(X.mT if tall else X, plan, eps))
    return (O.mT if tall else O).to(X.dtype).contiguous()


def _normalised(X: Tensor, plan: _Plan, eps: float) -> Tensor:
    """A copy X / max(margin ||X||_F, eps) in the dtype of the iteration.

    In bfloat16 the norm is taken after the cast and rounded, as torch.optim.Muon does. In float16
    the cast comes last, since it would overflow.
    """
    work = torch.float32 if plan.dtype == torch.float16 else plan.dtype
    Y = X.to(work)
    scale = (plan.margin * _frobenius(Y)).clamp(min=eps)
    Y = Y / scale if Y is X else Y.div_(scale)
    return Y.to(plan.dtype)


def _frobenius(X: Tensor) -> Tensor:
    """||X||_F, a scalar for one matrix, (K, 1, 1) for a stack."""
    dim = (-2, -1) if X.ndim == 3 else None
    norm: Tensor = torch.linalg.vector_norm(X, dim=dim, keepdim=X.ndim == 3)
    if X.device.type == "cpu" and bool(norm.isinf().any()):
        # The squares of finite entries may overflow. On an accelerator we do not wait to look.
        wide = torch.linalg.vector_norm(X, dim=dim, keepdim=X.ndim == 3, dtype=torch.float64)
        norm = torch.where(norm.isinf(), wide.to(X.dtype), norm)
    return norm


def _check_input(X: Tensor) -> None:
    if X.ndim < 2:
        raise ValueError(
            f"X has {X.ndim} dimensions, but at least 2 are needed: pass X.view(1, -1)"
        )
    if X.dtype not in _DTYPES:
        raise ValueError(f"X has dtype {X.dtype}: pass float32, float64, bfloat16 or float16")


def _entry(method: str) -> _Method:
    if method not in METHODS:
        names = ", ".join((*METHODS, "auto"))
        raise ValueError(f"method={method!r} is unknown: pass one of {names}")
    return METHODS[method]


def _steps(steps: int | None, default: int) -> int:
    steps = default if steps is None else steps
    if steps >= 100:
        raise ValueError(
            f"steps={steps}: Number of steps must be less than 100 for computational efficiency"
        )
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: pass None for the method's default")
    return steps


def _plan(
    method: str,
    steps: int | None,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None,
    X: Tensor,
    options: dict[str, object],
) -> _Plan:
    """Check the arguments and bind them to the method's function."""
    entry = _entry(method)
    dtype = _iteration_dtype(options.pop("dtype", None), method, entry, X)
    for key in options:
        if key not in entry.options:
            names = ", ".join(("dtype", *entry.options))
            raise ValueError(f"option {key!r} is unknown to method={method!r}: it takes {names}")
    if entry.schedule:
        schedule = entry.schedule if coefficients is None else as_schedule(coefficients)
        length = len(schedule) if coefficients is not None and len(schedule) > 1 else entry.steps
        run = partial(entry.run, schedule=at_step(schedule, _steps(steps, length)))
        return _Plan(run, dtype, entry.margin, dtype not in _LOW)
    if coefficients is not None or _steps(steps, 1) != 1:
        raise ValueError(
            f"steps and coefficients mean nothing to method={method!r}: leave both None"
        )
    if method == "zolo":
        step = _rational(options)
        return _Plan(partial(_zolo, step=step), dtype, entry.margin, True)
    return _Plan(entry.run, dtype, entry.margin, False)


def _rational(options: dict[str, object]) -> Rational:
    """The step that the options of ``zolo`` ask for."""
    if not options:
        return lists.ZOLO
    l, r = options.get("l", 3e-3), options.get("r", 2)
    if not isinstance(l, float) or not isinstance(r, int):
        raise ValueError(f"l={l!r} must be a float and r={r!r} an int: pass l=3e-3, r=2")
    return lists.zolotarev(l, r)


def _iteration_dtype(wish: object, method: str, entry: _Method, X: Tensor) -> torch.dtype:
    """The dtype option, or its default for this method, input and device."""
    if wish is None:
        if X.dtype == torch.float64:
            return X.dtype
        fast = X.device.type != "cpu" and bool(entry.schedule)
        return torch.bfloat16 if fast else torch.float32
    if not isinstance(wish, torch.dtype) or wish not in _DTYPES:
        raise ValueError(f"dtype={wish}: pass float32, float64, bfloat16, float16 or None")
    if wish in _LOW and not entry.schedule:
        raise ValueError(f"dtype={wish} cannot be factorised by method={method!r}: pass float32")
    return wish
