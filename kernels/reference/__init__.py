"""The operations in plain torch: the CPU path, and what the Triton kernels are tested against.

Every operation lies in a file of its own, and its kernel in the file of that name in ``triton/``.
``matmul``, ``write``, ``rounding`` and ``hashing`` have no kernel: products of stacks are torch's
own on every device, and ``store_weight`` in ``triton/_write.py`` is what ``update_weight_`` is
here, with the same random bits.
"""

from .adam import adam
from .adam_lift import adam_lift_
from .cast_stack import cast_stack
from .dct import dct_project, dct_reorder, dct_restore, dct_take, dct_twiddle, dct_untwiddle
from .lift import lift_
from .momentum import momentum_power_sums_, momentum_step_
from .normalize import normalized, padded
from .project import project
from .reductions import power_sums, squares
from .row_norm import column_norm, row_norm
from .row_step import row_step_
from .scale_and_apply import scale_and_apply
from .scaled_add import scaled_add_
from .sinkhorn import equal_rows, sinkhorn
from .split_step import split_step_
from .symmetric import gram, symmetric_apply, symmetric_poly

__all__ = [
    "adam",
    "adam_lift_",
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
    "momentum_power_sums_",
    "momentum_step_",
    "normalized",
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
