"""The command `codec`, called as a user would."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import Codec, bitstream, images
from codec.cli import main
from codec.engine import Engine
from tests.conftest import photo


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def coded(photo_folder: Path, model_dir: Path, tmp_path: Path) -> Path:
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "coded"), "-m", str(model_dir), "-q", "70"]) == 0
    return tmp_path / "coded"


def test_a_folder_tree_goes_through_encode_and_decode(
    photo_folder: Path, coded: Path, model_dir: Path, tmp_path: Path
) -> None:
    assert tree(coded) == ["a.png.lcx", "sub/b.png.lcx", "sub/c.png.lcx"]
    assert main(["decode", str(coded), "-o", str(tmp_path / "out"), "-m", str(model_dir)]) == 0
    assert tree(tmp_path / "out") == ["a.png.png", "sub/b.png.png", "sub/c.png.png"]
    codec = Codec.load(model_dir)
    for name in tree(photo_folder):
        original = images.load(photo_folder / name)
        data = (coded / f"{name}.lcx").read_bytes()
        assert data == codec.encode(original, 70)
        np.testing.assert_array_equal(images.load(tmp_path / "out" / f"{name}.png"), codec.decode(data))


def test_a_second_run_fails_on_each_existing_output_and_leaves_it(
    photo_folder: Path, coded: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coded / "a.png.lcx").write_bytes(b"mine")
    (coded / "sub/b.png.lcx").unlink()
    assert main(["encode", str(photo_folder), "-o", str(coded), "-m", str(model_dir), "-q", "70"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 images" in out
    assert err.count("exists already, left untouched") == 2
    assert (coded / "a.png.lcx").read_bytes() == b"mine"
    assert tree(coded) == ["a.png.lcx", "sub/b.png.lcx", "sub/c.png.lcx"]  # b is there again; no temporary file


def test_one_bad_file_does_not_stop_the_rest(
    photo_folder: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo_folder / "b_text.png").write_text("I am not a picture")
    whole = images.save_png(photo(60, 60))
    (photo_folder / "c_cut.png").write_bytes(whole[: len(whole) // 2])
    (photo_folder / "d_empty.jpg").write_bytes(b"")
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 1
    assert tree(tmp_path / "o") == ["a.png.lcx", "sub/b.png.lcx", "sub/c.png.lcx"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for name, line in zip(("b_text.png", "c_cut.png", "d_empty.jpg"), errors, strict=True):
        assert line.count(str(photo_folder / name)) == 1


def test_inputs_that_differ_only_in_extension_get_outputs_of_their_own(model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for seed, name in enumerate(("x.png", "x.jpg", "x.PNG")):
        from PIL import Image

        Image.fromarray(photo(20, 20 + seed)).save(source / name)
    assert main(["encode", str(source), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 0
    assert main(["decode", str(tmp_path / "o"), "-o", str(tmp_path / "d"), "-m", str(model_dir)]) == 0
    assert tree(tmp_path / "d") == ["x.PNG.png", "x.jpg.png", "x.png.png"]
    widths = [images.size(tmp_path / "d" / name)[0] for name in ("x.png.png", "x.jpg.png", "x.PNG.png")]
    assert widths == [20, 21, 22]


def test_two_sources_with_the_same_name_do_not_overwrite_each_other(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "x.png").write_bytes(images.save_png(photo(10, 10 * n)))
    sources = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["encode", *sources, "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 1
    assert bitstream.read_header((tmp_path / "o/x.png.lcx").read_bytes()).width == 10
    assert str(tmp_path / "2/x.png") in capsys.readouterr().err


def test_a_damaged_file_gives_one_clear_error_and_no_output(
    coded: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((coded / "a.png.lcx").read_bytes())
    data[len(data) // 2] ^= 1
    (coded / "a.png.lcx").write_bytes(data)
    (coded / "sub/b.png.lcx").write_bytes(bytes(data[:20]))
    capsys.readouterr()
    assert main(["decode", str(coded), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "CRC-32 does not match" in errors[0]
    assert "truncated" in errors[1]
    assert tree(tmp_path / "o") == ["sub/c.png.png"]


def test_every_flipped_byte_and_every_truncation_is_one_error_and_no_output(
    coded: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (coded / "sub/c.png.lcx").read_bytes()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for n in range(len(data)):
        (damaged / f"flip{n:05d}.lcx").write_bytes(data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :])
        (damaged / f"cut{n:05d}.lcx").write_bytes(data[:n])
    capsys.readouterr()
    assert main(["decode", str(damaged), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 * len(data)
    assert tree(tmp_path / "o") == []


def test_a_file_of_another_model_is_exit_3_and_names_both_streams(
    coded: Path, model_dir: Path, new_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = new_model("other", seed=5)
    assert main(["decode", str(coded), "-o", str(tmp_path / "o"), "-m", str(other)]) == 3
    error = capsys.readouterr().err
    assert Codec.load(model_dir).stream_id in error
    assert Codec.load(other).stream_id in error
    assert tree(tmp_path / "o") == []


def test_files_of_two_models_some_unknown_is_exit_1(
    coded: Path, model_dir: Path, new_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = Codec.load(new_model("other", seed=5))
    (coded / "z.png.lcx").write_bytes(other.encode(photo(9, 9)))
    assert main(["decode", str(coded), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 1
    assert tree(tmp_path / "o") == ["a.png.png", "sub/b.png.png", "sub/c.png.png"]


def test_decode_finds_the_model_of_each_file_by_its_ids(
    coded: Path,
    model_dir: Path,
    new_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = new_model("other", seed=5)
    (coded / "z.png.lcx").write_bytes(Codec.load(other).encode(photo(9, 9)))
    monkeypatch.setenv("CODEC_MODELS", os.pathsep.join([str(model_dir.parent), str(other)]))
    assert main(["decode", str(coded), "-o", str(tmp_path / "o")]) == 0
    assert len(tree(tmp_path / "o")) == 4
    capsys.readouterr()
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^tiny +f2 c4 .* licence: not stated", listed, re.MULTILINE)
    assert "other  f2 c4" in listed


def test_another_decoder_of_the_same_stream_decodes_and_says_so(
    coded: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(model_dir, tuned)
    network = AutoencoderKL.from_pretrained(tuned)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.1)
    network.save_pretrained(tuned)  # codec.json keeps the id of the old decoder: the weights decide
    capsys.readouterr()
    assert main(["decode", str(coded), "-o", str(tmp_path / "o"), "-m", str(tuned)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert Codec.load(model_dir).decoder_id in notes[0]
    assert Codec.load(tuned).decoder_id in notes[0]
    assert Codec.load(model_dir).decoder_id != Codec.load(tuned).decoder_id


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode", "{photos}", "-o", "{out}"], 2, "which model?"),
        (["encode", "{tmp}/nowhere", "-o", "{out}", "-m", "{model}"], 2, "nowhere: no such file or folder"),
        (["encode", "{empty}", "-o", "{out}", "-m", "{model}"], 2, "no images found"),
        (["encode", "{photos}", "-o", "{photos}/a.png", "-m", "{model}"], 2, "cannot write here"),
        (["encode", "{photos}", "-o", "/proc/nothing", "-m", "{model}"], 2, "cannot write here"),
        (["encode", "{photos}", "-o", "{out}", "-m", "{tmp}/no-model"], 3, "no such folder"),
        (["encode", "{photos}", "-o", "{out}", "-m", "{empty}"], 3, "no codec.json"),
        (["encode", "{photos}", "-o", "{out}", "-m", "{model}", "--device", "warp"], 2, "device warp"),
        (["encode", "{photos}", "-o", "{out}", "-m", "{model}", "-q", "101"], 2, "less than or equal to 100"),
        (["decode", "{coded}", "-o", "{out}", "-m", "{model}", "--device", "warp"], 2, "device warp"),
        (["decode", "{coded}", "-o", "{out}", "-m", "{weightless}"], 3, "cannot load the weights"),
        (["decode", "{photos}", "-o", "{out}", "-m", "{model}"], 2, "no compressed files found"),
        (["decode", "{photos}/a.png", "-o", "{out}", "-m", "{model}"], 1, "not a latent-codec file"),
        (["decode", "{photos}/a.png", "-o", "{out}"], 2, "which model?"),
        (["info", "{photos}/a.png"], 1, "not a latent-codec file"),
        (["info", "{tmp}/nowhere"], 2, "nowhere"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_each_mistake_has_its_exit_code_and_words(
    arguments: list[str],
    code: int,
    message: str,
    photo_folder: Path,
    coded: Path,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CODEC_MODELS", raising=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"photos": photo_folder, "out": tmp_path / "out", "tmp": tmp_path, "model": model_dir, "empty": empty}
    places |= {"coded": coded, "weightless": tmp_path / "weightless"}
    shutil.copytree(model_dir, tmp_path / "weightless")
    (tmp_path / "weightless" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    assert main([argument.format(**places) for argument in arguments]) == code
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_info_reads_the_header_alone(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(coded / "a.png.lcx"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    size_bytes = (coded / "a.png.lcx").stat().st_size
    assert (fields["width"], fields["height"], fields["quality"], fields["size_bytes"]) == (80, 96, 70, size_bytes)
    assert fields["bpp"] == pytest.approx(8 * size_bytes / (80 * 96), abs=1e-5)


def test_help_info_and_models_import_neither_torch_nor_diffusers(coded: Path, model_dir: Path) -> None:
    script = (
        "import sys; from codec.cli import main\n"
        "for argv in (['--help'], ['encode', '--help'], ['info', sys.argv[1]], ['models']):\n"
        "    assert main(argv) == 0, argv\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules), 'imported'\n"
    )
    environment = os.environ | {"CODEC_MODELS": str(model_dir.parent)}
    command = [sys.executable, "-c", script, str(coded / "a.png.lcx")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout


def test_an_interrupt_is_exit_130_and_leaves_no_half_file(
    photo_folder: Path,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = Engine.encode
    calls = []

    def interrupted(self: Engine, image: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, image)

    monkeypatch.setattr(Engine, "encode", interrupted)
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "o"), "-m", str(model_dir)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert "a.png.lcx" in tree(tmp_path / "o")
    assert set(tree(tmp_path / "o")) <= {"a.png.lcx", "sub/b.png.lcx"}
