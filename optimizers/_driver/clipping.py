"""``clip_grad_norm_``: torch's, for plain tensors and DTensors of any meshes together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils

from .agreement import held_gradient, teams_of
from .layout import Layout, is_sharded

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    params: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients in place so that their norm as one vector is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, whose bits plain tensors get, but plain tensors and
    DTensors of any meshes may be mixed. A DTensor counts whole, whatever part of it a process
    holds; a plain tensor counts once, so it must be equal on all processes. All processes that
    share a mesh must call it, with their parameters in the same order.

    Args:
        params: A tensor, or tensors whose gradients are clipped together.
        max_norm: Largest norm that is left as it is.
        norm_type: Order p of the norm (default: 2.0), ``inf`` and ``"inf"`` included.
        error_if_nonfinite: Whether a norm that is not finite raises (default: False).
        foreach: As torch's (default: None): whether gradients are scaled by one call.

    Returns:
        The norm before clipping, a plain tensor that is equal on all processes.

    Raises:
        RuntimeError: With ``error_if_nonfinite``, if the norm is not finite. No gradient has
            changed.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import clip_grad_norm_
        >>> w, b = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> (2 * w.sum() + 2 * b.sum()).backward()
        >>> clip_grad_norm_([w, b], max_norm=1.0)
        tensor(4.)
        >>> b.grad
        tensor([0.5000])
    """
    found = params if isinstance(params, Tensor) else _listed(params)
    tensors = [found] if isinstance(found, Tensor) else found
    if not any(map(is_sharded, tensors)):
        return utils.clip_grad_norm_(found, max_norm, norm_type, error_if_nonfinite, foreach)
    order = float(norm_type)
    norms = _norms(tensors, order)
    if not norms:
        return torch.tensor(0.0, dtype=torch.get_default_dtype(), device="cpu")
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    if error_if_nonfinite and not bool(total.isfinite()):
        utils.get_total_norm([total], order, error_if_nonfinite=True)  # raises torch's sentence
    # the memory of a DTensor's gradient is scaled itself, so that meshes and plain ones mix
    parts: Any = [SimpleNamespace(grad=_memory(p.grad)) for p in tensors if p.grad is not None]
    utils.clip_grads_with_norm_(parts, max_norm, total, foreach)
    return total


def _listed(params: Iterable[Tensor]) -> Any:
    """The tensors; an iterable that has none as it is, of which torch may warn."""
    tensors = list(params)
    return tensors or params


def _memory(G: Tensor) -> Tensor:
    """What this process holds of a gradient."""
    held: Tensor = G._local_tensor if is_sharded(G) else G  # type: ignore[attr-defined]
    return held


def _norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """The norm of every whole gradient, rounded to its dtype as torch does; one call per team.

    Teams are those of all DTensors, with a gradient here or not, for no rank to wait alone.
    """
    layouts = {i: _layout(p) for i, p in enumerate(tensors) if is_sharded(p)}
    held = {
        i: held_gradient(layouts[i], p.grad) if i in layouts else p.grad
        for i, p in enumerate(tensors)
    }
    powers = {i: _power(p, held[i], order) for i, p in enumerate(tensors)}
    teams, team_of = teams_of(layouts, frozenset())
    kind = {math.inf: "MAX", -math.inf: "MIN"}.get(order, "SUM")
    for team in teams:
        shared = [i for i, other in team_of.items() if other is team]
        packed = torch.stack([powers[i] for i in shared]).to(team.device)
        _reduce_(packed, kind, layouts[shared[0]])
        powers.update(zip(shared, packed.unbind(0), strict=True))
    present = [p.grad for p in tensors if p.grad is not None]
    if not present:
        return []
    widest = reduce(torch.promote_types, [G.dtype for G in present]).to_real()
    norms = []
    for i, p in enumerate(tensors):
        if p.grad is not None or i in layouts:
            norm = powers[i] if order == 0.0 or math.isinf(order) else powers[i] ** (1 / order)
            dtype = widest if p.grad is None else p.grad.dtype.to_real()
            norms.append(norm.to(present[0].device, dtype).to(widest))
    return norms


def _reduce_(x: Tensor, kind: str, layout: Layout) -> None:
    """Reduce over the ranks that share a layout, axis by axis: no group has to be made for it."""
    import torch.distributed as dist

    for axis in layout.axes:
        dist.all_reduce(x, getattr(dist.ReduceOp, kind), group=layout.mesh.get_group(axis))


def _layout(p: Any) -> Layout:
    """How the whole gradient of a DTensor is looked at: as the parameter, partial sums whole."""
    from torch.distributed.tensor import Replicate

    placements = (Replicate() if x.is_partial() else x for x in p.placements)
    return Layout(p.device_mesh, tuple(placements), tuple(p.shape))


def _power(p: Tensor, held: Tensor | None, order: float) -> Tensor:
    """The norm of what is held to the power of its order, which ranks add; a number of float64.

    What is not there changes no sum, no maximum and no minimum.
    """
    if held is None or not held.numel():
        nothing = math.inf if order == -math.inf else 0.0
        device = p.device if held is None else held.device
        return torch.full((), nothing, dtype=torch.float64, device=device)
    wide = torch.promote_types(held.dtype, torch.float32)
    norm = torch.linalg.vector_norm(held, order, dtype=wide).double()
    power: Tensor = norm if order == 0.0 or math.isinf(order) else norm.pow(order)
    return power
