import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file
from torch import nn

from codec import model_folder
from codec.errors import ModelError, UsageError
from codec.latent_model import latent_model, load_latent_model
from codec.runtime import Codec
from codec.shards import read_index
from tests.conftest import photo
from train.config import Config, DataConfig, ExportConfig, ModelConfig, RunConfig
from train.data import split
from train.export import export_model, load_discriminator_state
from train.loss_config import AdversarialConfig, KLConfig
from train.networks import build_network

TINY = ModelConfig(family="tiny", block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=5)
KL = ModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
RECORD = {"losses": "l1 + 0.5 adversarial", "validation": {}, "steps": 3, "images_seen": 12, "time_s": 6.0}


class Critic(nn.Module):
    """As the trainer's discriminator: a config beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"channels": 8, "norm": "group"}
        self.layer = nn.Conv2d(3, 8, 4)


def export(
    network: nn.Module,
    model: ModelConfig,
    shards: Path,
    out: Path,
    config: Config | None = None,
    images: int = 6,
    **how: Any,
) -> dict[str, Any]:
    config = replace(
        config or Config(kl=KLConfig(weight=0)),
        model=model,
        data=DataConfig(shards=str(shards), crop=64, n_validation=2),
        run=RunConfig(out=str(out.parent)),
        export=ExportConfig(statistics_images=images),
    )
    training, validation = split(read_index(shards), 2)
    network.eval()
    return export_model(network, out, config, training, validation, record=RECORD, device=torch.device("cpu"), **how)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_tiny_network_becomes_a_model_folder(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    out = tmp_path / "run" / "model"
    network = build_network(TINY)
    figures = export(network, TINY, shards, out)

    codec = Codec.load(out)
    assert codec.description()["family"] == "tiny"
    assert codec.decoder_id == figures["decoder_id"]
    image = photo(50, 61)
    data = codec.encode_many(image, [0, 100])
    assert len(data[0]) < len(data[1])
    finest, ceiling = codec.decode(data[1]).astype(float), codec.reconstruct(image).astype(float)
    assert finest.shape == image.shape
    assert np.abs(finest - ceiling).mean() < np.abs(codec.decode(data[0]).astype(float) - ceiling).mean()

    logging.getLogger("diffusers").addHandler(caplog.handler)
    vae = AutoencoderTiny.from_pretrained(out)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert caplog.text == ""  # diffusers warns about the `block_out_channels` that it would write itself
    assert vae.config.block_out_channels == [8, 8, 8]  # which pipelines take f from
    info = model_folder.read(out).info
    statistics = info["statistics"]
    assert (info["scaling_factor"], info["shift_factor"]) == (vae.config.scaling_factor, vae.config.shift_factor)
    assert vae.config.scaling_factor == pytest.approx(1 / statistics["global_std"])
    assert vae.config.shift_factor == 0  # which the pipelines that take an AutoencoderTiny would ignore
    assert figures["normalized_std"] == pytest.approx(1, abs=0.3)

    step = model_folder.read(out).step  # no variance: in proportion to the channels' deviation
    np.testing.assert_allclose(step / step[0], np.array(statistics["std"]) / statistics["std"][0], rtol=1e-5)
    fixture = load_file(tmp_path / "run" / "fixture.safetensors")
    with torch.inference_mode():
        assert torch.allclose(vae.encode(fixture["x"]).latents, fixture["z"], atol=1e-5)
        assert torch.allclose(vae.decode(fixture["z"]).sample, fixture["x_hat"], atol=1e-5)

    card = (out / "README.md").read_text()
    assert "`diffusers.AutoencoderTiny`, f4, 5 latent channels, widths 8, 8, 8" in card
    assert "z = (vae.encode(x).latents - vae" in card
    assert "| channel | mean | std |\n|---|---|---|\n| 0 |" in card
    for word in ("posterior", "KL ", "AutoencoderKL"):
        assert word not in card.split("## Latents")[1].replace("without the posterior's noise", "")


def test_a_decoder_keeps_the_normalisation_of_its_base(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build_network(KL)
    base.register_to_config(scaling_factor=0.5, shift_factor=None, sample_size=512, optimization_step=7)
    base.save_pretrained(tmp_path / "released" / "vae")
    before = settings(tmp_path / "released" / "vae")
    config = ModelConfig(init_from=str(tmp_path / "released"))

    out = tmp_path / "decoder" / "model"
    figures = export(build_network(config), config, shards, out)
    after = settings(out)
    assert (after["scaling_factor"], after["shift_factor"], after["sample_size"]) == (0.5, 0.0, 512)
    assert {name for name in before if name not in after} == {"optimization_step"}
    assert not any(str(tmp_path) in path.read_text() for path in (out / "config.json", out / "README.md"))
    info = model_folder.read(out).info
    assert (info["scaling_factor"], info["shift_factor"]) == (0.5, 0.0)
    assert figures["normalized_std"] == pytest.approx(0.5 * info["statistics"]["global_std"], rel=0.3)
    card = (out / "README.md").read_text()
    assert "the decoder alone: encoder and latents are the base's" in card
    assert f"standard deviation {0.5 * info['statistics']['global_std']:.4f}" in card

    all_of_it = replace(config, trainable="all")
    out = tmp_path / "all" / "model"
    export(build_network(all_of_it), all_of_it, shards, out)
    after = settings(out)
    assert after["scaling_factor"] == pytest.approx(1 / info["statistics"]["global_std"], rel=1e-4)
    assert after["sample_size"] == 64
    assert "1 / standard deviation" in (out / "README.md").read_text()


def test_with_a_teacher_the_normalisation_is_the_teachers(shards: Path, tmp_path: Path) -> None:
    build_network(TINY).save_pretrained(tmp_path / "some" / "teacher")
    export(build_network(TINY), replace(TINY, teacher=str(tmp_path / "some/teacher")), shards, tmp_path / "0" / "model")
    after = settings(tmp_path / "0" / "model")
    assert (after["scaling_factor"], after["shift_factor"]) == (1.0, 0.0)


def test_a_decoder_trained_alone_keeps_the_stream_of_its_base_and_decodes_its_files(
    shards: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, tuned, whole = (tmp_path / name / "model" for name in ("base", "tuned", "whole"))
    export(build_network(TINY), TINY, shards, base)
    config = replace(TINY, init_from=str(base))
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) * parameter.requires_grad)
    export(network, config, shards, tuned, images=3)
    export(network, replace(config, trainable="all"), shards, whole, images=3)  # measured anew
    first, second, third = (Codec.load(folder, "cpu", dtype="float32") for folder in (base, tuned, whole))
    assert first.stream_id == second.stream_id != third.stream_id
    assert first.decoder_id != second.decoder_id
    image = photo(40, 40)
    data = first.encode(image, 90)
    assert 0 < np.abs(first.decode(data).astype(int) - second.decode(data)).mean() < 20
    assert len(second.encode(image, 90)) == len(data)


def test_channels_last_weights_are_written_as_any_others(shards: Path, tmp_path: Path) -> None:
    network, critic = (module.to(memory_format=torch.channels_last) for module in (build_network(KL), Critic()))
    export(network, KL, shards, tmp_path / "run" / "model", discriminator=critic)
    saved = load_latent_model(tmp_path / "run" / "model").network.state_dict()
    moved = {"quant_conv.bias", "post_quant_conv.bias"}  # see train.centring
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items() if name not in moved)
    assert load_discriminator_state(tmp_path / "run" / "model") is not None


def test_learned_steps_are_the_models_steps(shards: Path, tmp_path: Path) -> None:
    step = np.array([0.5, 1, 2, 3, 4], np.float32)
    export(build_network(TINY), TINY, shards, tmp_path / "run" / "model", step=step)
    np.testing.assert_array_equal(model_folder.read(tmp_path / "run" / "model").step, step)


def test_a_discriminator_goes_along_and_comes_back(shards: Path, tmp_path: Path) -> None:
    out, critic = tmp_path / "run" / "model", Critic()
    export(build_network(TINY), TINY, shards, out, discriminator=critic)
    state = load_discriminator_state(out)
    assert state is not None
    assert set(state) == set(critic.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in critic.state_dict().items())
    assert json.loads((out / "discriminator" / "config.json").read_text()) == critic.config
    assert load_latent_model(out).f == 4  # diffusers does not mind the folder

    (out / "discriminator" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable discriminator"):
        load_discriminator_state(out)
    export(build_network(TINY), TINY, shards, out)  # replaced: no leftover of another run
    assert load_discriminator_state(out) is None


def test_the_card_speaks_of_the_discriminator_as_it_was(shards: Path, tmp_path: Path) -> None:
    cards = []
    for weight in (0.0, 0.5):
        out = tmp_path / str(weight) / "model"
        config = Config(model=TINY, kl=KLConfig(weight=0), adversarial=AdversarialConfig(weight=weight))
        export(build_network(TINY), TINY, shards, out, config)
        cards.append((out / "README.md").read_text())
    assert "- loss: l1 + 0.5 adversarial; no discriminator\n" in cards[0]
    assert "- loss: l1 + 0.5 adversarial\n" in cards[1]


def test_the_fixture_serves_coarse_grids(shards: Path, tmp_path: Path) -> None:
    deep = replace(KL, block_out_channels=(8,) * 6, mid_block_add_attention=True)
    export(build_network(deep), deep, shards, tmp_path / "run" / "model")
    fixture = load_file(tmp_path / "run" / "fixture.safetensors")
    assert tuple(fixture["z"].shape) == (1, 4, 2, 2)
    vae = AutoencoderKL.from_pretrained(tmp_path / "run" / "model")
    with torch.inference_mode():
        assert torch.allclose(vae.encode(fixture["x"]).latent_dist.mode(), fixture["z"], atol=1e-4)
    assert latent_model(vae).f == 32
    assert "posterior std | KL, nats |" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_collapsed_model_is_refused(shards: Path, tmp_path: Path) -> None:
    network: Any = build_network(TINY)
    nn.init.zeros_(network.encoder.layers[-1].weight)
    with pytest.raises(UsageError, match="do not vary"):
        export(network, TINY, shards, tmp_path / "run" / "model")
