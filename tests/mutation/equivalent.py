"""Changes that no test can notice, each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "data/ragged.py drawn_spans: kept = totals > shared -> kept = totals >= shared": (
        "a row of as many entries as are shared has no window either way"
    ),
    "data/ragged.py left_padded: sliding = torch.nn.functional.pad(items, (width, 0)).unfold(0, width, 1) -> "
    "sliding = torch.nn.functional.pad(items, (width, 1)).unfold(0, width, 1)": "a window more, which no row takes",
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
    "losses/tiles.py rows_per_chunk: return max(1, min(rows, _CHUNK_BYTES // (v * 4))) if eager and device.type == "
    "'cpu' else rows -> return max(2, min(rows, _CHUNK_BYTES // (v * 4))) if eager and device.type == 'cpu' "
    "else rows": ("how many rows are worked on at a time; slices of one tile may reach beyond its end"),
    "losses/tiles.py rows_per_tile: def rows_per_tile(wanted: int | None, t: int, row_bytes: int, device: "
    "torch.device, "
    "large: int=0) -> int: -> def rows_per_tile(wanted: int | None, t: int, row_bytes: int, device: torch.device, "
    "large: int=1) -> int:": "a byte beside 512 MiB, and on a CPU not read",
    "losses/peers.py Peers.compiles: return self.pairs.spread is None -> return None": (
        "which of two forms of the same tile runs; the tests that compile are slow ones"
    ),
    "losses/tiles.py walk: stride = v if device.type == 'cpu' else -(-v // _ALIGNED) * _ALIGNED -> "
    "stride = v if device.type == 'cpu' else -(-v * _ALIGNED) * _ALIGNED": (
        "on an accelerator, where rows stand further apart: memory and time; tests/device looks at its products"
    ),
    "training/folder.py locked: path.unlink(missing_ok=True) -> pass": (
        "on Windows alone; its test loads the file from the disk, where nothing is changed"
    ),
    "training/gradients.py clip_members_: each = [norms.new_zeros(rows.n).index_copy(0, at, norms) for norms, at in "
    "zip(each, own, strict=True)] -> each = [norms.new_zeros(rows.n).index_copy(0, at, norms) for norms, at in "
    "zip(each, own, strict=False)]": "both lists have an entry per gradient",
    "training/gradients.py clip_members_: if norms.device.type == 'cpu' and bool((scale == 1).all()): -> "
    "if norms.device.type != 'cpu' and bool((scale == 1).all()):": "a product with 1 changes nothing: time alone",
    "training/log.py RunLog.start_bar: self._bar = tqdm(total=total, initial=done, desc=text, leave=False, "
    "mininterval=1.0) -> self._bar = tqdm(total=total, initial=done, desc=text, leave=False, mininterval=3.0)": (
        "how often the bar is drawn"
    ),
    "stacking/trial.py _deviation: least = max(1e-06, _LEAST * max(sizes, default=0.0) if len(sizes) > 1 else 0.0) -> "
    "least = max(1e-06, _LEAST * max(sizes, default=0.0) if len(sizes) >= 1 else 0.0)": (
        "a single tensor is larger than a share of itself"
    ),
    "stacking/tree.py stack_into: buffers = [dict(m.named_buffers(remove_duplicate=False)) for m in members] -> "
    "buffers = [dict(m.named_buffers(remove_duplicate=True)) for m in members]": (
        "a buffer is looked up under its first name alone, which both lists have"
    ),
    "stacking/mixed.py MixedModule.describe: for group, own in zip(self.groups, self._numbers, strict=True): -> "
    "for group, own in zip(self.groups, self._numbers, strict=False):": "both lists have an entry per group",
    "objectives/positions.py newest_columns: return ids if max_len is None or ids.shape[1] <= max_len else "
    "ids[:, -max_len:] -> return ids if max_len is None or ids.shape[1] < max_len else ids[:, -max_len:]": (
        "the newest max_len columns of as many are all of them"
    ),
}
