import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from codec.errors import UsageError
from codec.latent_model import Posterior
from codec.latent_transform import LatentTransform
from codec.pixels import to_float
from codec.statistics import LatentStatistics
from tests.conftest import photo
from train.latent_losses import FeatureAlignment, LatentScale, latent_moments, noisy_latents

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


# Transform


def test_draws_cover_all_scales_and_turns_and_keep_the_shortest_side() -> None:
    rng = np.random.default_rng(0)
    drawn = [LatentTransform.draw(rng, 32, 64, 8) for _ in range(2000)]
    assert {t.turns for t in drawn} == {1, 2, 3}
    assert {t.height for t in drawn} == set(range(8, 32))
    assert all(t.width == 2 * t.height for t in drawn)
    large = [LatentTransform.draw(rng, 32, 64, 8, min_pixels=161) for _ in range(1000)]
    assert {t.height for t in large} == set(range(21, 32))  # 20 * 8 = 160 pixels would be too few
    assert LatentTransform.draw(rng, 16, 20, 8, min_pixels=127).height == 16  # nothing smaller is allowed: turned only
    assert LatentTransform.draw(rng, 1, 1, 8).height == 1
    again = [LatentTransform.draw(np.random.default_rng(7), 32, 32, 8, m) for m in (1, 1, 200)]
    assert again[0] == again[1]
    assert again[2].turns == again[0].turns


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turns_alone_are_exact(turns: int) -> None:
    z, x = torch.randn(2, 4, 6, 8), torch.randn(2, 3, 48, 64)
    transform = LatentTransform(6, 8, turns)
    assert torch.equal(transform.latents(z), torch.rot90(z, turns, (-2, -1)))
    assert torch.equal(transform.image(x, 8), torch.rot90(x, turns, (-2, -1)))


def test_latents_are_filtered_as_images_are_with_a_gradient() -> None:
    z = torch.randn(2, 4, 12, 16, requires_grad=True)
    transform = LatentTransform(5, 7, 1)
    turned = transform.latents(z)
    expected = F.interpolate(z, size=(5, 7), mode="bilinear", align_corners=False, antialias=True)
    assert turned.shape == (2, 4, 7, 5)
    torch.testing.assert_close(turned, torch.rot90(expected, 1, (-2, -1)))
    assert torch.equal(transform.image(z.detach(), 1), torch.rot90(expected.detach(), 1, (-2, -1)))
    g = torch.randn_like(turned)
    (got,) = torch.autograd.grad((turned * g).sum(), z)
    (wanted,) = torch.autograd.grad((torch.rot90(expected, 1, (-2, -1)) * g).sum(), z)
    torch.testing.assert_close(got, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform.latents(z), turned)


@pytest.mark.parametrize("size", [(256, 256), (192, 256)])
@pytest.mark.parametrize("scale", [8, 13, 20, 31])
def test_an_encoder_that_averages_commutes_with_it(size: tuple[int, int], scale: int) -> None:
    f, x = 8, to_float(photo(*size))[None]
    z = F.avg_pool2d(x, f)
    transform = LatentTransform(z.shape[2] * scale // 32, z.shape[3] * scale // 32, 1)
    of_image = F.avg_pool2d(transform.image(x, f), f)
    deviation = of_image.std().item()
    assert rms(transform.latents(z) - of_image) < 0.06 * deviation  # measured: 0.02 to 0.045
    wrong = LatentTransform(transform.height, transform.width, 3)
    assert rms(wrong.latents(z) - of_image) > 0.5 * deviation


# Noise


def test_noise_is_scaled_per_image() -> None:
    z, noise = torch.randn(3, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 5, 6)
    y = noisy_latents(z, torch.tensor([0.0, 0.5, 2.0]), noise)
    torch.testing.assert_close(y, torch.stack([z[0], z[1] + 0.5 * noise[1], z[2] + 2 * noise[2]]))
    (gradient,) = torch.autograd.grad(y.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


def test_the_scale_is_the_deviation_that_export_measures() -> None:
    torch.manual_seed(0)
    place = torch.tensor([0.0, 3.0, -1.0])[:, None, None]
    batches = [place + 2.0 * torch.randn(4, 3, 8, 8) for _ in range(30)]
    scale, statistics = LatentScale(), LatentStatistics(3)
    assert scale.deviation == 0.0
    for n, z in enumerate(batches):
        # Two ranks or two accumulated batches, averaged as the loop averages what is logged, are one.
        halves = (latent_moments(z[:2]) + latent_moments(z[2:])) / 2
        torch.testing.assert_close(halves, latent_moments(z))
        scale.update(*halves.tolist())
        statistics.update(Posterior(mean=z, logvar=None))
        if n == 0:
            assert scale.deviation == pytest.approx(z.std(correction=0).item(), rel=1e-4)
        if n == 14:
            resumed = LatentScale(**json.loads(json.dumps(dataclasses.asdict(scale))))
        elif n > 14:
            resumed.update(*halves.tolist())
    assert scale.deviation == pytest.approx(statistics.summary().global_std, rel=1e-3)
    assert resumed == scale


def test_the_scale_follows_latents_that_grow() -> None:
    scale = LatentScale()
    for _ in range(200):
        scale.update(0.0, 1.0)
    for _ in range(500):
        scale.update(0.0, 9.0)
    assert scale.deviation == pytest.approx(3.0, rel=0.01)


# Alignment


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random networks, by the name of their kind; do not change them."""
    import transformers

    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in made:
            return made[kind]
        patches: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}
        torch.manual_seed(0)
        network = {
            "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**patches, hidden_dropout_prob=0.5)),
            "classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**patches)),
            "registers": lambda: transformers.Dinov2WithRegistersModel(
                transformers.Dinov2WithRegistersConfig(**patches, num_register_tokens=9)
            ),
            "swin": lambda: transformers.SwinModel(
                transformers.SwinConfig(
                    image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
                )
            ),
            "convnext": lambda: transformers.ConvNextModel(
                transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64)
            ),
            "clip": lambda: transformers.CLIPModel(
                transformers.CLIPConfig(text_config={**TINY, "vocab_size": 9}, vision_config=patches)
            ),
            "text": lambda: transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=9)),
        }[kind]()
        made[kind] = tmp_path_factory.mktemp(kind)
        network.eval().save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"),
    [("vit", 1, 4), ("classifier", 1, 4), ("registers", 10, 4), ("clip", 1, 4), ("swin", 0, 4), ("convnext", None, 2)],
)
def test_features_are_the_grid_without_class_and_register_tokens(
    networks: Callable[[str], Path], kind: str, prefix: int | None, grid: int
) -> None:
    from transformers import AutoModel

    folder = networks(kind)
    alignment = FeatureAlignment(folder, (0.25, 0.5))
    side = 64 if kind == "convnext" else 32
    x = torch.rand(2, 3, side, side) * 2 - 1
    features = alignment.features(x)
    assert features.shape == (2, 16, grid, grid)
    assert alignment.channels == 16
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        states = getattr(network, "vision_model", network)(((x + 1) / 2 - mean) / deviation).last_hidden_state
    if prefix is None:
        torch.testing.assert_close(features, states)
        return
    assert states.shape[1] == prefix + grid * grid
    for row in range(grid):
        for column in range(grid):
            torch.testing.assert_close(features[:, :, row, column], states[:, prefix + row * grid + column])


def test_the_preprocessor_beside_the_network_is_obeyed(networks: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "dino"
    folder.mkdir()
    for file in networks("convnext").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    plain = FeatureAlignment(folder, (0.0, 0.0))
    assert plain.features(x).shape[-2:] == (2, 2)  # config.image_size is 64, a cell 32
    settings: dict[str, Any] = {"crop_size": {"height": 96, "width": 96}, "size": {"shortest_edge": 128}}
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    cropped = FeatureAlignment(folder, (0.0, 0.0)).features(x)
    assert cropped.shape[-2:] == (3, 3)
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_center_crop": False}))
    assert FeatureAlignment(folder, (0.0, 0.0)).features(x).shape[-2:] == (4, 4)
    # Mean and deviation of one half make [-1, 1] of [0, 1] again.
    with torch.no_grad():
        torch.testing.assert_close(cropped, plain._network(x).last_hidden_state)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 96, "do_normalize": False}))
    with torch.no_grad():
        expected = plain._network((x + 1) / 2).last_hidden_state
    torch.testing.assert_close(FeatureAlignment(folder, (0.0, 0.0)).features(x), expected)


def test_the_loss_is_the_formula(networks: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    x, z, projected = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 5, 3, 4), torch.randn(2, 16, 3, 4)
    alignment = FeatureAlignment(networks("vit"), (0.1, 0.7))
    f = F.interpolate(alignment.features(x), size=(3, 4), mode="bilinear", antialias=True)
    places = [(row, column) for row in range(3) for column in range(4)]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a @ b / (a.norm() * b.norm())).item()

    near, far = [], []
    for n in range(2):
        for i in places:
            near.append(max(0.0, 1 - 0.7 - cosine(projected[n, :, *i], f[n, :, *i])))
            for j in places:
                gap = abs(cosine(z[n, :, *i], z[n, :, *j]) - cosine(f[n, :, *i], f[n, :, *j]))
                far.append(max(0.0, gap - 0.1))
    assert 0 < np.mean([value == 0 for value in near]) < 1  # the margins cut some and leave some
    assert 0 < np.mean([value == 0 for value in far]) < 1
    assert alignment(z, projected, x).item() == pytest.approx(np.mean(near) + np.mean(far), rel=1e-4)
    # Latents that are the features have no loss without margins; opposite ones a cosine of -1.
    strict = FeatureAlignment(networks("vit"), (0.0, 0.0))
    assert strict(f, f, x).item() == pytest.approx(0.0, abs=1e-5)
    assert strict(f, -3 * f, x).item() == pytest.approx(2.0, abs=1e-5)
    assert strict(torch.zeros_like(z), torch.zeros_like(projected), x).isfinite()


def test_large_grids_compare_every_second_position(networks: Callable[[str], Path]) -> None:
    alignment = FeatureAlignment(networks("vit"), (0.0, 0.0))
    x, z, projected = torch.rand(1, 3, 32, 32), torch.randn(1, 2, 40, 40), torch.randn(1, 16, 40, 40)
    loss = alignment(z, projected, x).item()
    z[..., 1::2, :] = 0
    z[..., :, 1::2] = 0
    assert alignment(z, projected, x).item() == pytest.approx(loss, rel=1e-6)
    z[..., 0, 0] *= -1
    assert alignment(z, projected, x).item() != pytest.approx(loss, rel=1e-6)


def test_gradients_reach_latents_and_projection_and_nothing_else(networks: Callable[[str], Path]) -> None:
    alignment = FeatureAlignment(networks("vit"), (0.25, 0.5))
    projection = alignment.projection(5)
    assert projection.bias is None
    assert projection.weight.shape == (16, 5, 1, 1)
    x, z = torch.rand(2, 3, 32, 32, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    alignment.train()
    assert not any(module.training for module in alignment.modules())
    assert torch.equal(alignment.features(x), alignment.features(x))  # no dropout
    alignment(z, projection(z), x).backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(dim=1) > 0).all()
    assert projection.weight.grad is not None
    assert projection.weight.grad.abs().sum() > 0
    assert x.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in alignment.parameters())
    assert projection.weight.requires_grad


def test_features_do_not_change_under_autocast(networks: Callable[[str], Path]) -> None:
    alignment = FeatureAlignment(networks("vit"), (0.25, 0.5))
    x, z, projected = torch.rand(2, 3, 32, 32), torch.randn(2, 5, 4, 4), torch.randn(2, 16, 4, 4)
    loss = alignment(z, projected, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(alignment(z, projected, x), loss)


def test_half_precision_weights_are_widened(networks: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(str(networks("vit"))).half().save_pretrained(tmp_path)
    alignment = FeatureAlignment(tmp_path, (0.25, 0.5))
    assert {parameter.dtype for parameter in alignment.parameters()} == {torch.float32}


def failure(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        FeatureAlignment(folder, (0.25, 0.5))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_what_is_not_a_vision_network_is_said_in_one_line(networks: Callable[[str], Path], tmp_path: Path) -> None:
    assert "hf download" in failure(tmp_path / "missing")
    assert "no config.json" in failure(tmp_path)
    assert "gives no grid" in failure(networks("text"))

    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in failure(tmp_path)
    # Weights of another network: transformers would start at random values with a warning.
    (tmp_path / "config.json").write_bytes((networks("vit") / "config.json").read_bytes())
    assert "cannot be loaded" in failure(tmp_path)  # no weights at all
    (tmp_path / "model.safetensors").write_bytes((networks("convnext") / "model.safetensors").read_bytes())
    assert "do not fit" in failure(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((networks("vit") / "model.safetensors").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(UsageError, match=r"preprocessor_config\.json: "):
        FeatureAlignment(tmp_path, (0.25, 0.5))


def test_missing_transformers_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in failure(tmp_path)
