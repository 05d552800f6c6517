"""Several processes that train one model."""

from ensemble_kd.distributed.place import Ranks, process_group, restarted

__all__ = ["Ranks", "process_group", "restarted"]
