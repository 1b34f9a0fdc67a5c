"""Into a subspace: the coordinates R = P^T G, in plain torch."""

import torch
from torch import Tensor

from .matmul import product
from .reductions import column_squares


def project(
    P: Tensor, G: Tensor, squares: bool = False, like: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The coordinates R = P^T G.

    Args:
        P: (K, m, r), or (1, m, r) for all matrices.
        G: (K, m, n), any strides. The narrower of the two is widened.
        squares: whether the columns' sums of squares are wanted too (False).
        like: None (default), or (K, r, n), beside which R will be used: on the CPU R lies in memory
            as it does, row by row or column by column.

    Returns:
        R: (K, r, n), at least float32.
        G2: (K, 1, n), the sums of squares of G's columns, at least float32; None if not wanted.
    """
    dtype = torch.promote_types(torch.promote_types(P.dtype, G.dtype), torch.float32)
    P = P if len(P) == len(G) else P.expand(len(G), -1, -1)
    G2 = column_squares(G.to(torch.promote_types(G.dtype, torch.float32))) if squares else None
    P, G = P.to(dtype), G.to(dtype)
    by_column = like is not None and like.stride(-1) != 1 and like.stride(-2) == 1
    return (product(G.mT, P).mT if by_column else product(P.mT, G)), G2
