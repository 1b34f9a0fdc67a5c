"""Polar factors and the other heavy steps, one plain reference each."""

from .coefficients import polar_express_schedule, zolotarev
from .polar import METHODS as POLAR_METHODS
from .polar import auto_method, composite_map, polar_factor
from .products import add_product_, product
from .reference import gram, symmetric_poly
from .report import PolarReport, polar_report

__all__ = [
    "POLAR_METHODS",
    "PolarReport",
    "add_product_",
    "auto_method",
    "composite_map",
    "gram",
    "polar_express_schedule",
    "polar_factor",
    "polar_report",
    "product",
    "symmetric_poly",
    "zolotarev",
]
