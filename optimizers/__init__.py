"""Drop-in ``torch.optim`` classes for matrix-aware and memory-lean methods."""

from ..kernels import polar_report
from .base import StackedOptimizer
from .fira import Fira
from .galore import GaLore
from .muon import Muon
from .roles import Assignment, classify
from .rule import Blocks, Dense, Direction, Factored, Member, Rule, Scaled, Selected, Slot

__all__ = [
    "Assignment",
    "Blocks",
    "Dense",
    "Direction",
    "Factored",
    "Fira",
    "GaLore",
    "Member",
    "Muon",
    "Rule",
    "Scaled",
    "Selected",
    "Slot",
    "StackedOptimizer",
    "classify",
    "polar_report",
]
