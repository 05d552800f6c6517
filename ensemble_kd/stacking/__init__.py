"""n modules of one architecture as one, with their parameters stacked along a leading member axis."""

from ensemble_kd.stacking.backends import Backend
from ensemble_kd.stacking.build import build_members, check_members, duplicate
from ensemble_kd.stacking.heads import Heads
from ensemble_kd.stacking.lookups import inner_rows, share_table, sparse_lookups, take_rows
from ensemble_kd.stacking.stack import StackedModule

__all__ = [
    "Backend",
    "Heads",
    "StackedModule",
    "build_members",
    "check_members",
    "duplicate",
    "inner_rows",
    "share_table",
    "sparse_lookups",
    "take_rows",
]
