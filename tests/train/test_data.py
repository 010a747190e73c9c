from pathlib import Path

import numpy as np
import pytest
import torch

from codec import images
from codec.errors import UsageError
from codec.shards import SampleRef, read_index, read_sample
from train.config import DataConfig
from train.data import SampleSequence, batches, centre_crop, random_crop, split, whole_images

CONFIG = DataConfig(crop=32)


def keys_and_images(sequence: SampleSequence, *, workers: int = 0, n_ranks: int = 1) -> list[tuple[str, torch.Tensor]]:
    """The first 24 samples, in global order, put together from all ranks."""
    per_rank = 6 // n_ranks
    loaders = [iter(batches(sequence, per_rank, workers, rank=rank, n_ranks=n_ranks)) for rank in range(n_ranks)]
    found = []
    for _ in range(4):
        for loader in loaders:
            batch = next(loader)
            found += list(zip(batch["key"], batch["image"], strict=True))
    return found


def test_the_sequence_depends_on_the_seed_alone_not_on_ranks_or_workers(shards: Path) -> None:
    refs = read_index(shards)
    alone = keys_and_images(SampleSequence(refs, CONFIG, seed=3))
    for how in ({"workers": 1}, {"n_ranks": 2}, {"n_ranks": 3}):
        other = keys_and_images(SampleSequence(refs, CONFIG, seed=3), **how)
        assert [key for key, _ in other] == [key for key, _ in alone]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, other, strict=True))
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
    assert 0 < sum(image.nbytes for image in cached._cache.values()) <= 100_000
    assert not plain._cache


def test_images_smaller_than_the_crop_are_enlarged() -> None:
    rng = np.random.default_rng(0)
    small = np.full((10, 20, 3), 77, np.uint8)
    assert (random_crop(small, 32, rng) == 77).all()
    assert random_crop(small, 32, rng).shape == (32, 32, 3)
    assert centre_crop(small, 64, 8).shape == (8, 16, 3)
    assert centre_crop(small, 64, 16).shape == (16, 32, 3)
    assert random_crop(np.full((1, 60_000, 3), 77, np.uint8), 256, rng).shape == (256, 256, 3)


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
            bad += [key for key, _ in after["bad"]]
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
