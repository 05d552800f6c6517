"""Readers of files: the field's text layout, RecBole, MovieLens, Amazon."""

from ensemble_kd.data.readers.amazon import read_amazon
from ensemble_kd.data.readers.movielens import read_movielens
from ensemble_kd.data.readers.recbole import read_recbole
from ensemble_kd.data.readers.text import read_text

__all__ = ["read_amazon", "read_movielens", "read_recbole", "read_text"]
