"""What stands around an FFT to make it a cosine transform, and chosen cosines.

``_dct_forward`` and ``_dct_back`` have the kernels before and after ``torch.fft``, ``_dct_select``
those that take or make chosen cosines only.
"""

from ._dct_back import dct_restore, dct_untwiddle
from ._dct_forward import dct_reorder, dct_twiddle
from ._dct_select import dct_project, dct_take

__all__ = [
    "dct_project",
    "dct_reorder",
    "dct_restore",
    "dct_take",
    "dct_twiddle",
    "dct_untwiddle",
]
