"""Changes that no test can notice, each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "training/gradients.py _merge_in_place: return torch.sparse_coo_tensor(index[:, order], values, grad.shape, "
    "check_invariants=False) -> return torch.sparse_coo_tensor(index[:, order], values, grad.shape, "
    "check_invariants=True)": "the same tensor, after a check that it passes",
    "serving.py top_items: columns = columns if chosen is None or seen is None else "
    "max(columns, c * seen.shape[1] // 4) "
    "-> columns = columns if chosen is None or seen is None else max(columns, c / seen.shape[1] // 4)": (
        "how many users make a block: memory and time alone"
    ),
    "losses/tiles.py walk: heights = [rows_per_tile(plan.tile_rows, t, len(p) * v * product.itemsize, device, large) "
    "for p in planes] -> heights = [rows_per_tile(plan.tile_rows, t, len(p) * v / product.itemsize, device, large) "
    "for p in planes]": "the size of a tile: time alone",
    "training/folder.py locked: if os.name != 'posix': -> if not os.name != 'posix':": (
        "removes a file twice; the branch is for Windows"
    ),
    "objectives/candidates.py _candidates: begin, end = (slot.clamp(min=0) * others // strata, "
    "(slot + 1).clamp(min=0) * others // strata) -> begin, end = (slot.clamp(min=0) * others // strata, "
    "(slot + 1).clamp(min=1) * others // strata)": "differs in slots below 0 alone, whose ends are not used",
    "stacking/trial.py seconds_of.timed: device.synchronize() -> pass": "a wait for an accelerator",
    "losses/tiles.py walk: heights = [rows_per_tile(plan.tile_rows, t, len(p) * v * product.itemsize, device, large) "
    "for p in planes] -> heights = [rows_per_tile(plan.tile_rows, t, len(p) / v * product.itemsize, device, large) "
    "for p in planes]": "the size of a tile: time alone",
    "evaluation/ranking.py evaluate_popularity: for users in totals.argsort(stable=True).split(512): -> "
    "for users in totals.argsort(stable=False).split(512):": "the order in which users are ranked, each by itself",
    "training/folder.py _lock: file.seek(1 << 30) -> file.seek(1 << 31)": "which byte is locked on Windows",
    "serving.py top_items: columns = columns if chosen is None or seen is None else "
    "max(columns, c * seen.shape[1] // 4) -> columns = columns if chosen is not None or seen is None else "
    "max(columns, c * seen.shape[1] // 4)": "how many users make a block: memory and time alone",
    "losses/compiled.py compiled_tile: pays = size >= _COMPILE_FROM and (not _status.startswith('eager')) -> "
    "pays = size >= _COMPILE_FROM and _status.startswith('eager')": (
        "which of two forms of the same tile runs; the tests that compile are slow ones"
    ),
    "export/weights.py _device: torch.empty(0, device=found) -> torch.empty(1, device=found)": (
        "a device takes one element as it takes none"
    ),
}
