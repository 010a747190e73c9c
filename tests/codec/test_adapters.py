"""The diffusers classes beside AutoencoderKL, AutoencoderTiny and VQModel: names, latents, folders, ways to run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, Flux2Pipeline

from codec import Codec, fast, images, memory, model_folder, tiled
from codec.adapters import AsymmetricModel, DCModel, Flux2Model, KLModel, TinyModel
from codec.adopt import adopt
from codec.cli import main
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError
from codec.latent_model import decoder_id, latent_model, load_latent_model, load_network
from eval.cli import main as eval_main
from tests.conftest import photo

BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def dc(**more: Any) -> AutoencoderDC:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    shapes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()}
    return AutoencoderDC(**({"latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.5} | shapes | more))


def flux2(**more: Any) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    how = {"block_out_channels": (8, 16), "decoder_block_out_channels": (8, 24), "latent_channels": 3} | more
    network = AutoencoderKLFlux2(layers_per_block=1, **BLOCKS, **how)
    torch.nn.init.normal_(network.bn.running_mean)
    torch.nn.init.uniform_(network.bn.running_var, 0.1, 4.0)
    return network


def asymmetric(**more: Any) -> AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    widths = {"down_block_out_channels": (8, 16), "up_block_out_channels": (16, 24)}
    return AsymmetricAutoencoderKL(scaling_factor=0.5, **(BLOCKS | widths | more))


def kl(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 16), scaling_factor=0.5, shift_factor=0.25, **BLOCKS, **more)


NEW = [dc, flux2, asymmetric]


def picture(height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("make", "adapter", "family", "f", "channels", "normalisation"),
    [
        (dc, DCModel, "dc", 4, 4, (0.5, 0.0)),
        (lambda: dc(encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1)), DCModel, "dc", 4, 4, None),
        (flux2, Flux2Model, "kl", 2, 3, None),
        (asymmetric, AsymmetricModel, "kl", 2, 4, (0.5, 0.0)),
    ],
)
@torch.no_grad()
def test_an_adapter_is_its_network_with_our_names(
    make: Callable[[], Any],
    adapter: type,
    family: str,
    f: int,
    channels: int,
    normalisation: tuple[float, float] | None,
) -> None:
    network = make().eval()
    model = latent_model(network)
    assert type(model) is adapter
    assert (model.family, model.f, model.channels, model.receptive_field) == (family, f, channels, None)
    assert normalisation in (None, (model.scaling_factor, model.shift_factor))
    x = picture()
    posterior, encoded = model.encode(x), network.encode(x)
    assert posterior.mean.shape == (2, channels, 24 // f, 32 // f)
    if family == "kl":
        assert torch.equal(posterior.mean, encoded.latent_dist.mode())
        assert torch.equal(posterior.logvar, encoded.latent_dist.logvar)
    else:
        assert posterior.logvar is None
        assert torch.equal(posterior.mean, encoded.latent)
    x_hat = model.decode(posterior.mean)
    assert x_hat.shape == x.shape
    assert torch.equal(x_hat, network.decode(posterior.mean).sample)
    model.decoder_out.bias.add_(1)
    assert not torch.equal(x_hat, model.decode(posterior.mean))


def test_networks_whose_two_halves_disagree_are_refused(tmp_path: Path) -> None:
    shorter = {"decoder_block_types": "ResBlock", "decoder_qkv_multiscales": ((), (), ())}
    for network in (
        dc(decoder_layers_per_block=(1, 0, 1), **shorter),
        asymmetric(up_block_out_channels=(16, 16, 24), up_block_types=("UpDecoderBlock2D",) * 3),
    ):
        name = type(network).__name__
        with pytest.raises(ModelError, match=f"an {name} that shrinks by . and enlarges by .: not supported"):
            latent_model(network)
        network.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"{name}: an {name} that shrinks"):
            load_network(tmp_path / name)


def test_normalized_latents_of_flux2_are_those_of_its_pipeline() -> None:
    network = flux2()
    model, z = latent_model(network), torch.randn(2, 3, 6, 8)
    mean, variance = (part.view(1, -1, 1, 1) for part in (network.bn.running_mean, network.bn.running_var))
    patched = (Flux2Pipeline._patchify_latents(z) - mean) / torch.sqrt(variance + network.config.batch_norm_eps)
    expected = Flux2Pipeline._unpatchify_latents(patched)
    torch.testing.assert_close(model.normalize(z), expected, rtol=1e-5, atol=1e-6)
    assert model.scaling_factor == pytest.approx((variance + network.config.batch_norm_eps).mean().item() ** -0.5)
    assert model.shift_factor == pytest.approx(mean.mean().item(), rel=1e-5)
    odd = torch.randn(1, 3, 5, 7)  # a grid that no pipeline cuts into patches
    torch.testing.assert_close(model.denormalize(model.normalize(odd)), odd)
    torch.testing.assert_close(model.normalize(odd)[..., :4, :6], model.normalize(odd[..., :4, :6]))


def test_latents_are_normalized_as_pipelines_do_it() -> None:
    z = torch.randn(2, 4, 3, 5)
    plain, by_channel = KLModel(kl()), KLModel(kl(latents_mean=[1.0, 2, 3, 4], latents_std=[0.5, 1, 2, 4]))
    half = KLModel(kl(latents_mean=[1.0, 2, 3, 4]))  # pipelines then use neither
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in ([1.0, 2, 3, 4], [0.5, 1, 2, 4]))
    torch.testing.assert_close(by_channel.normalize(z), (z - mean) * 0.5 / std)
    for model in (plain, half):
        assert torch.equal(model.normalize(z), (z - 0.25) * 0.5)
    assert torch.equal(latent_model(dc()).normalize(z), z * 0.5)
    for model in (plain, by_channel):
        torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
        unit = model.denormalize(model.normalize(z) + 1) - z
        torch.testing.assert_close(unit, torch.as_tensor(model.normalisation.deviation(z)).float().expand_as(z))
        assert model.normalize(z.bfloat16()).dtype == torch.bfloat16


def test_statistics_for_another_number_of_channels_are_a_model_error(tmp_path: Path) -> None:
    kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="4 latents_mean and 3 latents_std, expected 4 each"):
        load_latent_model(tmp_path)


@pytest.mark.parametrize("make", NEW)
def test_a_folder_of_it_becomes_a_codec(make: Callable[[], Any], tmp_path: Path, photo_folder: Path) -> None:
    """The latents are measured, and the folder then serves the commands as any other."""
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    found = adopt(folder, [photo(64, 64, seed) for seed in range(4)], 4)
    codec = Codec.load(found, "cpu", dtype="float32")
    image = photo(45, 63)
    decoded = codec.decode(codec.encode(image, 100))
    assert decoded.shape == image.shape
    assert np.abs(decoded.astype(int) - codec.reconstruct(image)).mean() < 3

    table_sets = list(found.table_sets.values())
    info = dict(found.info) | {"name": "it", "decoder_id": found.decoder_id}
    info |= {"f": found.f, "latent_channels": found.channels}
    model_folder.write(folder, info=info, mean=found.mean, step=found.step, table_sets=table_sets)
    coded, out = str(tmp_path / "coded"), tmp_path / "out"
    assert main(["encode", str(photo_folder), "-o", coded, "-m", str(folder), "--dtype", "float32", "-q", "50"]) == 0
    assert main(["decode", coded, "-o", str(out), "-m", str(folder), "--dtype", "float32", "--strict"]) == 0
    back, original = images.load(out / "a.png.png"), images.load(photo_folder / "a.png")
    assert np.array_equal(back, codec.decode((tmp_path / "coded" / "a.png.lcx").read_bytes()))
    assert back.shape == original.shape


@pytest.mark.parametrize("make", NEW)
def test_recon_measures_it(make: Callable[[], Any], tmp_path: Path, photo_folder: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    options = ["--data", photo_folder, "--protocol", "folder", "--metrics", "psnr", "--dtype", "float32"]
    assert eval_main(["recon", str(tmp_path / "model"), *map(str, options), "-o", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "recon.json").read_text())["models"]
    assert row["description"]["class"] == type(make()).__name__
    engine = Engine.load(tmp_path / "model", EngineConfig(device="cpu", dtype="float32"))
    image = images.load(photo_folder / "a.png")
    error = (engine.decode(engine.encode(image), *image.shape[:2]).astype(float) - image) ** 2
    assert row["rows"][0]["psnr"] == pytest.approx(10 * np.log10(255**2 / error.mean()), abs=1e-3)


@pytest.mark.parametrize("name", ["AutoencoderOobleck", "AutoencoderKLWan", "AutoencoderKLTemporalDecoder"])
def test_the_rest_is_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    supported = "AutoencoderKL, AutoencoderTiny, VQModel, AutoencoderDC, AutoencoderKLFlux2, AsymmetricAutoencoderKL"
    message = f"of class {name}: not an image autoencoder that is supported; supported are {supported}"
    with pytest.raises(ModelError, match=message):
        load_latent_model(tmp_path)
    (tmp_path / "a.png").write_bytes(images.save_png(photo(32, 32)))
    assert (
        eval_main(["recon", str(tmp_path), "--data", str(tmp_path), "--metrics", "psnr", "-o", str(tmp_path / "r")])
        == 3
    )
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("make", NEW)
@torch.no_grad()
def test_accelerated_it_computes_the_same_and_stays_what_it_was(make: Callable[[], Any]) -> None:
    network, again = make().eval(), make().eval()
    x = picture()
    z = latent_model(network).encode(x).mean
    x_hat = latent_model(network).decode(z)
    state, base = {name: part.clone() for name, part in network.state_dict().items()}, decoder_id(network)
    model = latent_model(fast.accelerate(network, torch.float32))
    torch.testing.assert_close(model.encode(x).mean, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(z), x_hat, rtol=1e-5, atol=1e-5)
    fast.accelerate(network, torch.bfloat16)
    assert 1e-4 < (model.decode(z) - x_hat).abs().mean() / x_hat.std() < 0.05
    assert model.decode(z).dtype == network.dtype == torch.float32
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(part, state[name]) for name, part in network.state_dict().items())
    assert decoder_id(network) == base
    plain = fast.plain(network)
    assert type(plain.encoder) is type(again.encoder)
    assert torch.equal(latent_model(plain).decode(z), x_hat)
    assert fast.compute_dtype(network) == torch.bfloat16


@torch.no_grad()
def test_an_accelerated_asymmetric_decoder_still_takes_image_and_mask() -> None:
    network = asymmetric().eval()
    x, mask = picture(), (torch.rand(2, 1, 24, 32) > 0.5).float()
    z = network.encode(x).latent_dist.mode()
    expected = network.decode(z, image=x, mask=mask).sample
    assert not torch.allclose(expected, network.decode(z).sample)
    fast.accelerate(network, torch.float32)
    torch.testing.assert_close(network.decode(z, image=x, mask=mask).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [flux2, asymmetric])
def test_in_stripes_it_gives_what_the_whole_gives(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    image = photo(75, 58)
    whole, small = (
        Engine.load(tmp_path, EngineConfig(device="cpu", dtype="float32", memory_bytes=size)) for size in (0, 500_000)
    )
    assert whole.fits(75, 58, "encode")
    assert not small.fits(75, 58, "encode")
    z = whole.encode(image)
    np.testing.assert_allclose(small.encode(image), z, atol=1e-4 * np.abs(z).max())
    assert np.abs(whole.decode(z, 75, 58).astype(int) - small.decode(z, 75, 58)).max() <= 1
    pieces = tiled.encode(whole.model, image, stripe_rows=4)
    np.testing.assert_allclose(pieces, z, atol=1e-4 * np.abs(z).max())


def test_what_cannot_run_in_stripes_says_so_and_is_computed_again_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dc().save_pretrained(tmp_path)
    image, notes = photo(40, 44), []
    small = Engine.load(tmp_path, EngineConfig(device="cpu", dtype="float32", memory_bytes=1_000_000))
    with pytest.raises(ModelError, match="AutoencoderDC cannot be run in stripes, as an image beyond the memory"):
        small.encode(image)
    wide = Engine.load(tmp_path, EngineConfig(device="cpu", dtype="float32"))
    narrow = Engine.load(tmp_path, EngineConfig(device="cpu", dtype="bfloat16"), notes=notes.append)
    z = wide.encode(image)
    monkeypatch.setattr(narrow.model, "decode", lambda _: torch.full((1, 3, 40, 44), torch.nan))
    assert np.abs(narrow.decode(z, 40, 44).astype(int) - wide.decode(z, 40, 44)).max() <= 1
    assert notes == ["decode: numbers beyond bfloat16; done again in float32"]
    assert fast.compute_dtype(narrow.model.network) == torch.bfloat16


def test_memory_of_a_dc_follows_its_widest_maps() -> None:
    with torch.device("meta"):
        model = latent_model(AutoencoderDC())
    for what in ("encode", "decode"):
        small, large = (memory.estimate(model, side, side, what, False) for side in (1024, 2048))
        assert small > 4 * 128 * 1024**2 * 4
        assert 3.5 * small < large < 4 * small
        with pytest.raises(ModelError, match="AutoencoderDC cannot be run in stripes"):
            memory.estimate(model, 1024, 1024, what, True)


MEASURE = """
import resource, sys
import torch
from diffusers import AutoencoderDC
from codec import fast, memory
from codec.latent_model import latent_model
block, what, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
shape = {"block_types": ("ResBlock", block), "block_out_channels": (32, 128), "layers_per_block": (1, 1)}
shape |= {"qkv_multiscales": ((), (5,))}
shapes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()}
network = AutoencoderDC(latent_channels=8, attention_head_dim=32, **shapes).eval()
model = latent_model(fast.accelerate(network, dtype))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.inference_mode():
    model.decode(model.encode(torch.rand(1, 3, 64, 64)).mean)
    given = torch.rand(1, 3, 768, 768) if what == "encode" else torch.rand(1, 8, 384, 384)
    before = peak()
    getattr(model, what)(given)
print(peak() - before, memory.estimate(model, 768, 768, what, False, dtype=dtype))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.parametrize("block", ["ResBlock", "EfficientViTBlock"])
def test_the_estimate_of_a_dc_is_the_peak(block: str, what: str, dtype: str) -> None:
    command = [sys.executable, "-c", MEASURE, block, what, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, estimate = map(int, done.stdout.split())
    assert 0.5 * estimate < peak < 1.2 * estimate, f"peak {peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("make", "pinned"), [(dc, "5bde49915834d0eb"), (flux2, "073c08a35c281e25"), (asymmetric, "4b34be67371c9aa4")]
)
def test_decoder_ids_stay_and_cover_the_decoder_alone(make: Callable[..., Any], pinned: str) -> None:
    network = make()
    with torch.no_grad():
        for n, parameter in enumerate(network.parameters()):
            values = torch.arange(parameter.numel()) % 17 - 8
            parameter.copy_(values.reshape(parameter.shape) / 64 + n / 128)
        assert decoder_id(network) == pinned
        network.encoder.conv_in.weight.mul_(2)
        for buffer in network.buffers():
            buffer.add_(1)
        if hasattr(network.config, "scaling_factor"):
            network.register_to_config(scaling_factor=3.0)
        assert decoder_id(network) == pinned
        network.decoder.conv_in.weight.mul_(2)
    assert decoder_id(network) != pinned


@pytest.mark.parametrize("make", NEW)
def test_every_field_that_its_decoder_depends_on_counts(make: Callable[[], Any]) -> None:
    network = make()
    kind = type(network).__name__
    fields = model_folder.DECODER_FIELDS[kind]
    assert set(fields) - {"_class_name"} <= set(network.config)
    ids = {decoder_id(network)}
    for name in fields[1:]:
        network = make()
        network.register_to_config(**{name: "another"})
        ids.add(decoder_id(network))
    assert len(ids) == len(fields)


def test_all_adapters_normalize(tmp_path: Path) -> None:
    """What caches and the race call on whichever model they are given."""
    from diffusers import AutoencoderTiny, VQModel

    tiny = AutoencoderTiny(latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
    assert isinstance(latent_model(tiny), TinyModel)
    z = torch.randn(1, 4, 4, 4)
    for network in (tiny, VQModel(latent_channels=4, scaling_factor=0.5), kl(), dc(), asymmetric()):
        model = latent_model(network)
        assert torch.equal(model.normalize(z), (z - model.shift_factor) * model.scaling_factor)
        torch.testing.assert_close(model.denormalize(model.normalize(z)), z)


@pytest.mark.parametrize("make", NEW)
def test_the_other_evaluations_measure_or_refuse_it(
    make: Callable[[], Any], tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, folder = make(), tmp_path / "model"
    name = type(network).__name__
    network.save_pretrained(folder)
    options = ["--data", str(photo_folder), "--size", "48", "--no-plots", "--dtype", "float32", "-o", str(tmp_path)]
    assert eval_main(["latents", str(folder), *options]) == 0
    found = json.loads((tmp_path / "latents.json").read_text())
    assert found["model"]["class"] == name
    assert ("bn.running_mean and bn.running_var are not used" in capsys.readouterr().err) is (make is flux2)
    assert eval_main(["lint", str(folder)]) == 1
    assert f"'{name}' is not a class that lint knows" in " ".join(capsys.readouterr().out.split())
