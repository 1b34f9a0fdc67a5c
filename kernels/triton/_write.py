"""The one place of the kernels that rounds a weight. Another rounding mode is a change here.

Plain torch's counterpart is ``update_weight_`` in ``reference/write.py``. Nothing else rounds
weights, but torch's own AdamW.
"""

import triton
import triton.language as tl


@triton.jit
def store_weight(pointers, value, mask):
    """Round a tile of new values, float32, to the weight's dtype, to nearest, and store it.

    Together with ``update_weight_`` of plain torch this function is all that rounds weights:
    another rounding mode is a change in these two functions. The docstring there says what a mode
    needs; here it comes beside the mask, made of the key of matrix k and of the rows and columns of
    the tile, and a residual as pointers of its own.
    """
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)
