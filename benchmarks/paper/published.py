"""Test NDCG@10 as the paper prints it, by data and row; figures have no printed numbers."""

from __future__ import annotations

from collections.abc import Mapping

Numbers = Mapping[str, Mapping[str, float]]

# Table 1: one network, and two trained independently.
TABLE_1: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "Beauty": {"GRU4Rec": (0.0175, 0.0199), "Caser": (0.0212, 0.0247), "SASRec": (0.0284, 0.0365)},
    "ML-1M": {"GRU4Rec": (0.0649, 0.0720), "Caser": (0.0734, 0.0786), "SASRec": (0.0918, 0.1032)},
}
# Table 3, the columns that we run.
TABLE_3: Numbers = {
    "Beauty": {"GRU4Rec": 0.0175, "Caser": 0.0212, "SASRec": 0.0284, "BERT4Rec": 0.0307, "EMKD": 0.0594},
    "ML-1M": {"GRU4Rec": 0.0649, "Caser": 0.0734, "SASRec": 0.0918, "BERT4Rec": 0.1097, "EMKD": 0.1915},
}
TABLE_4: Numbers = {
    "Beauty": {
        "(1) EMKD (3)": 0.0594,
        "(2) without ICL": 0.0529,
        "(3) without CCL": 0.0552,
        "(4) without KD": 0.0537,
        "(5) independent": 0.0452,
        "(6) one network": 0.0363,
        "(7) EMKD (2)": 0.0536,
        "(8) EMKD (4)": 0.0591,
        "(9) without AP": 0.0578,
    },
    "ML-1M": {
        "(1) EMKD (3)": 0.1915,
        "(2) without ICL": 0.1679,
        "(3) without CCL": 0.1807,
        "(4) without KD": 0.1758,
        "(5) independent": 0.1476,
        "(6) one network": 0.1183,
        "(7) EMKD (2)": 0.1792,
        "(8) EMKD (4)": 0.1930,
        "(9) without AP": 0.1831,
    },
}
# Table 5: layers of one network, d = 256.
TABLE_5: Numbers = {
    "Beauty": {
        "SASRec, 2 layers": 0.0284,
        "SASRec, 4 layers": 0.0301,
        "SASRec, 6 layers": 0.0298,
        "BERT4Rec, 2 layers": 0.0307,
        "BERT4Rec, 4 layers": 0.0328,
        "BERT4Rec, 6 layers": 0.0332,
    },
    "ML-1M": {
        "SASRec, 2 layers": 0.0918,
        "SASRec, 4 layers": 0.0896,
        "SASRec, 6 layers": 0.0857,
        "BERT4Rec, 2 layers": 0.1097,
        "BERT4Rec, 4 layers": 0.1113,
        "BERT4Rec, 6 layers": 0.1100,
    },
}
