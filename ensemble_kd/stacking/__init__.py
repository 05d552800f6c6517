"""n modules as one, with the parameters of those of one architecture stacked along a leading member axis."""

from ensemble_kd.stacking.backends import Backend
from ensemble_kd.stacking.build import (
    Factories,
    build_members,
    check_members,
    check_modules,
    duplicate,
    factories_of,
)
from ensemble_kd.stacking.heads import Heads
from ensemble_kd.stacking.lookups import item_rows, share_table, sparse_lookups, take_rows
from ensemble_kd.stacking.mixed import MixedModule, form_of, stack
from ensemble_kd.stacking.stack import StackedModule

__all__ = [
    "Backend",
    "Factories",
    "Heads",
    "MixedModule",
    "StackedModule",
    "build_members",
    "check_members",
    "check_modules",
    "duplicate",
    "factories_of",
    "form_of",
    "item_rows",
    "share_table",
    "sparse_lookups",
    "stack",
    "take_rows",
]
