"""Drop-in ``torch.optim`` classes for matrix-aware and memory-lean methods."""

from ..kernels import polar_report
from .altlora import AltLoRA
from .aro import ARO
from .auon import AuON
from .base import StackedOptimizer
from .dctadamw import DCTAdamW
from .fira import Fira
from .frugal import FRUGAL
from .galore import GaLore
from .lora import lora_param_groups, pairs_to_groups
from .memory import MemoryReport, memory_report
from .moments import heavy_tail_schedule
from .muon import Muon
from .roles import Assignment, classify
from .rule import (
    Blocks,
    Dense,
    Direction,
    Factored,
    Member,
    Place,
    Rule,
    Scaled,
    Selected,
    Slot,
)
from .trion import Trion

__all__ = [
    "ARO",
    "FRUGAL",
    "AltLoRA",
    "Assignment",
    "AuON",
    "Blocks",
    "DCTAdamW",
    "Dense",
    "Direction",
    "Factored",
    "Fira",
    "GaLore",
    "Member",
    "MemoryReport",
    "Muon",
    "Place",
    "Rule",
    "Scaled",
    "Selected",
    "Slot",
    "StackedOptimizer",
    "Trion",
    "classify",
    "heavy_tail_schedule",
    "lora_param_groups",
    "memory_report",
    "pairs_to_groups",
    "polar_report",
]
