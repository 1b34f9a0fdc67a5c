"""Projectors: how a low-rank method finds, stores and applies a basis P of the rows of a matrix.

A projector is a frozen, stateless object; all that lasts between steps is in the state tensors that
its slots declare. A rule gets one from :func:`make_projector` and needs nothing else of a kind.

| ``projection=`` | basis | state, bytes | refresh / thin SVD |
|---|---|---|---|
| ``"svd"`` | top singular vectors, by the Gram matrix and eigh | 4 m r | 0.109 |
| ``"svd_full"`` | the same, by the thin SVD | 4 m r | 1 |
| ``"range"``, ``"range:8,1"`` | randomized range finder | 4 m r | 0.079 |
| ``"power"``, ``"power:8"`` | one warm step of subspace iteration | 4 m r | 0.042 |
| ``"random"`` | Haar, blind to G | 4 m r | 0.0056 |
| ``"gaussian"`` | entries N(0, 1/r), blind to G; down only | 4 m r | 0.004 |
| ``"randk"`` | random rows, blind to G | 4 r | 0.0001 |
| ``"topk"`` | rows of largest norm | 4 r | 0.0025 |
| ``"dct"``, ``"dct:l1"`` | cosines of largest coefficients | 4 r | 0.014 |

Ratios: one float32 1024 x 4096 matrix, r = 256, one CPU thread, +-15 %, as ``python
bench/toolkit.py --only subspaces`` prints them. Share of the energy that the SVD captures, where
sigma_i = i^-0.5 and singular vectors are random: svd, svd_full and (warm) power 1.00, range 0.97
(0.85 without a power iteration, 0.99 with two), topk 0.41, dct 0.40, randk and random 0.31. So
range gains little over svd on a CPU, and power pays only while gradients change slowly between
refreshes. Rows and cosines are cheap to store but capture little, unless single rows or
neighbouring rows matter. dct shares one basis of 4 m^2 bytes among all matrices with m rows, and
gathers m x r of it in every step. gaussian has no orthonormal columns: it is for rules that measure
R and lift nothing.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from .._core.validation import check
from .dense_projectors import (
    DenseProjector,
    GaussianProjector,
    PowerProjector,
    Projector,
    RandomProjector,
    RangeProjector,
    SvdProjector,
)
from .index_projectors import (
    DctProjector,
    RandKProjector,
    TopKProjector,
    clear_rows_,
    take_rows,
)
from .random_keys import StackRNG
from .svd import fix_signs, top_bases, top_basis

__all__ = [
    "DOWN_KINDS",
    "PROJECTION_KINDS",
    "DctProjector",
    "DenseProjector",
    "Projector",
    "StackRNG",
    "clear_rows_",
    "fix_signs",
    "make_projector",
    "projects_columns",
    "take_rows",
    "top_bases",
    "top_basis",
]

# the projector with its defaults, and the fields that may follow a colon
_PROJECTORS: dict[str, tuple[Projector, tuple[str, ...]]] = {
    "svd": (SvdProjector(), ()),
    "svd_full": (SvdProjector(exact=True), ()),
    "range": (RangeProjector(), ("oversample", "iterations")),
    "power": (PowerProjector(), ("probes",)),
    "random": (RandomProjector(), ()),
    "randk": (RandKProjector(), ()),
    "topk": (TopKProjector(), ()),
    "dct": (DctProjector(), ("norm",)),
    "gaussian": (GaussianProjector(), ()),
}
DOWN_KINDS = tuple(_PROJECTORS)
"""All kinds, for rules that only project down."""
PROJECTION_KINDS = tuple(name for name, (P, _) in _PROJECTORS.items() if P.is_orthonormal)
"""The kinds that lift too."""


def projects_columns(proj_type: str, m: int, n: int) -> bool:
    """Whether ``proj_type`` projects the right side of an m x n weight by transposing it first."""
    right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False, "full": False}
    return right[proj_type]


@functools.lru_cache(maxsize=256)
def make_projector(
    projection: str, *, both: bool = False, lapack_signs: bool = False, lifts: bool = True
) -> Projector:
    """Make the projector that a user names in ``projection=``.

    Args:
        projection: One of ``PROJECTION_KINDS``; options follow a colon: ``"range:8,1"``
            (oversampling, power iterations), ``"power:8"`` (probes), ``"dct:l1"`` or ``"dct:l2"``
            (score).
        both: Whether both sides get a basis, dense kinds only (default: False).
        lapack_signs: Whether signs stay as LAPACK gives them, ``"svd"`` and ``"svd_full"`` only
            (default: False).
        lifts: Whether the rule lifts what it has projected (default: True), for which columns must
            be orthonormal.

    Raises:
        ValueError: For an unknown kind or option, both sides of a kind that has only one, or a kind
            that cannot lift.
    """
    name, colon, text = str(projection).partition(":")
    if name not in _PROJECTORS:
        known = PROJECTION_KINDS if lifts else DOWN_KINDS
        raise ValueError(f"projection must be one of {', '.join(known)}, got {projection!r}")
    default, options = _PROJECTORS[name]
    check(
        default.is_orthonormal or not lifts,
        f"projection {projection!r} has no orthonormal columns, so nothing can be lifted by it; "
        "use projection='random'",
    )
    values = text.split(",") if colon else []
    check(
        len(values) <= len(options),
        f"projection {projection!r}: {name!r} takes {', '.join(options) or 'no options'}",
    )
    check(
        not both or isinstance(default, DenseProjector),
        f"projection {projection!r} chooses rows and has no second side: use one side of it, or a "
        "kind with a dense basis",
    )
    flags = {"both": both, "lapack_signs": lapack_signs}
    fields: dict[str, Any] = {key: True for key, is_set in flags.items() if is_set}
    try:
        for key, value in zip(options, values, strict=False):
            fields[key] = type(getattr(default, key))(value)
        return replace(default, **fields)
    except ValueError as error:
        raise ValueError(f"projection {projection!r}: {error}") from None
