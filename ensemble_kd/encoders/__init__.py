"""Four published sequence encoders under one contract: item_ids (b, l), padded on the left -> hidden (b, l, d)."""

from ensemble_kd.encoders.adapters import from_huggingface, right_padded
from ensemble_kd.encoders.bert4rec import BERT4Rec
from ensemble_kd.encoders.caser import Caser
from ensemble_kd.encoders.gru4rec import GRU4Rec
from ensemble_kd.encoders.sasrec import SASRec

__all__ = ["BERT4Rec", "Caser", "GRU4Rec", "SASRec", "from_huggingface", "right_padded"]
