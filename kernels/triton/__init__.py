"""The Triton back end: the operations of ``stiefel.kernels.reference`` under the same names."""

from .adam import adam
from .adam_lift import adam_lift_
from .apply import scale_and_apply
from .chosen import dct_project, dct_take
from .cosine import dct_reorder, dct_twiddle
from .cosine_back import dct_restore, dct_untwiddle
from .launch import INTERPRETED
from .lift import lift_
from .normalise import normalised, padded
from .passes import blend_, blend_power_sums_
from .reads import cast_stack, power_sums, squares
from .row_step import row_step_
from .rows import column_norm, row_norm
from .scaled_add import scaled_add_
from .scaling import equal_rows, sinkhorn
from .split import split_step_
from .subspace import project
from .symmetric import gram, symmetric_apply, symmetric_poly

__all__ = [
    "INTERPRETED",
    "adam",
    "adam_lift_",
    "blend_",
    "blend_power_sums_",
    "cast_stack",
    "column_norm",
    "dct_project",
    "dct_reorder",
    "dct_restore",
    "dct_take",
    "dct_twiddle",
    "dct_untwiddle",
    "equal_rows",
    "gram",
    "lift_",
    "normalised",
    "padded",
    "power_sums",
    "project",
    "row_norm",
    "row_step_",
    "scale_and_apply",
    "scaled_add_",
    "sinkhorn",
    "split_step_",
    "squares",
    "symmetric_apply",
    "symmetric_poly",
]
