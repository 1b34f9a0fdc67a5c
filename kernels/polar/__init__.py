"""Polar factors by several methods, and what is built of them: low rank, inverse roots, rotations.

``newton_schulz.newton_schulz`` is the method in its plainest form; :func:`polar_factor` is what to
call.
"""

from .coefficients import polar_express_schedule, zolotarev
from .gram_newton_schulz import gram_restarts
from .inverse_root import gram_polar, inverse_root
from .low_rank import SKETCHES, low_rank, low_rank_size
from .methods import POLAR_METHODS, auto_method, composite_map, polar_factor
from .newton_schulz import newton_schulz
from .qdwh import qdwh_schedule
from .report import PolarReport, polar_report
from .rotation import (
    cholesky_qr,
    completed_eigenbasis,
    eigenbasis,
    householder_qr,
    left_basis,
    nearest_rotation,
    rotated,
)

__all__ = [
    "POLAR_METHODS",
    "SKETCHES",
    "PolarReport",
    "auto_method",
    "cholesky_qr",
    "completed_eigenbasis",
    "composite_map",
    "eigenbasis",
    "gram_polar",
    "gram_restarts",
    "householder_qr",
    "inverse_root",
    "left_basis",
    "low_rank",
    "low_rank_size",
    "nearest_rotation",
    "newton_schulz",
    "polar_express_schedule",
    "polar_factor",
    "polar_report",
    "qdwh_schedule",
    "rotated",
    "zolotarev",
]
