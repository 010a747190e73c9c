"""Files of a VQ model: codebook indices in the same container, through Python and the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel

from codec import Codec, adopt, bitstream, fsq, images, index_tables, model_folder, tiled
from codec.adapters import CodebookModel
from codec.cli import main
from codec.coding import Settings
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError, UsageError
from codec.index_maps import IndexMap
from codec.index_tables import IndexMode, IndexTables
from codec.latent_model import load_latent_model
from codec.pixels import to_float, to_uint8
from codec.tables import Mode
from tests.codec.vq_models import make_vq, vq_network
from tests.conftest import photo, said


@pytest.fixture(scope="session")
def vq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VQ model folder, shared by all tests: do not change it."""
    return make_vq(tmp_path_factory.mktemp("vq") / "small")


@pytest.fixture(scope="module")
def codec(vq_dir: Path) -> Codec:
    return Codec.load(vq_dir, "cpu", dtype="float32")


def test_a_file_holds_the_networks_own_indices_and_decodes_as_the_network_does(codec: Codec, vq_dir: Path) -> None:
    image = photo(45, 70)
    network = VQModel.from_pretrained(vq_dir).eval()
    x = to_float(np.pad(image, ((0, 1), (0, 0), (0, 0)), mode="edge"))[None]
    with torch.no_grad():
        z = network.encode(x).latents[0].permute(1, 2, 0)[..., None, :]  # (h, w, 1, D)
        nearest = (z - network.quantize.embedding.weight).square().sum(-1).argmin(-1)
        z_q = network.quantize.embedding.weight[nearest].permute(2, 0, 1)[None]
        expected = to_uint8(network.decode(z_q, force_not_quantize=True).sample[0])[:45]
    for tile in (0, 8):
        data = codec.encode(image, settings=Settings(tile=tile))
        header, indices = codec.indices(data)
        assert (header.quality, header.n_tiles) == (0, 1 if tile == 0 else 15)
        np.testing.assert_array_equal(indices[0], nearest)
        assert np.abs(codec.decode(data).astype(int) - expected).max() <= 1
    assert len(nearest.unique()) > 3
    np.testing.assert_array_equal(codec.reconstruct(image), codec.decode(data))
    assert np.array_equal(codec.decode_picture(data).pixels, codec.decode(data))


def test_every_mode_makes_a_file_that_decodes_alike_and_the_smallest_is_kept(codec: Codec) -> None:
    image = photo(64, 64, seed=9)
    sizes = []
    for mode in IndexMode:
        data = codec.encode(image, settings=Settings(modes=(mode,)))
        assert {tile.mode for tile in bitstream.unpack(data).tiles} == {mode}
        np.testing.assert_array_equal(codec.indices(data)[1], codec.indices(codec.encode(image))[1])
        sizes.append(len(data))
    assert len(codec.encode(image)) == min(sizes)
    with pytest.raises(ValueError, match=r"modes .* for small"):
        codec.encode(image, settings=Settings(modes=tuple(Mode)))


def test_quality_and_size_are_the_models_own(
    codec: Codec, vq_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="small is a VQ model: its quality is its own"):
        codec.encode(photo(10, 10), quality=50)
    with pytest.raises(ValueError, match="no size can be asked for"):
        codec.coder.code_within(np.zeros((1, 5, 5), np.int32), 10, 10, Settings(), 1000)
    for option, value in (("-q", "0"), ("--target-bpp", "0.1"), ("--target-kb", "5"), ("--effort", "1")):
        assert main(["encode", str(photo_folder), "-o", str(tmp_path / "o"), "-m", str(vq_dir), option, value]) == 2
        text = said(capsys)
        assert f"error: {option}: small is a VQ model, " in text
        assert text.count("error:") == 1
        assert not list(tmp_path.glob("o/**/*.lcx"))


def test_a_folder_goes_through_all_commands(
    codec: Codec, vq_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, again, model = tmp_path / "coded", tmp_path / "again", ["-m", str(vq_dir), "--dtype", "float32"]
    assert main(["encode", str(photo_folder), "-o", str(coded), *model, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert "quality" not in summary
    assert summary["n_done"] == 3
    assert main(["encode", str(photo_folder / "sub"), str(photo_folder / "a.png"), "-o", str(again), *model]) == 0
    for name in ("a.png", "b.png", "c.png"):  # whatever the order and the folder
        (path,) = coded.rglob(f"{name}.lcx")
        assert path.read_bytes() == next(again.rglob(f"{name}.lcx")).read_bytes()
        (original,) = photo_folder.rglob(name)
        assert path.read_bytes() == codec.encode(images.load(original))
    capsys.readouterr()
    assert main(["info", str(coded / "a.png.lcx")]) == 0
    text = said(capsys)
    assert "codebook indices" in text
    assert "the model's own" in text
    assert main(["verify", str(coded), "-m", str(vq_dir)]) == 0
    assert main(["decode", str(coded), "-o", str(tmp_path / "out"), *model, "--strict"]) == 0
    assert main(["decode", str(coded), "-o", str(tmp_path / "part"), *model, "--region", "5,6,20,10"]) == 0
    whole, part = (images.load(tmp_path / folder / "a.png.png") for folder in ("out", "part"))
    np.testing.assert_array_equal(whole, codec.decode((coded / "a.png.lcx").read_bytes()))
    np.testing.assert_array_equal(part, whole[6:16, 5:25])


@pytest.mark.slow
def test_jobs_change_no_byte(vq_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    for jobs in ("1", "2"):
        out = str(tmp_path / jobs)
        assert main(["encode", str(photo_folder), "-o", out, "-m", str(vq_dir), "-j", jobs]) == 0
        assert main(["decode", out, "-o", f"{out}d", "-m", str(vq_dir), "-j", jobs]) == 0
    for folder in ("", "d"):
        first = {p.relative_to(tmp_path / f"1{folder}"): p.read_bytes() for p in tmp_path.glob(f"1{folder}/**/*.*")}
        assert len(first) == 3
        for path, data in first.items():
            assert (tmp_path / f"2{folder}" / path).read_bytes() == data


def test_a_file_of_the_other_kind_of_model_is_exit_3_in_words(
    vq_dir: Path, model_dir: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {path: model_folder.read(path).stream_id for path in (vq_dir, model_dir)}
    for own, other in ((vq_dir, model_dir), (model_dir, vq_dir)):
        coded = tmp_path / own.name
        assert main(["encode", str(photo_folder / "a.png"), "-o", str(coded), "-m", str(own)]) == 0
        capsys.readouterr()
        for command in (["decode", str(coded), "-o", str(tmp_path / "out")], ["verify", str(coded)]):
            assert main([*command, "-m", str(other)]) == 3
            assert f"it needs stream {ids[own]}, {other.name} has {ids[other]}" in said(capsys)
        assert not list(tmp_path.glob("out/*"))


def test_models_are_found_by_the_files_ids(
    vq_dir: Path,
    model_dir: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(vq_dir, tmp_path / "models" / "small")
    shutil.copytree(model_dir, tmp_path / "models" / "tiny")
    monkeypatch.setenv("CODEC_MODELS", str(tmp_path / "models"))
    for name in ("small", "tiny"):
        assert main(["encode", str(photo_folder / "a.png"), "-o", str(tmp_path / "coded" / name), "-m", name]) == 0
    assert main(["decode", str(tmp_path / "coded"), "-o", str(tmp_path / "out")]) == 0
    assert len(list(tmp_path.glob("out/*/a.png.png"))) == 2
    capsys.readouterr()
    assert main(["models"]) == 0
    assert "small  f2 c4 k32" in said(capsys)


def test_salvage_names_what_is_lost_and_fills_it_with_the_commonest_code(codec: Codec, tmp_path: Path) -> None:
    image = photo(64, 64)
    data = bytearray(codec.encode(image, settings=Settings(tile=16)))
    whole = codec.indices(bytes(data))[1]
    spans = [span for span in bitstream.walk(bytes(data), 25, len(data) - 4) if span.is_tile]
    data[spans[1].start] ^= 1  # the check of the second of four
    picture, damage = codec.rescue(bytes(data))
    assert picture.pixels.shape == (64, 64, 3)
    tables = codec.coder.folder.index_tables[codec.stream_id]
    assert isinstance(tables, IndexTables)
    assert any(f"the commonest code of the model, {tables.commonest}" in line for line in damage)
    assert "lost: x 32..63, y 0..31" in damage
    z = codec.coder.rescue(bytes(data)).z
    assert (z[:, :16, 16:] == tables.commonest).all()
    np.testing.assert_array_equal(np.delete(z, np.s_[16:], axis=2), np.delete(whole, np.s_[16:], axis=2))
    counts = np.bincount(np.concatenate([codec.indices(codec.encode(photo(64, 64, n)))[1].ravel() for n in range(6)]))
    assert counts[tables.commonest] == counts.max()
    (tmp_path / "bad.lcx").write_bytes(data)
    command = ["decode", str(tmp_path / "bad.lcx"), "-o", str(tmp_path / "out"), "-m", str(codec.folder)]
    assert main(command) == 1
    assert main([*command, "--salvage"]) == 1
    assert len(list(tmp_path.glob("out/*.png"))) == 1


def test_a_decoder_trained_alone_reads_the_files_of_its_base(codec: Codec, vq_dir: Path, tmp_path: Path) -> None:
    network = VQModel.from_pretrained(vq_dir)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.3)
    network.save_pretrained(tmp_path / "tuned")
    base = model_folder.read(vq_dir)
    info = dict(base.info) | {"decoder_id": load_id(tmp_path / "tuned")}
    model_folder.write_vq(tmp_path / "tuned", info=info, index_tables=list(base.index_tables.values()))
    data = codec.encode(photo(30, 30))
    (tmp_path / "x.lcx").write_bytes(data)
    tuned = Codec.load(tmp_path / "tuned", "cpu", dtype="float32")
    assert tuned.stream_id == codec.stream_id
    assert not np.array_equal(tuned.decode(data), codec.decode(data))
    command = ["decode", str(tmp_path / "x.lcx"), "-m", str(tmp_path / "tuned")]
    assert main([*command, "-o", str(tmp_path / "a"), "--strict"]) == 3
    assert main([*command, "-o", str(tmp_path / "b")]) == 0


def load_id(folder: Path) -> str:
    return Engine.load(folder, EngineConfig(device="cpu")).decoder_id


def test_an_image_beyond_the_memory_goes_in_stripes_to_the_same_indices(codec: Codec, vq_dir: Path) -> None:
    small = Engine.load(vq_dir, EngineConfig(device="cpu", dtype="float32", memory_bytes=1_000_000))
    image = photo(150, 90, seed=3)
    assert not small.fits(150, 90, "encode")
    indices = codec.engine.encode_for_coder(image)
    assert (indices.dtype, indices.shape) == (np.int32, (1, 75, 45))
    assert np.mean(small.encode_for_coder(image) != indices) < 0.002  # of those between two codes
    difference = small.decode(indices, 150, 90).astype(int) - codec.engine.decode(indices, 150, 90)
    assert np.abs(difference).max() <= 1
    box = (7, 30, 40, 50)
    np.testing.assert_array_equal(small.decode(indices, 150, 90, box), small.decode(indices, 150, 90)[30:80, 7:47])


def test_a_network_that_cannot_go_in_stripes_says_so(tmp_path: Path) -> None:
    vq_network(norm_type="spatial", block_out_channels=(32, 32)).save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, EngineConfig(device="cpu", memory_bytes=1_000_000))
    with pytest.raises(ModelError, match="cannot be run in stripes"):
        engine.decode(np.zeros((1, 20, 20), np.int32), 40, 40)


def test_latents_are_quantised_in_float32_whatever_the_encoder_computes_in(vq_dir: Path) -> None:
    engine = Engine.load(vq_dir, EngineConfig(device="cpu", dtype="bfloat16"))
    image = photo(60, 60)
    z, model = engine.encode(image), engine.model
    assert isinstance(model, CodebookModel)
    codebook = model.codebook.double().numpy()
    nearest = ((z.astype(np.float64).transpose(1, 2, 0)[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(engine.encode_for_coder(image)[0], nearest)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(model.quantise(torch.from_numpy(z)[None])[0], nearest)


def test_many_positions_against_a_large_codebook_are_quantised_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = CodebookModel(vq_network(k=100))
    z = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    whole = model.quantise(z)
    monkeypatch.setattr("codec.codebook_model._MOST_DISTANCES", 1000)  # ten positions at a time
    assert torch.equal(model.quantise(z), whole)


def test_cells_of_finite_scalar_quantisation_are_coded_as_codes(tmp_path: Path) -> None:
    levels = [5, 4, 3, 2]
    network = vq_network(k=120)
    network.register_to_config(fsq_levels=levels)
    with torch.no_grad():
        network.quantize.embedding.weight.copy_(fsq.codebook(levels))
    network.save_pretrained(tmp_path)
    model = load_latent_model(tmp_path)
    assert isinstance(model, CodebookModel)
    measured = adopt.measure_indices(model, [photo(32, 32, n) for n in range(4)], 4)
    assert measured is not None
    folder = adopt.write_vq(tmp_path, model, measured, {"name": "cells"})
    assert (folder.name, folder.maps) == ("cells", (IndexMap(120, 1),))
    codec, image = Codec.load(tmp_path, "cpu", dtype="float32"), photo(40, 36, seed=8)
    with torch.no_grad():
        expected = model.indices(to_float(image)[None])[0]
    np.testing.assert_array_equal(codec.indices(codec.encode(image))[1][0], expected)


def test_what_the_images_say_of_the_codebook_stands_in_codec_json(vq_dir: Path) -> None:
    info = model_folder.read(vq_dir).info
    model = load_latent_model(vq_dir)
    assert isinstance(model, CodebookModel)
    with torch.no_grad():
        indices = np.concatenate([model.indices(to_float(photo(64, 64, n))[None]).ravel() for n in range(6)])
    p = np.bincount(indices, minlength=32) / indices.size
    used = p > 0
    assert info["codebook"] == {
        "size": 32,
        "n_tokens": 6 * 32 * 32,
        "n_used": used.sum(),
        "usage": used.mean(),
        "perplexity": pytest.approx(np.exp(-(p[used] * np.log(p[used])).sum())),
    }
    assert (info["family"], info["codebook_size"], info["latent_channels"]) == ("vq", 32, 4)
    assert info["statistics"]["n_positions"] == 6 * 32 * 32


def test_adoption_fits_index_tables_and_writes_nothing(tmp_path: Path) -> None:
    vq_network(seed=2).save_pretrained(tmp_path / "vae")
    before = sorted(tmp_path.rglob("*"))
    folder = adopt.adopt(tmp_path / "vae", [photo(70, 50, n) for n in range(3)], 3)
    assert sorted(tmp_path.rglob("*")) == before
    assert (folder.name, folder.maps, folder.f) == (tmp_path.name, (IndexMap(32, 1),), 2)
    codec, image = Codec.load(folder, "cpu", dtype="float32"), photo(33, 21)
    np.testing.assert_array_equal(codec.decode(codec.encode(image)), codec.reconstruct(image))
    with pytest.raises(UsageError, match="no training image of at least 2 x 2"):
        adopt.adopt(tmp_path / "vae", [photo(1, 9)], 1)
    dead = vq_network()
    with torch.no_grad():
        for part in (dead.quant_conv.weight, dead.encoder.conv_out.weight):
            part.zero_()
    with pytest.raises(UsageError, match="collapsed"):
        adopt.measure_indices(CodebookModel(dead), [photo(16, 16)], 1)


def test_a_refit_adds_tables_and_old_files_stay_readable(codec: Codec, vq_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(vq_dir, tmp_path / "m")
    data = codec.encode(photo(20, 20))
    codebook = codec.model.codebook.numpy()
    refitted = index_tables.fit([np.arange(32).reshape(4, 8)], codebook)
    folder = model_folder.add_tables(tmp_path / "m", refitted)
    assert list(folder.index_tables) == [codec.stream_id, refitted.digest()]
    after = Codec.load(tmp_path / "m", "cpu", dtype="float32")
    assert bitstream.read_header(after.encode(photo(20, 20))).stream_id == refitted.digest()
    np.testing.assert_array_equal(after.indices(data)[1], codec.indices(data)[1])
    with pytest.raises(ValueError, match="already"):
        model_folder.add_tables(tmp_path / "m", refitted)
    with pytest.raises(ModelError, match="a codebook of 32, the tables are for a codebook of 31"):
        model_folder.add_tables(tmp_path / "m", index_tables.fit([np.zeros((2, 2), int)], codebook[:31]))


def test_folders_and_networks_that_do_not_belong_together_are_refused(
    vq_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    base = model_folder.read(vq_dir)
    latent = model_folder.read(model_dir)
    with pytest.raises(ModelError, match="a codebook of 32, the tables are for integer latents"):
        model_folder.add_tables(shutil.copytree(vq_dir, tmp_path / "a"), latent.table_sets[latent.stream_id])
    with pytest.raises(ModelError, match="no codebook, the tables are for a codebook of 32"):
        model_folder.add_tables(shutil.copytree(model_dir, tmp_path / "b"), base.index_tables[base.stream_id])
    vq_network(k=33).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="says a codebook of 32, the network has a codebook of 33"):
        Codec.load(tmp_path / "a", "cpu")
    vq_network().save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match="says no codebook, the network has a codebook of 32"):
        Codec.load(tmp_path / "b", "cpu")
    document = json.loads((vq_dir / "codec.json").read_text())
    shutil.copytree(vq_dir, tmp_path / "c")
    changes: tuple[dict[str, Any], ...] = ({"codebook_size": 31}, {"stream_ids": ["0" * 16]})
    for change in changes:
        (tmp_path / "c" / "codec.json").write_text(json.dumps(document | change))
        with pytest.raises(ModelError, match="does not have the stream id"):
            model_folder.read(tmp_path / "c")


def test_the_coder_refuses_what_are_no_indices_of_its_codebook(codec: Codec) -> None:
    for z, message in (
        (np.full((1, 5, 5), 32, np.int32), "an index beyond the codebook of 32"),
        (np.full((1, 5, 5), -1, np.int32), "an index beyond the codebook of 32"),
        (np.zeros((1, 5, 5), np.float32), "float32 for small, expected codebook indices"),
        (np.zeros((4, 5, 5), np.int32), r"latents \(4, 5, 5\), expected \(1, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.coder.code(z, 10, 10, Settings())


def test_stripes_decode_codebook_vectors_as_they_are(codec: Codec) -> None:
    """FSQ's vectors are no latents: to quantise them again would move them."""
    model = codec.model
    assert isinstance(model, CodebookModel)
    indices = torch.randint(0, 32, (1, 9, 8), generator=torch.Generator().manual_seed(0))
    z_q = model.vectors(indices)[0].numpy()
    striped = tiled.decode(model, z_q, 18, 16, stripe_rows=3)
    np.testing.assert_allclose(striped, codec.engine.decode(indices.numpy(), 18, 16), atol=1)
