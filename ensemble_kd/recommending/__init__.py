"""Recommendations under the source's own ids: of some users, of histories of names, and of all users into a file.

A room of its own, since it brings together what ``EnsembleKD`` need not know: data, names, and files.
"""

from ensemble_kd.recommending.answers import recommend, recommend_for
from ensemble_kd.recommending.file import recommend_all
from ensemble_kd.recommending.named import NamedRecommendations

__all__ = ["NamedRecommendations", "recommend", "recommend_all", "recommend_for"]
