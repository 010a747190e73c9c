"""Files that were made once: they read as they did then, and what is coded today gives their bytes.

`scripts/update_golden.py` made them. A change of these bytes is a new version of the format.
"""

from pathlib import Path

import numpy as np
import pytest

from codec import bitstream, map_tables, model_folder, pictures
from codec.bitstream import Tile
from codec.coding import Coder
from codec.errors import FormatError
from codec.index_maps import to_grids
from codec.index_tables import IndexMode, IndexTables
from codec.map_tables import MapTables
from codec.tables import Mode, TableSet

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("v1-*.lcx"))
OF_INDICES = sorted(GOLDEN.glob("vq-*.lcx"))
OF_MAPS = sorted(GOLDEN.glob("maps-*.lcx"))


@pytest.fixture(scope="module")
def coder() -> Coder:
    folder = model_folder.read(GOLDEN / "model")
    return Coder(folder, folder.decoder_id)


@pytest.fixture(scope="module")
def vq_coder() -> Coder:
    folder = model_folder.read(GOLDEN / "vq-model")
    return Coder(folder, folder.decoder_id)


@pytest.fixture(scope="module")
def maps_coder() -> Coder:
    folder = model_folder.read(GOLDEN / "maps-model")
    return Coder(folder, folder.decoder_id)


def test_there_is_a_file_of_every_mode() -> None:
    modes = {tile.mode for path in FILES for tile in bitstream.unpack(path.read_bytes()).tiles}
    assert modes == {*Mode}
    assert len(FILES) == 10
    modes = {tile.mode for path in OF_INDICES for tile in bitstream.unpack(path.read_bytes()).tiles}
    assert modes == {*IndexMode}
    assert len(OF_INDICES) == 7
    assert {tile.mode for path in OF_MAPS for tile in bitstream.unpack(path.read_bytes()).tiles} == {bitstream.MAPS}
    assert len(OF_MAPS) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_file_reads_to_its_latents_and_they_code_to_its_bytes(coder: Coder, path: Path) -> None:
    data = path.read_bytes()
    contents = bitstream.unpack(data)
    indices = coder.read(contents)
    expected = np.load(path.with_suffix(".npy"))
    np.testing.assert_array_equal(indices, expected)
    header, table_set = contents.header, coder.tables(contents.header)
    assert isinstance(table_set, TableSet)
    again = []
    for number, (rows, columns) in enumerate(header.tiles()):
        part = expected[:, rows, columns]
        mode, payload = table_set.encode(part, header.quality, (Mode(contents.tiles[number].mode),))
        again.append(Tile(mode, bitstream.tile_check(header, number, part), payload))
    assert bitstream.pack(header, again, contents.chunks) == data


@pytest.mark.parametrize("path", OF_INDICES, ids=lambda path: path.stem)
def test_a_golden_file_of_codebook_indices_reads_and_codes_to_its_bytes(vq_coder: Coder, path: Path) -> None:
    data = path.read_bytes()
    contents = bitstream.unpack(data)
    expected = np.load(path.with_suffix(".npy"))
    np.testing.assert_array_equal(vq_coder.read(contents), expected)
    header, tables = contents.header, vq_coder.tables(contents.header)
    assert isinstance(tables, IndexTables)
    assert header.quality == 0
    again = []
    for number, (rows, columns) in enumerate(header.tiles()):
        part = expected[:, rows, columns]
        mode, payload = tables.encode(part, (IndexMode(contents.tiles[number].mode),))
        again.append(Tile(mode, bitstream.tile_check(header, number, part), payload))
    assert bitstream.pack(header, again, contents.chunks) == data


@pytest.mark.parametrize("path", OF_MAPS, ids=lambda path: path.stem)
def test_a_golden_file_of_index_maps_reads_and_codes_to_its_bytes(maps_coder: Coder, path: Path) -> None:
    data = path.read_bytes()
    contents = bitstream.unpack(data)
    expected = np.load(path.with_suffix(".npy"))
    np.testing.assert_array_equal(maps_coder.read(contents), expected)
    header, tables = contents.header, maps_coder.tables(contents.header)
    assert isinstance(tables, MapTables)
    again = []
    for number, (rows, columns) in enumerate(header.tiles()):
        part, payload = expected[:, rows, columns], b""
        modes = [mode for mode, _ in map_tables.split(contents.tiles[number].payload)]
        for own, grid, mode in zip(tables.tables, to_grids(part, tables.maps), modes, strict=True):
            body = own.encode(grid[None], (IndexMode(mode),))[1]
            payload += bytes([mode]) + bitstream.varint(len(body)) + body
        again.append(Tile(bitstream.MAPS, bitstream.tile_check(header, number, part), payload))
    assert bitstream.pack(header, again, contents.chunks) == data


def test_the_chunks_of_a_golden_file_hold_what_was_put_in(coder: Coder) -> None:
    contents = bitstream.unpack((GOLDEN / "v1-chunks.lcx").read_bytes())
    header = contents.header
    pixels = np.zeros((header.height, header.width, 3), np.uint8)
    picture = pictures.from_chunks(pixels, contents.chunks, header)
    np.testing.assert_array_equal(picture.alpha, np.load(GOLDEN / "v1-chunks.alpha.npy"))
    assert (picture.gray, picture.deep, picture.icc) == (True, True, None)
    assert picture.exif == b"II*\0\x08\0\0\0\0\0\0\0\0\0"
    assert picture.xmp == b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    assert max(chunk.kind for chunk in contents.chunks) == 200  # unknown, and passed over


def test_reconstruction_points_are_those_of_the_model(coder: Coder) -> None:
    contents = bitstream.unpack((GOLDEN / "v1-context.lcx").read_bytes())
    z = coder.dequantise(contents.header, coder.read(contents))
    assert (z.dtype, z.shape) == (np.float32, (2, 11, 17))
    np.testing.assert_allclose(z[:, 5, 5:8], np.load(GOLDEN / "v1-context.z.npy")[:, 5, 5:8], rtol=1e-6)


def test_a_file_of_version_0_is_refused_in_words() -> None:
    with pytest.raises(FormatError, match="format version 0"):
        bitstream.unpack((GOLDEN / "v0.lcx").read_bytes())
