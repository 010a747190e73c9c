"""Any diffusers autoencoder in `codec-eval rd`: tables fitted to training images, the folder left as it is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import VQModel

from codec import images
from eval.cli import main
from tests.codec.vq_models import vq_network
from tests.conftest import photo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images to measure in `test`, to fit to in `train`."""
    for name, seeds, side in (("test", range(2), 48), ("train", range(10, 13), 80)):
        (tmp_path / name).mkdir()
        for seed in seeds:
            (tmp_path / name / f"{seed}.png").write_bytes(images.save_png(photo(side, side, seed=seed)))
    return tmp_path


def bare(model: Path, to: Path) -> Path:
    """Copy a model folder without the codec's own part."""
    shutil.copytree(model, to, ignore=lambda *_: {"codec.json", "codec.safetensors"})
    return to


def rd(data: Path, model: Path, *options: str, fit: bool = True) -> int:
    training = ["--fit-images", str(data / "train")] * fit
    common = ["-q", "5,50,100", "--baselines", "", "--metrics", "psnr", "--dtype", "float32", "-o", str(data / "out")]
    return main(["rd", str(data / "test"), "-m", str(model), *training, *common, *options])


def result(data: Path) -> Any:
    return json.loads((data / "out" / "rd.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_without_a_codec_is_coded_with_tables_fitted_for_it(data: Path, model_dir: Path) -> None:
    folder = bare(model_dir, data / "other")
    before = files(folder)
    (data / "train" / "broken.png").write_bytes(b"broken")
    assert rd(data, folder) == 0
    assert files(folder) == before
    (codec,) = result(data)["codecs"]
    tables = codec["description"]["tables"]
    assert tables["n_images"] == 3
    order = np.random.default_rng(0).permutation(4)  # of 10, 11, 12, broken
    sha = hashlib.sha256()
    for n in (n for n in order if n < 3):
        sha.update(b"(80, 80, 3)" + photo(80, 80, seed=int(n) + 10).tobytes())
    assert tables["sha256"] == sha.hexdigest()
    assert codec["name"] == "other"
    sizes = [row["size_bytes"] for row in codec["rows"] if row["image"] == "0.png"]
    assert sizes == sorted(sizes)
    assert codec["points"][0]["bpp"] < 0.5
    assert codec["points"][2]["psnr"] == pytest.approx(codec["ceiling"]["psnr"], abs=0.3)


def test_a_pipelines_16_channel_autoencoder(data: Path, new_model: Callable[..., Path]) -> None:
    bare(new_model("made", channels=16), data / "pipeline" / "vae")
    (data / "pipeline" / "model_index.json").write_text("{}")
    assert rd(data, data / "pipeline", "--limit", "1", "--fit-limit", "2") == 0
    (codec,) = result(data)["codecs"]
    assert (codec["name"], codec["description"]["latent_channels"]) == ("pipeline", 16)
    assert codec["description"]["tables"]["n_images"] == 2
    assert codec["points"][0]["bpp"] < codec["points"][2]["bpp"]


def test_a_vq_model_is_one_point_beside_the_others_curves(data: Path, model_dir: Path) -> None:
    vq_network().save_pretrained(data / "vq")
    before = files(data / "vq")
    assert rd(data, data / "vq", "-m", str(model_dir), "--limit", "1") == 0
    assert files(data / "vq") == before
    codec, other = result(data)["codecs"]
    assert [point["quality"] for point in other["points"]] == [5, 50, 100]
    (point,) = codec["points"]
    (row,) = codec["rows"]
    assert (codec["name"], codec["ceiling"], codec["ceiling_rows"]) == ("vq", None, [])
    assert (point["quality"], row["quality"]) == (None, None)
    assert point["bpp"] == row["bpp"] == 8 * row["size_bytes"] / 48**2
    assert codec["description"]["codebook_size"] == 32
    assert "effort" not in codec["description"]
    assert (data / "out" / "report.html").exists()
    assert main(["compare", str(data / "out" / "rd.json"), str(data / "out" / "rd.json")]) == 0


def test_what_is_refused(data: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(code: int, model: Path, *options: str, fit: bool = True) -> str:
        capsys.readouterr()
        assert rd(data, model, *options, fit=fit) == code
        assert not (data / "out" / "rd.json").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    folder = bare(model_dir, data / "other")
    message = refused(2, folder, fit=False)
    assert str(folder) in message
    assert "--fit-images" in message
    message = refused(2, folder, "--fit-images", str(data / "test"), fit=False)
    assert f"{data / 'test' / '0.png'} is one of the images to measure" in message
    shutil.copy(data / "test" / "1.png", data / "train" / "copy.png")
    assert f"{data / 'train' / 'copy.png'} has the bytes of one" in refused(2, folder)
    (data / "train" / "copy.png").unlink()
    (data / "empty").mkdir()
    assert "not a diffusers model folder" in refused(3, data / "empty")
    network = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8, latent_channels=4)
    network.save_pretrained(data / "vq")
    assert f"{data / 'vq'}: no codec.json in it" in refused(2, data / "vq", fit=False)
    for path in (data / "train").iterdir():
        path.write_bytes(images.save_png(photo(1, 9)))
    assert "no training image of at least 2 x 2 pixels" in refused(2, folder)
