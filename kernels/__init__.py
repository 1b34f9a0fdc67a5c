"""Polar factors and the other heavy steps, one plain reference each."""

from .blockwise import (
    blockwise_levels,
    blockwise_scales,
    dequantise_blocks,
    quantise_blocks,
)
from .coefficients import polar_express_schedule, zolotarev
from .dct import PATHS as DCT_PATHS
from .dct import dct, dct_basis, dct_path, idct
from .gram_space import gram_restarts
from .inverse_root import gram_polar, inverse_root
from .low_rank import SKETCHES, low_rank, low_rank_size
from .polar import METHODS as POLAR_METHODS
from .polar import auto_method, composite_map, polar_factor
from .products import add_product_, product
from .qdwh import qdwh_schedule
from .quantise import dequantise_rows, quantise_rows
from .reference import gram, symmetric_poly
from .report import PolarReport, polar_report
from .rotation import (
    cholesky_qr,
    eigenbasis,
    householder_qr,
    left_basis,
    nearest_rotation,
    rotated,
)
from .rownorm import column_norm, row_norm
from .sinkhorn import equal_rows, sinkhorn

__all__ = [
    "DCT_PATHS",
    "POLAR_METHODS",
    "SKETCHES",
    "PolarReport",
    "add_product_",
    "auto_method",
    "blockwise_levels",
    "blockwise_scales",
    "cholesky_qr",
    "column_norm",
    "composite_map",
    "dct",
    "dct_basis",
    "dct_path",
    "dequantise_blocks",
    "dequantise_rows",
    "eigenbasis",
    "equal_rows",
    "gram",
    "gram_polar",
    "gram_restarts",
    "householder_qr",
    "idct",
    "inverse_root",
    "left_basis",
    "low_rank",
    "low_rank_size",
    "nearest_rotation",
    "polar_express_schedule",
    "polar_factor",
    "polar_report",
    "product",
    "qdwh_schedule",
    "quantise_blocks",
    "quantise_rows",
    "rotated",
    "row_norm",
    "sinkhorn",
    "symmetric_poly",
    "zolotarev",
]
