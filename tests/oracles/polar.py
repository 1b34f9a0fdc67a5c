"""Naive float64 polar factors of one matrix, written for the eye and not for speed."""

import numpy as np
import torch
from scipy.special import ellipj, ellipk
from torch import Tensor


def svd_polar(M: Tensor) -> Tensor:
    """U V^T over the singular values that are not rounding noise."""
    U, s, Vh = np.linalg.svd(M.double().numpy(), full_matrices=False)
    keep = s > max(M.shape) * np.finfo(np.float64).eps * s[0]
    return torch.from_numpy(U[:, keep] @ Vh[keep])


def newton_schulz(M: Tensor, schedule, norm_factor: float = 1.0) -> Tensor:
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, from M over its Frobenius norm."""
    X = M.double()
    X = X / (norm_factor * torch.sqrt((X**2).sum()))
    for a, b, c in schedule:
        X = a * X + b * (X @ X.T @ X) + c * (X @ X.T @ X @ X.T @ X)
    return X


def row_scaled(M: Tensor) -> Tensor:
    """M with each row (column, if M is tall) over the root of its sum of |M M^T|."""
    X = M if M.shape[0] <= M.shape[1] else M.T
    X = X / (X @ X.T).abs().sum(dim=1, keepdim=True).sqrt()
    return X if M.shape[0] <= M.shape[1] else X.T


def schatten4(M: Tensor) -> float:
    """The fourth root of the sum of the fourth powers of the singular values."""
    return float((torch.linalg.svdvals(M.double()) ** 4).sum() ** 0.25)


def zolotarev_step(l: float, r: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Shifts c_1, c_3, ..., weights and scale, with scipy's elliptic functions and a grid."""
    i = np.arange(1, 2 * r + 1)
    sn, cn, _, _ = ellipj(i * ellipk(1 - l * l) / (2 * r + 1), 1 - l * l)
    c = l * l * (sn / cn) ** 2
    odd, even = c[0::2], c[1::2]
    weights = np.array(
        [
            -np.prod(odd[j] - even) / np.prod([odd[j] - odd[k] for k in range(r) if k != j])
            for j in range(r)
        ]
    )
    x = np.geomspace(l, 1, 400_001)
    f = x * (1 + (weights / (x[:, None] ** 2 + odd)).sum(axis=1))
    return odd, weights, 2 / (f.max() + f.min())


def zolotarev_polar(M: Tensor, l: float = 3e-3, r: int = 2) -> Tensor:
    """The rational step on the singular values, each divided by ||M M^T||_F^(1/2)."""
    shifts, weights, scale = zolotarev_step(l, r)
    U, s, Vh = np.linalg.svd(M.double().numpy(), full_matrices=False)
    x = s / (s**4).sum() ** 0.25
    y = scale * x * (1 + (weights / (x[:, None] ** 2 + shifts)).sum(axis=1))
    return torch.from_numpy((U * y) @ Vh)
