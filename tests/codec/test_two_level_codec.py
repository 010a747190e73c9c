"""Files of a VQ model of two levels: two index maps in every tile, through Python and the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from codec import Codec, adopt, bitstream, images, map_tables, model_folder, tiled
from codec.cli import main
from codec.coding import Settings
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError
from codec.index_maps import IndexMap, to_grids
from codec.index_tables import IndexTables
from codec.latent_model import TwoLevelModel, load_latent_model
from codec.map_tables import MapTables
from codec.pixels import to_float, to_uint8
from tests.codec.two_level_models import two_level_network
from tests.codec.vq_models import make_two_level, make_vq, vq_network
from tests.conftest import photo, said

MAPS = (IndexMap(20, 1), IndexMap(32, 2))


@pytest.fixture(scope="module")
def two_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder of two index maps: do not change it."""
    return make_two_level(tmp_path_factory.mktemp("two") / "pair")


@pytest.fixture(scope="module")
def codec(two_dir: Path) -> Codec:
    return Codec.load(two_dir, "cpu", dtype="float32")


def test_a_file_holds_the_networks_own_indices_and_decodes_as_the_network_does(codec: Codec) -> None:
    image, model = photo(45, 70), codec.model
    assert isinstance(model, TwoLevelModel)
    x = to_float(np.pad(image, ((0, 3), (0, 2), (0, 0)), mode="edge"))[None]
    with torch.inference_mode():
        own = model.indices(x)
        expected = to_uint8(model.decode_indices(own)[0])[:45, :70]
    for tile, n_tiles in ((0, 1), (4, 15)):
        data = codec.encode(image, settings=Settings(tile=tile))
        header, indices = codec.indices(data)
        assert (header.quality, header.n_tiles, header.f) == (0, n_tiles, 4)
        np.testing.assert_array_equal(indices, own[0])
        np.testing.assert_array_equal(codec.decode(data), expected)
    assert all(np.unique(grid).size > 3 for grid in to_grids(indices, MAPS))
    np.testing.assert_array_equal(codec.reconstruct(image), expected)
    np.testing.assert_array_equal(codec.engine.encode_for_coder(image), own[0])


def test_a_folder_goes_through_all_commands(
    codec: Codec, two_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, model = tmp_path / "coded", ["-m", str(two_dir), "--dtype", "float32"]
    assert main(["encode", str(photo_folder), "-o", str(coded), *model]) == 0
    assert (coded / "a.png.lcx").read_bytes() == codec.encode(images.load(photo_folder / "a.png"))
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "q"), *model, "-q", "50"]) == 2
    capsys.readouterr()
    assert main(["info", str(coded / "a.png.lcx"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["latents"], about["index_maps"], about["quality"]) == ("codebook indices", 2, None)
    assert set(about["modes"]) <= {"fixed", "static", "adaptive", "context"}
    assert main(["verify", str(coded), "-m", str(two_dir)]) == 0
    assert "3 of 3 files are whole" in said(capsys)
    assert main(["decode", str(coded), "-o", str(tmp_path / "out"), *model, "--strict"]) == 0
    part = ["decode", str(coded / "a.png.lcx"), "-o", str(tmp_path / "part"), *model]
    assert main([*part, "--region", "5,6,20,10"]) == 0
    whole, cut = (images.load(tmp_path / folder / "a.png.png") for folder in ("out", "part"))
    np.testing.assert_array_equal(whole, codec.decode((coded / "a.png.lcx").read_bytes()))
    np.testing.assert_array_equal(cut, whole[6:16, 5:25])


def test_models_are_listed_with_the_codebook_of_each_map(
    two_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two_dir, tmp_path / "pair")
    monkeypatch.setenv("CODEC_MODELS", str(tmp_path))
    assert main(["models"]) == 0
    assert "pair  f4 c15 k20+32" in said(capsys)


def test_a_lost_tile_is_named_and_becomes_the_commonest_code_of_each_map(codec: Codec, tmp_path: Path) -> None:
    image = photo(64, 64)
    data = bytearray(codec.encode(image, settings=Settings(tile=8)))
    whole = codec.indices(bytes(data))[1]
    spans = [span for span in bitstream.walk(bytes(data), 25, len(data) - 4) if span.is_tile]
    data[spans[1].start] ^= 1  # the check of the second of four
    stream = codec.coder.folder.index_tables[codec.stream_id]
    commonest = [tables.commonest for tables in map_tables.of_each_map(stream)]
    rescued = codec.coder.rescue(bytes(data))
    assert rescued.losses == ["lost: x 32..63, y 0..31"]
    assert any("the commonest code of each map, {} and {}".format(*commonest) in line for line in rescued.damage)
    for grid, code in zip(to_grids(rescued.z[:, :8, 8:], MAPS), commonest, strict=True):
        assert (grid == code).all()
    np.testing.assert_array_equal(rescued.z[:, 8:], whole[:, 8:])
    np.testing.assert_array_equal(rescued.z[:, :8, :8], whole[:, :8, :8])
    (tmp_path / "bad.lcx").write_bytes(data)
    command = ["decode", str(tmp_path / "bad.lcx"), "-o", str(tmp_path / "out"), "-m", str(codec.folder)]
    assert main(command) == 1
    assert main([*command, "--salvage"]) == 1
    assert images.load(tmp_path / "out" / "bad.png").shape == (64, 64, 3)


def test_info_names_a_tile_that_does_not_fit_and_goes_on(
    codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = codec.encode(photo(20, 20))
    contents = bitstream.unpack(good)
    (tile,) = contents.tiles
    bad = bitstream.Tile(tile.mode, tile.check, b"\x09" + tile.payload[1:])
    (tmp_path / "a.lcx").write_bytes(bitstream.pack(contents.header, [bad]))
    (tmp_path / "b.lcx").write_bytes(good)
    assert main(["info", str(tmp_path)]) == 1
    text = said(capsys)
    assert "a.lcx: damaged payload: an index map of entropy mode 9" in text
    assert "index_maps           2" in text


def test_a_file_of_another_number_of_maps_is_exit_3_in_one_line(
    two_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_dir = make_vq(tmp_path / "one")
    ids = {path: model_folder.read(path).stream_id for path in (one_dir, two_dir)}
    for own, other in ((one_dir, two_dir), (two_dir, one_dir)):
        coded = tmp_path / f"of-{own.name}"
        assert main(["encode", str(photo_folder / "a.png"), "-o", str(coded), "-m", str(own)]) == 0
        capsys.readouterr()
        for command in (["decode", str(coded), "-o", str(tmp_path / "out")], ["verify", str(coded)]):
            assert main([*command, "-m", str(other)]) == 3
            text = said(capsys)
            assert f"it needs stream {ids[own]}, {other.name} has {ids[other]}" in text
            assert text.count("error:") == 1


def test_networks_and_folders_of_other_maps_are_refused(two_dir: Path, tmp_path: Path) -> None:
    both = "codebooks of 20 at scale 1, 32 at scale 2"
    other = shutil.copytree(two_dir, tmp_path / "a")
    two_level_network(num_vq_embeddings=30).save_pretrained(other)
    with pytest.raises(ModelError, match=f"says {both}, the network has codebooks of 20 at scale 1, 30 at scale 2"):
        Codec.load(other, "cpu")
    vq_network().save_pretrained(other)
    with pytest.raises(ModelError, match=f"says {both}, the network has a codebook of 32"):
        Codec.load(other, "cpu")


def test_what_the_images_say_of_both_codebooks_stands_in_codec_json(two_dir: Path) -> None:
    info, model = model_folder.read(two_dir).info, load_latent_model(two_dir)
    assert isinstance(model, TwoLevelModel)
    with torch.no_grad():
        planes = [model.indices(to_float(photo(64, 64, n))[None])[0].numpy() for n in range(6)]
    for n, (about, k, tokens) in enumerate(zip(info["codebooks"], (20, 32), (6 * 256, 6 * 1024), strict=True)):
        used = np.unique([to_grids(each, MAPS)[n] for each in planes]).size
        assert (about["size"], about["n_tokens"], about["n_used"]) == (k, tokens, used)
    assert (info["family"], info["f"], info["latent_channels"]) == ("vq", 4, 15)
    assert not {"codebook", "codebook_size"} & info.keys()
    assert Codec.load(two_dir, "cpu").description()["maps"] == info["maps"]


def test_adoption_and_refit_fit_tables_to_each_map(tmp_path: Path) -> None:
    two_level_network(seed=2).save_pretrained(tmp_path)
    folder = adopt.adopt(tmp_path, [photo(70, 50, n) for n in range(3)], 3)
    (stream,) = folder.index_tables.values()
    assert isinstance(stream, MapTables)
    assert folder.maps == MAPS
    codec, image = Codec.load(folder, "cpu", dtype="float32"), photo(33, 21)
    np.testing.assert_array_equal(codec.decode(codec.encode(image)), codec.reconstruct(image))
    # each map's tables are those of its own indices: likelier under them than under the other order of codes
    model = codec.model
    assert isinstance(model, TwoLevelModel)
    measured = adopt.measure_indices(model, [photo(64, 64, n) for n in range(3)], 3)
    assert measured is not None
    assert [grid.shape for grids in measured.grids for grid in grids] == [(16, 16)] * 3 + [(32, 32)] * 3
    fitted = measured.fit(model)
    assert isinstance(fitted, MapTables)
    for tables, counts in zip(fitted.tables, measured.counts, strict=True):
        assert isinstance(tables, IndexTables)
        assert counts[tables.commonest] == counts.max()


def test_an_image_beyond_the_memory_goes_in_stripes_to_the_same_indices(codec: Codec, two_dir: Path) -> None:
    small = Engine.load(two_dir, EngineConfig(device="cpu", dtype="float32", memory_bytes=1_000_000))
    image, model = photo(150, 90, seed=3), codec.model
    assert isinstance(model, TwoLevelModel)
    assert not small.fits(150, 90, "encode")
    indices = codec.engine.encode_for_coder(image)
    assert indices.shape == (5, 38, 23)
    assert np.mean(small.encode_for_coder(image) != indices) < 0.002  # of those between two codes
    striped = tiled.decode(model, codec.engine._vectors(model, indices), 150, 90, stripe_rows=3)
    for found in (small.decode(indices, 150, 90), striped):
        assert np.abs(found.astype(int) - codec.engine.decode(indices, 150, 90)).max() <= 1
    box = (7, 30, 40, 50)
    np.testing.assert_array_equal(small.decode(indices, 150, 90, box), small.decode(indices, 150, 90)[30:80, 7:47])


def test_half_precision_and_stripes_of_it_find_indices_of_the_same_vectors(two_dir: Path) -> None:
    """The coarse level computes in float32 whatever the rest does, and latents are quantised in it."""
    image = photo(60, 60)
    for memory_bytes in (0, 1_000_000):
        engine = Engine.load(two_dir, EngineConfig(device="cpu", dtype="bfloat16", memory_bytes=memory_bytes))
        model = engine.model
        assert isinstance(model, TwoLevelModel)
        for z, codebook, found in zip(
            model.unpack(torch.from_numpy(engine.encode(image))[None]),
            model.codebooks,
            to_grids(engine.encode_for_coder(image), MAPS),
            strict=True,
        ):
            distances = (z[0].movedim(0, -1)[..., None, :].double() - codebook.double()).square().sum(-1)
            np.testing.assert_array_equal(found, distances.argmin(-1))
