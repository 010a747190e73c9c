"""train.shards: original bytes in, the same bytes out by offset and by webdataset; resumed, refused, counted."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from codec.console import run
from codec.errors import ImageError, UsageError
from codec.shards import read_index, read_sample
from train import shards
from train.shards_cli import shards_command

app = typer.Typer()
app.command("shards")(shards_command)


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 16), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """14 good images in three folders, and 2 bad files."""
    folder = tmp_path / "photos"
    for n in range(5):
        picture(folder / "cat" / f"{n}.png", n)
        picture(folder / "dog" / f"IMG.{n:02d}.JPG", n + 5, format="JPEG")
    picture(folder / "a.png", 20)
    picture(folder / "a.jpg", 21)
    picture(folder / "sub" / "b.c" / "Ünï cödé.webp", 22)
    exif = Image.Exif()
    exif[274] = 6
    picture(folder / "turned.jpeg", 23, exif=exif)
    (folder / "cat" / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-50])
    return folder


SHARD_MB = 0.02  # a few images each


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_offsets_and_webdataset_give_the_original_bytes(source: Path, tmp_path: Path) -> None:
    import webdataset

    report = shards.write_shards([source], tmp_path / "out", shard_mb=SHARD_MB, jobs=1)
    assert (report.n_images, report.n_bad, report.reused_shards) == (14, 2, 0)
    assert report.n_shards > 2
    originals = {path.read_bytes() for path in source.rglob("*") if path.is_file() and path.name != "cut.png"}

    refs = read_index(tmp_path / "out")
    assert len({ref.key for ref in refs}) == 14
    assert {read_sample(ref) for ref in refs} == originals - {b"no image"}
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert all(path.stat().st_size <= SHARD_MB * 1e6 for path in tars)
    assert sum(path.stat().st_size for path in tars) == report.size_bytes

    dataset = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
    samples = {sample["__key__"]: sample for sample in dataset}
    assert list(samples) == [ref.key for ref in refs]
    for ref in refs:
        sample, data = samples[ref.key], read_sample(ref)
        assert sample[ref.ext] == data
        with tarfile.open(ref.shard) as tar:
            member = tar.extractfile(f"{ref.key}.{ref.ext}")
            assert member is not None
            assert member.read() == data
        facts = json.loads(sample["json"])
        assert (source / facts["path"]).read_bytes() == data
        assert facts["source"] == "photos"
        assert facts["sha256"] == ref.sha256 == hashlib.sha256(data).hexdigest()
        assert (facts["class"], facts["width"], facts["height"]) == (ref.label, ref.width, ref.height)


def test_keys_classes_and_sizes(source: Path, tmp_path: Path) -> None:
    shards.write_shards([source], tmp_path / "out", jobs=1)
    refs = {ref.key: ref for ref in read_index(tmp_path / "out")}
    assert refs["dog_IMG-01"].ext == "jpg"
    assert refs["dog_IMG-01"].label == "dog"
    assert refs["sub_b-c_-n-c-d-"].label == "b.c"
    assert (refs["turned"].ext, refs["turned"].label) == ("jpg", None)
    assert (refs["turned"].width, refs["turned"].height) == (16, 24)  # stored as 24 x 16, on its side
    assert {ref.ext for key, ref in refs.items() if key.startswith("a-")} == {"png", "jpg"}


def test_hard_names_get_unique_safe_keys(tmp_path: Path) -> None:
    names = ["x.png", "X.png", "x!.png", "x?.png", "a_b/c.png", "a/b_c.png", "日本.png", "本日.png", "l" * 200 + ".png"]
    for n, name in enumerate(names):
        picture(tmp_path / "one/imgs" / name, n)
        if n >= 2:  # x and X differ in nothing but case
            picture(tmp_path / "two/imgs" / name, n)
    picture(tmp_path / "photo.xyz", 99, format="PNG")
    named = [tmp_path / "one/imgs", tmp_path / "two/imgs", tmp_path / "photo.xyz"]
    shards.write_shards(named, tmp_path / "out", jobs=1)
    refs = read_index(tmp_path / "out")
    assert len(refs) == len({ref.key.lower() for ref in refs}) == 17
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert all(set(ref.key) <= allowed and len(ref.key) <= 80 for ref in refs)
    assert {ref.ext for ref in refs if ref.key == "photo"} == {"img"}


def test_unreadable_files_are_listed_and_not_packed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(source), "-o", str(out), "--jobs", "1"]
    assert run(app, argv, "shards") == 1
    stdout, stderr = capsys.readouterr()
    assert f"error: {source / 'cat' / 'text.png'}: not an image that Pillow can read\n" in stderr
    assert f"error: {source / 'cut.png'}: truncated: " in stderr
    assert "14 images in 1 shards" in stdout
    listed = [json.loads(line) for line in (out / shards.BAD_FILES).read_text().splitlines()]
    assert [Path(bad["path"]).name for bad in listed] == ["text.png", "cut.png"]
    assert run(app, argv, "shards") == 1  # still two files short
    assert "nothing to do" in capsys.readouterr().out


def test_processes_change_no_byte(source: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        shards.write_shards([source], tmp_path / str(jobs), shard_mb=SHARD_MB, jobs=jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_second_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1)
    assert again.reused_shards == again.n_shards == first.n_shards
    assert (again.n_images, again.bad, again.size_bytes) == (first.n_images, first.bad, first.size_bytes)
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_killed_run_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    n_shards = shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1).n_shards
    whole = contents(out)
    manifest = json.loads((out / shards.MANIFEST).read_text())
    del manifest["complete"]
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    (out / "shard-000001.tar").unlink()  # gone, though its index stands
    (out / "shard-000002.index.json").unlink()  # killed between the tar and its index
    (out / "shard-000000.tar").write_bytes(b"short")
    (out / ".shard-000001.tar.99.tmp").write_bytes(b"half a shard")
    with pytest.raises(UsageError, match="incomplete; finish them: codec-train shards"):
        read_index(out)
    assert shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1).reused_shards == n_shards - 3
    assert contents(out) == whole


def test_interrupt_leaves_no_half_shard(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.write_shards([source], tmp_path / "whole", shard_mb=SHARD_MB, jobs=1)
    examine, seen = shards._examine, []

    def interrupted(path: str) -> shards._Examined:
        seen.append(path)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return examine(path)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_examine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1)
    left = contents(out)
    tars = [name for name in left if name.endswith(".tar")]
    assert 0 < len(tars) < len(list((tmp_path / "whole").glob("*.tar")))
    assert len(left) == 2 * len(tars) + 1  # each with its index, and the manifest; no temporary file
    assert shards.write_shards([source], out, shard_mb=SHARD_MB, jobs=1).reused_shards == len(tars)
    assert contents(out) == contents(tmp_path / "whole")


def test_other_sources_or_settings_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shards.write_shards([source], out, jobs=1)
    before = contents(out)
    capsys.readouterr()

    def refused(*argv: str) -> str:
        assert run(app, [str(source), "-o", str(out), "--jobs", "1", *argv], "shards") == 2
        assert contents(out) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert str(out) in message
        return message

    assert '{"shard_mb": 64.0}, not {"shard_mb": 32.0}' in refused("--shard-mb", "32")
    picture(source / "one_more.png", 50)
    assert "other sources (16 files then, 17 now" in refused()


def test_output_and_source_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "src" / "a.png", 0)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_bytes(b"dear")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.png").write_bytes(b"bad")
    (tmp_path / "empty").mkdir()
    for src, out, reason in [
        ("src", "file", "cannot write here"),
        ("src", "home", "not empty, and not a shard folder"),
        ("empty", "out", "no images found"),
        ("nowhere", "out", "no such file or folder"),
        ("bad", "out", "none of the 1 files can be read"),
    ]:
        assert run(app, [str(tmp_path / src), "-o", str(tmp_path / out), "--jobs", "1"], "shards") == 2
        assert reason in capsys.readouterr().err
    assert run(app, [str(tmp_path / "src"), "-o", str(tmp_path / "out"), "--jobs", "0"], "shards") == 2
    assert not list((tmp_path / "out").iterdir())  # nothing of the last case is left, so that it can be repaired


def test_read_errors_name_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder .* codec-train shards SRC\.\.\. -o"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no shards here"):
        read_index(tmp_path)
    picture(tmp_path / "src" / "a.png", 0)
    shards.write_shards([tmp_path / "src"], tmp_path / "out", jobs=1)
    (ref,) = read_index(tmp_path / "out")
    Image.open(io.BytesIO(read_sample(ref))).load()
    ref.shard.write_bytes(ref.shard.read_bytes()[: ref.offset + 10])
    with pytest.raises(ImageError, match="shard is truncated, 10 of"):
        read_sample(ref)
    with pytest.raises(UsageError, match="missing or damaged"):
        read_index(tmp_path / "out")
