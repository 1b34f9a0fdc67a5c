"""Bring stacks of any shape to a polar method, which takes wide matrices of Frobenius norm one.

On the CPU a matrix comes out the same, bit for bit, in whatever stack it sits.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..dispatch import SUPPORTED_DTYPES, backend_for

# On the CPU: shorter side of a small matrix, and its entries, fewer than torch sums with several
# threads, whose number would decide bits; entries of a batch of them (768 KiB in float32, so that
# its temporaries stay in the cache and in memory that is kept), and the multiple that sides are
# padded to.
_SMALL_SIDE = 128
_SMALL = 2**15
_BATCH = 3 * 2**16
_PAD_MULTIPLE = 16
# What the temporaries of a batch take together, in batches: of ``zolo``'s two terms; and of a large
# matrix, in matrices. Bytes of a block that malloc still learns from: it does up to 32 MiB.
_TEMPORARIES = 8
_LARGEST_LESSON = 24 * 2**20
# The least eps whose square is still far above the underflow of float32.
_SQUARED = 1e-15


class PolarCall(NamedTuple):
    """One call of a polar method: the function, and what it needs done around it."""

    run: Callable[..., Tensor]
    dtype: torch.dtype
    margin: float
    batchable: bool  # whether zero padding changes nothing and batches are faster
    allows_kernels: bool = False  # whether kernels may run it; zero padding changes nothing then
    finds_norm: bool = False  # whether run divides by the norm itself, given eps
    exact: bool = False  # whether each matrix runs alone, on torch's own products
    takes_size: bool = False  # whether run leaves X as it is, and takes its norm and a result


def run_stack(stack: Tensor, call: PolarCall, eps: float, overwrite: bool = False) -> Tensor:
    """Choose how a stack (K, m, n) is run: whole, in batches of small matrices, or one by one.

    On the CPU a matrix must come out the same in whatever stack it sits. Small ones are therefore
    batched even when alone, large ones run alone even in a stack.

    Args:
        stack: The matrices.
        call: The method.
        eps: Least norm to divide by.
        overwrite: Whether the result may be the stack itself.
    """
    if call.allows_kernels and call.dtype in SUPPORTED_DTYPES:
        ops = backend_for(stack, "symmetric")
        if ops is not reference:
            return _run_kernels(stack, call, eps, ops)
    if stack.device.type != "cpu" and not call.exact:
        return _factor(stack, call, eps)
    m, n = sorted(map(_ceil, stack.shape[-2:]))
    if call.batchable and m <= _SMALL_SIDE and m * n < _SMALL:
        return _run_batches(stack, call, eps, overwrite)
    overwrite = overwrite and call.takes_size
    _keep_freed_memory(_TEMPORARIES * stack[:1].numel() * call.dtype.itemsize)
    if len(stack) == 1:
        X = stack[0]
        return _factor(X, call, eps, X if overwrite else None).unsqueeze(0)
    out = stack if overwrite else _new(stack)
    for X, O in zip(stack, out, strict=True):
        _factor(X, call, eps, X if overwrite else O)
    return out


def _new(stack: Tensor) -> Tensor:
    """Contiguous memory of this shape."""
    return torch.empty_like(stack, memory_format=torch.contiguous_format)


def _run_batches(stack: Tensor, call: PolarCall, eps: float, overwrite: bool) -> Tensor:
    """Run small matrices many at a time; the stack is on the CPU.

    They are padded with zeros to whole cache lines, which no method sees, because the bits of a
    matrix product may depend on the alignment of its operands.
    """
    out = stack if overwrite else _new(stack)
    transposed = stack.shape[-2] > stack.shape[-1]
    source, target = (stack.mT, out.mT) if transposed else (stack, out)  # (K, m, n), m <= n
    m, n = source.shape[-2:]
    most = max(1, _BATCH // (_ceil(m) * _ceil(n)))
    size = math.ceil(len(stack) / math.ceil(len(stack) / most))  # of batches as equal as can be
    _keep_freed_memory(_TEMPORARIES * _BATCH * call.dtype.itemsize)
    for i in range(0, len(stack), size):
        Y = torch.nn.functional.pad(source[i : i + size], (0, _ceil(n) - n, 0, _ceil(m) - m))
        target[i : i + size].copy_(call.run(_normalized(Y, call, eps))[..., :m, :n])
    return out


@functools.cache
def _keep_freed_memory(size: int) -> None:
    """Tell glibc's malloc, once in a process, to keep so many bytes when they are freed.

    It returns what is free at its end to the system, to be faulted in again, where that is more
    than twice the largest block freed so far. The block made here is never written to, so it takes
    no memory itself.
    """
    torch.empty(min(size, _LARGEST_LESSON), dtype=torch.uint8, device="cpu")


def _run_kernels(stack: Tensor, call: PolarCall, eps: float, ops: ModuleType) -> Tensor:
    """Run all of a stack on kernels, in dense copies whose sides are multiples of 16.

    No copy is made of what needs neither a cast nor padding nor a norm.
    """
    transposed = stack.shape[-2] > stack.shape[-1]
    X = stack.mT if transposed else stack  # (K, m, n), m <= n
    if call.finds_norm and eps >= _SQUARED:
        ready = X.dtype == call.dtype and _is_even(X)
        O = call.run(X if ready else ops.padded(X, call.dtype), eps=eps)
    else:
        O = call.run(ops.normalized(X, call.dtype, call.margin, eps))
    if O.shape == stack.shape and O.dtype == stack.dtype:
        return O.contiguous()
    out = _new(stack)
    (out.mT if transposed else out).copy_(O[..., : X.shape[-2], : X.shape[-1]])
    return out


def _is_even(X: Tensor) -> bool:
    """Whether kernels can read X (K, m, n) in whole lines: by rows, if narrow by columns too.

    From sm_90 on columns of float32 would be copied to the matrix units one entry at a time.
    """
    _, m, n = X.shape
    near, far = X.stride()[:0:-1]
    if X.element_size() == 2 and far == 1:
        near, far = far, near
    whole = (m, n, X.storage_offset(), far, X.stride(0))
    return near == 1 and all(number % _PAD_MULTIPLE == 0 for number in whole)


def _ceil(side: int) -> int:
    return -(-side // _PAD_MULTIPLE) * _PAD_MULTIPLE


def _factor(X: Tensor, call: PolarCall, eps: float, out: Tensor | None = None) -> Tensor:
    """Transpose a tall X (m, n) or (K, m, n), scale it, run the method, and transpose back.

    Args:
        X: The matrix; only where it is ``out`` it changes.
        call: The method.
        eps: Least norm to divide by.
        out: Where the result goes. None: new memory.
    """
    tall = X.shape[-2] > X.shape[-1]
    Y = X.mT if tall else X
    target = Y if out is X else out.mT if tall and out is not None else out
    if call.takes_size and X.device.type == "cpu":
        Z, size = _sized(Y, call, eps)
        fits = target is not None and target.dtype == Z.dtype
        O = call.run(Z, size=size, out=target if fits else None)
    else:
        O = call.run(_normalized(Y, call, eps))
    if out is not None and target is not None:
        if O is not target:
            target.copy_(O)
        return out
    return (O.mT if tall else O).to(X.dtype).contiguous()


def _sized(X: Tensor, call: PolarCall, eps: float) -> tuple[Tensor, Tensor]:
    """X (m, n) in the dtype of the iteration, and ||X||_F, so that a pass over X is saved.

    Where products of entries would leave the dtype, or the norm is below eps, X is divided.
    """
    Y = X.to(call.dtype)
    tiny = torch.finfo(call.dtype).tiny
    norm = _frobenius(Y, eps)
    if max(eps, tiny**0.375) < float(norm) < tiny**-0.375:
        return Y, norm
    return _normalized(X, call, eps), torch.ones_like(norm)


def _normalized(X: Tensor, call: PolarCall, eps: float) -> Tensor:
    """A copy X / max(margin ||X||_F, eps) in the dtype of the iteration.

    In bfloat16 the norm is taken after the cast and rounded, as torch.optim.Muon does. In float16
    the cast comes last, since it would overflow.
    """
    work = torch.float32 if call.dtype == torch.float16 else call.dtype
    Y = X.to(work)
    least = max(eps, torch.finfo(work).tiny)  # an eps of float64 would be 0 here
    scale = (call.margin * _frobenius(Y, eps)).clamp(min=least)
    Y = Y / scale if Y is X else Y.div_(scale)
    return Y.to(call.dtype)


def _frobenius(X: Tensor, eps: float) -> Tensor:
    """||X||_F, a scalar for one matrix, (K, 1, 1) for a stack; exact where it is above eps."""
    dim = (-2, -1) if X.ndim == 3 else None
    norm: Tensor = torch.linalg.vector_norm(X, dim=dim, keepdim=X.ndim == 3)
    # below it squares of entries may have vanished, which matters if the floor is lower still
    least = 2.0**23 * math.sqrt(torch.finfo(X.dtype).tiny)
    if X.device.type != "cpu":  # we do not wait to look whether squares overflowed
        return norm if eps >= least else torch.where(norm < least, _small_frobenius(X), norm)
    if bool(norm.isinf().any()):  # the squares of finite entries may overflow
        wide = torch.linalg.vector_norm(X, dim=dim, keepdim=X.ndim == 3, dtype=torch.float64)
        norm = torch.where(norm.isinf(), wide.to(X.dtype), norm)
    if eps < least and bool((norm < least).any()):
        norm = torch.where(norm < least, _small_frobenius(X), norm)
    return norm


def _small_frobenius(X: Tensor) -> Tensor:
    """``_frobenius`` of matrices whose squares vanish: of X over its largest entry."""
    dim = (-2, -1) if X.ndim == 3 else None
    largest = X.abs().amax((-2, -1), keepdim=X.ndim == 3).clamp(min=torch.finfo(X.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(X / largest, dim=dim, keepdim=X.ndim == 3)
    return norm * largest
