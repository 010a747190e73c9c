"""The entropy coder alone: bytes of each mode, ideal code lengths, times, and what the encoder's effort saves.

images -> raw latents (the network runs once) -> indices -> raw, static, context -> rows, plain JSON values
          VQ: codebook indices -> fixed, static, adaptive, context -> one row for each index map
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codec import Codec, effort, images, model_folder, tables
from codec.index_maps import to_grids
from codec.index_tables import IndexMode, IndexTables
from codec.map_tables import of_each_map
from codec.model_folder import ModelFolder, state_maps
from codec.tables import Mode, TableSet

N_TIMED = 24_576  # latents that times are given for: a 512 x 768 image at f8 with 4 channels
_EFFORTS = (1, 9)


def run(
    folder: str | Path, paths: Sequence[Path], qualities: Sequence[int], efforts: Sequence[int] = _EFFORTS
) -> dict[str, Any]:
    """Measure one model's tables on images, each coded as one tile.

    Args:
        folder: of the model, or its name.
        paths: images.
        qualities: 0..100 each; not used of a VQ model, which has its own.
        efforts: levels 1..9 of the encoder's search to measure; the same.

    Returns:
        `model`, `stream_id`, `n_images`, and `rows`, one for each quality, of sums over all images: `raw_bytes`,
        `static_bytes`, `context_bytes`, `chosen_bytes`, the `ideal` code length of each mode in bytes, `ms` of process
        time to encode and decode 24,576 latents in each mode, `mse`, the mean squared error of latents in steps, and
        for each effort level bytes, mse, ms, and `saving`: bytes at the mse of the nearest indices, see `_saving`.
        Of a VQ model a row for each index map, see `_vq_row`, whose `quality` is None.

    Raises:
        ModelError: the model cannot be read.
        ImageError: an image cannot.
    """
    codec = Codec.load(folder)
    model = model_folder.read(codec.folder)
    about = {"model": model.name, "stream_id": model.stream_id, "n_images": len(paths)}
    if model.maps:
        codes = [to_grids(codec.engine.encode_for_coder(images.load(path)), model.maps) for path in paths]
        tables_and_grids = zip(of_each_map(model.index_tables[model.stream_id]), *codes, strict=True)
        rows = [_vq_row(own, [grid[None] for grid in grids]) for own, *grids in tables_and_grids]
        return {**about, **state_maps(model.maps), "rows": rows}
    grids = [codec.latents(images.load(path)) for path in paths]
    rows = [_row(model, grids, quality) for quality in qualities]
    by_mse = sorted((row["mse"], row["ideal_context_bytes"]) for row in rows)
    for row in rows:
        row["effort"] = {str(level): _effort(model, grids, row, level, by_mse) for level in efforts}
    return {**about, "rows": rows}


def _vq_row(index_tables: IndexTables, grids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Measure the modes of the indices of one map, (1, h, w) each: bytes, ideal code length in bytes, ms as in `run`.

    `entropy_bytes` is the order-0 entropy of these images' own indices: what static tables made for them would give.
    """
    n_latents = sum(grid.size for grid in grids)
    counts = np.bincount(np.concatenate([grid.reshape(-1) for grid in grids]))
    p = counts[counts > 0] / n_latents
    row: dict[str, Any] = {"quality": None, "codebook_size": index_tables.codebook_size}
    row |= {"n_latents": n_latents, "ms": {}, "effort": {}}
    row["entropy_bytes"] = float(-(p * np.log2(p)).sum()) * n_latents / 8
    sizes = []
    for mode in IndexMode:
        name = mode.name.lower()
        payloads, encode_s = _timed(partial(_encode_indices, index_tables, grids, mode))
        decoded, decode_s = _timed(partial(_decode_indices, index_tables, payloads, grids, mode))
        assert all(np.array_equal(a, b) for a, b in zip(decoded, grids, strict=True))
        sizes.append([len(payload) for payload in payloads])
        row[f"{name}_bytes"] = sum(sizes[-1])
        row[f"ideal_{name}_bytes"] = sum(index_tables.bits(grid, mode) for grid in grids) / 8
        scale = 1e3 * N_TIMED / n_latents
        row["ms"][name] = {"encode": round(encode_s * scale, 2), "decode": round(decode_s * scale, 2)}
    row["chosen_bytes"] = int(np.min(sizes, axis=0).sum())
    return row


def _encode_indices(index_tables: IndexTables, grids: Sequence[np.ndarray], mode: IndexMode) -> list[bytes]:
    return [index_tables.encode(grid, [mode])[1] for grid in grids]


def _decode_indices(
    index_tables: IndexTables, payloads: Sequence[bytes], grids: Sequence[np.ndarray], mode: IndexMode
) -> list[np.ndarray]:
    return [
        index_tables.decode(mode, payload, (grid.shape[1], grid.shape[2]))
        for payload, grid in zip(payloads, grids, strict=True)
    ]


def _row(model: ModelFolder, grids: Sequence[np.ndarray], quality: int) -> dict[str, Any]:
    """Measure one quality without effort."""
    table_set = model.table_sets[model.stream_id]
    indices = [tables.to_indices(z, model.mean, model.step, quality) for z in grids]
    n_latents = sum(found.size for found in indices)
    row: dict[str, Any] = {"quality": quality, "n_latents": n_latents, "chosen_bytes": 0, "ms": {}}
    sizes = []
    for mode in Mode:
        name = mode.name.lower()
        payloads, encode_s = _timed(partial(_encode_all, table_set, indices, quality, mode))
        decoded, decode_s = _timed(partial(_decode_all, table_set, payloads, indices, quality, mode))
        assert all(np.array_equal(a, b) for a, b in zip(decoded, indices, strict=True))
        sizes.append([len(payload) for payload in payloads])
        row[f"{name}_bytes"] = sum(sizes[-1])
        row[f"ideal_{name}_bytes"] = sum(table_set.bits(i, quality, mode) for i in indices) / 8
        scale = 1e3 * N_TIMED / n_latents
        row["ms"][name] = {"encode": round(encode_s * scale, 2), "decode": round(decode_s * scale, 2)}
    row["chosen_bytes"] = int(np.min(sizes, axis=0).sum())
    row["mse"] = _mse(model, grids, indices, quality)
    return row


def _encode_all(table_set: TableSet, indices: Sequence[np.ndarray], quality: int, mode: Mode) -> list[bytes]:
    return [table_set.encode(found, quality, [mode])[1] for found in indices]


def _decode_all(
    table_set: TableSet, payloads: Sequence[bytes], indices: Sequence[np.ndarray], quality: int, mode: Mode
) -> list[np.ndarray]:
    return [
        table_set.decode(mode, payload, (found.shape[1], found.shape[2]), quality)
        for payload, found in zip(payloads, indices, strict=True)
    ]


def _effort(
    model: ModelFolder, grids: Sequence[np.ndarray], row: dict[str, Any], level: int, by_mse: list[tuple[float, float]]
) -> dict[str, Any]:
    """Measure one level of effort at the quality of a row."""
    table_set, quality = model.table_sets[model.stream_id], row["quality"]
    indices, search_s = _timed(
        lambda: [effort.search(z, model.mean, model.step, table_set, quality, level) for z in grids]
    )
    size = sum(table_set.bits(i, quality, Mode.CONTEXT) for i in indices) / 8
    mse = _mse(model, grids, indices, quality)
    return {
        "ideal_context_bytes": size,
        "mse": mse,
        "ms": round(search_s * 1e3 * N_TIMED / row["n_latents"], 2),
        "saving": _saving(size, mse, by_mse),
    }


def _saving(size_bytes: float, mse: float, by_mse: list[tuple[float, float]]) -> float | None:
    """Return the share of bytes saved at equal error, against plain rounding at the qualities measured.

    Their sizes are interpolated, logarithms over logarithms; None where the error lies outside all of them.
    """
    errors, sizes = np.array(by_mse).T
    if not errors[0] <= mse <= errors[-1]:
        return None
    equal = float(np.exp(np.interp(np.log(mse), np.log(errors), np.log(sizes))))
    return round(1 - size_bytes / equal, 4)


def _mse(model: ModelFolder, grids: Sequence[np.ndarray], indices: Sequence[np.ndarray], quality: int) -> float:
    """Return the mean squared error of the reconstructed latents, in squared steps of q = 0."""
    table_set = model.table_sets[model.stream_id]
    step = model.step[:, None, None]
    total = sum(
        float((((table_set.dequantise(i, quality, model.mean, model.step) - z) / step) ** 2).sum())
        for z, i in zip(grids, indices, strict=True)
    )
    return total / sum(z.size for z in grids)


def _timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float]:
    """Return what some work returned and the process time it took, in seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start
