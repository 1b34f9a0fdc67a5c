"""8-bit state that comes in another form than is wanted: of older versions, or of other ranks.

Older versions had one scale for every 256 numbers of the flat tensor. The shapes of the scales tell
it from today's, whose blocks end with their rows. Such state is decoded and coded anew; where rows
are too short for scales of their own it becomes floats. Bases, which older versions kept as floats,
are coded. State that stays in floats, as ranks cut its blocks, has scales of -1: it is coded where
no rank does, and codes are decoded where one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...kernels import (
    blockwise_scales,
    dequantize_blocks,
    quantize_basis,
    quantize_blocks,
)
from .held_codes import NO_SCALE
from .layout import is_sharded, local
from .saved_state import Entry, Expected, check_values_of
from .units import QUANTIZED_DTYPES, base_of, scale_of


def recoded(found: Any, expected: Entry, text: str) -> Any:
    """State of one parameter in today's layout.

    Args:
        found: Its state, saved or live; not changed.
        expected: What it may hold.
        text: How a message names the parameter.

    Returns:
        ``found`` itself where nothing in it is old. What does not fit at all stays, for other
        checks to refuse.

    Raises:
        ValueError: For old state whose values cannot be.
    """
    if not isinstance(found, Mapping):
        return found
    changes: dict[str, Tensor | None] = {}
    for key, wanted in expected.tensors.items():
        value, scale = found.get(key), found.get(scale_of(key))
        wanted_scale = expected.tensors.get(scale_of(key))
        if wanted_scale is not None and base_of(key) in QUANTIZED_DTYPES:
            changes.update(_in_form(value, scale, key, wanted, wanted_scale, text))
            if key in changes:
                continue
        if not _is_plain(value) or tuple(value.shape) != wanted.shape:
            continue
        if _is_plain(scale) and _is_flat(value, scale, wanted_scale):
            limits = Expected(tuple(scale.shape), scale.dtype, scale.device, 0.0)
            check_values_of(scale_of(key), scale, limits, text, True)
            changes.update(_coded(value, scale, key, wanted, wanted_scale))
        elif (
            wanted_scale is not None
            and scale is None
            and value.is_floating_point()
            and base_of(key) in expected.bases
        ):
            limits = Expected(wanted.shape, value.dtype, value.device)
            check_values_of(key, value, limits, text, True)
            changes.update(_coded_basis(value, key, wanted_scale))
    if not changes:
        return found
    return {key: value for key, value in ({**found} | changes).items() if value is not None}


def _in_form(
    value: Any, scale: Any, key: str, wanted: Expected, wanted_scale: Expected, text: str
) -> dict[str, Tensor | None]:
    """Codes as floats or floats as codes, whole, where the other form is wanted; else nothing.

    A distributed checkpoint has copied codes into floats then, number by number.

    Raises:
        ValueError: For floats that were copied into codes, of which nothing is left.
    """
    if not (_fits(value, wanted) and _fits(scale, wanted_scale) and scale.is_floating_point()):
        return {}
    held = local(scale)
    wants_floats, has_floats = wanted.dtype.is_floating_point, bool((held == NO_SCALE).all())
    if wants_floats == has_floats or not held.numel():
        return {}
    if has_floats and not value.dtype.is_floating_point:
        raise ValueError(
            f"state {key!r} of {text} was saved in {torch.float32}, because ranks cut its blocks "
            "of 256 numbers, and was read as codes; load it on as many ranks as have saved it, or "
            "from a full_state_dict"
        )
    X, scales = _whole(value), _whole(scale).contiguous().unsqueeze(0)
    if wants_floats:
        limits = Expected(tuple(scale.shape), scale.dtype, scales.device, 0.0)
        check_values_of(scale_of(key), scales[0], limits, text, True)
        codes = X.to(torch.int16).to(QUANTIZED_DTYPES[base_of(key)]).contiguous().unsqueeze(0)
        floats = dequantize_blocks(codes, scales, wanted.dtype)[0]
        return {key: floats, scale_of(key): torch.full_like(scales[0], NO_SCALE)}
    limits = Expected(wanted.shape, X.dtype, X.device, wanted.low)
    check_values_of(key, X, limits, text, True)
    new = torch.zeros(X.shape, dtype=wanted.dtype, device=X.device).unsqueeze(0)
    quantize_blocks(X.contiguous().unsqueeze(0), new, scales := torch.zeros_like(scales))
    return {key: new[0], scale_of(key): scales[0]}


def _fits(x: Any, wanted: Expected) -> TypeGuard[Tensor]:
    """Whether x is a dense tensor of the shape that is wanted."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    return not (x.is_quantized or x.is_meta) and tuple(x.shape) == wanted.shape


def _whole(X: Any) -> Tensor:
    """All of a tensor; of a DTensor by communication."""
    whole: Tensor = X.full_tensor() if is_sharded(X) else X
    return whole


def _is_plain(x: Any) -> TypeGuard[Tensor]:
    if not isinstance(x, Tensor) or is_sharded(x):  # DTensors are younger than these layouts
        return False
    return x.layout is torch.strided and not (x.is_quantized or x.is_meta)


def _is_flat(codes: Tensor, scales: Tensor, wanted: Expected | None) -> bool:
    """Whether codes and scales are such as older versions stored, and not such as are wanted."""
    return (
        codes.dtype in (torch.int8, torch.uint8)
        and scales.dtype == torch.float32
        and tuple(scales.shape) == (blockwise_scales(codes.numel()),)
        and (wanted is None or tuple(scales.shape) != wanted.shape)
    )


def _coded(
    codes: Tensor, scales: Tensor, key: str, wanted: Expected, wanted_scale: Expected | None
) -> dict[str, Tensor | None]:
    """What codes of the flat tensor stand for, as it is stored today; None for what is dropped."""
    X = dequantize_blocks(codes.contiguous().unsqueeze(0), scales.contiguous().unsqueeze(0))
    X.masked_fill_(codes == 0, 0.0)  # scales of sums may be infinite, as the sums may
    if wanted_scale is None:
        return {key: X[0].to(wanted.dtype), scale_of(key): None}
    if wanted.dtype.is_floating_point:
        none = torch.full(wanted_scale.shape, NO_SCALE, dtype=torch.float32, device=X.device)
        return {key: X[0].to(wanted.dtype), scale_of(key): none}
    new = torch.zeros(X.shape, dtype=codes.dtype, device=X.device)
    new_scales = torch.zeros(1, *wanted_scale.shape, dtype=torch.float32, device=X.device)
    quantize_blocks(X, new, new_scales)
    return {key: new[0], scale_of(key): new_scales[0]}


def _coded_basis(P: Tensor, key: str, scale: Expected) -> dict[str, Tensor | None]:
    """A basis in 8 bits, with its scales."""
    codes = torch.zeros(P.shape, dtype=torch.int8, device=P.device)
    scales = torch.zeros(scale.shape, dtype=torch.float32, device=P.device)
    quantize_basis(P, codes, scales)
    return {key: codes, scale_of(key): scales}
