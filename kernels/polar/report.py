"""How far an approximate polar factor is from the exact one, in the measures that matter."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolarReport:
    """Measures of an approximate polar factor O of M, with m <= n and P the exact factor.

    Attributes:
        alignment_deficit: 1 - <O, M> / (||O||_2 ||M||_*). It is 0 for P, and scaling O does not
            change it. With the operator norm it is all that enters a descent inequality.
        operator_norm: ||O||_2, 1 for P.
        orthogonality: ||O O^T - I||_F / sqrt(m).
        polar_error: ||O - P||_F / ||P||_F.
        psd_error: norm of the negative eigenvalues of sym(O^T M) over that of the positive ones.
    """

    alignment_deficit: float
    operator_norm: float
    orthogonality: float
    polar_error: float
    psd_error: float

    def __str__(self) -> str:
        rows = [
            ("alignment deficit", self.alignment_deficit),
            ("operator norm", self.operator_norm),
            ("orthogonality", self.orthogonality),
            ("polar error", self.polar_error),
            ("psd error", self.psd_error),
        ]
        return "\n".join(f"{name:<18}{value:10.3e}" for name, value in rows)


def polar_report(M: Tensor, O: Tensor) -> PolarReport:
    """Measure O as a polar factor of M, in float64.

    Args:
        M: (m, n), any floating dtype, not zero.
        O: (m, n), the approximate factor of M, for example ``polar_factor(M)``.

    Returns:
        A ``PolarReport``.

    Raises:
        ValueError: if M and O are not two matrices of one shape, or M is zero.
    """
    if M.ndim != 2 or M.shape != O.shape:
        raise ValueError(
            f"M and O must be two matrices of one shape, not {tuple(M.shape)} and "
            f"{tuple(O.shape)}: pass one matrix of a stack at a time"
        )
    M, O = M.detach().double(), O.detach().double()
    if M.shape[0] > M.shape[1]:
        M, O = M.mT, O.mT
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    if not s.sum() > 0:
        raise ValueError("M is zero or not finite, so it has no polar factor to measure against")
    keep = s > max(M.shape) * torch.finfo(M.dtype).eps * s[0]
    P = (U * keep) @ Vh
    norm = torch.linalg.matrix_norm(O, 2)
    eye = torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
    return PolarReport(
        alignment_deficit=float(1 - (O * M).sum() / (norm * s.sum())),
        operator_norm=float(norm),
        orthogonality=float((O @ O.mT - eye).norm() / M.shape[0] ** 0.5),
        polar_error=float((O - P).norm() / P.norm()),
        psd_error=_psd_error(M, O),
    )


def _psd_error(M: Tensor, O: Tensor) -> float:
    """Negative over positive part of sym(O^T M), an n x n matrix of rank 2m at most."""
    H = O.mT @ M
    if 2 * M.shape[0] < M.shape[1]:
        # Both row spaces lie in the span of Q, so the other eigenvalues are zero.
        Q = torch.linalg.qr(torch.cat([O, M]).mT).Q  # (n, 2m)
        H = (O @ Q).mT @ (M @ Q)
    values = torch.linalg.eigvalsh((H + H.mT) / 2)
    return float(values.clamp(max=0).norm() / values.clamp(min=0).norm())
