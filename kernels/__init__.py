"""Polar factors and the other heavy steps, one plain reference each."""

from .blockwise import (
    blockwise_levels,
    blockwise_scales,
    dequantise_blocks,
    quantise_blocks,
)
from .coefficients import polar_express_schedule, zolotarev
from .dct import dct, dct_basis, dct_path, idct
from .gram_space import gram_restarts
from .polar import METHODS as POLAR_METHODS
from .polar import auto_method, composite_map, polar_factor
from .products import add_product_, product
from .qdwh import qdwh_schedule
from .quantise import dequantise_rows, quantise_rows
from .reference import gram, symmetric_poly
from .report import PolarReport, polar_report

__all__ = [
    "POLAR_METHODS",
    "PolarReport",
    "add_product_",
    "auto_method",
    "blockwise_levels",
    "blockwise_scales",
    "composite_map",
    "dct",
    "dct_basis",
    "dct_path",
    "dequantise_blocks",
    "dequantise_rows",
    "gram",
    "gram_restarts",
    "idct",
    "polar_express_schedule",
    "polar_factor",
    "polar_report",
    "product",
    "qdwh_schedule",
    "quantise_blocks",
    "quantise_rows",
    "symmetric_poly",
    "zolotarev",
]
