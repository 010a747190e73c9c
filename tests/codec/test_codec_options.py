"""What `codec encode` and `codec decode` do when asked for more: resume, targets, regions, streams, rescue, ranks."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from codec import Codec, bitstream, images
from codec.cli import main
from codec.coding import Settings
from codec.files import write_atomic
from tests.conftest import photo

Capture = pytest.CaptureFixture[str]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def errors(capsys: Capture) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def encode(photo_folder: Path, model_dir: Path, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def run(name: str, *more: str, source: Path = photo_folder) -> tuple[int, Path]:
        return main(["encode", str(source), "-o", str(tmp_path / name), "-m", str(model_dir), *more]), tmp_path / name

    return run


@pytest.fixture
def tiled_file(model_dir: Path, tmp_path: Path) -> Path:
    """A file of 2 x 2 tiles of 16 latents, 32 pixels."""
    path = tmp_path / "tiled" / "t.png.lcx"
    data = Codec.load(model_dir).encode(photo(60, 64), settings=Settings(tile=16, quality=50))
    write_atomic(path, data)
    return path


def test_existing_outputs_are_skipped_or_replaced_when_asked_for(
    encode: Callable[..., tuple[int, Path]], capsys: Capture
) -> None:
    _, out = encode("o", "-q", "30")
    before = contents(out)
    (out / "a.png.lcx").unlink()
    stamp = (out / "sub/b.png.lcx").stat().st_mtime_ns
    assert encode("o", "-q", "30", "--skip-existing")[0] == 0
    assert contents(out) == before
    assert (out / "sub/b.png.lcx").stat().st_mtime_ns == stamp
    assert "1 of 3 images, 2 skipped" in capsys.readouterr().out
    assert encode("o", "-q", "80", "--overwrite")[0] == 0
    assert all(len(data) > len(before[name]) for name, data in contents(out).items())
    assert encode("o", "--overwrite", "--skip-existing")[0] == 2


def test_a_damaged_output_is_not_skipped_but_made_again(encode: Callable[..., tuple[int, Path]]) -> None:
    _, out = encode("o")
    whole = contents(out)
    (out / "a.png.lcx").write_bytes(whole["a.png.lcx"][:50])
    assert encode("o", "--skip-existing")[0] == 0
    assert contents(out) == whole


def test_after_kill_9_skip_existing_ends_with_the_folder_complete_and_correct(
    model_dir: Path, encode: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    source = tmp_path / "many"
    for n in range(40):
        write_atomic(source / f"{n:02d}.png", images.save_png(photo(150, 150, seed=n)))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "codec", "encode", str(source), "-o", str(out), "-m", str(model_dir)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: the last bits of latents depend on it
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.lcx"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(out.glob("*.lcx"))) < 40, "it was not killed half way"
    left = out / f".39.png.lcx.{_machine_of_temporaries(tmp_path)}-{process.pid}-0123abcd.tmp"
    left.write_bytes(b"half a file")  # what a kill in the middle of a write leaves
    assert encode("killed", "--skip-existing", source=source)[0] == 0
    assert encode("whole", source=source)[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def _machine_of_temporaries(folder: Path) -> str:
    names = []

    class Stop(Exception):
        pass

    def look(self: Path, data: bytes) -> int:
        names.append(self.name)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", look)
        with pytest.raises(Stop):
            write_atomic(folder / "x", b"")
    return names[0].split(".")[2].split("-")[0]


def test_stdin_goes_in_and_stdout_comes_out(
    photo_folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def through(arguments: list[str], data: bytes) -> bytes:
        out = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        monkeypatch.setattr(sys, "stdout", out)
        try:
            assert main([*arguments, "-m", str(model_dir), "-j", "2"]) == 0  # whose workers have no stdin
        finally:
            monkeypatch.undo()
        return out.buffer.getvalue()  # type: ignore[attr-defined]

    source = photo_folder / "a.png"
    coded = through(["encode", "-", "-o", "-"], source.read_bytes())
    codec = Codec.load(model_dir)
    assert coded == codec.encode(images.load(source))
    decoded = through(["decode", "-", "-o", "-"], coded)
    np.testing.assert_array_equal(images.load(decoded), codec.decode(coded))
    assert main(["encode", str(photo_folder), "-o", "-", "-m", str(model_dir)]) == 2  # three files, one stdout


@pytest.mark.slow
def test_a_pipe_of_two_commands_works_with_many_workers(photo_folder: Path, model_dir: Path) -> None:
    codec = f"{sys.executable} -m codec"
    options = f"-o - -m {model_dir} -j 2 --dtype float32"
    done = subprocess.run(
        f"{codec} encode - {options} < {photo_folder / 'a.png'} | {codec} decode - {options}",
        shell=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert images.size(done.stdout) == (80, 96)


def test_one_source_may_go_to_a_file_of_its_own_name(photo_folder: Path, model_dir: Path, tmp_path: Path) -> None:
    for verb, source, target in (("encode", photo_folder / "a.png", "x.lcx"), ("decode", tmp_path / "x.lcx", "y.png")):
        assert main([verb, str(source), "-o", str(tmp_path / target), "-m", str(model_dir)]) == 0
    assert images.size(tmp_path / "y.png") == (80, 96)
    assert main(["encode", str(photo_folder), "-o", str(tmp_path / "z.lcx"), "-m", str(model_dir)]) == 2


def test_a_target_is_met_by_the_highest_quality_that_keeps_it(
    encode: Callable[..., tuple[int, Path]], photo_folder: Path, model_dir: Path, capsys: Capture
) -> None:
    codec = Codec.load(model_dir)
    for option, value, limit in (("--target-bpp", "2.5", 2.5 * 96 * 80 / 8), ("--target-kb", "1.6", 1600)):
        code, out = encode(option.strip("-"), option, value)
        assert code == 0
        data = (out / "a.png.lcx").read_bytes()
        quality = bitstream.read_header(data).quality
        assert 0 < quality < 100
        assert len(data) <= limit < len(codec.encode(images.load(photo_folder / "a.png"), quality + 1))
    capsys.readouterr()
    code, out = encode("little", "--target-kb", "0.05")
    assert code == 0
    assert bitstream.read_header((out / "a.png.lcx").read_bytes()).quality == 0
    assert capsys.readouterr().err.count("more than the 50 that were asked for") == 3
    for wrong in (["--target-kb", "1", "--target-bpp", "1"], ["-q", "50", "--target-kb", "1"], ["--target-kb", "inf"]):
        assert encode("wrong", *wrong)[0] == 2
    assert encode("nothing", "--target-kb", "0")[0] == 0  # no file is that small: the smallest
    assert bitstream.read_header((out.parent / "nothing" / "a.png.lcx").read_bytes()).quality == 0


def test_effort_makes_smaller_files_of_the_same_image(
    encode: Callable[..., tuple[int, Path]], photo_folder: Path, model_dir: Path
) -> None:
    folders = [encode(f"effort{level}", "-q", "30", "--effort", str(level))[1] for level in (0, 1, 9)]
    sizes = [sum(map(len, contents(folder).values())) for folder in folders]
    assert sizes[1] < 0.98 * sizes[0]
    assert sizes[2] < 0.98 * sizes[0]
    codec = Codec.load(model_dir, dtype="float32")
    z = codec.latents(images.load(photo_folder / "a.png"))
    step = codec.coder.folder.step[:, None, None] * 2 ** (-30 / 16)
    for folder in folders:
        header, indices = codec.indices((folder / "a.png.lcx").read_bytes())
        assert (np.abs(codec.coder.dequantise(header, indices) - z) / step).max() < 2


def test_a_region_is_that_part_of_the_whole_image(
    encode: Callable[..., tuple[int, Path]], model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    _, out = encode("o")
    source = out / "a.png.lcx"
    command = ["decode", str(source), "-m", str(model_dir), "--dtype", "float32"]
    assert main([*command, "-o", str(tmp_path / "part.png"), "--region", "13,20,31,40"]) == 0
    whole = Codec.load(model_dir, dtype="float32").decode(source.read_bytes())
    part = images.load(tmp_path / "part.png")
    assert np.abs(part.astype(int) - whole[20:60, 13:44]).max() <= 1
    capsys.readouterr()
    assert main([*command, "-o", str(tmp_path / "out.png"), "--region", "60,0,21,10"]) == 1
    assert "not inside the image of 80x96 pixels" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "out.png"), "--region", "1,2,3"]) == 2


def test_a_decoder_tuned_on_the_same_latents_decodes_and_strict_refuses_it(
    encode: Callable[..., tuple[int, Path]], model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    _, coded = encode("o")
    tuned = tmp_path / "tuned"
    shutil.copytree(model_dir, tuned)
    network = AutoencoderKL.from_pretrained(tuned)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.1)
    network.save_pretrained(tuned)
    command = ["decode", str(coded), "-m", str(tuned)]
    capsys.readouterr()
    assert main([*command, "-o", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().err.count("of the same latents") == 1
    assert main([*command, "-o", str(tmp_path / "s"), "--strict"]) == 1  # codec.json still names the old decoder
    assert len(errors(capsys)) == 3
    document = json.loads((tuned / "codec.json").read_text())
    (tuned / "codec.json").write_text(json.dumps(document | {"decoder_id": Codec.load(tuned).decoder_id}))
    assert main([*command, "-o", str(tmp_path / "s"), "--strict"]) == 3
    assert "another decoder" in capsys.readouterr().err
    assert tree(tmp_path / "s") == []
    assert main(["decode", str(coded), "-m", str(model_dir), "-o", str(tmp_path / "own"), "--strict"]) == 0


def test_a_damaged_tile_is_lost_alone_and_named(
    tiled_file: Path, model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = bytearray(tiled_file.read_bytes())
    sizes = [len(tile.payload) for tile in bitstream.unpack(bytes(data)).tiles]
    data[-4 - sizes[3] - 20] ^= 0x40  # within the third tile
    tiled_file.write_bytes(data)
    command = ["decode", str(tiled_file), "-m", str(model_dir), "-o", str(tmp_path / "o"), "--dtype", "float32"]
    assert main(command) == 1
    assert "CRC-32" in errors(capsys)[0]
    assert tree(tmp_path / "o") == []
    assert main([*command, "--salvage"]) == 1
    told = errors(capsys)
    (tmp_path / "o" / "t.png.png").rename(tmp_path / "first.png")
    assert main([*command, "--salvage", "--json"]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["n_files"], summary["n_failed"], summary["n_done"]) == (1, 1, 0)
    assert any("3 of 4 tiles" in line for line in told)
    assert any("lost: x 0..31, y 32..59" in line for line in told)
    assert any("other pixels may have shifted" in line for line in told)
    original = photo(60, 64)
    rescued = images.load(tmp_path / "o" / "t.png.png")
    whole = Codec.load(model_dir, dtype="float32").decode(Codec.load(model_dir).encode(original, 50))
    difference = np.abs(rescued.astype(int) - whole).mean(axis=2)
    assert difference[34:, :30].mean() > 3 * difference[:30, 34:].mean()


def test_verify_checks_every_sum_without_a_network(
    tiled_file: Path, model_dir: Path, new_model: Callable[..., Path], capsys: Capture
) -> None:
    script = (
        "import sys; from codec.cli import main\n"
        "code = main(['verify', sys.argv[1], '-m', sys.argv[2]])\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules), 'imported'\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", script, str(tiled_file), str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1 of 1 files are whole"), done.stderr
    assert main(["verify", str(tiled_file), "-m", str(new_model("other", seed=4))]) == 3
    found = bitstream.unpack(tiled_file.read_bytes())
    swapped = [found.tiles[1], found.tiles[0], *found.tiles[2:]]
    tiled_file.write_bytes(bitstream.pack(found.header, swapped))  # a right CRC-32 over wrong content
    capsys.readouterr()
    assert main(["verify", str(tiled_file), "-m", str(model_dir)]) == 1
    assert main(["decode", str(tiled_file), "-m", str(model_dir), "-o", str(tiled_file.parent / "o")]) == 1
    assert "tile 0" in capsys.readouterr().err
    assert not (tiled_file.parent / "o" / "t.png.png").exists()


def test_workers_order_and_folder_change_no_byte(
    encode: Callable[..., tuple[int, Path]], photo_folder: Path, tmp_path: Path, model_dir: Path
) -> None:
    _, alone = encode("alone", "-j", "1")
    assert encode("two", "-j", "2")[0] == 0
    assert contents(tmp_path / "two") == contents(alone)
    sources = [str(photo_folder / name) for name in ("sub/c.png", "sub/b.png", "a.png")]
    assert main(["encode", *sources, "-o", str(tmp_path / "flat"), "-m", str(model_dir), "-j", "2"]) == 0
    assert sorted(contents(tmp_path / "flat").values()) == sorted(contents(alone).values())
    assert main(["decode", str(alone), "-o", str(tmp_path / "d2"), "-m", str(model_dir), "-j", "2"]) == 0
    assert main(["decode", str(alone), "-o", str(tmp_path / "d1"), "-m", str(model_dir), "-j", "1"]) == 0
    assert contents(tmp_path / "d1") == contents(tmp_path / "d2")


def test_a_file_of_one_type_decodes_in_another_with_the_same_integers(model_dir: Path) -> None:
    image = photo(50, 62)
    codecs = {name: Codec.load(model_dir, "cpu", dtype=name) for name in ("bfloat16", "float32")}
    for name, codec in codecs.items():
        data = codec.encode(image, 60)
        first, second = (other.indices(data)[1] for other in codecs.values())
        np.testing.assert_array_equal(first, second)
        decoded = [other.decode(data).astype(int) for other in codecs.values()]
        assert 0 < np.abs(decoded[0] - decoded[1]).mean() < 3, name


def test_the_json_summary_adds_up(encode: Callable[..., tuple[int, Path]], photo_folder: Path, capsys: Capture) -> None:
    (photo_folder / "broken.png").write_text("no picture")
    capsys.readouterr()
    code, out = encode("o", "--json", "-q", "40")
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert code == 1
    assert (told["n_files"], told["n_done"], told["n_failed"]) == (4, 3, 1)
    assert told["pixels"] == 96 * 80 + 50 * 70 + 64 * 64
    assert told["size_bytes"] == sum(map(len, contents(out).values()))
    assert told["bpp"] == pytest.approx(8 * told["size_bytes"] / told["pixels"], abs=1e-4)
    assert (told["quality"], told["model"], len(told["failures"])) == (40, "tiny", 1)
    assert "on cpu" in captured.err


def on_two_ranks(arguments: list[str]) -> tuple[list[int], list[dict[str, Any]], str]:
    """Run the command as a launcher starts it; return exit codes, the JSON summaries of both, and all of stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "codec", *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    told = [json.loads(line) for out, _ in said for line in out.splitlines() if line.startswith("{")]
    return [process.returncode for process in processes], told, "".join(error for _, error in said)


def test_ranks_share_the_files_and_give_one_summary(
    photo_folder: Path, model_dir: Path, encode: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    _, alone = encode("alone")
    out = tmp_path / "ranks"
    codes, told, said = on_two_ranks(["encode", str(photo_folder), "-o", str(out), "-m", str(model_dir), "--json"])
    assert codes == [0, 0], said
    assert [(one["n_files"], one["n_done"], one["processes"]) for one in told] == [(3, 3, 2)]
    assert contents(out) == contents(alone)


@pytest.mark.slow
@pytest.mark.parametrize("n_wrong", [2, 4])
def test_ranks_end_as_one_process_would_when_files_need_another_model(
    n_wrong: int, model_dir: Path, new_model: Callable[..., Path], tmp_path: Path
) -> None:
    codecs = Codec.load(model_dir), Codec.load(new_model("other", seed=4))
    for n in range(4):  # the second rank gets the odd ones
        wrong = n % 2 == 1 or n_wrong == 4
        write_atomic(tmp_path / "mixed" / f"{n}.png.lcx", codecs[wrong].encode(photo(20, 20)))
    arguments = ["decode", str(tmp_path / "mixed"), "-o", str(tmp_path / "o"), "-m", str(model_dir), "--json"]
    codes, told, said = on_two_ranks(arguments)
    assert codes == [3, 3] if n_wrong == 4 else [1, 1], said
    if n_wrong == 4:
        assert told == []
        assert said.count("needs stream") == 2
    else:
        assert [(one["n_files"], one["n_done"], one["n_failed"]) for one in told] == [(4, 2, 2)], said
        assert tree(tmp_path / "o") == ["0.png.png", "2.png.png"]


def test_ranks_without_a_launcher_are_refused_before_any_work(
    encode: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, out = encode("o")
    assert code == 2
    assert tree(out) == []


def test_a_full_disk_is_one_line_and_no_half_file(
    encode: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if ".lcx" in self.name:
            write(self, data[:30])
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, out = encode("o")
    assert code == 1
    lines = errors(capsys)
    assert len(lines) == 3
    assert all(line.endswith(": No space left on device") for line in lines)
    assert tree(out) == []
