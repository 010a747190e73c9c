import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codec import images
from codec.errors import UsageError
from codec.shards import SampleRef, read_index, read_sample
from train.bad_samples import BadSample, BadSamples, TooManyBadError, bad_sample
from train.config import DataConfig
from train.crops import centre_crop, cover_crop, random_crop
from train.data import SampleSequence, batches, describe_data, is_final, share_of, split, whole_images

CONFIG = DataConfig(crop=32)


def keys_and_images(
    sequence: SampleSequence, *, workers: int = 0, n_ranks: int = 1, batch_size: int = 0, n_rounds: int = 4
) -> list[tuple[str, torch.Tensor]]:
    """The first samples (by default 24), in global order, put together from all ranks."""
    batch_size = batch_size or 6 // n_ranks
    loaders = [iter(batches(sequence, batch_size, workers, rank=rank, n_ranks=n_ranks)) for rank in range(n_ranks)]
    found = []
    for _ in range(n_rounds):
        for loader in loaders:
            batch = next(loader)
            found += list(zip(batch["key"], batch["image"], strict=True))
    return found


def equal(one: list[tuple[str, torch.Tensor]], other: list[tuple[str, torch.Tensor]]) -> bool:
    same = all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
    return same and [key for key, _ in one] == [key for key, _ in other]


def test_the_sequence_depends_on_the_seed_alone_not_on_ranks_or_workers(shards: Path) -> None:
    refs = read_index(shards)
    alone = keys_and_images(SampleSequence(refs, CONFIG, seed=3))
    for half in (alone[:12], alone[12:]):  # each of the two epochs, whatever the ranks and workers
        assert sorted(key for key, _ in half) == sorted(ref.key for ref in refs)
    for how in ({"n_ranks": 2}, {"n_ranks": 3}, {"n_ranks": 2, "workers": 2}):
        assert equal(keys_and_images(SampleSequence(refs, CONFIG, seed=3), **how), alone)
    resumed = next(iter(batches(SampleSequence(refs, CONFIG, seed=3), 2, 0, rank=1, n_ranks=2, start=16)))
    assert equal(list(zip(resumed["key"], resumed["image"], strict=True)), alone[18:20])
    assert [key for key, _ in keys_and_images(SampleSequence(refs, CONFIG, seed=4))] != [key for key, _ in alone]


def test_every_epoch_holds_every_sample_once_in_another_order(shards: Path) -> None:
    refs = read_index(shards)
    sequence = SampleSequence(refs, CONFIG, seed=0)
    epochs = [[sequence[epoch * len(refs) + n]["key"] for n in range(len(refs))] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(ref.key for ref in refs)
    assert epochs[0] != epochs[1]
    first, again = sequence[0]["image"], sequence[len(refs)]["image"]
    assert first.shape == again.shape == (3, 32, 32)
    assert -1 <= first.min() < first.max() <= 1


def test_a_crop_is_a_piece_of_the_image_mirrored_or_not(shards: Path) -> None:
    ref = read_index(shards)[0]
    image = images.load(read_sample(ref))
    mirrored = []
    for position in range(8):
        x = SampleSequence([ref], CONFIG, seed=1)[position]["image"]
        crop = ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3)).squeeze(2)
        straight = (windows == crop).all(axis=(2, 3, 4)).any()
        turned = (windows == crop[:, ::-1]).all(axis=(2, 3, 4)).any()
        assert straight or turned
        mirrored.append(bool(turned))
    assert len(set(mirrored)) == 2


def test_the_final_stage_takes_other_crops_of_the_same_samples(shards: Path) -> None:
    refs = read_index(shards)
    sequence = SampleSequence(refs, DataConfig(crop=32, final_crop=48, final_part=0.25), seed=3)
    assert sequence.stage(0.7) is sequence
    final = sequence.stage(0.75)
    assert sequence.stage(1.0) is final
    assert (sequence[40]["image"].shape, final[40]["image"].shape) == ((3, 32, 32), (3, 48, 48))
    assert sequence[40]["key"] == final[40]["key"]
    assert SampleSequence(refs, CONFIG, seed=3).stage(1.0)[40]["image"].shape == (3, 32, 32)


def test_the_cache_changes_no_sample_and_keeps_to_its_size(shards: Path) -> None:
    refs = read_index(shards)
    plain = SampleSequence(refs, CONFIG, seed=3)
    cached = SampleSequence(refs, DataConfig(crop=32, cache_mb=0.1), seed=3)  # four of the twelve images
    for position in range(2 * len(refs)):
        assert torch.equal(plain[position]["image"], cached[position]["image"])
    assert 0 < sum(4 * image.width * image.height for image in cached._cache.values()) <= 100_000
    assert not plain._cache


def test_images_smaller_than_the_crop_are_enlarged() -> None:
    rng = np.random.default_rng(0)
    small = np.full((10, 20, 3), 77, np.uint8)
    assert (random_crop(Image.fromarray(small), 32, rng) == 77).all()
    assert random_crop(Image.fromarray(small), 32, rng).shape == (32, 32, 3)
    assert centre_crop(small, 64, 8).shape == (8, 16, 3)
    assert centre_crop(small, 64, 16).shape == (16, 32, 3)
    assert random_crop(Image.fromarray(np.full((1, 60_000, 3), 77, np.uint8)), 256, rng).shape == (256, 256, 3)


def ramp(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row, as shares of 250; so a resized piece tells where it was cut."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([250 * x / (width - 1), 250 * y / (height - 1), 0 * x], axis=-1).round().astype(np.uint8)


def test_random_resize_cuts_larger_pieces_and_reduces_them(shards: Path) -> None:
    image = ramp(120, 200)
    shares = []
    for seed in range(1000):
        crop = random_crop(Image.fromarray(image), 20, np.random.default_rng(seed), largest=4.0).astype(float)
        assert crop.shape == (20, 20, 3)
        across, down = (crop[:, -1, 0] - crop[:, 0, 0]).mean() / 250, (crop[-1, :, 1] - crop[0, :, 1]).mean() / 250
        assert across * 199 == pytest.approx(down * 119, abs=4)  # square pieces
        shares.append(across * 199 / 19)
    assert min(shares) == pytest.approx(1, abs=0.15)
    assert max(shares) == pytest.approx(4, abs=0.15)
    assert np.mean(np.array(shares) < 2) == pytest.approx(0.5, abs=0.05)  # log-uniform
    small = [
        random_crop(Image.fromarray(ramp(30, 25)), 20, np.random.default_rng(seed), largest=4.0) for seed in range(50)
    ]
    assert max(float(crop[0, -1, 0]) - float(crop[0, 0, 0]) for crop in small) <= 250
    same = [
        random_crop(Image.fromarray(image[:20, :20]), 20, np.random.default_rng(seed), largest=4.0) for seed in range(5)
    ]
    assert all((crop == image[:20, :20]).all() for crop in same)  # no room: pixels as they are

    refs, config = read_index(shards), DataConfig(crop=32, random_resize=2.0)
    resized = [SampleSequence(refs, config, seed=3)[position]["image"] for position in range(4)]
    assert all(torch.equal(SampleSequence(refs, config, seed=3)[n]["image"], resized[n]) for n in (3, 0, 2))
    plain = SampleSequence(refs, CONFIG, seed=3)
    assert not any(torch.equal(plain[n]["image"], resized[n]) for n in range(4))
    assert resized[0].shape == (3, 32, 32)


def test_a_covering_crop_keeps_one_side_whole_and_moves_along_the_other() -> None:
    starts = []
    for seed in range(40):
        crop = cover_crop(Image.fromarray(ramp(100, 300)), 20, 40, np.random.default_rng(seed)).astype(float)
        assert crop.shape == (20, 40, 3)
        assert crop[-1, :, 1].mean() - crop[0, :, 1].mean() == pytest.approx(250 * 19 / 20, abs=6)
        assert crop[:, -1, 0].mean() - crop[:, 0, 0].mean() == pytest.approx(250 * 2 / 3 * 39 / 40, abs=6)
        starts.append(crop[0, 0, 0])
    assert min(starts) < 15
    assert max(starts) > 70
    assert cover_crop(Image.fromarray(ramp(2, 5000)), 64, 32, np.random.default_rng(0)).shape == (64, 32, 3)


def test_multi_resolution_batches_have_one_side_each_of_all_sides(shards: Path) -> None:
    refs, config = read_index(shards), DataConfig(crop=32, crops=(16, 32, 48))
    sequence = SampleSequence(refs, config, seed=1, batch_size=2)
    assert sequence.shapes == [(16, 16), (32, 32), (48, 48)]
    alone = keys_and_images(sequence, batch_size=2, n_rounds=24)
    sides = [image.shape[-1] for _, image in alone]
    assert sides[::2] == sides[1::2]  # of a batch
    assert set(sides) == {16, 32, 48}
    of_ranks = keys_and_images(SampleSequence(refs, config, 1, batch_size=2), batch_size=2, n_ranks=3, n_rounds=8)
    assert equal(alone, of_ranks)
    assert torch.equal(SampleSequence(refs, config, 1, batch_size=2)[37]["image"], alone[37][1])
    for size, start in ((3, 0), (2, 5)):
        with pytest.raises(UsageError, match=r"resume with the same optim\.batch_size"):
            batches(sequence, size, 0, start=start)


@pytest.fixture
def wide_and_tall(tmp_path: Path) -> list[SampleRef]:
    """23 images, from 1:3 to 3:1, in one shard."""
    rng = np.random.default_rng(0)
    data, refs = b"", []
    for n in range(23):
        width = int(60 * 3 ** rng.uniform(-0.5, 0.5))
        height = round(3600 / width) if n else 20
        png = images.save_png(ramp(height, width if n else 60))
        place = {"shard": tmp_path / "x.tar", "offset": len(data), "length": len(png)}
        refs.append(
            SampleRef(key=str(n), ext="png", width=width if n else 60, height=height, label=None, sha256="", **place)
        )
        data += png
    (tmp_path / "x.tar").write_bytes(data)
    return refs


def test_aspect_buckets_cover_every_sample_in_batches_of_one_shape(wide_and_tall: list[SampleRef]) -> None:
    config = DataConfig(crop=32, aspect_buckets=5, flip=False)
    sequence = SampleSequence(wide_and_tall, config, seed=2, batch_size=4, multiple=8)
    n_rounds = sequence.epoch_length // 4
    assert 23 <= sequence.epoch_length < 23 + 5 * 4
    found = keys_and_images(sequence, batch_size=4, n_rounds=2 * n_rounds)
    refs = {ref.key: ref for ref in wide_and_tall}
    for epoch in (found[: 4 * n_rounds], found[4 * n_rounds :]):
        assert {key for key, _ in epoch} == set(refs)
    together = [frozenset(key for key, _ in found[start : start + 4]) for start in range(0, len(found), 4)]
    assert set(together[:n_rounds]) != set(together[n_rounds:])  # another order within the buckets
    columns = [image.shape[2] for _, image in found[: 4 * n_rounds : 4]]
    assert columns not in (sorted(columns), sorted(columns, reverse=True))  # batches of all buckets, mixed
    assert columns != [image.shape[2] for _, image in found[4 * n_rounds :: 4]]
    shapes = set()
    for start in range(0, len(found), 4):
        (shape,) = {image.shape[1:] for _, image in found[start : start + 4]}
        shapes.add(tuple(shape))
        assert shape[0] % 8 == shape[1] % 8 == 0
        assert 700 <= shape[0] * shape[1] <= 1400  # about 32 x 32
        for key, _ in found[start : start + 4]:
            ratio = np.clip(refs[key].width / refs[key].height, 0.5, 2)
            assert abs(np.log(ratio / (shape[1] / shape[0]))) < 0.4  # half a step, and the rounding to 8 pixels
    assert len(shapes) >= 4
    assert shapes == set(sequence.shapes)


def test_aspect_buckets_depend_on_the_seed_alone(wide_and_tall: list[SampleRef]) -> None:
    config = DataConfig(crop=32, aspect_buckets=3, crops=(32, 64))

    def sequence(seed: int = 2) -> SampleSequence:
        return SampleSequence(wide_and_tall, config, seed, batch_size=2, multiple=8)

    alone = keys_and_images(sequence(), batch_size=2, n_rounds=36)
    assert equal(alone, keys_and_images(sequence(), batch_size=2, n_ranks=3, n_rounds=12))
    assert equal(alone[60:61], [(sequence()[60]["key"], sequence()[60]["image"])])
    assert [key for key, _ in alone] != [key for key, _ in keys_and_images(sequence(3), batch_size=2, n_rounds=36)]
    assert {max(image.shape[1:]) > 48 for _, image in alone} == {False, True}  # both sides


def break_sample(shards: Path, tmp_path: Path) -> list[SampleRef]:
    refs = read_index(shards)
    data = bytearray(refs[0].shard.read_bytes())
    data[refs[0].offset : refs[0].offset + refs[0].length] = bytes(refs[0].length)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(data)
    return [SampleRef(**{**vars(ref), "shard": broken}) for ref in refs]


def test_a_broken_sample_is_replaced_reported_and_moves_no_other(shards: Path, tmp_path: Path) -> None:
    whole = SampleSequence(read_index(shards), CONFIG, seed=0)
    broken = SampleSequence(break_sample(shards, tmp_path), CONFIG, seed=0)
    bad = []
    for position in range(12):
        before, after = whole[position], broken[position]
        if after["bad"]:
            bad += [key for key, kind, _ in after["bad"] if kind == "not an image"]
            assert after["key"] != before["key"]
            assert torch.equal(after["image"], broken[position]["image"])
        else:
            assert torch.equal(after["image"], before["image"])
    assert bad == [read_index(shards)[0].key]


def test_nothing_but_broken_samples_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unreadable samples in a row"):
        SampleSequence(break_sample(shards, tmp_path)[:1], CONFIG, seed=0)[0]


def test_the_split_is_disjoint_stable_and_complete(shards: Path) -> None:
    refs = read_index(shards)
    training, validation = split(refs, 4)
    assert len(validation) == 4
    assert {ref.key for ref in training} | {ref.key for ref in validation} == {ref.key for ref in refs}
    assert len(training) + len(validation) == len(refs)
    assert {r.key for r in split(refs[::-1], 4)[1]} == {r.key for r in validation}
    without_one = [ref for ref in refs if ref.key != training[0].key]
    assert split(without_one, 4)[1] == validation
    with pytest.raises(UsageError, match="12 images"):
        split(refs, 12)


def test_copies_of_an_image_stay_on_one_side_of_the_split(shards: Path) -> None:
    refs = read_index(shards)
    doubled = refs + [SampleRef(**{**vars(ref), "key": ref.key + "-copy"}) for ref in refs]
    training, validation = split(doubled, 3)
    assert not {ref.sha256 for ref in training} & {ref.sha256 for ref in validation}
    assert len(training) + len(validation) == len(doubled)


def test_whole_images_yields_each_sample_once_and_refuses_broken_ones(shards: Path, tmp_path: Path) -> None:
    refs = read_index(shards)
    found = dict(whole_images(refs, 80, 8))
    assert list(found) == [ref.key for ref in refs]
    assert all(image.shape[0] % 8 == image.shape[1] % 8 == 0 and max(image.shape) <= 80 for image in found.values())
    with pytest.raises(ValueError, match="not an image"):
        list(whole_images(break_sample(shards, tmp_path), 80, 8))


def test_shares_of_the_samples_are_every_sample_once(shards: Path) -> None:
    refs = read_index(shards)
    for n_ranks in (1, 2, 3, 5, 13):
        shares = [share_of(refs, rank, n_ranks) for rank in range(n_ranks)]
        assert sorted((ref for share in shares for ref in share), key=refs.index) == refs
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_start_of_a_run_says_what_is_read(shards: Path, wide_and_tall: list[SampleRef]) -> None:
    config = DataConfig(crop=32, workers=3)
    text = describe_data(SampleSequence(read_index(shards), config, 0, batch_size=3), n_ranks=2)
    assert "12 samples in 1 shard(s), 2 rank(s) x 3 worker(s), 2.0 batches of 3 per rank and epoch" in text
    config = DataConfig(crop=32, aspect_buckets=1)
    assert "crops 32 x 32" in describe_data(SampleSequence(wide_and_tall, config, 0, multiple=8), n_ranks=1)
    assert [is_final(DataConfig(final_crop=64, final_part=0.25), share) for share in (0.7, 0.75)] == [False, True]
    assert not is_final(config, 1.0)


def test_reasons_have_a_kind(shards: Path, tmp_path: Path) -> None:
    refs = read_index(shards)
    data, start, length = refs[0].shard.read_bytes(), refs[0].offset, refs[0].length

    def kind(path: Path, content: bytes | None, **changes: object) -> str:
        if content is not None:
            path.write_bytes(content)
        broken = SampleRef(**{**vars(refs[0]), "key": "truncated: damaged", "shard": path, **changes})
        sequence = SampleSequence([broken, *refs], CONFIG, seed=0)
        (bad,) = {bad for position in range(13) for bad in sequence[position]["bad"]}
        assert bad.key == broken.key
        assert str(path) not in bad.reason
        return bad.kind

    assert kind(tmp_path / "gone.tar", None) == "missing"
    assert kind(tmp_path / "cut.tar", data[: start + 9]) == "truncated"
    assert kind(tmp_path / "short.tar", data, length=length // 2) == "truncated"
    hole = start + length // 2
    assert kind(tmp_path / "hole.tar", data[:hole] + bytes(length // 4) + data[hole + length // 4 :]) == "damaged"
    assert kind(tmp_path / "zero.tar", bytes(len(data))) == "not an image"
    assert kind(tmp_path / "empty.tar", data, length=0) == "not an image"
    assert bad_sample("k", "k", OSError(5, "Input/output error")).kind == "unreadable"
    bad = bad_sample("k", "x/k.png", ValueError("x/k.png: 99999 x 99999 pixels, more than the 9 that are allowed"))
    assert bad == ("k", "too large", "99999 x 99999 pixels, more than the 9 that are allowed")


def test_bad_samples_are_counted_listed_once_and_end_the_run_when_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(path, max_share=0.02)
    for n in range(10):
        bad.add([BadSample(f"k{n % 4}", "truncated" if n % 2 else "missing", "why")], 0, images=n)
        bad.require_few(bad.total, bad.n_read)  # ten are allowed
    assert capsys.readouterr().err.splitlines() == [
        f"error: sample k{n}: why (replaced; listed in {path})" for n in range(4)
    ]
    state = json.loads(json.dumps(bad.state_dict()))
    resumed = BadSamples(path, max_share=0.02)
    resumed.load_state_dict(state)
    assert (resumed.total, resumed.n_read, resumed.counts) == (10, 10, {"missing": 5, "truncated": 5})
    resumed.add([], 539, images=600)
    resumed.add([BadSample("k1", "truncated", "why")], 0, images=600)  # 11 of 550 are 2 %
    resumed.require_few(resumed.total, resumed.n_read)
    resumed.add([BadSample("pipe:x", "shard", "why")], 0, images=700)
    with pytest.raises(TooManyBadError, match=r"12 of 551 .*6 truncated, 5 missing, 1 shard\).*max_bad_share = 0.02"):
        resumed.require_few(resumed.total, resumed.n_read)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k0", "k1", "k2", "k3", "pipe:x"]
    assert lines[-1] == {"key": "pipe:x", "kind": "shard", "reason": "why", "images": 700}
