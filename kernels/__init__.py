"""Polar factors and the other heavy operations of the optimizers, each with one plain reference.

Every function runs on the back end that suits its tensors; see ``README.md`` of this folder.
"""

import sys
import warnings
from typing import Any

from .dct import DCT_PATHS, dct, dct_basis, dct_path, idct, sized_dct
from .dispatch import backend_summary
from .ops import (
    adam,
    adam_lift_,
    cast_stack,
    column_norm,
    dct_project,
    dct_take,
    equal_rows,
    fuses_passes,
    lift_,
    momentum_power_sums_,
    momentum_step_,
    power_sums,
    project,
    row_norm,
    row_step_,
    scaled_add_,
    sinkhorn,
    split_step_,
    squares,
)
from .polar import (
    POLAR_METHODS,
    SKETCHES,
    PolarReport,
    auto_method,
    cholesky_qr,
    completed_eigenbasis,
    composite_map,
    eigenbasis,
    gram_polar,
    gram_restarts,
    householder_qr,
    inverse_root,
    left_basis,
    low_rank,
    low_rank_size,
    nearest_rotation,
    newton_schulz,
    polar_express_schedule,
    polar_factor,
    polar_report,
    qdwh_schedule,
    rotated,
    zolotarev,
)
from .quantize import (
    blockwise_levels,
    blockwise_scales,
    blockwise_shape,
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)
from .quantize_basis import basis_scales, dequantize_basis, quantize_basis
from .reference import gram, symmetric_poly
from .reference._stacks import Stack
from .reference.adam import update_moments_
from .reference.hashing import mix64_of_int
from .reference.matmul import add_product_, product
from .reference.reductions import row_total
from .reference.rounding import LOW_PRECISION_DTYPES, Rounding, parameter_keys, rounding_keys
from .reference.row_norm import ROW_MODES, row_factors
from .reference.symmetric import gram_stack
from .reference.write import unflagged_stay, update_weight_

__all__ = [
    "DCT_PATHS",
    "LOW_PRECISION_DTYPES",
    "POLAR_METHODS",
    "ROW_MODES",
    "SKETCHES",
    "PolarReport",
    "Rounding",
    "Stack",
    "adam",
    "adam_lift_",
    "add_product_",
    "auto_method",
    "backend_summary",
    "basis_scales",
    "blockwise_levels",
    "blockwise_scales",
    "blockwise_shape",
    "cast_stack",
    "cholesky_qr",
    "column_norm",
    "completed_eigenbasis",
    "composite_map",
    "dct",
    "dct_basis",
    "dct_path",
    "dct_project",
    "dct_take",
    "dequantize_basis",
    "dequantize_blocks",
    "dequantize_rows",
    "eigenbasis",
    "equal_rows",
    "fuses_passes",
    "gram",
    "gram_polar",
    "gram_restarts",
    "gram_stack",
    "householder_qr",
    "idct",
    "inverse_root",
    "left_basis",
    "lift_",
    "low_rank",
    "low_rank_size",
    "mix64_of_int",
    "momentum_power_sums_",
    "momentum_step_",
    "nearest_rotation",
    "newton_schulz",
    "parameter_keys",
    "polar_express_schedule",
    "polar_factor",
    "polar_report",
    "power_sums",
    "product",
    "project",
    "qdwh_schedule",
    "quantize_basis",
    "quantize_blocks",
    "quantize_rows",
    "rotated",
    "rounding_keys",
    "row_factors",
    "row_norm",
    "row_step_",
    "row_total",
    "scaled_add_",
    "sinkhorn",
    "sized_dct",
    "split_step_",
    "squares",
    "symmetric_poly",
    "unflagged_stay",
    "update_moments_",
    "update_weight_",
    "zolotarev",
]

_RENAMED = {
    "dequantise_blocks": "dequantize_blocks",
    "dequantise_rows": "dequantize_rows",
    "quantise_blocks": "quantize_blocks",
    "quantise_rows": "quantize_rows",
}
"""Names of release 0.1, which work for one more release."""
sys.modules[f"{__name__}.report"] = sys.modules[PolarReport.__module__]  # as pickles of 0.1 say


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"stiefel.kernels.{name} is called {_RENAMED[name]} now"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
