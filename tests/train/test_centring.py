"""The mean of the latents goes into the weights: equal pictures, and normalisation that every pipeline applies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from codec.adopt import measure
from codec.latent_model import latent_model, load_latent_model
from codec.runtime import Codec
from codec.shards import read_index
from tests.conftest import photo
from train.centring import centred, measured_shift
from train.config import Config, DataConfig, ExportConfig, ModelConfig, RunConfig
from train.data import split
from train.export import export_model


def kl(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.0,
        **more,
    )
    return network.eval()


@torch.no_grad()
def test_a_centred_network_gives_the_same_pictures_and_is_what_measuring_it_says() -> None:
    network, images = kl(), [photo(48, 48, seed) for seed in range(3)]
    network.quant_conv.bias[:4] = torch.tensor([3.0, -2.0, 0.5, 5.0])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measured = measure(latent_model(network), images, 3)
    assert measured is not None
    moved, told = centred(network, measured)
    found = measure(latent_model(moved), images, 3)
    assert found is not None
    assert np.abs(measured.summary.mean).max() > 1
    for name, value in vars(found.summary).items():
        np.testing.assert_allclose(getattr(told.summary, name), value, rtol=1e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(told.step, found.step, rtol=1e-3)
    for one, other in zip(told.grids, found.grids, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior, shifted = (latent_model(one).encode(x) for one in (network, moved))
    assert torch.equal(posterior.logvar, shifted.logvar)
    x_hat = latent_model(network).decode(posterior.mean)
    torch.testing.assert_close(latent_model(moved).decode(shifted.mean), x_hat, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    changed = {name for name, tensor in moved.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"quant_conv.bias", "post_quant_conv.bias"}


@pytest.mark.parametrize(
    "network", [kl(use_quant_conv=False, use_post_quant_conv=False), AutoencoderTiny(latent_channels=4).eval()]
)
def test_a_network_without_those_convolutions_stays_as_it_is(network: Any) -> None:
    measured = measure(latent_model(network), [photo(48, 48)], 1)
    assert measured is not None
    moved, told = centred(network, measured)
    assert moved is network
    assert told is measured


def test_only_networks_of_pipelines_that_apply_a_shift_are_given_one() -> None:
    assert measured_shift(kl(use_quant_conv=False, use_post_quant_conv=False), 0.3) == 0.3
    assert measured_shift(kl(), 0.3) == 0
    assert measured_shift(AutoencoderTiny(latent_channels=4), 0.3) == 0


@pytest.mark.slow
def test_an_export_centres_what_was_trained_from_scratch_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    scratch = ModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    folders = {}
    for name, model in {"scratch": scratch, "tuned": replace(scratch, init_from="base", trainable="all")}.items():
        config = Config(
            model=model,
            data=DataConfig(shards=str(shards), crop=64, n_validation=2),
            run=RunConfig(out=str(tmp_path / name)),
            export=ExportConfig(statistics_images=6),
        )
        network = kl()
        with torch.no_grad():
            network.quant_conv.bias[:4] = torch.tensor([3.0, -2.0, 0.5, 5.0])
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        training, validation = split(read_index(shards), 2)
        record = {"losses": "l1", "validation": {}, "steps": 3, "images_seen": 12, "time_s": 6.0}
        folders[name] = tmp_path / name / "model"
        export_model(network, folders[name], config, training, validation, record=record, device=torch.device("cpu"))
        if name == "scratch":
            assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    made = {name: load_latent_model(folder) for name, folder in folders.items()}
    assert (made["scratch"].shift_factor, made["tuned"].shift_factor) == (0, 0)  # pipelines would ignore another one
    assert made["scratch"].scaling_factor > made["tuned"].scaling_factor  # no means that differ by channel in it
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z, x_hat = {}, {}
        for name, model in made.items():
            z[name] = model.encode(x).mean
            x_hat[name] = model.decode(z[name])
    torch.testing.assert_close(x_hat["scratch"], x_hat["tuned"], rtol=1e-5, atol=1e-5)
    moved = (z["tuned"] - z["scratch"])[0]
    assert moved.abs().max() > 1
    torch.testing.assert_close(moved, moved.mean(dim=(1, 2), keepdim=True).expand_as(moved), rtol=0, atol=1e-5)
    images = [Codec.load(folder, "cpu", dtype="float32").reconstruct(photo(40, 40)) for folder in folders.values()]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
