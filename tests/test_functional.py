"""Equations over leading axes, against each slice by itself."""

from __future__ import annotations

import torch

from ensemble_kd.functional import kl_divergence


def test_the_divergence_of_stacked_pairs_is_that_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    together = kl_divergence(teacher, student, temperature=0.7)
    assert together.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = kl_divergence(teacher[i, j], student[i, j], temperature=0.7)
            torch.testing.assert_close(together[i, j], alone)
