"""codec.files: which files a command works on, and that results are written whole or not at all."""

import os
from pathlib import Path

import pytest

from codec import files
from codec.errors import UsageError

PNG = frozenset({".png", ".jpg"})


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders_are_walked_sorted_without_hidden_files(tmp_path: Path) -> None:
    src = tmp_path / "src"
    touch(src / "b.PNG", src / "a" / "z.jpg", src / "a" / "notes.txt", src / ".hidden.png", src / ".git" / "c.png")
    found = files.find([src], PNG)
    assert [str(source.relative) for source in found] == ["a/z.jpg", "b.PNG"]
    assert [source.path for source in found] == [src / "a" / "z.jpg", src / "b.PNG"]


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "photo.weird")
    (found,) = files.find([tmp_path / "x" / "photo.weird"], PNG)
    assert str(found.relative) == "photo.weird"


def test_the_same_file_is_listed_once_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "src" / "deep" / "a.png")
    (tmp_path / "src" / "deep" / "up").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "other.png").symlink_to(tmp_path / "src" / "deep" / "a.png")
    found = files.find([tmp_path / "src", tmp_path / "src" / "deep", tmp_path / "src" / "deep" / "a.png"], PNG)
    assert [str(source.relative) for source in found] == ["deep/a.png"]


def test_a_dangling_link_is_listed_so_that_it_gets_counted(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [str(source.relative) for source in files.find([tmp_path], PNG)] == ["gone.png"]


def test_equal_relative_paths_of_two_folders_are_both_kept(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "a.png", tmp_path / "two" / "a.png")
    found = files.find([tmp_path / "two", tmp_path / "one"], PNG)
    assert [source.path.parent.name for source in found] == ["two", "one"]
    assert {str(source.relative) for source in found} == {"a.png"}


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        files.find([tmp_path / "nowhere"], PNG)
    touch(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=rf"{tmp_path}: no pictures found \(looked for \.jpg \.png\)"):
        files.find([tmp_path], PNG, "pictures")


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / ("n" * 240)
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_write_atomic_exclusive_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def no_links(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a"
    files.write_atomic(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        files.write_atomic(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_writable(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    touch(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot write here: a file is in the way"):
            files.check_writable(folder)
    if Path("/proc").is_dir():
        with pytest.raises(UsageError, match=r"^/proc/nothing: cannot write here: "):
            files.check_writable(Path("/proc/nothing"))
