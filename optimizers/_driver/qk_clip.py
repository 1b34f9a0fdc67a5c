"""QK-clip: scale the queries and keys of attention heads whose logits have grown too large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._core.validation import check, number, shown
from .._roles.attention_heads import Attention, Attentions, HeadRows
from .layout import is_sharded, layout_of, local, memory
from .norms import RESET_BY
from .replicas import checked_group
from .write_modes import RESIDUAL

__all__ = ["qk_clip_"]


@torch.no_grad()
def qk_clip_(
    model: nn.Module,
    max_logits: Mapping[str, Tensor],
    *,
    threshold: float = 100.0,
    alpha: float = 0.5,
    optimizer: Optimizer | None = None,
    group: Any = None,
) -> dict[str, Tensor]:
    """Scale queries and keys so that no attention logit of the step would exceed a threshold.

    To be called after ``optimizer.step()``, with the largest logit S of each head in all passes of
    that step (:class:`MaxLogits` records them). With gamma = threshold / max(S, threshold)::

        queries of the head <- gamma ^ alpha * queries           rows of the weight, and bias
        keys of the head    <- gamma ^ (1 - alpha) * keys        values stay as they are

    Heads that share a key (GQA, MQA) take the smallest gamma among them, queries too. In multi-head
    latent attention this holds for the parts of content, and the rotary part of the queries takes
    gamma, as the rotary key is shared by all heads and stays. Weights of their own, fused ones
    (rows of all queries first, or group by group), ``Conv1D``, ``nn.MultiheadAttention``, stacks
    (heads, in, out) and DTensors of any layout are understood; heads are counted by ``max_logits``.

    Without other terms in the logits the largest becomes the threshold. A head below it keeps its
    bits. S is taken before the softmax and before a soft cap, after the scale. What makes the size
    of queries or keys meaningless (a norm in the code and in no module, cosines) is not seen here.

    Args:
        model: The model, wrapped or not.
        max_logits: Name of an attention module in the model -> S (heads,), on any device. Modules
            that are not named stay as they are.
        threshold: The largest logit that is left alone, positive (default: 100).
        alpha: The share of the queries, in [0, 1] (default: 0.5).
        optimizer: None (default), or the optimizer of the model: a norm of a scaled weight that it
            keeps, measured or given by ``weight_radius``, is measured anew at its next update,
            which otherwise would undo the scaling.
        group: None (default), or a process group, or mesh of one axis, over which S is reduced by
            its maximum first, in one call. All replicas must scale by the same S.

    Returns:
        gamma (heads,) of every named module, float32; 1 where nothing was done.

    Raises:
        ValueError: If a name is unknown, heads do not fit, a value is not finite (on devices such
            a head keeps gamma 1 instead, as the host does not wait), or weights cannot be scaled
            to scale the logits: q/k norms, adapters, shared or quantized or parametrized weights.
            Nothing has changed then.

    Source: Kimi Team, Kimi K2, arXiv 2507.20534; GQA and latent attention as in Megatron-LM.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import qk_clip_
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
        >>> gamma = qk_clip_(model, {"self_attn": torch.tensor([50.0, 400.0])})
        >>> gamma["self_attn"]
        tensor([1.0000, 0.2500])
    """
    check(isinstance(model, nn.Module), f"model must be a module, got {shown(model)}")
    check(
        isinstance(max_logits, Mapping),
        f"max_logits must map names of modules to tensors, got {shown(max_logits)}",
    )
    check(
        optimizer is None or (hasattr(optimizer, "state") and hasattr(optimizer, "param_groups")),
        f"optimizer must be that of the model, got {shown(optimizer)}",
    )
    tau, share = number("threshold", threshold, "(0, inf)"), number("alpha", alpha, "[0, 1]")
    assert tau is not None and share is not None
    for name in max_logits:
        check(isinstance(name, str), f"max_logits must map names of modules, got {shown(name)}")
    group, names = checked_group(group, "group"), sorted(max_logits)
    values = [_values(name, max_logits[name]) for name in names]
    params = dict(model.named_parameters(remove_duplicate=False))
    heads = [(name, len(S)) for name, S in zip(names, values, strict=True)]
    found = _attentions(model, params, heads) if names else []
    _refuse_twice([rows.name for attention in found for rows in attention.parameters])
    spans = [[_range(rows, params[rows.name]) for rows in x.parameters] for x in found]
    gammas = _factors(names, values, tau, group) if names else []
    for attention, ranges, gamma in zip(found, spans, gammas, strict=True):
        _scale(attention, ranges, gamma, share, optimizer)
    by_name = dict(zip(names, gammas, strict=True))
    return {name: by_name[name] for name in max_logits}


class _Range(NamedTuple):
    """The rows of a parameter that this process holds, and their memory."""

    param: Tensor
    held: Tensor
    start: int
    end: int


def _values(name: str, S: Any) -> Tensor:
    """The largest logits of a module as a plain vector of float32."""
    is_vector = isinstance(S, Tensor) and S.ndim == 1 and len(S) > 0
    check(
        is_vector and S.dtype != torch.bool and not S.is_complex(),
        f"max_logits[{name!r}] must be a tensor of real numbers (heads,), got "
        f"{tuple(S.shape) if isinstance(S, Tensor) else shown(S)}",
    )
    whole: Tensor = S.full_tensor() if is_sharded(S) else S
    return whole.detach().to(torch.float32)


_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, dict[tuple[str, int], Attention]]]
_KNOWN = WeakKeyDictionary()
"""Layouts of the attentions of a model, as long as its parameters and modules stay the same."""


def _attentions(
    model: nn.Module, params: Mapping[str, Tensor], wanted: Sequence[tuple[str, int]]
) -> list[Attention]:
    """The layouts of modules by (name, heads), looked up once: roles of all parameters cost time.

    They hold names, neither weights nor modules, which would keep the model alive.
    """
    tensors = tuple((name, id(p), tuple(p.shape)) for name, p in params.items())
    modules = tuple((name, type(x)) for name, x in model.named_modules(remove_duplicate=False))
    seen, known = _KNOWN.get(model, (None, {}))
    known = dict(known) if seen == (tensors, modules) else {}
    missing = [key for key in wanted if key not in known]
    if missing:
        attentions = Attentions(model)
        known |= {key: attentions.find(*key) for key in missing}
        _KNOWN[model] = (tensors, modules), known
    return [known[key] for key in wanted]


def _refuse_twice(names: Sequence[str]) -> None:
    """Raise for a weight that two names of modules mean."""
    for name, count in Counter(names).items():
        check(
            count == 1,
            f"{name} belongs to two of the modules in max_logits; name each attention once",
        )


def _range(rows: HeadRows, p: Tensor) -> _Range:
    """What this process holds of a parameter, whose rows are all accounted for."""
    count = rows.groups * sum(heads * size for _, heads, size in rows.pieces)
    check(
        p.shape[rows.dim] == count,
        f"{rows.name} of shape {tuple(p.shape)} has not the {count} rows of the weight that its "
        "heads belong to",
    )
    layout = layout_of(p, rows.name)
    if layout is None:
        return _Range(p, p, 0, count)
    return _Range(p, memory(p), *layout.box[rows.dim])


def waits_for(device: torch.device) -> bool:
    """Whether the host may read numbers of a device: those of an accelerator come late."""
    return device.type == "cpu"


def _factors(
    names: Sequence[str], values: Sequence[Tensor], tau: float, group: Any
) -> list[Tensor]:
    """Factors gamma of all modules, by one reduction over the group."""
    device = next((S.device for S in values if S.device.type != "cpu"), values[0].device)
    S = torch.cat([x.to(device) for x in values])
    bad = ~S.isfinite()
    if group is not None:
        import torch.distributed as dist

        # flags go along, so that a bad value is known to all
        packed = torch.cat([S.masked_fill(bad, -torch.inf), bad.to(S.dtype)])
        dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
        S, bad = packed[: len(S)], packed[len(S) :] > 0
    gamma = torch.where(bad, 1.0, tau / S.clamp(min=tau))
    sizes = [len(x) for x in values]
    if waits_for(device):
        for name, flags in zip(names, torch.split(bad, sizes), strict=True):
            heads = flags.nonzero().flatten().tolist()
            check(
                not heads,
                f"max_logits[{name!r}] is not finite for the heads {heads}; leave such a step out",
            )
    return list(torch.split(gamma, sizes))


def _scale(
    attention: Attention,
    ranges: Sequence[_Range],
    gamma: Tensor,
    alpha: float,
    optimizer: Optimizer | None,
) -> None:
    """Scale what a module holds, each weight by one multiplication; rounded once."""
    kv = attention.kv_heads
    least = gamma.view(kv, -1).amin(1)  # (kv,), of the queries that share a key
    if waits_for(gamma.device) and bool((least == 1).all()):
        return
    tables = {
        "query": (least**alpha).repeat_interleave(attention.heads // kv),
        "key": least ** (1 - alpha),
        "rotary": gamma,
    }
    for rows, (p, held, start, end) in zip(attention.parameters, ranges, strict=True):
        by = _row_factors(rows, tables)[start:end].to(held.device)
        by = by.view([-1 if i == rows.dim else 1 for i in range(held.ndim)])
        state = {} if optimizer is None else optimizer.state.get(p, {})
        _scale_held(held, by, state.get(RESIDUAL))
        _forget_norms(state, (least < 1).any())


def _row_factors(rows: HeadRows, tables: Mapping[str, Tensor]) -> Tensor:
    """The factor of every row of a parameter."""
    columns = []
    for kind, heads, size in rows.pieces:
        by = tables[kind] if kind in tables else tables["key"].new_ones(rows.groups * heads)
        columns.append(by.view(rows.groups, heads).repeat_interleave(size, 1))
    return torch.cat(columns, 1).flatten()


def _scale_held(held: Tensor, by: Tensor, residual: Any) -> None:
    """Multiply a weight once; what rounding has cut off from it, under ``"kahan"``, is part of it.

    Args:
        held: What this process holds of the weight, changed in place.
        by: Factors that broadcast against it.
        residual: Its residual, changed in place, or None.
    """
    wide = torch.promote_types(held.dtype, torch.float32)
    if held.dtype == wide:
        held.mul_(by)
        return
    X, R = held.to(wide), None if residual is None else local(residual)
    X = X * by if R is None else (X + R) * by
    if R is None:
        held.copy_(X)
        return
    stays = by == 1  # in bits
    held.copy_(torch.where(stays, held.to(wide), X))
    R.copy_(torch.where(stays, R.to(wide), X - held))


def _forget_norms(state: Mapping[str, Any], is_scaled: Tensor) -> None:
    """Have an optimizer measure anew the norms that it keeps of a scaled weight."""
    for key, norm in state.items():
        marker = RESET_BY.get(str(key).partition(".")[0])
        if marker is not None:
            local(norm).masked_fill_(is_scaled.to(norm.device), marker)
