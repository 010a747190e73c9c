"""codec.shards and codec.shard_scan on other people's tars: indexed once, read by offset, nothing lost unsaid."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec import images, shard_scan
from codec.errors import UsageError
from codec.shards import read_index, read_sample
from tests.conftest import photo


def png(seed: int, height: int = 16, width: int = 24) -> bytes:
    return images.save_png(photo(height, width, seed=seed))


def write_tar(path: Path, files: Mapping[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def index_of(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.json")


def test_images_are_found_by_their_last_extension_and_read_by_offset(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    jpeg = io.BytesIO()
    Image.fromarray(photo(16, 24)).save(jpeg, "JPEG", exif=turned)
    files = {
        "b/photo.v1.2.JPG": jpeg.getvalue(),
        "b/photo.v1.2.cls": b"7\n",
        "./b/photo.v1.3.PnG": png(1),
        "dir.with.dots/c.png": png(2),
        "dir.with.dots/c.json": json.dumps({"class": "cat"}).encode(),
        "d.input.png": png(3),
        "d.cls": b"3",
        "e.json": b"not json",
        "e.png": png(4),
        "notes.txt": b"no image",
        "b/._photo.v1.2.JPG": b"macOS puts these there",
    }
    write_tar(tmp_path / "x.1.tar", files)
    refs = read_index(tmp_path)
    assert [ref.key for ref in refs] == [
        "x.1/b/photo.v1.2",
        "x.1/b/photo.v1.3",
        "x.1/dir.with.dots/c",
        "x.1/d.input",
        "x.1/e",
    ]
    assert [ref.ext for ref in refs] == ["jpg", "png", "png", "png", "png"]
    assert [ref.label for ref in refs] == ["7", None, "cat", "3", None]
    assert [(ref.width, ref.height) for ref in refs] == [(16, 24)] + [(24, 16)] * 4
    assert [read_sample(ref) for ref in refs] == [data for name, data in files.items() if shard_scan.image_name(name)]
    assert [ref.sha256 for ref in refs] == [hashlib.sha256(read_sample(ref)).hexdigest() for ref in refs]


def test_equal_names_stay_distinct_samples(tmp_path: Path) -> None:
    for n in (1, 0):  # read in the order of names
        write_tar(tmp_path / f"{n}.tar", [("a.png", png(10 * n)), ("a.png", png(10 * n + 1)), ("a.webp", png(2))])
    refs = read_index(tmp_path)
    assert [ref.key for ref in refs] == ["0/a", "0/a#2", "0/a#3", "1/a", "1/a#2", "1/a#3"]
    assert [read_sample(ref) for ref in refs] == [png(0), png(1), png(2), png(10), png(11), png(2)]


def test_the_index_is_made_once_and_again_when_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    scan = shard_scan._scan
    monkeypatch.setattr(shard_scan, "_scan", lambda path, kind: scanned.append(path.name) or scan(path, kind))
    tars = [write_tar(tmp_path / f"{n}.tar", {"a.png": png(n)}) for n in range(3)]
    first = read_index(tmp_path)
    assert read_index(tmp_path) == first
    assert scanned == ["0.tar", "1.tar", "2.tar"]

    later = tars[1].stat().st_mtime + 10
    write_tar(tars[1], {"b.png": png(7)})  # of the same size
    os.utime(tars[1], (later, later))
    write_tar(tars[2], {f"{n}.png": png(n) for n in range(20)})
    index_of(tars[0]).write_text(index_of(tars[0]).read_text()[:-20])  # torn
    assert [ref.key for ref in read_index(tmp_path)] == ["0/a", "1/b", *(f"2/{n}" for n in range(20))]
    assert scanned[3:] == ["0.tar", "1.tar", "2.tar"]
    read_index(tmp_path)
    assert len(scanned) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{n}.tar" for n in range(3)] + [f"{n}.tar.index.json" for n in range(3)]
    )


def test_an_unwritable_folder_keeps_the_index_in_memory_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", {"a.png": png(n)})

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shard_scan, "write_atomic", refuse)
    assert [ref.key for ref in read_index(tmp_path)] == ["0/a", "1/a"]
    told = capsys.readouterr().err
    assert told.count("kept in memory") == told.count("\n") == 1
    assert "Permission denied" in told
    assert len(read_index(tmp_path, quiet=True)) == 2
    assert capsys.readouterr().err == ""


def test_what_cannot_be_used_is_counted_and_said_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "x.tar", {"good.png": png(0), "text.png": b"no image", "cut.jpg": b"", "c.png": png(1)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "good.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    for _ in range(2):
        assert [ref.key for ref in read_index(tmp_path)] == ["x/good", "x/c"]
        told = capsys.readouterr().err
        assert (
            "x.tar: 3 of 5 images cannot be used, listed in x.tar.index.json; the first: x/text: not an image" in told
        )
    assert json.loads(index_of(path).read_text())["bad"] == [
        ["x/text", "not an image that Pillow can read"],
        ["x/cut", "empty file"],
        ["x/link", "not a plain file"],
    ]


def test_a_truncated_tar_gives_its_whole_images_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tar(tmp_path / "x.tar", {f"{n}.png": png(n) for n in range(3)}).read_bytes()
    offsets = [ref.offset for ref in read_index(tmp_path)]
    capsys.readouterr()
    cuts = {
        offsets[2] + 40: (2, 1, "unexpected end"),  # in the last image
        offsets[2] - 100: (2, 0, "header"),  # in the last header
        offsets[2] - 512: (2, 0, "end mark"),  # before it: a whole number of blocks, as transfers like to break
    }
    for cut, (n_whole, n_bad, reason) in cuts.items():
        (tmp_path / "x.tar").write_bytes(data[:cut])
        assert [ref.key for ref in read_index(tmp_path)] == [f"x/{n}" for n in range(n_whole)]
        told = capsys.readouterr().err
        assert f"x.tar: truncated: {told.split('truncated: ')[1].split(';')[0]}; the 2 whole images" in told
        assert reason in told
        assert ("1 of 3 images cannot be used" in told) == bool(n_bad)


def test_damaged_tars_and_folders_without_images_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{n}.png": png(n) for n in range(3)})
    data = bytearray(path.read_bytes())
    header = read_index(tmp_path)[1].offset - 512
    data[header : header + 8] = b"garbage!"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"x\.tar: not an uncompressed tar, or damaged: damaged header"):
        read_index(tmp_path)  # where tarfile, and with it webdataset, would see one image and no error

    joined = write_tar(path, {"a.png": png(0)}).read_bytes() * 2
    path.write_bytes(joined)
    with pytest.raises(UsageError, match="several tars joined"):
        read_index(tmp_path)
    for content in (b"", b"x" * 2000, np.random.default_rng(0).bytes(700)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"x\.tar: not an uncompressed tar"):
            read_index(tmp_path)
    write_tar(path, {"a.txt": b"text"})
    with pytest.raises(UsageError, match="no readable image in any of the 1 tar files"):
        read_index(tmp_path)
