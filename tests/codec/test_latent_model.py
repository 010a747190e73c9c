import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file

from codec import Codec, model_folder, tables
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError, UsageError
from codec.latent_model import (
    CodebookModel,
    KLModel,
    TinyModel,
    decoder_id,
    latent_model,
    load_latent_model,
    load_network,
)
from codec.pixels import to_float, to_uint8
from tests.conftest import photo

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(encoder: tuple[int, ...] = (1, 2), decoder: tuple[int, ...] = (2, 1), **more: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    how = {"latent_channels": 5, "scaling_factor": 0.5, "shift_factor": 0.25} | more
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * len(encoder),
        decoder_block_out_channels=(8,) * len(decoder),
        num_encoder_blocks=encoder,
        num_decoder_blocks=decoder,
        **how,
    )


def kl(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **({"scaling_factor": 1.0, "shift_factor": 0.0} | more),
    )


def vq(**more: Any) -> VQModel:
    torch.manual_seed(0)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=32,
        scaling_factor=0.5,
        **({"block_out_channels": (8, 16)} | more),
    )
    torch.nn.init.normal_(
        network.quantize.embedding.weight, std=0.3
    )  # diffusers' are all but zero: one serves every latent
    return network


def picture(side: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tiny_is_its_network_with_our_names() -> None:
    network = tiny()
    model = latent_model(network)
    assert isinstance(model, TinyModel)
    assert (model.family, model.f, model.channels) == ("tiny", 2, 5)
    assert (model.scaling_factor, model.shift_factor) == (0.5, 0.25)
    x = picture()
    with torch.no_grad():
        posterior = model.encode(x)
        assert posterior.logvar is None
        assert torch.equal(posterior.mean, network.encode(x).latents)
        assert torch.equal(model.decode(posterior.mean), network.decode(posterior.mean).sample)


@pytest.mark.parametrize("network", [kl(), tiny()])
def test_adapters_serve_training(network: Any) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = latent_model(network)
    with torch.autocast("cpu", torch.bfloat16):
        mean = model.encode(picture()).mean
        x_hat = model.decode(mean)
    assert mean.dtype == torch.float32  # losses are computed in it
    x_hat.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.encoder.parameters())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert model.decoder_out.weight.shape[0] == 3


def reach(network: AutoencoderTiny, f: int) -> int:
    """The largest distance between an output pixel and an input pixel that it has a gradient to."""
    for parameter in network.parameters():  # positive everywhere: no ReLU is shut, nothing cancels
        torch.nn.init.constant_(parameter, 1.0 / parameter[0].numel() if parameter.ndim > 1 else 0.1)
    model = TinyModel(network.double())
    side, most = 160, 0
    x = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    x_hat = network.decode(network.encode(x).latents).sample
    middle = side // 2 // f * f
    for pixel in range(middle, middle + f):
        (gradient,) = torch.autograd.grad(x_hat[0, 0, middle, pixel], x, retain_graph=True)
        columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
        most = max(most, pixel - int(columns.min()), int(columns.max()) - pixel)
    assert most < side // 2 - f  # the edge of the picture did not cut it short
    assert model.f == f
    return most


@pytest.mark.parametrize(
    ("encoder", "decoder", "factor"),
    [
        ((1,), (2,), 2),
        ((1, 2), (2, 1), 2),
        ((1, 1, 1), (1, 1, 1), 2),
        ((2, 0, 1), (1, 0, 2), 2),
        ((1, 0, 1), (1, 1), 4),
    ],
)
def test_the_receptive_field_of_tiny_is_exact(encoder: tuple[int, ...], decoder: tuple[int, ...], factor: int) -> None:
    network = tiny(encoder, decoder, upsampling_scaling_factor=factor)
    stated = TinyModel(network).receptive_field
    assert stated == reach(network, 2 ** (len(encoder) - 1))


def test_a_receptive_field_that_is_not_known_is_the_whole_image() -> None:
    assert TinyModel(tiny(upsample_fn="bilinear")).receptive_field is None
    assert KLModel(kl()).receptive_field is None


def test_a_tiny_network_that_changes_the_size_is_refused(tmp_path: Path) -> None:
    network = tiny((1, 1, 1), (1, 1))
    with pytest.raises(ModelError, match="shrinks by 4 and enlarges by 2"):
        latent_model(network)
    network.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path.name}: .*shrinks by 4"):
        load_latent_model(tmp_path)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="class Linear: not an image autoencoder that is supported"):
        latent_model(torch.nn.Linear(1, 1))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    with pytest.raises(ModelError, match="class AutoencoderOobleck: not an image autoencoder that is supported"):
        load_latent_model(tmp_path)


@pytest.mark.parametrize("more", [{}, {"vq_embed_dim": 5}, {"norm_type": "spatial", "block_out_channels": (32, 32)}])
def test_a_vq_model_decodes_the_codebook_vectors_that_it_names(more: dict[str, Any]) -> None:
    network = vq(**more).eval()
    model = latent_model(network)
    assert isinstance(model, CodebookModel)
    dimensions = more.get("vq_embed_dim", 3)
    assert (model.family, model.f, model.channels, model.codebook_size) == ("vq", 2, dimensions, 32)
    assert (model.scaling_factor, model.shift_factor, model.receptive_field) == (0.5, 0.0, None)
    x = picture(16).repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.3])[:, None, None, None]
    with torch.no_grad():
        posterior, indices = model.encode(x), model.indices(x)
        assert posterior.logvar is None
        assert torch.equal(posterior.mean, network.encode(x).latents)
        assert (indices.shape, indices.dtype) == ((2, 8, 8), torch.int64)
        assert len(indices.unique()) > 1
        z = posterior.mean.permute(0, 2, 3, 1)[..., None, :]  # (B, h, w, 1, D)
        assert torch.equal(indices, (z - model.codebook).square().sum(-1).argmin(-1))
        z_q = model.codebook[indices].permute(0, 3, 1, 2)
        torch.testing.assert_close(model.decode(posterior.mean), network.decode(z_q, force_not_quantize=True).sample)
        assert torch.equal(model.quantise(z_q), indices)


def test_a_vq_folder_reconstructs_as_its_network_does(tmp_path: Path) -> None:
    network = vq()
    network.save_pretrained(tmp_path)
    image = photo(31, 46)
    engine = Engine.load(tmp_path, EngineConfig(device="cpu", dtype="float32"))
    assert engine.decoder_id == decoder_id(network)
    x_hat = engine.decode(engine.encode(image), 31, 46)
    padded = to_float(np.pad(image, ((0, 1), (0, 0), (0, 0)), mode="edge"))[None]
    with torch.no_grad():
        expected = to_uint8(network.eval()(padded).sample[0])[:31]
    assert np.mean(x_hat != expected) < 0.01
    model_folder.write(
        tmp_path,
        info={"name": "vq", "family": "vq", "f": 2, "latent_channels": 3, "decoder_id": engine.decoder_id},
        mean=np.zeros(3),
        step=np.ones(3),
        table_sets=[tables.fit([engine.encode(image)], np.zeros(3), np.ones(3))],
    )
    with pytest.raises(ModelError, match=f"{tmp_path.name}: codec.json says no codebook, the network has"):
        Codec.load(tmp_path, "cpu")


def test_the_decoder_id_of_vq_covers_its_codebook() -> None:
    network = vq()
    base = decoder_id(network)
    with torch.no_grad():
        network.encoder.conv_in.weight.mul_(2)
    assert decoder_id(network) == base
    with torch.no_grad():
        network.quantize.embedding.weight[3] += 1
    assert decoder_id(network) != base
    assert len({base, decoder_id(vq(layers_per_block=2)), decoder_id(vq(act_fn="relu"))}) == 3


@pytest.mark.parametrize("make", [kl, tiny])
def test_a_folder_gives_its_network_in_float32_for_inference(make: Callable[[], Any], tmp_path: Path) -> None:
    network = make().half()
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline"):
        model = load_latent_model(folder)
        assert type(model.network) is type(network)
        assert not model.network.training
        for name, parameter in model.network.named_parameters():
            assert parameter.dtype == torch.float32
            assert not parameter.requires_grad
            assert torch.equal(parameter, network.state_dict()[name].float())
    assert all(parameter.requires_grad for parameter in load_network(tmp_path / "pipeline").parameters())


def test_names_of_older_diffusers_are_understood(tmp_path: Path) -> None:
    """Many released autoencoders, Stable Diffusion's first among them, hold their attention under other names."""
    network = kl()
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    old = {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in state if ".attentions." in name]:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                state[name.replace(new_part, old_part)] = state.pop(name)
    assert any(".query." in name for name in state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert decoder_id(load_latent_model(tmp_path).network) == decoder_id(network)


def test_what_does_not_load_whole_is_a_model_error_that_names_the_folder(tmp_path: Path) -> None:
    def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            state = load_file(folder / WEIGHTS)
            change(state)
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

        return damage

    def config(**changes: Any) -> Callable[[Path], object]:
        return lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | changes)
        )

    def short(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])

    cases: dict[str, Callable[[Path], object]] = {
        "missing decoder.layers.0.bias": weights(lambda state: state.pop("decoder.layers.0.bias")),
        "unexpected another": weights(lambda state: state.update(another=torch.zeros(1))),
        "cannot load the weights": short,
        "do not fit|cannot load": config(num_decoder_blocks=[1, 1]),
        "cannot load": config(latent_channels=6),
        "4 image channels": config(in_channels=4),
        "cannot load the weights: .*no file named": lambda folder: (folder / WEIGHTS).unlink(),
        "not a diffusers model folder": lambda folder: (folder / "config.json").unlink(),
        "not a diffusers model folder: TypeError": lambda folder: (folder / "config.json").write_text("[]"),
        "not a diffusers model folder: JSON": lambda folder: (folder / "config.json").write_text("{"),
        "not a diffusers model folder: KeyError": lambda folder: (folder / "config.json").write_text("{}"),
    }
    for n, (message, damage) in enumerate(cases.items()):
        folder = tmp_path / str(n)
        tiny(in_channels=4 if "image channels" in message else 3).save_pretrained(folder)
        damage(folder)
        with pytest.raises(ModelError, match=f"(?i){message}") as caught:
            load_network(folder)
        assert str(caught.value).startswith(f"{folder}: ")
    with pytest.raises(ModelError, match="no such folder"):
        load_network(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path / "good")
    with pytest.raises(UsageError, match="device no-such-device"):
        load_latent_model(tmp_path / "good", "no-such-device")


def test_loading_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers warns about a field that it writes itself, and about what is an error here."""
    tiny().save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.addHandler(caplog.handler)
    try:
        load_latent_model(tmp_path)
        assert caplog.text == ""
        AutoencoderTiny.from_pretrained(tmp_path)
        assert "block_out_channels" in caplog.text  # its own level is back
    finally:
        logger.removeHandler(caplog.handler)
    assert logger.level == before


def test_the_decoder_ids_of_files_in_the_world_stay() -> None:
    """Written into every compressed file: an id that changes here makes old files look foreign."""
    for network, pinned in ((kl(), "0e82f9322464e17f"), (tiny(), "f729087a4f28317e"), (vq(), "bf54a226f1e2709b")):
        with torch.no_grad():
            for n, parameter in enumerate(network.parameters()):
                values = torch.arange(parameter.numel()) % 17 - 8
                parameter.copy_(values.reshape(parameter.shape) / 64 + n / 128)
        assert decoder_id(network) == pinned


def test_the_decoder_id_of_tiny_is_the_decoders_alone() -> None:
    base = decoder_id(tiny())
    assert decoder_id(tiny().half()) == base
    network = tiny()
    with torch.no_grad():
        network.encoder.layers[0].weight.mul_(2)
    network.register_to_config(scaling_factor=3.0, num_encoder_blocks=(1, 1), latent_magnitude=5, force_upcast=True)
    assert decoder_id(network) == base
    changes = {
        "act_fn": "silu",
        "upsample_fn": "bilinear",
        "upsampling_scaling_factor": 3,
        "num_decoder_blocks": (1, 2),
        "decoder_block_out_channels": (8, 9),
        "latent_channels": 6,
        "out_channels": 4,
    }
    ids = {base}
    for name, value in changes.items():
        network = tiny()
        network.register_to_config(**{name: value})
        ids.add(decoder_id(network))
    network = tiny()
    with torch.no_grad():
        network.decoder.layers[0].bias.add_(1)
    ids.add(decoder_id(network))
    assert len(ids) == len(changes) + 2
