"""Sequences of users' items, in memory or on disk: readers, what is held out, windows, batches, a synthetic default."""

from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.batches import BatchPlan
from ensemble_kd.data.blocks import BlockPlan
from ensemble_kd.data.columns import Table
from ensemble_kd.data.holdout import AtTime, Cuts, Holdout
from ensemble_kd.data.mapped import AnySequences, MappedSequences, MappedWindows
from ensemble_kd.data.ragged import Prefixes, left_padded
from ensemble_kd.data.readers.amazon import read_amazon
from ensemble_kd.data.readers.movielens import read_movielens
from ensemble_kd.data.readers.recbole import read_recbole
from ensemble_kd.data.readers.text import read_text
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.data.splits import Split
from ensemble_kd.data.synthetic import synthetic
from ensemble_kd.data.vocabulary import Unknown, Vocabulary
from ensemble_kd.data.writing import write_sequences

__all__ = [
    "AnySequences",
    "AtTime",
    "BatchPlan",
    "BlockPlan",
    "Cuts",
    "Holdout",
    "ItemAttributes",
    "MappedSequences",
    "MappedWindows",
    "Prefixes",
    "SequenceData",
    "Split",
    "Table",
    "Unknown",
    "Vocabulary",
    "left_padded",
    "read_amazon",
    "read_movielens",
    "read_recbole",
    "read_text",
    "synthetic",
    "write_sequences",
]
