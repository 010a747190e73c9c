"""Images that are held in memory, on the device of the networks, give the batches that reading them gives."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from codec.errors import UsageError
from codec.shards import read_index
from tests.train.conftest import tiny_trainer
from train.config import DataConfig
from train.data import SampleSequence, batches
from train.memory import MemoryImages
from train.recipe import load_recipe

CONFIGS = [
    DataConfig(crop=64, final_crop=96, final_part=0.25, workers=0),  # images are of 72 to 100 pixels: some are smaller
    DataConfig(crops=(64, 72, 96), flip=False, workers=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["stages", "sizes"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_images_in_memory_are_cut_as_those_that_are_read(shards: Path, config: DataConfig, share: float) -> None:
    assert_same_batches(shards, config, share, torch.device("cpu"), 0.0)


def assert_same_batches(shards: Path, config: DataConfig, share: float, device: torch.device, atol: float) -> None:
    sequence = SampleSequence(read_index(shards), config, 3, batch_size=4)
    held = MemoryImages(sequence, device)
    how = {"rank": 1, "n_ranks": 2, "start": 8}
    read = islice(batches(sequence.stage(share), 4, 0, **how), 6)
    cut = islice(held.batches(sequence.stage(share), 4, **how), 6)
    for a, b in zip(read, cut, strict=True):
        assert (b["image"].device.type, b["image"].dtype) == (device.type, torch.float32)
        assert torch.allclose(a["image"], b["image"].cpu(), rtol=0, atol=atol)
        assert a["key"] == b["key"]


def test_an_unreadable_image_in_memory_is_replaced_and_counted_as_one_that_is_read(
    shards: Path, tmp_path: Path
) -> None:
    refs = read_index(shards)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(refs[2].shard.read_bytes()[: refs[2].offset + 100])
    refs[2] = type(refs[2])(**{**vars(refs[2]), "shard": broken})
    sequence = SampleSequence(refs, CONFIGS[0], 3, batch_size=4)
    read = list(islice(batches(sequence, 4, 0), 6))
    cut = list(islice(MemoryImages(sequence, torch.device("cpu")).batches(sequence, 4), 6))
    assert [b["bad"] for b in cut] == [b["bad"] for b in read]
    assert sum(len(b["bad"]) for b in cut) >= 2  # once in each of two epochs at least
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(read, cut, strict=True))


def test_images_in_memory_are_what_a_run_takes_and_crops_that_are_resized_are_refused(
    shards: Path, tmp_path: Path
) -> None:
    trainer = tiny_trainer(shards, tmp_path / "a", "data.memory=device", "data.workers=3")
    other = tiny_trainer(shards, tmp_path / "b")
    assert "GB of images in memory" in trainer.feed.describe()
    a, b = next(trainer.feed.batches(0.0, 4)), next(other.feed.batches(0.0, 4))
    assert torch.equal(a["image"], b["image"])
    with pytest.raises(UsageError, match=r"data\.memory = 'device', allowed: none"):
        load_recipe("tiny", ["data.memory=device", "data.aspect_buckets=3"])
    with pytest.raises(UsageError, match=r"data\.memory = 'device', allowed: none with model.image_channels 4"):
        load_recipe("tiny", ["data.memory=device", "model.image_channels=4"])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=["stages", "sizes"])
def test_images_in_a_gpus_memory_are_cut_as_those_that_are_read(shards: Path, config: DataConfig) -> None:
    assert_same_batches(shards, config, 0.0, torch.device("cuda"), 1e-6)
