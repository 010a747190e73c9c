from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from codec.errors import ModelError, UsageError
from codec.latent_model import latent_model, load_latent_model
from train.config import ModelConfig
from train.networks import (
    build_network,
    check_teacher,
    checkpoint_activations,
    decoder_only,
    keeps_latents,
    load_teacher,
)
from train.recipe import load_recipe


def network(init: str, groups: int = 1) -> AutoencoderKL:
    torch.manual_seed(0)
    config = ModelConfig(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        use_quant_conv=False,
        init=init,
    )
    return build_network(config).eval()


def error_after(vae: nn.Module, steps: int) -> float:
    """L1 of a mode reconstruction after some steps of Adam on flat, differently coloured pictures with some texture."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    errors = []
    for _ in range(steps):
        colours = torch.rand(8, 3, 1, 1, generator=generator) * 1.6 - 0.8
        x = colours + 0.1 * torch.randn(8, 3, 32, 32, generator=generator)
        model = latent_model(vae)
        loss = (model.decode(model.encode(x).mean) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    return sum(errors[-5:]) / 5


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_the_linear_start_learns_brightness_sooner(groups: int) -> None:
    assert error_after(network("linear", groups), 60) < 0.7 * error_after(network("diffusers", groups), 60)


@pytest.mark.slow
def test_the_linear_start_helps_tiny_too() -> None:
    errors = {}
    for init in ("linear", "diffusers"):
        torch.manual_seed(0)
        config = ModelConfig(
            family="tiny", block_out_channels=(16,) * 3, layers_per_block=1, latent_channels=8, init=init
        )
        network = build_network(config)
        if init == "linear":
            features = 10 * torch.rand(1, 16, 8, 8)
            blocks = [module for module in network.modules() if isinstance(module, AutoencoderTinyBlock)]
            assert len(blocks) == 6
            assert all(torch.allclose(block(features), features, atol=0.1) for block in blocks)
        errors[init] = error_after(network, 120)
    assert errors["linear"] < 0.7 * errors["diffusers"]


def test_the_linear_start_is_nearly_linear() -> None:
    vae = network("linear")
    generator = torch.Generator().manual_seed(2)
    a, b = (0.3 * torch.randn(1, 3, 32, 32, generator=generator) for _ in range(2))
    with torch.no_grad():
        encode = [vae.encode(x).latent_dist.mode() for x in (a + b, a, b, torch.zeros_like(a))]
    error = encode[0] - (encode[1] + encode[2] - encode[3])
    assert float(error.norm() / (encode[0] - encode[3]).norm()) < 0.5


def test_one_channel_a_group_is_refused_where_it_would_lose_brightness() -> None:
    with pytest.raises(ValueError, match="one channel a group loses brightness"):
        ModelConfig(block_out_channels=(32, 64), norm_num_groups=32)
    assert ModelConfig(block_out_channels=(32, 64), norm_num_groups=32, init="diffusers").f == 2


TINY = ModelConfig(family="tiny", block_out_channels=(8, 8), layers_per_block=2, latent_channels=5, init="diffusers")
KL = ModelConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, init="diffusers"
)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def base_folder(path: Path, config: ModelConfig = KL) -> Path:
    build_network(config).half().save_pretrained(path)
    return path


def test_shapes_are_those_of_the_released_models() -> None:
    """Parameters as their authors state them: Stable Diffusion's autoencoder (without its two 1 x 1s) and TAESD."""
    with torch.device("meta"):
        vae = build_network(ModelConfig(init="diffusers"))
        tiny = build_network(ModelConfig(family="tiny", block_out_channels=(64,) * 4, layers_per_block=3))
    assert isinstance(vae, AutoencoderKL)
    assert (n_parameters(vae.encoder), n_parameters(vae.decoder)) == (34_163_592, 49_490_179)
    assert isinstance(tiny, AutoencoderTiny)
    assert (n_parameters(tiny.encoder), n_parameters(tiny.decoder)) == (1_222_532, 1_222_531)


def test_a_recipe_describes_the_tiny_network_that_is_built() -> None:
    model = latent_model(build_network(TINY))
    assert (model.family, model.f, model.channels) == ("tiny", 2, 5)
    assert (model.scaling_factor, model.shift_factor) == (1.0, 0.0)
    assert dict(model.network.config)["num_decoder_blocks"] == (2, 1)


@pytest.mark.parametrize("base", [KL, TINY])
def test_init_from_takes_the_folders_network_whatever_the_recipe_says(base: ModelConfig, tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "pipeline" / "vae", base)
    config = ModelConfig(init_from=str(folder.parent), trainable="all", latent_channels=32)
    network = build_network(config)
    saved = load_latent_model(folder).network.state_dict()
    assert list(saved) == list(network.state_dict())
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, True)}
    assert network.training


def test_a_vq_model_is_a_start_and_no_teacher(tmp_path: Path) -> None:
    saved = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=4)
    saved.save_pretrained(tmp_path)
    network = build_network(ModelConfig(init_from=str(tmp_path)))
    assert isinstance(network, VQModel)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert {p.requires_grad for p in network.quantize.parameters()} == {False}  # the decoder alone
    with pytest.raises(UsageError, match=r"model\.teacher: a VQModel; only"):
        load_teacher(tmp_path)


def test_init_from_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        build_network(ModelConfig(init_from=str(folder)))

    with pytest.raises(ModelError, match="nowhere: no such folder"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: not a diffusers model folder"):
        build(tmp_path / "empty")
    folder = base_folder(tmp_path / "damaged")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="damaged: cannot load the weights"):
        build(folder)


@pytest.mark.parametrize("base", [KL, TINY])
def test_a_decoder_is_trained_alone(base: ModelConfig, tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", base)
    for trainable, alone in (("auto", True), ("decoder", True), ("all", False)):
        config = ModelConfig(init_from=str(folder), trainable=trainable)
        assert decoder_only(config) == keeps_latents(config) == alone
        network = build_network(config)
        model = latent_model(network)
        model.decode(model.encode(torch.rand(1, 3, 16, 16)).mean).square().mean().backward()
        for name, parameter in network.named_parameters():
            encodes = name.startswith(("encoder.", "quant_conv."))
            assert (parameter.grad is None) == (alone and encodes), name
            assert parameter.grad is None or bool(parameter.grad.any()), name


def test_a_decoder_without_a_base_is_refused() -> None:
    assert not decoder_only(ModelConfig())
    with pytest.raises(UsageError, match=r"Set model\.init_from=FOLDER"):
        build_network(ModelConfig(trainable="decoder"))


def test_a_teacher_is_frozen_and_of_the_same_shape(tmp_path: Path) -> None:
    network = load_teacher(base_folder(tmp_path / "teacher"))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    teacher, student = latent_model(network), latent_model(build_network(replace(TINY, latent_channels=4)))
    check_teacher(teacher, student)
    with pytest.raises(UsageError, match="f 2, 4 latent channels; the network: f 2, 5 latent channels"):
        check_teacher(teacher, latent_model(build_network(TINY)))
    with pytest.raises(UsageError, match="the network: f 4"):
        check_teacher(teacher, latent_model(build_network(replace(TINY, block_out_channels=(8,) * 3))))


def test_gradient_checkpointing_changes_no_gradient_and_is_refused_where_it_would() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        network = build_network(KL)
        if on:
            checkpoint_activations(network)
            assert network.is_gradient_checkpointing
        model = latent_model(network)
        model.decode(model.encode(x).mean).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))
    with pytest.raises(UsageError, match="not with AutoencoderTiny"):
        checkpoint_activations(build_network(TINY))


@pytest.mark.parametrize(
    ("recipe", "kind", "f", "channels", "quant"),
    [
        ("f4c3", AutoencoderKL, 4, 3, True),
        ("f8c4", AutoencoderKL, 8, 4, True),
        ("f8c8", AutoencoderKL, 8, 8, False),
        ("f8c16", AutoencoderKL, 8, 16, False),
        ("f8c32", AutoencoderKL, 8, 32, False),
        ("f16c16", AutoencoderKL, 16, 16, True),
        ("f16c32", AutoencoderKL, 16, 32, True),
        ("small-f8c8", AutoencoderKL, 8, 8, False),
        ("tiny-f8c8", AutoencoderTiny, 8, 8, False),
        ("distill-tiny", AutoencoderTiny, 8, 4, False),
    ],
)
def test_recipes_build_what_their_names_say(recipe: str, kind: type, f: int, channels: int, quant: bool) -> None:
    with torch.device("meta"):
        network = build_network(load_recipe(recipe).model)
    model = latent_model(network)
    assert isinstance(network, kind)
    assert (model.f, model.channels) == (f, channels)
    assert bool(dict(network.config).get("use_post_quant_conv")) == quant


def test_recipes_for_diffusion_share_one_objective() -> None:
    for name in ("f4c3", "f8c4", "f8c8", "f8c16", "f8c32", "f16c16", "f16c32"):
        config = load_recipe(name)
        assert (config.data.crop, config.loss.perceptual, config.loss.perceptual_weight) == (256, "lpips-vgg", 1.0)
        assert (config.kl.reduction, config.kl.weight) == ("pixel", pytest.approx(1e-6 / 3, rel=1e-3))
        assert (config.adversarial.weight, config.adversarial.start) == (0.5, "20%")
        assert (config.latents.equivariance, config.optim.lr, config.run.trackers) == (0.5, 1e-4, ())


def test_the_recipe_that_finetunes_a_decoder_needs_a_base(tmp_path: Path) -> None:
    config = load_recipe("finetune-decoder").model
    with pytest.raises(UsageError, match="FOLDER"):
        build_network(config)
    network = build_network(replace(config, init_from=str(base_folder(tmp_path / "base"))))
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {
        "decoder",
        "post_quant_conv",
    }
