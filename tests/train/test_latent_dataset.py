"""LatentDataset: what a diffusion trainer gets, the same in every worker; and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from codec.errors import FormatError, ModelError, UsageError
from codec.latent_model import load_latent_model
from tests.train.test_cache import command, foreign_shard, png
from train.cache.reader import CacheReader
from train.cli import main
from train.latent_dataset import LatentDataset

N = 6


@pytest.fixture(scope="module")
def model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a posterior that is wide enough to be seen, and latents that need normalizing."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    network = AutoencoderKL.from_pretrained(model_dir)
    with torch.no_grad():
        network.encoder.conv_out.bias[4:] += 2.0
    network.register_to_config(scaling_factor=0.7, shift_factor=0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, with captions and classes; do not change it."""
    folder = tmp_path_factory.mktemp("cache")
    members: dict[str, bytes] = {}
    for n in range(N):
        members |= {f"{n}.png": png(n, (40, 50 + n)), f"{n}.cls": b"%d" % (10 * (n % 3)), f"{n}.txt": b"caption %d" % n}
    members |= {"5.json": json.dumps({"caption": ["one", "two"]}).encode()}
    del members["5.txt"], members["4.cls"]
    assert main(command(foreign_shard(folder / "s", members), model, folder / "c")) == 0
    return folder / "c"


def plain(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in item.items()}


def copied(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in cache.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_sample_is_drawn_mirrored_and_normalized(cache: Path, model: Path) -> None:
    dataset, reader, adapter = LatentDataset(cache, model=model), CacheReader(cache), load_latent_model(model)
    assert (len(dataset), dataset.shape) == (N, (4, 16, 16))
    sides = [reader.read(2, mirrored)[0] for mirrored in (False, True)]
    drawn: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for epoch in range(400):
        dataset.set_epoch(epoch)
        item = dataset[2]
        assert item["latents"].dtype == torch.float32
        drawn[item["mirrored"]].append(item["latents"].numpy())
    assert 160 < len(drawn[True]) < 240
    for mirrored, side in enumerate(sides):
        assert side.std is not None
        z = adapter.denormalize(torch.from_numpy(np.stack(drawn[bool(mirrored)]))).numpy()
        scores = (z - side.mean) / side.std  # standard normal, if mean, deviation and side are right
        assert abs(scores.mean()) < 0.01
        assert abs(scores.std() - 1) < 0.01
        assert np.abs(scores.mean(axis=0)).max() < 0.5
    raw = LatentDataset(cache, sample=False, mirror=False, normalized=False)[2]["latents"]
    np.testing.assert_array_equal(raw.numpy(), sides[0].mean)
    mean = LatentDataset(cache, sample=False, mirror=False)[2]["latents"]
    torch.testing.assert_close(mean, adapter.normalize(raw[None])[0])
    torch.testing.assert_close(dataset.denormalize(mean), raw)


def test_what_else_a_sample_says(cache: Path) -> None:
    dataset = LatentDataset(cache)
    item = dataset[1]
    assert (item["key"], item["caption"], item["label"]) == ("data-0/1", "caption 1", 10)
    assert item["original_size"].tolist() == [40, 51]
    assert item["crop_box"].tolist() == [5, 0, 45, 40]
    assert [dataset[n]["label"] for n in range(N)] == [0, 10, 20, 0, -1, 20]  # whole numbers are their own labels
    captions = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        captions.add(dataset[5]["caption"])
    assert captions == {"one", "two"}
    named = LatentDataset(cache, classes=["20", "10", "0"])
    assert [named[n]["label"] for n in range(N)] == [2, 1, 0, 2, -1, 0]
    with pytest.raises(UsageError, match="class 20 is not among the 2 given"):
        LatentDataset(cache, classes=["0", "10"])
    assert dataset[-1]["key"] == "data-0/5"
    with pytest.raises(IndexError, match="sample 6 of 6"):
        dataset[N]


def test_draws_depend_on_seed_epoch_and_number_alone(cache: Path) -> None:
    dataset = LatentDataset(cache, seed=5)
    forwards = [plain(dataset[n]) for n in range(N)]
    assert [plain(LatentDataset(cache, seed=5)[n]) for n in reversed(range(N))] == forwards[::-1]
    assert plain(LatentDataset(cache, seed=6)[0]) != forwards[0]
    dataset.set_epoch(1)
    assert all(plain(dataset[n]) != forwards[n] for n in range(N))
    dataset.set_epoch(0)
    assert plain(dataset[3]) == forwards[3]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_and_hear_of_a_new_epoch(cache: Path, start: str) -> None:
    dataset = LatentDataset(cache)
    dataset[0]  # opens a file that workers must not share
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context=start, persistent_workers=True
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(loader)
        expected = [dataset[n] for n in range(N)]
        assert batches[0]["latents"].shape == (4, 4, 16, 16)
        torch.testing.assert_close(
            torch.cat([batch["latents"] for batch in batches]), torch.stack([item["latents"] for item in expected])
        )
        assert [text for batch in batches for text in batch["caption"]] == [item["caption"] for item in expected]


def test_another_model_is_refused(cache: Path, model: Path, new_model: Callable[..., Path]) -> None:
    other = new_model("other", seed=3)
    with pytest.raises(
        ModelError, match=r"made with encoder [0-9a-f]{16} \(model wide\), not with [0-9a-f]{16} \(.*other\)"
    ):
        LatentDataset(cache, model=other)
    network = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():
        network.decoder.conv_out.weight *= 2
    assert len(LatentDataset(cache, model=network)) == N  # a decoder may be trained further
    network.to(torch.float16)
    assert len(LatentDataset(cache, model=network)) == N  # half precision is the same model
    with torch.no_grad():
        network.encoder.conv_in.bias[0] += 1
    with pytest.raises(ModelError, match="made with encoder"):
        LatentDataset(cache, model=network)


def test_damage_is_an_error(cache: Path, tmp_path: Path) -> None:
    folder = copied(cache, tmp_path / "c")
    (tar,) = folder.glob("*.tar")
    place = CacheReader(folder).place(1)
    data = bytearray(tar.read_bytes())
    data[place.offset + 512 + 512 + 512 + 200] ^= 1  # within the latents
    tar.write_bytes(data)
    dataset = LatentDataset(folder)
    with pytest.raises(FormatError, match=rf"{tar.name}: damaged at byte {place.offset}: the CRC-32"):
        dataset[1]
    assert dataset[0]["key"] == "data-0/0"
    dataset = LatentDataset(folder)
    tar.unlink()
    with pytest.raises(FormatError, match="was the cache refreshed"):
        dataset[0]
    with pytest.raises(UsageError, match="missing or damaged"):
        LatentDataset(folder)
    tar.write_bytes(data[:-1000])
    with pytest.raises(UsageError, match="missing or damaged"):
        LatentDataset(folder)


def test_no_cache_and_half_a_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder; make one: codec-train cache"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no latent cache here"):
        LatentDataset(tmp_path)
    folder = copied(cache, tmp_path / "c")
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**header, "complete": False}))
    with pytest.raises(UsageError, match="incomplete"):
        LatentDataset(folder)
    (folder / "cache.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(UsageError, match="version 99"):
        LatentDataset(folder)


def test_webdataset_reads_it_too(cache: Path) -> None:
    """The snippet of the documentation."""
    import webdataset
    from safetensors.torch import load

    urls = [str(cache / shard["name"]) for shard in json.loads((cache / "cache.json").read_text())["shards"]]
    found = [
        (load(sample["safetensors"]), json.loads(sample["json"]))
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    reader = CacheReader(cache)
    assert len(found) == N
    for n, (tensors, facts) in enumerate(found):
        for mirrored, prefix in enumerate(("", "mirror_")):
            moments, expected = reader.read(n, bool(mirrored))
            np.testing.assert_array_equal(tensors[f"{prefix}mean"].float(), moments.mean)
            np.testing.assert_array_equal(tensors[f"{prefix}std"].float(), moments.std)
            assert facts == expected


def test_normalizing_by_channel_and_place_survives_the_header(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    network = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(tmp_path / "m")
    shards = foreign_shard(tmp_path / "s", {"a.png": png(0)})
    assert main(command(shards, tmp_path / "m", tmp_path / "c")) == 0
    dataset = LatentDataset(tmp_path / "c", sample=False)
    raw = LatentDataset(tmp_path / "c", sample=False, normalized=False)[0]["latents"]
    expected = load_latent_model(tmp_path / "m").normalize(raw[None])[0]
    torch.testing.assert_close(dataset[0]["latents"], expected)
