"""Several processes that train one model: launch, place, collectives, states, rows by rows, and shards of weights."""

from ensemble_kd.distributed.collectives import (
    agree,
    gather_members,
    gather_objects,
    gather_rows,
    mean_members,
    reduced,
    same_draws,
    shares,
    sum_members_,
    sum_rows,
)
from ensemble_kd.distributed.data_parallel import SpreadLoss
from ensemble_kd.distributed.launch import process_group, restarted
from ensemble_kd.distributed.place import Place
from ensemble_kd.distributed.shards import gathered, shard
from ensemble_kd.distributed.states import (
    beside,
    gather_states,
    own_moments,
    own_shards,
    own_states,
    whole,
)

__all__ = [
    "Place",
    "SpreadLoss",
    "agree",
    "beside",
    "gather_members",
    "gather_objects",
    "gather_rows",
    "gather_states",
    "gathered",
    "mean_members",
    "own_moments",
    "own_shards",
    "own_states",
    "process_group",
    "reduced",
    "restarted",
    "same_draws",
    "shard",
    "shares",
    "sum_members_",
    "sum_rows",
    "whole",
]
