"""Our model folders inside diffusers' own pipelines: which formula each decodes by, tiled, in 16 bits, accelerated."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from codec import fast, images, model_folder, runtime
from codec.latent_model import LatentModel, load_latent_model
from codec.pixels import to_float
from codec.shards import read_index
from tests.codec.small_pipelines import CODEBOOK, IMAGE_TO_IMAGE, INPAINT, TEXT_TO_IMAGE, Case, generate
from tests.conftest import photo
from train.cli import main
from train.config import Config, DataConfig, ExportConfig, ModelConfig, RunConfig
from train.data import split
from train.export import export_model
from train.loss_config import KLConfig
from train.networks import build_network

PACKAGE_MODELS = Path(model_folder.__file__).parent / "models"
SHAPE: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1}
MODELS = {
    "sd": ModelConfig(latent_channels=4, norm_num_groups=4, **SHAPE),
    "sd3": ModelConfig(latent_channels=16, norm_num_groups=4, use_quant_conv=False, **SHAPE),
    "tiny": ModelConfig(family="tiny", latent_channels=4, **SHAPE),
}
RECORD = {"losses": "l1", "validation": {}, "steps": 3, "images_seen": 12, "time_s": 6.0}


def prepared(config: ModelConfig) -> Any:
    """Return a network whose latents have a mean that is far from zero, and next to no variance."""
    torch.manual_seed(0)
    network: Any = build_network(config)
    if config.family == "kl":
        last = network.quant_conv if config.use_quant_conv else network.encoder.conv_out
        with torch.no_grad():
            last.weight[config.latent_channels :] = 0
            last.bias[config.latent_channels :] = -30  # so that image to image has no noise of the posterior's
            last.bias[: config.latent_channels] += 1.5
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by form, as a run exports them; and one of a VQModel."""
    root = tmp_path_factory.mktemp("pipelines")
    (root / "photos").mkdir()
    for n in range(6):
        (root / "photos" / f"{n}.png").write_bytes(images.save_png(photo(72, 80, seed=n)))
    assert main(["shards", str(root / "photos"), "-o", str(root / "shards"), "--jobs", "1"]) == 0
    training, validation = split(read_index(root / "shards"), 1)
    made = {}
    for name, model in MODELS.items():
        config = Config(
            model=model,
            kl=KLConfig(weight=0),
            data=DataConfig(shards=str(root / "shards"), crop=64, n_validation=1),
            run=RunConfig(out=str(root / name)),
            export=ExportConfig(statistics_images=5),
        )
        made[name], device = root / name / "model", torch.device("cpu")
        export_model(prepared(model), made[name], config, training, validation, record=RECORD, device=device)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    network = VQModel(
        block_out_channels=(8, 8, 8), norm_num_groups=4, num_vq_embeddings=64, scaling_factor=0.5, **blocks
    )
    torch.nn.init.normal_(network.quantize.embedding.weight)
    made["vq"] = root / "vq"
    network.save_pretrained(made["vq"])
    return made


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a folder as a user does."""
    kind = {"sd": AutoencoderKL, "sd3": AutoencoderKL, "tiny": AutoencoderTiny, "vq": VQModel}
    name = folder.name if folder.name == "vq" else folder.parent.name
    return kind[name].from_pretrained(folder, torch_dtype=dtype)


def form(case: Case) -> str:
    return "sd3" if case.shifts else "sd"


@torch.no_grad()
def decoded(model: LatentModel, z: torch.Tensor) -> torch.Tensor:
    """Return the image in [0, 1] of normalized latents, by our formula."""
    return (model.decode(model.denormalize(z)) / 2 + 0.5).clamp(0, 1)


def close(image: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return image.shape == expected.shape and float((image - expected).abs().max()) <= tolerance


cases = pytest.mark.parametrize("case", TEXT_TO_IMAGE.values(), ids=list(TEXT_TO_IMAGE))


@cases
def test_a_pipeline_decodes_by_our_formula_and_accelerated_does_the_same(case: Case, folders: dict[str, Path]) -> None:
    folder = folders[form(case)]
    vae, model = loaded(folder), load_latent_model(folder)
    pipeline = case.build(vae)
    made = generate(case, pipeline)
    assert made.image.shape == (1, 3, 64, 64)
    assert made.image.std() > 0.02
    assert made.z.shape[1] == case.latents
    assert abs(model.scaling_factor - 1) > 0.05  # else nothing would be seen of it
    assert (abs(model.shift_factor) > 0.5) == case.shifts
    assert close(made.image, decoded(model, made.z))

    vae.register_to_config(shift_factor=model.shift_factor + 2)  # why an export for the others has none
    assert torch.equal(generate(case, pipeline).image, made.image) is not case.shifts
    vae.register_to_config(shift_factor=model.shift_factor)

    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    assert runtime.accelerate(pipeline, torch.float32) is pipeline
    assert fast.compute_dtype(vae) == torch.float32
    assert close(generate(case, pipeline).image, made.image, 1e-4)
    runtime.accelerate(pipeline, torch.bfloat16)
    assert 0 < (generate(case, pipeline).image - made.image).abs().mean() < 0.01
    assert vae.dtype == torch.float32
    assert isinstance(getattr(pipeline, case.place), AutoencoderKL)
    assert vae.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())


@cases
def test_in_tiles_and_in_bfloat16(case: Case, folders: dict[str, Path]) -> None:
    folder = folders[form(case)]
    vae, again = loaded(folder), load_latent_model(folder)
    pipeline = case.build(vae)
    whole = generate(case, pipeline)
    network: Any = again.network
    for tiled in (vae, network):
        tiled.tile_sample_min_size, tiled.tile_latent_min_size = 48, 6
        tiled.enable_tiling()
    made = generate(case, pipeline)
    assert torch.equal(made.z, whole.z)
    assert not close(made.image, whole.image, 1e-3)  # tiles were used
    assert close(made.image, decoded(again, made.z))
    runtime.accelerate(pipeline, torch.float32)
    assert close(generate(case, pipeline).image, made.image, 1e-4)
    fast.restore(vae).disable_tiling()
    network.disable_tiling()

    pipeline.to(torch.bfloat16)
    narrow = generate(case, pipeline)
    assert narrow.image.dtype == vae.dtype == torch.bfloat16
    assert 0 < (narrow.image.float() - decoded(again, narrow.z)).abs().mean() < 0.02


def test_statistics_of_channels_are_normalized_as_in_sdxl(folders: dict[str, Path], tmp_path: Path) -> None:
    vae = loaded(folders["sd"])
    vae.register_to_config(latents_mean=[1.0, -1.0, 0.5, 2.0], latents_std=[0.5, 1.0, 2.0, 1.5])
    vae.save_pretrained(tmp_path)
    case = TEXT_TO_IMAGE["sdxl"]
    made = generate(case, case.build(vae))
    assert close(made.image, decoded(load_latent_model(tmp_path), made.z))
    assert not close(made.image, decoded(load_latent_model(folders["sd"]), made.z), 1e-2)


class Still(diffusers.DDIMScheduler):
    """Adds no noise and takes none away."""

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        return original_samples

    def step(self, model_output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
        return (sample,)


class StillFlow(diffusers.FlowMatchEulerDiscreteScheduler):
    """See `Still`."""

    def scale_noise(self, sample: Any, timestep: Any, noise: Any = None) -> Any:
        return sample

    def step(self, model_output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
        return (sample,)


def round_trip(folder: Path, x: torch.Tensor) -> torch.Tensor:
    model = load_latent_model(folder)
    with torch.no_grad():
        return (model.decode(model.encode(x).mean) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("case", IMAGE_TO_IMAGE.values(), ids=list(IMAGE_TO_IMAGE))
def test_what_goes_into_image_to_image_comes_out(case: Case, folders: dict[str, Path]) -> None:
    """Encoded, normalized, nothing done, denormalized, decoded: our own round trip."""
    folder, x = folders[form(case)], to_float(photo(64, 64, seed=9))[None]
    pipeline = case.build(loaded(folder))
    pipeline.scheduler = StillFlow() if case.shifts else Still.from_config(pipeline.scheduler.config)
    made = generate(case, pipeline, image=x / 2 + 0.5, strength=0.9)
    expected = round_trip(folder, x)
    assert expected.std() > 0.02
    assert close(made.image, expected)
    model = load_latent_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(made.z, model.normalize(model.encode(x).mean), rtol=1e-5, atol=1e-5)
    assert abs(float(made.z.mean())) < 0.7
    assert 0.3 < float(made.z.std()) < 3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_model_of_the_package_serves_pipelines(name: str) -> None:
    """Those that know shift_factor and latents of 16 channels: a picture of noise, and one of a photograph."""
    folder, x = PACKAGE_MODELS / "kl-f8", to_float(photo(64, 64, seed=9))[None]
    vae, case = AutoencoderKL.from_pretrained(folder), TEXT_TO_IMAGE[name]
    made = generate(case, case.build(vae))
    assert made.image.std() > 0.02
    assert close(made.image, decoded(load_latent_model(folder), made.z))
    case = IMAGE_TO_IMAGE[name]
    pipeline = case.build(vae)
    pipeline.scheduler = StillFlow()
    given = x / 2 + 0.5
    image = generate(case, pipeline, image=given, strength=0.9).image
    assert (image - given).square().mean() < 0.2 * given.var()  # it is that photograph


@pytest.mark.parametrize("case", INPAINT.values(), ids=list(INPAINT))
def test_inpainting_leaves_alone_what_is_not_masked(case: Case, folders: dict[str, Path]) -> None:
    folder, x = folders["sd"], to_float(photo(64, 64, seed=9))[None]
    pipeline = case.build(loaded(folder))
    mask = torch.zeros(1, 1, 64, 64)
    how = {"image": x / 2 + 0.5, "num_inference_steps": 2, "strength": 1.0}
    made = generate(case, pipeline, mask_image=mask, **how)
    if "nine" not in case.name:  # that one is told by its denoiser's inputs what to keep, and learns to
        assert close(made.image, round_trip(folder, x))
    masked = generate(case, pipeline, mask_image=torch.ones_like(mask), **how)
    assert close(masked.image, decoded(load_latent_model(folder), masked.z))
    assert not close(masked.image, round_trip(folder, x), 0.05)


def test_sdxl_upcasts_a_network_that_float16_does_not_hold(folders: dict[str, Path]) -> None:
    """The pipeline computes in float16 and our decoder in float32, as `force_upcast` asks."""
    case, folder = TEXT_TO_IMAGE["sdxl"], folders["sd"]
    for upcast in (True, False):
        vae = loaded(folder)
        vae.register_to_config(force_upcast=upcast)
        pipeline = case.build(vae).to(torch.float16)
        dtypes = []
        vae.decoder.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))  # noqa: B023
        made = generate(case, pipeline)
        assert dtypes == [torch.float32 if upcast else torch.float16]
        assert made.image.isfinite().all()
        assert vae.dtype == torch.float16  # as it was
        tolerance = 3e-3 if upcast else 3e-2  # latents are float16 in both
        assert close(made.image.float(), decoded(load_latent_model(folder), made.z), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", IMAGE_TO_IMAGE.values(), ids=list(IMAGE_TO_IMAGE))
def test_image_to_image_of_little_strength_returns_the_image(case: Case, folders: dict[str, Path]) -> None:
    """With the pipeline's own noise, little of it, and a denoiser that knows nothing."""
    folder, x = folders[form(case)], to_float(photo(64, 64, seed=9))[None]
    pipeline, expected = case.build(loaded(folder)), round_trip(folder, x)
    errors = []
    for strength in (0.02, 0.9):
        made = generate(case, pipeline, image=x / 2 + 0.5, strength=strength, num_inference_steps=100)
        errors.append(float((made.image - expected).square().mean().sqrt() / expected.std()))
    assert errors[0] < 0.2 < errors[1]


FRESH = """
import sys
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tests.codec.small_pipelines import IMAGE_TO_IMAGE, INPAINT, TEXT_TO_IMAGE, generate
folder, file, fixture, form = sys.argv[1:]
whole, single = AutoencoderKL.from_pretrained(folder), AutoencoderKL.from_single_file(file, config=folder)
told = load_file(fixture)
with torch.no_grad():
    for vae in (whole, single):
        z = vae.encode(told["x"]).latent_dist.mode()
        errors = (z - told["z"], vae.decode(z).sample - told["x_hat"])
        print(form, "trainer", max(float(error.abs().max()) for error in errors))
x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
for group in (TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT):
    how = {} if group is TEXT_TO_IMAGE else {"image": x, "strength": 0.9, "num_inference_steps": 4}
    how |= {"mask_image": (x[:, :1] > 0.5).float()} if group is INPAINT else {}
    for case in group.values():
        if case.shifts == (form == "sd3"):
            one, other = (generate(case, case.build(vae), **how).image for vae in (whole, single))
            assert one.std() > 0.02
            print(case.name, case.make, float((one - other).abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_folder_single_file_and_trainer_agree_in_a_fresh_process(name: str, folders: dict[str, Path]) -> None:
    (file,) = folders[name].glob("*_ldm.safetensors")
    fixture = folders[name].parent / "fixture.safetensors"
    command = [sys.executable, "-c", FRESH, str(folders[name]), str(file), str(fixture), name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + (4 if name == "sd3" else 9)
    assert all(float(line.rsplit(" ", 1)[1]) <= 1e-5 for line in lines), lines


def test_a_small_decoder_serves_stable_diffusion(folders: dict[str, Path]) -> None:
    case = TEXT_TO_IMAGE["sd"]
    vae = loaded(folders["tiny"])
    pipeline = case.build(vae)
    made = generate(case, pipeline)
    assert close(made.image, decoded(load_latent_model(folders["tiny"]), made.z))
    runtime.accelerate(pipeline, torch.float32)
    assert close(generate(case, pipeline).image, made.image, 1e-4)


@pytest.mark.parametrize("case", CODEBOOK.values(), ids=list(CODEBOOK))
def test_a_codebook_serves_latent_diffusion(case: Case, folders: dict[str, Path]) -> None:
    vae, model = loaded(folders["vq"]), load_latent_model(folders["vq"])
    pipeline = case.build(vae)
    how: dict[str, Any] = {}
    if "super" in case.name:
        how["image"] = to_float(photo(8, 8))[None]
    outputs = []
    forward: Callable[..., Any] = vae.decode
    vae.decode = lambda z, **more: outputs.append(forward(z, **more)) or outputs[-1]
    made = generate(case, pipeline, **how)
    scaled = made.z if "super" in case.name else model.denormalize(made.z)  # this pipeline scales nothing
    with torch.no_grad():
        expected = model.decode(scaled)
    assert close(outputs[-1].sample, expected)
    assert close(made.image, (expected / 2 + 0.5).clamp(0, 1))
    assert len(model.quantise(scaled).unique()) > 3
    del vae.decode
    runtime.accelerate(pipeline, torch.float32)
    assert close(generate(case, pipeline, **how).image, made.image, 1e-4)


def test_the_codebook_of_the_package_serves_latent_diffusion() -> None:
    folder, x = PACKAGE_MODELS / "vq-f8", to_float(photo(64, 64, seed=9))[None]
    vae, model = VQModel.from_pretrained(folder), load_latent_model(folder)
    case = CODEBOOK["ldm unconditional"]
    made = generate(case, case.build(vae))
    assert made.image.std() > 0.02
    with torch.no_grad():
        expected = (model.decode(model.denormalize(made.z)) / 2 + 0.5).clamp(0, 1)
        given, decoded = x / 2 + 0.5, vae(x).sample / 2 + 0.5
    assert close(made.image, expected)
    assert (decoded - given).square().mean() < 0.3 * given.var()


def test_what_has_no_autoencoder_is_told_so(folders: dict[str, Path]) -> None:
    unet = TEXT_TO_IMAGE["ldm"].build(loaded(folders["sd"])).unet
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="DDIMPipeline: no autoencoder in it, expected one of vae, vqvae, movq"):
        runtime.accelerate(pipeline)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.encoder is NoneType"):
        runtime.accelerate(unet)
    vae = loaded(folders["sd"])
    assert runtime.accelerate(vae, torch.float32) is vae
    assert fast.compute_dtype(vae) == torch.float32
