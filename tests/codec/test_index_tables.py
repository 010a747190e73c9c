"""Integer tables of codebook indices: every mode reads back what it coded, near its ideal, as FORMAT.md says."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec import bitstream, index_tables, model_folder, rangecoder
from codec.errors import FormatError, ModelError
from codec.index_tables import IndexMode, IndexTables
from codec.map_tables import MapTables

GOLDEN = Path(__file__).parents[1] / "golden"


def smooth(k: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Return (h, w) indices in which neighbours are alike, as in a picture."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(h + 8, w + 8))
    for axis in (0, 1):
        z = sum(np.roll(z, shift, axis) for shift in range(-2, 3)) / np.sqrt(5)
    ranks = 0.5 * (1 + np.tanh(0.5 * z[4 : 4 + h, 4 : 4 + w] + rng.normal()))  # each picture has its own codes
    indices: np.ndarray = np.minimum((ranks * k).astype(np.int32), k - 1)
    return indices


@lru_cache(maxsize=4)
def fitted(k: int, n_grids: int = 4, side: int = 32) -> IndexTables:
    line = np.linspace(-1, 1, k)[:, None]
    codebook = np.concatenate([line, line**2, 0 * line], axis=1)
    return index_tables.fit([smooth(k, side, side, seed=n) for n in range(n_grids)], codebook)


@pytest.mark.parametrize("k", [2, 3, 5, 256, 1000, 16384, 65536, pytest.param(1 << 18, marks=pytest.mark.slow)])
def test_every_mode_reads_back_what_it_coded_and_comes_near_its_ideal(k: int) -> None:
    tables = fitted(k, 2)
    rng = np.random.default_rng(k)
    grids = [
        smooth(k, 13, 21, seed=99),
        rng.integers(0, k, (13, 8)),
        np.array([[k - 1]]),
        np.arange(60).reshape(2, 30) % k,
    ]
    for grid in grids:
        indices = grid.astype(np.int32)[None]
        sizes = []
        for mode in IndexMode:
            found, payload = tables.encode(indices, [mode])
            assert found is mode
            sizes.append(len(payload))
            np.testing.assert_array_equal(tables.decode(mode, payload, grid.shape), indices)
            ideal = tables.bits(indices, mode) / 8
            assert ideal - 1 <= len(payload) <= 1.0005 * ideal + 4  # the coder ends on whole bytes
        assert len(tables.encode(indices)[1]) == min(sizes)


def test_what_each_mode_knows_saves_bytes() -> None:
    tables = fitted(256)
    sizes = dict.fromkeys(IndexMode, 0)
    for seed in range(20, 23):
        indices = smooth(256, 40, 40, seed)[None]
        for mode in IndexMode:
            sizes[mode] += len(tables.encode(indices, [mode])[1])
    fixed, static, adaptive, context = (sizes[mode] for mode in IndexMode)
    assert fixed == 3 * 1600
    assert context < 0.9 * adaptive
    assert adaptive < 0.99 * static


def test_static_mode_costs_what_the_prior_says() -> None:
    tables = fitted(1000)
    indices = smooth(1000, 40, 40, 30)[None]
    prior = tables.prior[tables.places[indices]] / tables.prior.sum()
    assert tables.bits(indices, IndexMode.STATIC) == pytest.approx(-np.log2(prior).sum(), rel=0.002)
    assert tables.bits(indices, IndexMode.FIXED) == 1600 * 10


def test_indices_that_no_table_expects_cost_no_more_than_fixed_length() -> None:
    tables = fitted(256)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32)).astype(np.int32)
    mode, payload = tables.encode(noise)
    assert (mode, len(payload)) == (IndexMode.FIXED, 1024)


def test_the_tables_survive_their_largest_numbers() -> None:
    """No sum goes beyond 63 bits, whatever a damaged or foreign folder holds."""
    tables = fitted(256)
    k = tables.codebook_size
    prior = np.full(k, 1 + (1 << 25) // k - 1, np.int32)
    prior[0] += (1 << 25) - int(prior.sum())
    for value in (127, -128):
        extreme = replace(
            tables,
            prior=prior,
            group_context=np.full_like(tables.group_context, value),
            member_context=np.full_like(tables.member_context, value),
            repeats=np.full(6, 32767, np.int16),
            units=np.full((2, 2), 1 << 24, np.int32),
        )
        for grid in (np.zeros((64, 64), np.int32), smooth(256, 40, 40)):
            for mode in (IndexMode.ADAPTIVE, IndexMode.CONTEXT):
                payload = extreme.encode(grid[None], [mode])[1]
                np.testing.assert_array_equal(extreme.decode(mode, payload, grid.shape)[0], grid)


def test_tensors_make_the_same_tables_and_each_of_them_counts_for_the_stream() -> None:
    tables = fitted(256)
    again = IndexTables.from_tensors(tables.tensors())
    assert again.digest() == tables.digest()
    for name, tensor in tables.tensors().items():
        changed = tensor.copy()
        if name == "codes":
            changed[[0, 1]] = changed[[1, 0]]
        else:
            changed.flat[0] += 1
        assert IndexTables.from_tensors(tables.tensors() | {name: changed}).digest() != tables.digest(), name


DAMAGE: dict[str, Callable[[IndexTables], dict[str, Any]]] = {
    "a code twice": lambda t: {"codes": np.zeros_like(t.codes)},
    "no prior": lambda t: {"prior": np.zeros_like(t.prior)},
    "too much prior": lambda t: {"prior": np.full_like(t.prior, 1 << 20)},
    "another K": lambda t: {"prior": t.prior[1:]},
    "another number of neighbours": lambda t: {"group_context": t.group_context[1:]},
    "no groups": lambda t: {"group_context": t.group_context[:, :, :0]},
    "groups of too many": lambda t: {"member_context": t.member_context[:, :, 1:]},
    "no repeats": lambda t: {"repeats": t.repeats[:0]},
    "a unit below 0": lambda t: {"units": -1 - t.units},
    "few powers": lambda t: {"powers": t.powers[1:]},
    "a power of 0": lambda t: {"powers": 0 * t.powers},
    "a power too large": lambda t: {"powers": 2 * t.powers},
    "another type": lambda t: {"prior": t.prior.astype(np.int64)},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tables_are_refused(what: str) -> None:
    tables = fitted(256)
    with pytest.raises(ModelError, match="index tables are damaged"):
        IndexTables.from_tensors(tables.tensors() | DAMAGE[what](tables))


def test_what_cannot_be_fitted_is_refused() -> None:
    grid, codebook = np.zeros((4, 4), np.int32), np.zeros((4, 2))
    for message, grids, vectors in (
        ("a codebook of 1 vectors", [grid], codebook[:1]),
        ("an index beyond a codebook of 4", [grid + 4], codebook),
        ("an index beyond a codebook of 4", [grid - 1], codebook),
        ("no codebook indices", [], codebook),
        ("no codebook indices", [grid[:0]], codebook),
        ("the codebook is not finite", [grid], np.full((4, 2), np.nan)),
    ):
        with pytest.raises(ValueError, match=message):
            index_tables.fit(grids, vectors)


def test_tables_fit_what_there_is_of_little_or_of_one_kind() -> None:
    """A single index, a single code in a large grid, a codebook larger than the tokens: coded all the same."""
    codebook = np.random.default_rng(0).normal(size=(300, 3))
    for grids in (
        [np.array([[7]])],
        [np.full((20, 30), 7)],
        [np.arange(20).reshape(4, 5)],
        [np.zeros((1, 50), int)] * 3,
    ):
        tables = index_tables.fit(grids, codebook)
        for grid in (*grids, np.arange(300).reshape(15, 20)):
            indices = grid.astype(np.int32)[None]
            for mode in IndexMode:
                np.testing.assert_array_equal(
                    tables.decode(mode, tables.encode(indices, [mode])[1], grid.shape), indices
                )


def test_fits_are_repeatable() -> None:
    grids = [smooth(64, 24, 24, n) for n in range(3)]
    codebook = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
    assert index_tables.fit(grids, codebook).digest() == index_tables.fit(grids, codebook).digest()


def test_damaged_payloads_are_refused() -> None:
    tables = fitted(5)
    with pytest.raises(FormatError, match="entropy mode 2 in a file of codebook indices"):
        tables.decode(2, b"", (1, 1))
    with pytest.raises(FormatError, match="3 bytes of packed indices, expected 2"):
        tables.decode(IndexMode.FIXED, b"\0\0\0", (1, 4))
    with pytest.raises(FormatError, match="bits left over"):
        tables.decode(IndexMode.FIXED, b"\0\1", (1, 4))
    with pytest.raises(FormatError, match="beyond a codebook of 5"):
        tables.decode(IndexMode.FIXED, b"\xe0\0", (1, 4))
    for mode in (IndexMode.STATIC, IndexMode.ADAPTIVE, IndexMode.CONTEXT):
        payload = tables.encode(np.zeros((1, 3, 3), np.int32), [mode])[1]
        with pytest.raises(FormatError, match="left over"):
            tables.decode(mode, payload + b"\1" * 9, (3, 3))


def read_by_the_book(tables: IndexTables, mode: int, payload: bytes, h: int, w: int) -> np.ndarray:
    """Read a payload of mode 5, 6 or 7 as FORMAT.md 5.5 tells it, a position at a time, in Python's own integers."""
    k, (_, c, g) = len(tables.codes), tables.group_context.shape
    c2 = tables.member_context.shape[1]
    members = [[p for p in range(k) if p * g // k == n] for n in range(g)]
    unit = [0, 0] if mode == 5 else tables.units[mode - 6].tolist()
    seen, place = [0] * k, {}
    decoder = rangecoder.Decoder(payload)

    def interval(weights: list[int]) -> int:
        total, done, bounds = sum(weights), 0, [0]
        for i, weight in enumerate(weights):
            done += weight
            bounds.append(done * (65536 - len(weights)) // total + i + 1)
        (symbol,) = decoder.symbols([bounds])
        assert symbol == bisect_right(bounds, bounds[symbol]) - 1
        return symbol

    def learned(prior: int, n: int, level: int, n_seen: int) -> int:
        if not unit[level]:
            return prior
        total = int(tables.prior.sum()) + unit[level] * n_seen
        return max((prior + unit[level] * n) >> max(0, total.bit_length() - 26), 1)

    def power(x: int) -> int:
        return int(tables.powers[min(max(x, -160), 160) + 160])

    for front in range(w + 2 * (h - 1)):
        here = [(front - 2 * y, y) for y in range(h) if 0 <= front - 2 * y < w]
        before, n_seen = list(seen), len(place)
        near = {}
        for x, y in here:
            west, north = place.get((x - 1, y)), place.get((x, y - 1))
            west, north = (north if west is None else west), (west if north is None else north)
            others = [place.get(at) for at in ((x - 1, y - 1), (x + 1, y - 1), (x - 2, y), (x, y - 2))]
            ways = (north, north, west, north)
            near[x, y] = [west, north, *(way if at is None else at for at, way in zip(others, ways, strict=True))]
        groups = []
        for x, y in here:
            weights = []
            for n in range(g):
                prior, count = (sum(int(a[p]) for p in members[n]) for a in (tables.prior, before))
                said = sum(
                    int(tables.group_context[j, p * c // k, n]) for j, p in enumerate(near[x, y]) if p is not None
                )
                weights.append(learned(prior, count, 0, n_seen) * (power(said) if mode == 7 else 1))
            groups.append(interval(weights))
        for (x, y), n in zip(here, groups, strict=True):
            weights = []
            for p in members[n]:
                said = 0
                for j, q in enumerate(near[x, y]):
                    if q is not None:
                        said += int(tables.member_context[j, q * c2 // k, p]) + (
                            int(tables.repeats[j]) if p == q else 0
                        )
                weights.append(learned(int(tables.prior[p]), before[p], 1, n_seen) * (power(said) if mode == 7 else 1))
            place[x, y] = members[n][interval(weights) if max(map(len, members)) > 1 else 0]
            seen[place[x, y]] += 1
    decoder.finish()
    return np.array([[tables.codes[place[x, y]] for x in range(w)] for y in range(h)])


@pytest.mark.parametrize("name", ["static", "adaptive", "context", "every-code"])
def test_a_reader_written_after_the_format_reads_the_golden_files(name: str) -> None:
    folder = model_folder.read(GOLDEN / "vq-model")
    (tile,) = bitstream.unpack((GOLDEN / f"vq-{name}.lcx").read_bytes()).tiles
    expected = np.load(GOLDEN / f"vq-{name}.npy")
    tables = folder.index_tables[folder.stream_id]
    assert isinstance(tables, IndexTables)
    np.testing.assert_array_equal(read_by_the_book(tables, tile.mode, tile.payload, 11, 17), expected[0])


def test_a_reader_written_after_the_format_reads_a_golden_file_of_two_index_maps() -> None:
    """Its first tile, of 4 x 4 latents: FORMAT.md 5.6, and the planes of section 1."""
    folder = model_folder.read(GOLDEN / "maps-model")
    payload = bitstream.unpack((GOLDEN / "maps-tiles.lcx").read_bytes()).tiles[0].payload
    expected = np.load(GOLDEN / "maps-tiles.npy")[:, :4, :4]
    stream = folder.index_tables[folder.stream_id]
    assert isinstance(stream, MapTables)
    plane = 0
    for scale, tables in zip((1, 2), stream.tables, strict=True):
        mode, size = payload[0], payload[1]  # no length here takes a second byte
        body, payload = payload[2 : 2 + size], payload[2 + size :]
        grid = read_by_the_book(tables, mode, body, 4 * scale, 4 * scale)
        for y, x in np.ndindex(grid.shape):
            where = (plane + y % scale * scale + x % scale, y // scale, x // scale)
            assert grid[y, x] == expected[where]
        plane += scale**2
    assert payload == b""
