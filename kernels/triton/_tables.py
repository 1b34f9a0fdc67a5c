"""Shipped tile sizes: for every kernel and architecture one Config for small and one for large.

They come from compiling, not from timing: no spills, enough blocks per multiprocessor, the tiles
that published kernels use where those are known. ``STIEFEL_AUTOTUNE=1`` times all of a kernel's on
the device at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile sizes by the names of the kernel's constants, warps of a block, pipeline stages."""

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    @property
    def tile_sizes(self) -> dict[str, int]:
        """Tile sizes by name."""
        return dict(self.tiles)


def _of(warps: int, stages: int, **tiles: int) -> Config:
    return Config(tuple(tiles.items()), warps, stages)


def _each(
    sm_80: tuple[Config, Config], sm_90: tuple[Config, Config], sm_100: tuple[Config, Config],
    gfx942: tuple[Config, Config], interpreted: Config,
) -> dict[str, dict[str, Config]]:  # fmt: skip
    """(small, large) for every architecture."""
    pairs = {"sm_80": sm_80, "sm_90": sm_90, "sm_100": sm_100, "gfx942": gfx942}
    table = {arch: {"small": small, "large": large} for arch, (small, large) in pairs.items()}
    return {**table, "interpreted": {"small": interpreted, "large": interpreted}}


def _alike(
    sm_80: Config, sm_90: Config, sm_100: Config, gfx942: Config, interpreted: Config
) -> dict[str, dict[str, Config]]:
    """For every architecture one Config of both size classes."""
    return _each((sm_80,) * 2, (sm_90,) * 2, (sm_100,) * 2, (gfx942,) * 2, interpreted)


def _same(nvidia: Config, amd: Config, interpreted: Config) -> dict[str, dict[str, Config]]:
    """The same for all of NVIDIA's: what is bound by memory hardly cares."""
    return _alike(nvidia, nvidia, nvidia, amd, interpreted)


TABLES: Mapping[str, Mapping[str, Mapping[str, Config]]] = {
    "symmetric": _each(
        sm_80=(_of(4, 4, BM=64, BK=64), _of(8, 3, BM=128, BK=64)),
        sm_90=(_of(4, 4, BM=64, BK=64), _of(8, 4, BM=128, BK=64)),
        sm_100=(_of(4, 4, BM=64, BK=64), _of(8, 4, BM=128, BK=64)),
        gfx942=(_of(4, 2, BM=64, BK=64), _of(8, 2, BM=128, BK=64)),
        interpreted=_of(4, 2, BM=16, BK=16),
    ),
    "symmetric32": _each(  # float32 takes twice the room, and three products of tf32 spill on sm_80
        sm_80=(_of(4, 4, BM=64, BK=16), _of(4, 4, BM=64, BK=16)),
        sm_90=(_of(4, 4, BM=64, BK=32), _of(8, 4, BM=128, BK=32)),
        sm_100=(_of(4, 4, BM=64, BK=32), _of(8, 4, BM=128, BK=32)),
        gfx942=(_of(4, 2, BM=64, BK=32), _of(8, 2, BM=128, BK=32)),
        interpreted=_of(4, 2, BM=16, BK=16),
    ),
    "scale_and_apply": _each(
        sm_80=(_of(4, 4, BM=64, BN=64, BK=64), _of(8, 3, BM=128, BN=128, BK=64)),
        sm_90=(_of(4, 4, BM=64, BN=64, BK=64), _of(8, 4, BM=128, BN=128, BK=64)),
        sm_100=(_of(4, 4, BM=64, BN=64, BK=64), _of(8, 4, BM=128, BN=128, BK=64)),
        gfx942=(_of(4, 2, BM=64, BN=64, BK=64), _of(8, 2, BM=128, BN=128, BK=64)),
        interpreted=_of(4, 2, BM=16, BN=32, BK=16),
    ),
    "scale_and_apply32": _each(
        sm_80=(_of(4, 4, BM=64, BN=64, BK=32), _of(4, 4, BM=64, BN=64, BK=32)),
        sm_90=(_of(4, 4, BM=64, BN=64, BK=32), _of(8, 4, BM=128, BN=128, BK=32)),
        sm_100=(_of(4, 4, BM=64, BN=64, BK=32), _of(8, 4, BM=128, BN=128, BK=32)),
        gfx942=(_of(4, 2, BM=64, BN=64, BK=32), _of(8, 2, BM=128, BN=128, BK=32)),
        interpreted=_of(4, 2, BM=16, BN=32, BK=16),
    ),
    "squares": _same(_of(4, 1, BM=32, BN=128), _of(4, 1, BM=32, BN=128), _of(4, 1, BM=16, BN=32)),
    "inverse": _same(_of(4, 1, BN=1024), _of(4, 1, BN=1024), _of(4, 1, BN=8)),
    "cast": _same(_of(4, 1, BM=64, BN=64), _of(4, 1, BM=64, BN=64), _of(4, 1, BM=16, BN=32)),
    "split": _same(_of(1, 1, BM=16, BN=256), _of(1, 1, BM=16, BN=256), _of(1, 1, BM=4, BN=32)),
    "project": _same(_of(8, 3, BM=32, BN=128), _of(8, 2, BM=32, BN=128), _of(4, 2, BM=16, BN=16)),
    "project_wide": _alike(
        sm_80=_of(8, 2, BM=32, BN=128),
        sm_90=_of(8, 3, BM=32, BN=128),
        sm_100=_of(8, 3, BM=32, BN=128),
        gfx942=_of(8, 2, BM=32, BN=128),
        interpreted=_of(4, 2, BM=16, BN=16),
    ),
    "project_exact": _same(
        _of(8, 3, BM=16, BN=64), _of(8, 2, BM=16, BN=64), _of(4, 2, BM=16, BN=16)
    ),
    "added": _same(_of(4, 1, BN=1024), _of(4, 1, BN=1024), _of(4, 1, BN=128)),
    "adam": _same(_of(4, 1, BM=1, BN=1024), _of(4, 1, BM=1, BN=2048), _of(4, 1, BM=16, BN=32)),
    "lift": _alike(  # BK of 16 on sm_80: products in three parts spill with more
        sm_80=_of(8, 2, BM=128, BN=128, BK=16),
        sm_90=_of(8, 3, BM=128, BN=128, BK=32),
        sm_100=_of(8, 3, BM=128, BN=128, BK=32),
        gfx942=_of(8, 2, BM=128, BN=128, BK=32),
        interpreted=_of(4, 2, BM=16, BN=32, BK=16),
    ),
    "lift_sign": _alike(
        sm_80=_of(8, 3, BM=64, BN=64, BK=16),
        sm_90=_of(8, 3, BM=64, BN=64, BK=32),
        sm_100=_of(8, 3, BM=64, BN=64, BK=32),
        gfx942=_of(8, 2, BM=64, BN=64, BK=32),
        interpreted=_of(4, 2, BM=16, BN=32, BK=16),
    ),
    "adam_lift": _alike(
        sm_80=_of(8, 2, BM=64, BN=64),
        sm_90=_of(8, 3, BM=64, BN=64),
        sm_100=_of(8, 2, BM=64, BN=64),
        gfx942=_of(8, 2, BM=64, BN=64),
        interpreted=_of(4, 2, BM=16, BN=16),
    ),
    "adam_lift_sign": _same(
        _of(8, 2, BM=64, BN=32), _of(8, 1, BM=64, BN=32), _of(4, 2, BM=16, BN=16)
    ),
    "pass": _each(
        sm_80=(_of(4, 1, BM=8, BN=256), _of(4, 1, BM=16, BN=256)),
        sm_90=(_of(4, 1, BM=8, BN=256), _of(4, 1, BM=16, BN=256)),
        sm_100=(_of(4, 1, BM=8, BN=256), _of(4, 1, BM=8, BN=256)),
        gfx942=(_of(4, 1, BM=8, BN=256), _of(4, 1, BM=16, BN=256)),
        interpreted=_of(4, 1, BM=16, BN=32),
    ),
    "fold": _same(_of(4, 1, BT=32, BL=32), _of(4, 1, BT=32, BL=32), _of(4, 1, BT=4, BL=32)),
    "fold_powers": _same(_of(4, 1, BT=512), _of(4, 1, BT=1024), _of(4, 1, BT=8)),
    "rows": _each(  # small: rows of up to 1024 entries, large: of 16384
        sm_80=(_of(4, 1, R=4, BN=1024), _of(16, 1, R=1, BN=16384)),
        sm_90=(_of(4, 1, R=4, BN=1024), _of(16, 1, R=1, BN=16384)),
        sm_100=(_of(4, 1, R=4, BN=1024), _of(16, 1, R=1, BN=16384)),
        gfx942=(_of(4, 1, R=4, BN=1024), _of(16, 1, R=1, BN=16384)),
        interpreted=_of(4, 1, R=16, BN=128),
    ),
    "rows_long": _same(_of(4, 1, R=1, BN=4096), _of(4, 1, R=1, BN=4096), _of(4, 1, R=16, BN=128)),
    "rows_column_major": _same(
        _of(4, 1, R=64, BN=64), _of(4, 1, R=64, BN=64), _of(4, 1, R=16, BN=128)
    ),
    "rows_columns": _same(
        _of(4, 1, BM=32, BN=128), _of(4, 1, BM=32, BN=128), _of(4, 1, BM=16, BN=32)
    ),
    "rows_rms": _same(_of(4, 1, BN=256), _of(4, 1, BN=256), _of(4, 1, BN=64)),
    "rows_scaled": _same(
        _of(4, 1, BM=32, BN=128), _of(4, 1, BM=32, BN=128), _of(4, 1, BM=16, BN=32)
    ),
    "sinkhorn": _each(  # small: lines of up to 1024 entries, large: of 16384
        sm_80=(_of(4, 1, R=2, BN=1024), _of(16, 1, R=1, BN=16384)),
        sm_90=(_of(4, 1, R=2, BN=1024), _of(16, 1, R=1, BN=16384)),
        sm_100=(_of(4, 1, R=2, BN=1024), _of(16, 1, R=1, BN=16384)),
        gfx942=(_of(4, 1, R=2, BN=1024), _of(16, 1, R=1, BN=16384)),
        interpreted=_of(4, 1, R=16, BN=128),
    ),
    "sinkhorn_long": _same(
        _of(8, 1, R=1, BN=2048), _of(8, 1, R=1, BN=2048), _of(4, 1, R=16, BN=128)
    ),
    "sinkhorn_measure": _same(
        _of(8, 1, BM=32, BN=256), _of(8, 1, BM=32, BN=256), _of(4, 1, BM=16, BN=64)
    ),
    "sinkhorn_measured": _same(_of(4, 1, BN=512), _of(4, 1, BN=512), _of(4, 1, BN=4)),
    "sinkhorn_across": _same(
        _of(4, 1, BM=32, BN=128), _of(4, 1, BM=32, BN=128), _of(4, 1, BM=16, BN=32)
    ),
    "sinkhorn_written": _same(
        _of(4, 1, BM=32, BN=128), _of(4, 1, BM=32, BN=128), _of(4, 1, BM=16, BN=32)
    ),
    "dct": _same(_of(4, 1, BL=32, BP=64), _of(4, 1, BL=32, BP=64), _of(4, 1, BL=8, BP=16)),
    "split_places": _same(_of(4, 1, BLOCK=1024), _of(4, 1, BLOCK=1024), _of(4, 1, BLOCK=32)),
    "dct_take": _same(_of(4, 1, BL=32, BP=64), _of(4, 1, BL=32, BP=64), _of(4, 1, BL=8, BP=16)),
    "dct_project": _alike(
        sm_80=_of(8, 2, BL=128, BR=64, BK=32),
        sm_90=_of(8, 1, BL=128, BR=64, BK=16),
        sm_100=_of(8, 3, BL=128, BR=64, BK=16),
        gfx942=_of(8, 2, BL=128, BR=64, BK=32),
        interpreted=_of(4, 1, BL=16, BR=16, BK=16),
    ),
}
