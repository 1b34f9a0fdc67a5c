"""Factors of lr in the update of a matrix, by the names that ``adjust_lr_fn`` takes.

A factor depends on the shape alone, and multiplies the update, never the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's update per unit of lr (*Muon is Scalable*, arXiv 2502.16982)."""


def match_rms_adamw(m: int, n: int, rank: int) -> float:
    """0.2 sqrt(m n / rank): an update of Frobenius norm sqrt(rank) then has RMS 0.2, as AdamW's.

    An orthogonal factor of full rank has rank = min(m, n), which makes it 0.2 sqrt(max(m, n));
    an update of norm 1 counts as rank 1. Source: arXiv 2502.16982, torch.optim.Muon.
    """
    return RMS_OF_ADAMW * math.sqrt(m * n / rank)


def match_rms_full_rank(m: int, n: int, rank: int) -> float:
    """0.2 sqrt(max(m, n)), whatever the rank. Source: Trion's code, arXiv 2505.17967."""
    return RMS_OF_ADAMW * math.sqrt(max(m, n))


def tall_aspect(m: int, n: int, rank: int) -> float:
    """sqrt(max(1, m / n)). Source: KellerJordan/Muon, torch.optim.Muon; AuON, arXiv 2509.24320."""
    return math.sqrt(max(1.0, m / n))


def spectral_aspect(m: int, n: int, rank: int) -> float:
    """sqrt(m / n), the unit of the RMS-to-RMS operator norm. Source: Dion, arXiv 2504.05295."""
    return math.sqrt(m / n)


def unscaled(m: int, n: int, rank: int) -> float:
    """1."""
    return 1.0


ADJUST_LR_FNS: dict[str, Callable[[int, int, int], float]] = {
    "match_rms_adamw": match_rms_adamw,
    "kimi": match_rms_full_rank,
    "original": tall_aspect,  # torch's name
    "kj": tall_aspect,  # Trion's
    "aspect": tall_aspect,  # AuON's
    "spectral": spectral_aspect,
    "spectral_unclamped": spectral_aspect,  # torch's name, from 2.14 on
    "dion": spectral_aspect,
    "none": unscaled,
}
"""Every name of a scale rule; each method says which of them it accepts."""


def adjust_lr(name: str, m: int, n: int, rank: int) -> float:
    """The factor of lr in the update of an m x n weight.

    Args:
        name: A key of ``ADJUST_LR_FNS``.
        m: Rows of the weight.
        n: Columns of the weight.
        rank: The squared Frobenius norm of an exact update.
    """
    return ADJUST_LR_FNS[name](m, n, rank)
