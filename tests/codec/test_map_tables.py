"""Several index maps in one tile: every map reads back what it coded, and damage is an error of the format."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from codec import bitstream, map_tables, model_folder
from codec.bitstream import MAPS
from codec.coding import Coder, Settings
from codec.errors import FormatError, ModelError
from codec.index_maps import IndexMap, planes, to_grids, to_planes
from codec.index_tables import IndexMode
from codec.map_tables import MapTables
from tests.codec.test_index_tables import fitted, smooth

INFO = {"name": "two", "family": "vq", "f": 16, "latent_channels": 15, "decoder_id": "0123456789abcdef"}


def two(*sizes: int) -> tuple[IndexMap, ...]:
    return tuple(IndexMap(k, 2**n) for n, k in enumerate(sizes))


@lru_cache(maxsize=4)
def tables_of(*sizes: int) -> MapTables:
    return MapTables(two(*sizes), tuple(fitted(k, 2, 24) for k in sizes))


def indices_of(tables: MapTables, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Return (C, h, w) int32 indices, neighbours alike within each map."""
    grids = [smooth(each.codebook_size, h * each.scale, w * each.scale, seed) for each in tables.maps]
    return to_planes(grids)


@pytest.mark.parametrize("sizes", [(20, 300), (300, 5), (5, 20, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (4, 5)])
def test_each_map_is_coded_in_its_own_smallest_mode_and_read_back(
    sizes: tuple[int, ...], shape: tuple[int, int]
) -> None:
    tables = tables_of(*sizes)
    indices = indices_of(tables, *shape)
    assert len(indices) == planes(tables.maps) == (5 if len(sizes) == 2 else 21)
    mode, payload = tables.encode(indices)
    assert mode == MAPS
    found = tables.decode(mode, payload, shape)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, indices)
    grids = to_grids(indices, tables.maps)
    expected = [own.encode(grid[None]) for own, grid in zip(tables.tables, grids, strict=True)]
    assert list(map_tables.split(payload)) == expected
    for only in IndexMode:
        _, larger = tables.encode(indices, [only])
        assert [its for its, _ in map_tables.split(larger)] == [only] * len(sizes)
        assert len(larger) >= len(payload)
        np.testing.assert_array_equal(tables.decode(MAPS, larger, shape), indices)


def test_every_truncation_is_refused_and_every_flipped_bit_is_refused_or_reads_indices() -> None:
    tables = tables_of(20, 300)
    indices = indices_of(tables, 2, 3)
    for mode in (IndexMode.FIXED, IndexMode.CONTEXT):
        payload = tables.encode(indices, [mode])[1]
        for end in range(len(payload)):
            with pytest.raises(FormatError):
                tables.decode(MAPS, payload[:end], (2, 3))
        for n in range(8 * len(payload)):
            data = bytearray(payload)
            data[n // 8] ^= 1 << n % 8
            try:
                found = tables.decode(MAPS, bytes(data), (2, 3))
            except FormatError:
                continue
            for each, grid in zip(tables.maps, to_grids(found, tables.maps), strict=True):
                assert 0 <= grid.min() <= grid.max() < each.codebook_size


def test_payloads_that_no_encoder_writes_are_refused_in_words() -> None:
    tables = tables_of(20, 300)
    payload = tables.encode(indices_of(tables, 2, 3))[1]
    first = next(iter(map_tables.split(payload)))[1]
    for data, mode, message in (
        (payload, IndexMode.CONTEXT, "a tile of entropy mode 7 in a file of 2 index maps"),
        (payload, 0, "a tile of entropy mode 0 in a file of 2 index maps"),
        (bytes([9]) + payload[1:], MAPS, "an index map of entropy mode 9"),
        (bytes([MAPS]) + payload[1:], MAPS, "an index map of entropy mode 8"),
        (payload[:1] + b"\xff\x7f" + payload[2:], MAPS, r"needs \d+ bytes more"),
        (payload[:1] + b"\x80\x00" + payload[2:], MAPS, "no number in its shortest form"),
        (payload[:1], MAPS, "within the length of an index map"),
        (payload + b"\x04\x00", MAPS, "3 index maps, expected 2"),
        (payload[: 2 + len(first)], MAPS, "1 index maps, expected 2"),
        (b"", MAPS, "0 index maps, expected 2"),
        (b"\x04\x00" * 1000, MAPS, "more than 8 index maps"),
        (tables_of(300, 20).encode(indices_of(tables_of(300, 20), 2, 3), [IndexMode.FIXED])[1], MAPS, "damaged"),
    ):
        with pytest.raises(FormatError, match=message):
            tables.decode(mode, data, (2, 3))


def test_a_tile_of_more_indices_than_a_reader_must_bear_is_neither_written_nor_read() -> None:
    tables = tables_of(20, 300)
    shape = (1 << 9, (1 << 9) + 1)  # of the fine map four times as many
    for work in (
        lambda: tables.encode(np.zeros((5, *shape), np.int32)),
        lambda: tables.decode(MAPS, b"\x04\x00\x04\x00", shape),
    ):
        with pytest.raises(FormatError, match="1050624 indices of one map in a tile, expected at most 1048576"):
            work()


def test_every_table_and_scale_counts_for_the_stream() -> None:
    tables = tables_of(20, 300)
    again = MapTables.from_tensors(tables.tensors(), tables.maps)
    assert again.digest() == tables.digest()
    coarse, fine = tables.tables
    other_scale = (tables.maps[0], IndexMap(300, 4))
    for other in (
        MapTables(other_scale, tables.tables),
        MapTables(two(20, 300), (replace(coarse, units=coarse.units + 1), fine)),
        MapTables(two(20, 300), (coarse, replace(fine, units=fine.units + 1))),
        MapTables(two(300, 20), (fine, coarse)),
    ):
        assert other.digest() != tables.digest()
    assert {each.digest() for each in tables.tables}.isdisjoint({tables.digest()})


def test_tables_that_do_not_fit_their_maps_are_refused() -> None:
    tables = tables_of(20, 300)
    coarse, fine = tables.tables
    for maps, own in (
        (two(20), (coarse,)),
        (two(20, 301), (coarse, fine)),
        (two(20, 300, 300), (coarse, fine)),
        ((IndexMap(20, 2), IndexMap(300, 4)), (coarse, fine)),
        ((IndexMap(20, 1), IndexMap(300, 3)), (coarse, fine)),
        ((IndexMap(20, 1),) * 9, (coarse,) * 9),
    ):
        with pytest.raises(ModelError, match="index tables of"):
            MapTables(tuple(maps), own)


def written(path: Path, *tables: MapTables) -> model_folder.ModelFolder:
    path.mkdir()
    return model_folder.write_vq(path, info=INFO, index_tables=tables)


def test_a_folder_holds_the_tables_of_every_map_and_a_refit_adds_more(tmp_path: Path) -> None:
    tables = tables_of(20, 300)
    folder = written(tmp_path / "two", tables)
    assert (folder.maps, list(folder.index_tables)) == (tables.maps, [tables.digest()])
    document = json.loads((tmp_path / "two" / "codec.json").read_text())
    assert document["maps"] == [{"codebook_size": 20, "scale": 1}, {"codebook_size": 300, "scale": 2}]
    assert "codebook_size" not in document
    coarse, fine = tables.tables
    refit = MapTables(tables.maps, (coarse, replace(fine, units=fine.units + 1)))
    folder = model_folder.add_tables(tmp_path / "two", refit)
    assert list(folder.index_tables) == [tables.digest(), refit.digest()]
    assert folder.stream_id == refit.digest()
    with pytest.raises(ValueError, match="already"):
        model_folder.add_tables(tmp_path / "two", refit)
    both = "codebooks of 20 at scale 1, 300 at scale 2"
    with pytest.raises(ModelError, match=f"{both}, the tables are for a codebook of 20"):
        model_folder.add_tables(tmp_path / "two", coarse)
    with pytest.raises(ModelError, match=f"{both}, the tables are for codebooks of 300 at scale 1, 20 at scale 2"):
        model_folder.add_tables(tmp_path / "two", MapTables(two(300, 20), (fine, coarse)))
    for maps in ([{"codebook_size": 20, "scale": 1}], [{"codebook_size": 20, "scale": 1}, {"codebook_size": 9}], 7):
        (tmp_path / "two" / "codec.json").write_text(json.dumps(document | {"maps": maps}))
        with pytest.raises(ModelError, match=str(tmp_path / "two")):
            model_folder.read(tmp_path / "two")


def test_files_of_several_tiles_of_odd_sizes_are_read_whole_in_part_and_salvaged(tmp_path: Path) -> None:
    tables = tables_of(20, 300)
    coder = Coder(written(tmp_path / "two", tables), INFO["decoder_id"])
    indices = indices_of(tables, 9, 6, seed=3)
    coded = coder.code(indices, 16 * 6 - 5, 16 * 9 - 15, Settings(tile=4))
    contents = bitstream.unpack(coded.data)
    assert (contents.header.n_tiles, contents.header.quality, contents.header.grid) == (6, 0, (9, 6))
    assert {tile.mode for tile in contents.tiles} == {MAPS}
    np.testing.assert_array_equal(coder.read(contents), indices)
    part = coder.read(contents, (slice(5, 6), slice(0, 2)))
    np.testing.assert_array_equal(part[:, 4:8, :4], indices[:, 4:8, :4])
    assert not part[:, :4].any()
    first = bitstream.parse_header(coded.data)[1]
    spans = list(bitstream.walk(coded.data, first, len(coded.data) - 4))
    data = bytearray(coded.data)
    data[spans[2].start + 6] ^= 64  # in the payload of the third one's coarse map
    data[spans[3].at + 1] ^= 2  # the length of the next one, which is found all the same
    rescued = coder.rescue(bytes(data))
    assert rescued.lost == ((slice(4, 8), slice(0, 4)),)
    lost = np.zeros((9, 6), bool)
    lost[4:8, :4] = True
    np.testing.assert_array_equal(rescued.z[:, ~lost], indices[:, ~lost])
    commonest = [own.commonest for own in tables.tables]
    for own, code in zip(to_grids(rescued.z[:, 4:8, :4], tables.maps), commonest, strict=True):
        assert (own == code).all()
    assert (
        f"lost parts are filled with the commonest code of each map, {commonest[0]} and {commonest[1]}"
        in rescued.damage
    )


def test_the_coder_refuses_indices_beyond_the_codebook_of_their_map(tmp_path: Path) -> None:
    tables = tables_of(20, 300)
    coder = Coder(written(tmp_path / "two", tables), INFO["decoder_id"])
    indices = indices_of(tables, 2, 3)
    for plane, value, message in (
        (0, 20, "an index beyond the codebook of 20 vectors of two"),
        (4, 300, "an index beyond the codebook of 300 vectors of two"),
        (4, -1, "an index beyond the codebook of 300 vectors of two"),
    ):
        wrong = indices.copy()
        wrong[plane, 1, 2] = value
        with pytest.raises(ValueError, match=message):
            coder.code(wrong, 48, 32, Settings())
    with pytest.raises(ValueError, match=r"latents \(1, 2, 3\), expected \(5, 2, 3\)"):
        coder.code(indices[:1], 48, 32, Settings())
    with pytest.raises(ValueError, match="two is a VQ model"):
        coder.code_within(indices, 48, 32, Settings(), 1000)
