"""Four published sequence encoders under one contract: item_ids (b, l), padded on the left -> hidden (b, l, d)."""

from ensemble_kd.encoders.bert4rec import BERT4Rec

__all__ = ["BERT4Rec"]
