"""What vendors state of their devices, dense: the bounds that figures are held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """TF/s of bfloat16 and float16 products, of TF32 ones, of other float32 work, and TB/s."""

    half: float
    single: float
    other: float
    memory: float


PEAKS = {
    "A100": Peaks(312, 156, 19.5, 2.0),
    "H100": Peaks(989, 495, 67, 3.35),
    "H200": Peaks(989, 495, 67, 4.8),
    "B200": Peaks(2250, 1125, 80, 8.0),
    "MI300X": Peaks(1307, 654, 163, 5.3),
}
"""By a part of the device's name."""
