"""Polar factors: U V^T for a matrix U diag(s) V^T, exactly or nearly, by one option ``method``.

Every method is a short function of a stack X that is wide (m <= n) and has norm at most one; one
table maps names to them. ``batching`` transposes, scales and stacks around them.

What they make of spectra that fall as gradients' do, 512x512 in float32: ||O||_2 and the alignment
deficit d_A of ``polar_report``; time as a ratio to ns5 there and at 512x2048, on one thread of a
shared CPU. ``python bench/polar.py`` makes this table.

======================  ============  ==============  =============  ==========
method                  1 / i         geometric 1e-7  rank 64+noise  time
======================  ============  ==============  =============  ==========
``svd``                 1.000 0.0000  1.000 0.0001    1.000 0.0000   1.35  1.90
``eigh``                1.016 0.0314  1.000 0.0014    1.000 0.0011   0.73  0.36
``qdwh``                1.000 0.0000  1.000 0.0000    1.000 0.0000   1.94  1.51
``zolo``                1.062 0.0537  1.062 0.0683    1.062 0.0733   0.50  0.30
``ns5``                 1.202 0.2214  1.202 0.2955    0.958 0.2857   1.00  1.00
``ns5_tuned``           1.145 0.1228  1.145 0.1297    0.984 0.0200   1.00  0.99
``polar_express``       1.124 0.0999  1.124 0.1122    1.124 0.1555   1.02  1.00
``polar_express_safe``  1.141 0.1125  1.141 0.1155    1.141 0.2033   1.00  1.00
``gram``                1.124 0.1275  1.124 0.1218    1.123 0.1930   1.01  0.62
``cheb_cubic``          1.000 0.0000  1.000 0.0009    1.000 0.0011   1.43  1.80
``cubic``               1.000 0.1410  1.000 0.0197    1.000 0.0433   1.66  2.13
``taylor5``             1.000 0.1219  1.000 0.0167    1.000 0.0417   1.66  1.59
``turbo``               1.050 0.1357  1.050 0.0504    1.014 0.0411   0.84  0.81
``deepseekv4``          1.001 0.0004  1.002 0.0019    1.002 0.0020   2.04  2.24
``cans``                1.113 0.1115  1.113 0.1055    1.113 0.1535   1.07  1.02
``cubic5``              1.300 0.2865  1.300 0.2244    1.294 0.0487   0.69  0.98
======================  ============  ==============  =============  ==========
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import coefficients as schedules
from . import factorizations
from .batching import PolarCall, run_stack
from .coefficients import Rational, Scalar, Schedule, as_schedule, at_step
from .gram_newton_schulz import gram_iteration, gram_restarts
from .low_rank import low_rank
from .newton_schulz import check_norm, polynomial
from .qdwh import qdwh

_HALF = (torch.bfloat16, torch.float16)
_SKETCH_OPTIONS = ("rank", "oversample", "power", "sketch", "key", "basis")
_DTYPES = (torch.float32, torch.float64, *_HALF)


def polar_factor(
    X: Tensor,
    method: str = "ns5",
    *,
    steps: int | None = None,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    eps: float = 1e-7,
    overwrite: bool = False,
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
    ``qdwh``                up to six Halley steps by QR and Cholesky; 1, and below      direct
                            eps s_1, where only rounding is, anything from 0 to 1
    ``zolo``                one rational step: two Cholesky inverses, 0.87..1.13 from     direct
                            l = 3e-3, slope 359 at zero; above a shorter side of 256
                            three, 0.94..1.06 from l = 1e-3, slope 1322
    ``ns5``                 the quintic of torch.optim.Muon; 0.47..1.20, 0.68..1.13       5
    ``ns5_tuned``           five tuned quintics; 0.47..1.15, 0.98..1.03                   5
    ``polar_express``       minimax quintics; 0.85..1.12, 0.87..1.12                      5
    ``polar_express_safe``  the same with more margin; 0.85..1.14, 0.86..1.14             5
    ``gram``                minimax quintics with more margin, on X X^T where n is       5
                            1.5 m or more, with restarts; 0.73..1.12, 0.85..1.12
    ``cheb_cubic``          minimax cubics; 1.00 from l = 1e-3                            10
    ``cubic``               1.5 x - 0.5 x^3; 0.13..1, 0.89..1                             12
    ``taylor5``             Taylor's quintic; 0.15..1, 0.94..1                            8
    ``turbo``               rows scaled first, so the factor of another matrix and not    4
                            left equivariant; then 0.15..1.05, 0.94..1.05
    ``deepseekv4``          eight quintics of ``ns5``, two that settle; 1.0000..1.0005    10
    ``cans``                five tuned quintics; 0.88..1.12; in float32 only              5
    ``cubic5``              five tuned cubics; 0.12..1.30, 0.77..1.30                     5
    ``auto``                ``auto_method`` chooses by shape, device and dtype
    ``low_rank``            that of ``inner`` inside a random sketch of the range, see
                            ``low_rank``: zero beside it, and far cheaper
    ======================  ===========================================================  =======

    A zero matrix gives exactly zero, and a zero singular value stays zero. Only ``qdwh`` may raise
    to one what rounding has left of it: there the factor of a matrix of low rank is right on its
    range, an isometry of no meaning beside it. A matrix with a NaN or an infinity gives NaN. On the
    CPU a stack equals its matrices one by one, bit for bit. ``zolo``, ``svd``, ``eigh`` and
    ``qdwh`` wait for an accelerator; the polynomial methods never do. Temporaries are at most
    three matrices beside the result, or 4 MiB (``zolo`` 9) where small ones are many; those of
    LAPACK are not counted.

    Args:
        X: (..., m, n), float32, float64, bfloat16 or float16. It is not modified unless
            ``overwrite`` is True, and no gradient flows through it.
        method: a name of the table.
        steps: iterations of a polynomial method, 1 to 99. None: the method's default. The last
            triple of a schedule is repeated.
        coefficients: one triple (a, b, c), or a triple for each step, in place of a polynomial
            method's own. A list also sets the default of ``steps`` to its length.
        eps: least norm to divide by.
        overwrite: whether X is not needed any more (False). A contiguous one may then be changed,
            and be the result itself, which saves memory on the CPU.
        **options: ``dtype``, the dtype of the iteration; None means float64 for float64, else
            float32 on the CPU, and on an accelerator bfloat16 for polynomial methods (float16 for
            ``gram``, which refuses bfloat16; float32 for ``cans``, which refuses both, and there
            TF32 is as coarse) and float32 for the others. ``method="ns5",
            dtype=torch.bfloat16`` has the bits of torch.optim.Muon on the CPU. For polynomial
            methods ``exact``, True to take torch's own products, one matrix after the other,
            whatever back end there is (False), and ``norm``, what X is divided by before the first
            step: "frobenius" (default); "schatten4", the smaller ||X X^T||_F^(1/2); "rowsum",
            ||X X^T||_inf^(1/2); "power:k", a bound of ||X||_2 from above by k power steps, see
            ``stiefel.kernels.polynomial.power_bound``; "aol", the row scaling of ``turbo`` and its
            default. For ``zolo`` ``l`` and ``r`` (by the shorter side), see
            ``stiefel.kernels.zolotarev``. For ``qdwh`` ``l``, a lower bound of the singular values
            over the Frobenius norm; None estimates it from a Cholesky factor of X X^T, and assumes
            the rounding of X where that says nothing: too small a bound costs a step or two, too
            large a one leaves what is below it short of one. For ``low_rank`` ``inner``, the
            method inside ("polar_express"), to which the arguments above belong, and the options
            of ``stiefel.kernels.low_rank``.

    Returns:
        A contiguous tensor of X's shape and dtype, a new one unless ``overwrite`` is True.

    Raises:
        ValueError: for an unknown method or option, or a value out of range.

    Source: ``ns5`` Jordan et al., Muon, 2024; ``polar_express`` Amsel et al., arXiv 2505.16932;
    ``gram`` Gram Newton-Schulz, Dao-AILab/gram-newton-schulz; ``cheb_cubic`` after CANS, arXiv
    2506.10935; ``turbo`` Turbo-Muon, arXiv 2512.04632; ``cans`` of CANS, ``cubic5`` arXiv
    2606.00371, with ``deepseekv4`` as NVIDIA-NeMo/Emerging-Optimizers has them; ``zolo`` after
    Nakatsukasa and Freund, SIAM Review 58(3), 2016; ``qdwh`` Nakatsukasa, Bai and Gygi, SIAM J.
    Matrix Anal. Appl. 31(5), 2010.
    """
    _check_input(X)
    if method == "low_rank":
        inside = {"steps": steps, "coefficients": coefficients, "eps": eps}
        return _low_rank(X.detach(), {**inside, **options})
    if method == "auto":
        fixed = steps is not None or coefficients is not None or options.get("dtype") in _HALF
        fixed = fixed or "norm" in options or "exact" in options
        method = "ns5" if fixed else auto_method(X.shape, X.device.type, X.dtype)
    call = _bind(method, steps, coefficients, X, dict(options))
    X = X.detach()
    if X.numel() == 0:
        return X.clone()
    stack = X.reshape(-1, *X.shape[-2:])
    return run_stack(stack, call, eps, overwrite and X.is_contiguous()).reshape(X.shape)


def auto_method(shape: Sequence[int], device_type: str, dtype: torch.dtype) -> str:
    """The method that ``method="auto"`` means. It depends on its arguments alone.

    On the CPU ``zolo``: it is faster than five quintics and nearer to the polar factor. A single
    row or column is divided by its norm there (``svd``). On an accelerator ``ns5``, in bfloat16
    unless the input is float64: triangular work is slow there against matrix products. Giving
    ``steps``, ``coefficients``, ``norm`` or a low-precision ``dtype`` to ``polar_factor`` makes it
    ``ns5`` everywhere, since only a polynomial has those.

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
    """phi(x), what a method makes of a singular value x of the normalized matrix.

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
        return schedules.odd_rational(schedules.ZOLO, x)
    if not entry.schedule:
        raise ValueError(f"method={method!r} has no composite map: pass a polynomial or zolo")
    for step in at_step(entry.schedule, _steps(steps, entry.steps)):
        x = schedules.odd_quintic(step, x)
    return x


# --- The methods ---


class _Method(NamedTuple):
    """One line of the table."""

    run: Callable[..., Tensor]
    schedule: Schedule = ()  # empty: a direct method
    steps: int = 1
    margin: float = 1.0  # the norm is multiplied by it, so that rounding keeps X below one
    norm: str = "frobenius"
    options: tuple[str, ...] = ("norm", "exact")
    fast: torch.dtype = torch.bfloat16  # dtype of the iteration on an accelerator
    half_margin: float = 1.0  # margin of an iteration in bfloat16 or float16, where it is greater


POLAR_METHODS: dict[str, _Method] = {
    "svd": _Method(factorizations.svd, options=(), fast=torch.float32),
    "eigh": _Method(factorizations.eigh, options=(), fast=torch.float32),
    "qdwh": _Method(qdwh, options=("l",), fast=torch.float32),
    "zolo": _Method(factorizations.zolo, options=("l", "r"), fast=torch.float32),
    "ns5": _Method(polynomial, schedules.NS5, 5),
    "ns5_tuned": _Method(polynomial, schedules.NS5_TUNED, 5),
    "polar_express": _Method(polynomial, schedules.POLAR_EXPRESS, 5, 1.01),
    "polar_express_safe": _Method(polynomial, schedules.POLAR_EXPRESS_SAFE, 5, 1.02),
    "gram": _Method(gram_iteration, schedules.GRAM, 5, fast=torch.float16),
    "cheb_cubic": _Method(polynomial, schedules.CHEB_CUBIC, 10),
    "cubic": _Method(polynomial, schedules.CUBIC, 12),
    "taylor5": _Method(polynomial, schedules.TAYLOR5, 8),
    "turbo": _Method(polynomial, schedules.TURBO, 4, norm="aol"),
    "deepseekv4": _Method(polynomial, schedules.DEEPSEEKV4, 10),
    "cans": _Method(polynomial, schedules.CANS, 5, 1.01, fast=torch.float32),
    "cubic5": _Method(polynomial, schedules.CUBIC5, 5, half_margin=1.01),
}


# --- Arguments ---


def _check_input(X: Tensor) -> None:
    if X.ndim < 2:
        raise ValueError(
            f"X has {X.ndim} dimensions, but at least 2 are needed: pass X.view(1, -1)"
        )
    if X.dtype not in _DTYPES:
        raise ValueError(f"X has dtype {X.dtype}: pass float32, float64, bfloat16 or float16")


def _entry(method: str) -> _Method:
    if method not in POLAR_METHODS:
        names = ", ".join((*POLAR_METHODS, "low_rank", "auto"))
        raise ValueError(f"method={method!r} is unknown: pass one of {names}")
    return POLAR_METHODS[method]


def _low_rank(X: Tensor, options: dict[str, Any]) -> Tensor:
    """Tell the options of the sketch from those of the method inside it."""
    inner = options.pop("inner", "polar_express")
    if inner == "low_rank":
        raise ValueError("inner='low_rank' would sketch a sketch: pass polar_express")
    own = {key: options.pop(key) for key in _SKETCH_OPTIONS if key in options}

    def factor(B: Tensor) -> Tensor:
        return polar_factor(B, inner, **options)

    factor(X.new_empty(0, 1))  # what it refuses is refused here
    return low_rank(X, factor, **own)


def _steps(steps: int | None, default: int) -> int:
    steps = default if steps is None else steps
    if steps >= 100:
        raise ValueError(
            f"steps={steps}: Number of steps must be less than 100 for computational efficiency"
        )
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: pass None for the method's default")
    return steps


def _bind(
    method: str,
    steps: int | None,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None,
    X: Tensor,
    options: dict[str, object],
) -> PolarCall:
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
        schedule = at_step(schedule, _steps(steps, length))
        norm = check_norm(options.get("norm", entry.norm))
        margin = max(entry.margin, entry.half_margin) if dtype in _HALF else entry.margin
        exact = options.get("exact", False)
        if not isinstance(exact, bool):
            raise ValueError(f"exact={exact!r} must be True or False")
        run = partial(entry.run, schedule=schedule, norm=norm, margin=margin, exact=exact)
        if method == "gram":
            run = partial(run, restarts=gram_restarts(schedule))
        # the norm comes with the first product, but in float16 that would overflow
        free = method != "gram" and norm == "frobenius" and dtype != torch.float16
        return PolarCall(run, dtype, margin, dtype not in _HALF, not exact, free, exact)
    if coefficients is not None or _steps(steps, 1) != 1:
        raise ValueError(
            f"steps and coefficients mean nothing to method={method!r}: leave both None"
        )
    if method == "zolo":
        run = partial(factorizations.zolo, step=_rational(options, min(X.shape[-2:])))
        return PolarCall(run, dtype, entry.margin, True, takes_size=True)
    if method == "qdwh":
        return PolarCall(partial(qdwh, l=_bound(options.get("l"))), dtype, entry.margin, False)
    return PolarCall(entry.run, dtype, entry.margin, False)


def _rational(options: dict[str, object], side: int) -> Rational:
    """The step that the options of ``zolo`` ask for; without any, the shorter side decides.

    A gradient of side m has singular values down to about 1/m of its norm (spectrum 1/i), so
    larger ones need a band that reaches lower. The third pole costs 0.06 to 0.12 of ns5 there.
    """
    if not options:
        return schedules.ZOLO if side <= 256 else schedules.ZOLO_LARGE
    l, r = options.get("l", 3e-3), options.get("r", 2)
    if not isinstance(l, float) or not isinstance(r, int):
        raise ValueError(f"l={l!r} must be a float and r={r!r} an int: pass l=3e-3, r=2")
    return schedules.zolotarev(l, r)


def _bound(l: object) -> float | None:
    """The lower bound that the option of ``qdwh`` states."""
    if l is None or (isinstance(l, float) and 1e-40 <= l <= 1):
        return l
    raise ValueError(f"l={l!r} must be a float in [1e-40, 1]: pass None for an estimate")


def _iteration_dtype(requested: object, method: str, entry: _Method, X: Tensor) -> torch.dtype:
    """The dtype option, or its default for this method, input and device."""
    if requested is None:
        if X.dtype == torch.float64:
            return X.dtype
        return torch.float32 if X.device.type == "cpu" else entry.fast
    if not isinstance(requested, torch.dtype) or requested not in _DTYPES:
        raise ValueError(f"dtype={requested}: pass float32, float64, bfloat16, float16 or None")
    if requested in _HALF and not entry.schedule:
        raise ValueError(
            f"dtype={requested} cannot be factorized by method={method!r}: pass float32"
        )
    if requested == torch.bfloat16 and method == "gram":
        raise ValueError(
            "dtype=torch.bfloat16 is too coarse for the Gram matrices of method='gram': pass "
            "float16, or take polar_express"
        )
    if requested in _HALF and method == "cans":
        raise ValueError(
            f"dtype={requested} is too coarse for method='cans', which has no room above 1: pass "
            "float32, or take polar_express"
        )
    return requested
