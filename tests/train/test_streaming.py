"""train.streaming: endless batches out of tar streams, a random stream per reader, every failure counted."""

import gzip
import io
import tarfile
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec import images
from codec.errors import UsageError
from tests.conftest import photo
from train.config import DataConfig
from train.streaming import check_stream, list_urls, stream_batches


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(seed: int) -> bytes:
    return images.save_png(photo(24, 20, seed=seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of three images each, 00.tar to 03.tar."""
    for n in range(4):
        write_tar(tmp_path / f"{n:02d}.tar", {f"i/{n}.{m}.PNG": png(3 * n + m) for m in range(3)} | {"i/x.txt": b"x"})
    return tmp_path


def config(shards: object, **changes: Any) -> DataConfig:
    return DataConfig(
        **{"mode": "streaming", "shards": str(shards), "crop": 16, "workers": 0, "shuffle_buffer": 8, **changes}
    )


def keys(batches: Iterator[dict[str, Any]], n_batches: int = 20) -> list[str]:
    return [key for batch in islice(batches, n_batches) for key in batch["key"]]


ALL_KEYS = {f"{n:02d}/i/{n}.{m}" for n in range(4) for m in range(3)}


def test_batches_come_from_all_shards_shuffled_and_cropped(folder: Path) -> None:
    batches = stream_batches(config(folder / "{00..03}.tar"), 4, seed=0)
    first = next(batches)
    assert first["image"].shape == (4, 3, 16, 16)
    assert first["bad"] == []
    assert -1 <= first["image"].min() < first["image"].max() <= 1
    seen = keys(batches, 50)
    assert set(seen) == ALL_KEYS
    runs = sum(a.split("/")[0] != b.split("/")[0] for a, b in pairwise(seen))
    assert runs > len(seen) / 2  # a shard at a time would change after each third
    image = images.load(png(int(first["key"][0][-1]) + 3 * int(first["key"][0][-3])))
    crop = ((first["image"][0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16, 3)).squeeze(2)
    assert any((windows == turned).all(axis=(2, 3, 4)).any() for turned in (crop, crop[:, ::-1]))


def test_the_draws_depend_on_seed_rank_and_start(folder: Path) -> None:
    data = config(folder / "{00..03}.tar")
    cases = [{}, {"rank": 1}, {"start": 64}, {"seed": 1}]
    orders = [keys(stream_batches(data, 4, **{"seed": 0, "n_ranks": 2, **case})) for case in cases]
    again = keys(stream_batches(data, 4, seed=0, rank=0, n_ranks=2))
    assert again == orders[0]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert all(set(order) == ALL_KEYS for order in orders)  # nothing is split by rank
    with pytest.raises(ValueError, match="rank = 2"):
        stream_batches(data, 4, seed=0, rank=2, n_ranks=2)


def test_workers_draw_apart_from_fewer_shards_than_workers(folder: Path) -> None:
    data = config(folder / "00.tar", workers=2, crop=20)
    one, two = islice(stream_batches(data, 12, seed=0), 2)  # one batch of each worker
    assert set(one["key"]) == set(two["key"]) == {key for key in ALL_KEYS if key.startswith("00")}
    assert one["key"] != two["key"]


def test_crops_resize_and_the_final_part(folder: Path) -> None:
    data = config(folder / "{00..03}.tar", crops=(8, 16, 24), random_resize=2.0)
    sides = [batch["image"].shape[-2:] for batch in islice(stream_batches(data, 3, seed=0), 30)]
    assert {tuple(side) for side in sides} == {(8, 8), (16, 16), (24, 24)}
    last = config(folder / "{00..03}.tar", final_crop=20)
    assert next(stream_batches(last, 2, seed=0, final=True))["image"].shape == (2, 3, 20, 20)
    assert next(stream_batches(last, 2, seed=0))["image"].shape == (2, 3, 16, 16)
    plain, resized = (
        next(stream_batches(config(folder / "00.tar", crop=8, random_resize=r), 4, seed=0)) for r in (1.0, 3.0)
    )
    assert not torch.equal(plain["image"], resized["image"])


def test_pipes_and_compressed_shards_and_several_patterns(folder: Path) -> None:
    (folder / "03.tar.gz").write_bytes(gzip.compress((folder / "03.tar").read_bytes()))
    data = config(f"pipe:cat {folder}/{{00..01}}.tar::{folder / '02.tar'}::pipe:cat {folder / '03.tar.gz'}")
    assert len(list_urls(data)) == 4
    batches = list(islice(stream_batches(data, 4, seed=0), 30))
    assert {key for batch in batches for key in batch["key"]} == ALL_KEYS
    assert not [bad for batch in batches for bad in batch["bad"]]


def counted(data: DataConfig, n_batches: int = 40) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """Keys that came, and the bad ones with kind and reason."""
    batches = list(islice(stream_batches(data, 4, seed=0), n_batches))
    bad = {key: (kind, reason) for batch in batches for key, kind, reason in batch["bad"]}
    return {key for batch in batches for key in batch["key"]}, bad


def test_bad_samples_are_counted_and_left_out(folder: Path) -> None:
    path = write_tar(folder / "04.tar", {"a.png": b"text", "b.c.jpg": png(1)[:-40], "._d.png": b"", "e.png": png(2)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.SYMTYPE, "e.png"
        tar.addfile(link)
    batches = list(islice(stream_batches(config(folder / "{03..04}.tar"), 4, seed=0), 40))
    n_sound = sum(key == "04/e" for batch in batches for key in batch["key"])
    n_text = sum(bad.key == "04/a" for batch in batches for bad in batch["bad"])
    assert n_text == pytest.approx(n_sound, abs=10)  # each time once
    assert n_sound > 20
    seen, bad = counted(config(folder / "{03..04}.tar"))
    assert seen == {key for key in ALL_KEYS if key.startswith("03")} | {"04/e"}
    assert {key: kind for key, (kind, _) in bad.items()} == {
        "04/a": "not an image",
        "04/b.c": "truncated",
        "04/f": "not supported",
    }


def test_broken_shards_are_counted_and_give_what_they_have(folder: Path) -> None:
    data = (folder / "01.tar").read_bytes()
    damaged = bytearray(data)
    with tarfile.open(folder / "01.tar") as tar:
        second, third = tar.getmembers()[1:3]
    damaged[third.offset : third.offset + 8] = b"garbage!"
    contents = {
        "cut": data[: second.offset_data + 50],
        "even": data[: second.offset],  # a whole number of blocks: tarfile alone takes it for the end
        "damaged": bytes(damaged),
        "joined": data + (folder / "02.tar").read_bytes(),
        "text": b"<html>not found</html>",
    }
    for name, content in contents.items():
        (folder / f"{name}.tar").write_bytes(content)
    urls = {name: f"{folder}/{name}.tar" for name in contents}
    urls |= {
        "gone": f"{folder}/gone.tar",
        "pipe": f"pipe:cat {folder}/gone.tar 2>/dev/null",
        "fails": f"pipe:cat {folder}/00.tar; exit 3",
        "scheme": "nosuch://host/x.tar",
    }
    seen, bad = counted(config("::".join(urls.values())), 100)
    assert set(bad) == set(urls.values())
    assert {kind for kind, _ in bad.values()} == {"shard"}
    expected = {
        "cut": "unexpected end of data",
        "even": "without the end mark",
        "damaged": "damaged header",
        "joined": "several tars joined",
        "text": "could not be opened|truncated",
        "gone": "No such file",
        "pipe": "exit status 1",
        "fails": "exit 3|exit status 3",
        "scheme": "no gopen handler",
    }
    for name, words in expected.items():
        assert any(word in bad[urls[name]][1] for word in words.split("|")), (name, bad[urls[name]])
    per_shard = {name: sum(key.startswith(f"{name}/") for key in seen) for name in contents}
    assert per_shard == {"cut": 1, "even": 1, "damaged": 2, "joined": 3, "text": 0}


def test_a_stream_of_nothing_but_failures_ends(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"16 shards in a row gave no image; the last: .*gone\.tar: No such file"):
        next(stream_batches(config(folder / "gone.tar"), 2, seed=0))
    write_tar(folder / "empty.tar", {"a.txt": b""})
    with pytest.raises(UsageError, match="16 shards in a row gave no image"):
        next(stream_batches(config(folder / "empty.tar"), 2, seed=0))
    write_tar(folder / "text.tar", {f"{n}.png": b"text" for n in range(50)})
    with pytest.raises(UsageError, match="1000 unreadable samples in a row; the last: text/"):
        next(stream_batches(config(folder / "text.tar"), 2, seed=0))


def test_the_start_fails_fast_where_a_rank_could_starve(folder: Path) -> None:
    text = check_stream(config(folder / "{00..03}.tar", workers=2), n_ranks=3)
    assert "4 shard(s), 3 rank(s) x 2 worker(s)" in text
    assert "fewer shards than readers" in text
    assert "fewer" not in check_stream(config(folder / "{00..03}.tar"), n_ranks=4)
    assert "4 shard(s)" in check_stream(config(f"{folder}/gone.tar::{folder}/{{00..02}}.tar"))  # counted, later

    write_tar(folder / "empty.tar", {"a.txt": b""})
    write_tar(folder / "text.tar", {"a.png": b"text"})
    for shards, reason in {
        "": "data.shards is empty",
        folder / "{00..": "data.shards = ",
        folder / "gone{0..5}.tar": r"cannot be used \(so are the next 2\): .*gone0\.tar: No such file",
        f"pipe:cat {folder}/gone.tar 2>/dev/null": r"first shard cannot be used: pipe:.*exit status 1",
        folder / "empty.tar": r"empty\.tar: it holds no image",
        folder / "text.tar": r"text\.tar: text/a: not an image",
        folder: r"a folder; expected URLs .* data\.mode=indexed",
        "x${WDS_NOT_SET}.tar": "NOT_SET",
    }.items():
        with pytest.raises(UsageError, match=reason):
            check_stream(config(shards))
