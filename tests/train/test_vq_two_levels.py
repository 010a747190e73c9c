"""VQ models of two levels in training: gradients, the two codebooks, runs, export, what cannot be had."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codec import facts, model_folder
from codec.latent_model import TwoLevelModel, latent_model, load_latent_model
from codec.pixels import to_float, to_uint8
from codec.runtime import Codec
from codec.shards import read_index
from tests.train.conftest import log, tiny_trainer
from tests.train.test_ranks import launch
from train.averaging import averaged
from train.checkpoint import Checkpoints, load
from train.cli import main
from train.config import Config, ModelConfig
from train.data import split, whole_images
from train.loss_config import HealthConfig, KLConfig
from train.module import AutoencoderModule, Draws
from train.networks import build_network
from train.progress import means
from train.vq.config import VQConfig
from train.vq.terms import CodebookTerms, build_quantiser
from train.vq.usage import CodeCounts

TWO = [
    "model.family=vq", "kl.weight=0", "model.block_out_channels=[8,8,16]", "vq.codebook_size=32",
    "vq.coarse_codebook_size=24", "export.statistics_images=4",
]  # fmt: skip
LEVELS = ("coarse_", "")


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    return ["run", "tiny", f"data.shards={shards}", f"run.out={out}", *TWO, *more]


def model_of(vq: VQConfig) -> TwoLevelModel:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    model = latent_model(build_network(ModelConfig(family="vq", mid_block_add_attention=False, **shape), vq=vq))
    assert isinstance(model, TwoLevelModel)
    return model


def module_of(vq: VQConfig, model: TwoLevelModel, *, started: bool = True) -> AutoencoderModule:
    quantisers = [build_quantiser(vq, model, trained=False, trains=True, level=n) for n in range(2)]
    for quantiser in quantisers:
        quantiser.started.fill_(started)
    return AutoencoderModule(model.network, quantisers=quantisers)


def picture() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "gradient", "simvq"])
def test_the_gradient_of_the_image_passes_both_quantisers_to_both_encoders(kind: str) -> None:
    vq = VQConfig(kind=kind, codebook_size=32, coarse_codebook_size=24, rotation_trick=kind == "gradient")
    model = model_of(vq)
    module = module_of(vq, model)
    if kind == "simvq":
        for weight, quantiser in zip(model.codebooks, module.quantisers, strict=True):
            weight.data.copy_(quantiser._vectors(weight))
    out = module(picture(), Draws())
    assert [codes.indices.shape for codes in out.codes] == [(2, 8, 8), (2, 16, 16)]
    for codes, codebook in zip(out.codes, model.codebooks, strict=True):
        assert torch.equal(codes.z_q, codebook[codes.indices].movedim(-1, 1))  # to the bit
    assert torch.equal(torch.cat([codes.indices.flatten() for codes in out.codes]), _flat(model, picture()))
    torch.testing.assert_close(model.decode(model.encode(picture()).mean), out.x_hat, atol=1e-5, rtol=0)
    out.x_hat.square().sum().backward()
    network = model.network
    for part in (network.encoder, network.coarse_encoder, network.coarse_decoder, network.coarse_upsample):
        assert any(bool(p.grad.any()) for p in part.parameters())
    vectors = [*model.codebooks, *(p for quantiser in module.quantisers for p in quantiser.parameters())]
    assert all(p.grad is None or not p.grad.any() for p in vectors)  # which learn by the codebooks' losses alone


def _flat(model: TwoLevelModel, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([grid.flatten() for grid in model.grids(model.indices(x))])


def test_each_commitment_moves_its_own_latents_and_each_codebook_term_its_own_vectors() -> None:
    vq = VQConfig(kind="gradient", codebook_size=32, coarse_codebook_size=24, beta=0.5, weight=3.0)
    model = model_of(vq)
    out = module_of(vq, model)(picture(), Draws())
    terms = [codes.terms["vq"] for codes in out.codes]
    for level, (codes, z, weight) in enumerate(zip(out.codes, out.latents, model.codebooks, strict=True)):
        at_z, at_weight = torch.autograd.grad(terms[level], (z, weight), retain_graph=True)
        away = (z - codes.z_q).detach()
        assert torch.allclose(at_z, 3 * 0.5 * 2 * away / z.numel(), atol=1e-8)
        expected = torch.zeros_like(weight).index_add_(0, codes.indices.flatten(), -away.movedim(1, -1).flatten(0, -2))
        assert torch.allclose(at_weight, 3 * 2 * expected / z.numel(), atol=1e-7)
        other = torch.autograd.grad(terms[level], model.codebooks[1 - level], retain_graph=True, allow_unused=True)
        assert other == (None,)
    # The fine level's commitment also asks the coarse one for latents that help; not the other way round.
    for term, z, reaches in ((terms[0], out.latents[1], False), (terms[1], out.latents[0], True)):
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == reaches


def test_before_the_start_latents_of_both_levels_pass_as_they_are() -> None:
    vq = VQConfig(codebook_size=32, coarse_codebook_size=24)
    model = model_of(vq)
    module = module_of(vq, model, started=False)
    assert not module.is_quantised
    out, network = module(picture(), Draws()), model.network
    features = network.features(picture())
    coarse = network.coarse_latents(features)
    fine = network.fine_latents(features, coarse)
    assert torch.equal(out.mean, model.pack([coarse, fine]))
    assert torch.equal(out.x_hat, network.decode(coarse, fine, force_not_quantize=True).sample)
    module.quantisers[0].started.fill_(True)
    assert not module.is_quantised  # both have to be


def test_the_linear_start_carries_brightness_through_both_levels() -> None:
    """The smallest change, over four steps of brightness, of the fine latents and of the image."""
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 32, 32)
    shape = {"block_out_channels": (16, 16, 16), "norm_num_groups": 1, "mid_block_add_attention": False}
    found = {}
    for init in ("linear", "diffusers"):
        torch.manual_seed(0)
        vq = VQConfig(coarse_codebook_size=24)
        network: Any = build_network(ModelConfig(family="vq", layers_per_block=1, init=init, **shape), vq=vq)
        with torch.no_grad():
            features = network.features(x)
            coarse = network.coarse_latents(features)
            fine = network.fine_latents(features, coarse)
            x_hat = network.decode(coarse, fine, force_not_quantize=True).sample
        inner = (each[..., 1:-1, 1:-1].mean((2, 3)) for each in (fine, x_hat))
        found[init] = [float(each.diff(dim=0).norm(dim=1).min()) for each in inner]
    for linear, plain in zip(found["linear"], found["diffusers"], strict=True):
        assert linear > 2 * plain


def test_averages_copy_vectors_of_either_level_that_jump() -> None:
    vq = VQConfig(codebook_size=32, coarse_codebook_size=24, cosine=True)
    model = model_of(vq)
    module = module_of(vq, model)
    average = averaged(module, 0.999)
    for _ in range(100):  # the first few averages forget fast
        average.update_parameters(module)
    old = [weight.clone() for weight in model.codebooks]
    for weight, quantiser, row in zip(model.codebooks, module.quantisers, (3, 5), strict=True):
        with torch.no_grad():
            weight.copy_(nn.functional.normalize(0.1 - weight, dim=1))
        quantiser.replaced[row] = True
    average.update_parameters(module)
    means_of = latent_model(average.module.network).codebooks
    for mean, weight, before, row in zip(means_of, model.codebooks, old, (3, 5), strict=True):
        assert torch.allclose(mean[row], weight[row], atol=1e-6)
        assert not torch.allclose(mean[row + 1], weight[row + 1], atol=1e-2)
        assert torch.allclose(mean.norm(dim=1), torch.ones(len(mean)), atol=1e-5)
        assert not torch.equal(mean, before)


# --- what is counted and said ---------------------------------------------------------------------------------------


def test_usage_is_counted_and_said_for_each_level() -> None:
    vq = VQConfig(codebook_size=32, coarse_codebook_size=24)
    model = model_of(vq)
    indices = torch.zeros(1, 5, 12, 12, dtype=torch.int64)
    indices[:, 0, 0, 0] = 7
    indices[:, 1, :, :] = 2
    indices[:, 2, 0, :3] = torch.tensor([4, 5, 6])
    coarse, fine = CodeCounts.by_map(model, indices)
    assert (coarse.n_tokens, fine.n_tokens) == (144, 4 * 144)
    rows = [{"coarse_codes": coarse, "codes": fine}] * 3
    metrics = means(rows)
    assert metrics["coarse_usage"] == pytest.approx(2 / 24)
    assert metrics["usage"] == pytest.approx(5 / 32)
    assert metrics["coarse_tokens_per_code"] == pytest.approx(3 * 144 / 24)
    terms = [
        CodebookTerms(build_quantiser(vq, model, trained=False, trains=True, level=n), model, HealthConfig(), n)
        for n in range(2)
    ]
    (about_coarse,), (about_fine,) = (each.after_validation(metrics) for each in terms)
    assert about_coarse.startswith("low coarse codebook usage: 8.3% of 24 vectors, perplexity")
    assert about_fine.startswith("low codebook usage: 15.6% of 32 vectors, perplexity")
    few = {"coarse_tokens_per_code": 3.0, "coarse_usage_at_least": 0.2, "tokens_per_code": 40.0, "usage": 0.9}
    (line,) = terms[0].after_validation(few)
    assert line.startswith("coarse codebook: usage n/a, on 3 held-out tokens per vector at least 20.0%")
    assert terms[1].after_validation(few) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coarse_codebook_size": 1}, r"vq.coarse_codebook_size = 1, allowed: 0 \(one level\) or >= 2"),
        ({"coarse_codebook_size": 1 << 21}, "allowed: 0..1048576"),
        ({"coarse_codebook_size": 20, "kind": "fsq", "codebook_size": 20, "fsq_levels": (5, 4)}, "0 with vq.kind fsq"),
        ({"coarse_codebook_size": 8, "kind": "lfq", "codebook_size": 8}, "0 with vq.kind lfq"),
    ],
)
def test_each_mistake_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VQConfig(**settings)


def test_two_levels_need_two_widths() -> None:
    model = ModelConfig(family="vq", block_out_channels=(32,), norm_num_groups=1)
    with pytest.raises(ValueError, match=r"model\.block_out_channels = \(32,\), allowed: one width for each level"):
        Config(model=model, vq=VQConfig(coarse_codebook_size=8), kl=KLConfig(weight=0.0))


# --- steps of the trainer -------------------------------------------------------------------------------------------


def test_a_step_logs_both_levels_apart_and_learns_both_codebooks(shards: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(shards, tmp_path / "r", *TWO, "vq.start=0", "vq.revive_below=0.5", "vq.decay=0.5")
    described = trainer.task.describe()
    assert described["network"].startswith("TwoLevelVQModel f4 c20, ")
    assert described["coarse codebook"] == "ema, K 24, d 4"
    assert described["codebook"] == "ema, K 32, d 4"
    assert "coarse (0.25 commitment) + (0.25 commitment)" in described["loss"]
    batches = trainer.feed.batches(0.0, 0)
    trainer.step(batches)  # after which the codebooks begin
    module, average = trainer.task.module, trainer.ema.module
    for live, mean in zip(latent_model(module.network).codebooks, latent_model(average.network).codebooks, strict=True):
        assert torch.equal(live, mean)
    before = [weight.clone() for weight in latent_model(module.network).codebooks]
    values = trainer.step(batches)
    for prefix, size in zip(LEVELS, (24, 32), strict=True):
        assert 1 <= values[f"{prefix}codebook_perplexity"] <= values[f"{prefix}codebook_usage"] * size + 1e-3
        for name in ("codebook_error", "codebook_running_perplexity", "codebook_revived", "commitment"):
            assert f"{prefix}{name}" in values
        assert values[f"grad_{prefix}commitment"] > 0
    assert values["coarse_codebook_perplexity"] != values["codebook_perplexity"]
    for old, weight in zip(before, latent_model(module.network).codebooks, strict=True):
        assert not torch.equal(old, weight)


# --- runs through the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two levels, ended and exported; do not change it."""
    out = tmp_path_factory.mktemp("two") / "r"
    assert main(arguments(shards, out, "run.n_images=24", "run.validate_every=12", "vq.start=40%")) == 0
    return out


def held_out(shards: Path) -> np.ndarray:
    _, image = next(iter(whole_images(split(read_index(shards), 2)[1], 256, 4)))
    return image


def test_a_run_validates_each_level_and_exports_what_it_trained(run: Path, shards: Path, tmp_path: Path) -> None:
    validation = log(run, "validation")[-1]
    for prefix, size in zip(LEVELS, (24, 32), strict=True):
        assert validation[f"{prefix}tokens_per_code"] > 0
        bound = "" if f"{prefix}usage" in validation else "_at_least"
        assert validation[f"{prefix}perplexity{bound}"] <= validation[f"{prefix}usage{bound}"] * size + 1e-3
    assert validation["tokens_per_code"] == pytest.approx(4 * 24 / 32 * validation["coarse_tokens_per_code"])
    _, state = Checkpoints(run / "checkpoints", 1).newest()
    trainer = tiny_trainer(shards, tmp_path / "again", *TWO)
    trainer.resume(state)
    average = trainer.ema.module
    model = load_latent_model(run / "model")
    assert isinstance(model, TwoLevelModel)
    x = to_float(held_out(shards))[None]
    with torch.inference_mode():
        indices = model.indices(x)
        ours = average(x, Draws())
        assert torch.equal(indices, latent_model(average.network).indices(x))
        assert [len(grid.unique()) > 2 for grid in model.grids(indices)] == [True, True]
        for grid, codes in zip(model.grids(indices), ours.codes, strict=True):
            assert torch.equal(grid, codes.indices)
        torch.testing.assert_close(model.decode_indices(indices), ours.x_hat, atol=1e-5, rtol=0)


def test_the_folder_is_a_model_of_the_codec_and_its_card_says_what_loads_it(run: Path, shards: Path) -> None:
    folder, model = run / "model", load_latent_model(run / "model")
    assert isinstance(model, TwoLevelModel)
    image = held_out(shards)
    codec = Codec.load(folder, dtype="float32")
    data = codec.encode(image)
    with torch.inference_mode():
        indices = model.indices(to_float(image)[None])
        coded = codec.indices(data)[1]
        assert np.mean(coded == indices[0].numpy()) > 0.95  # the last bits of the encoder's ways differ
        expected = to_uint8(model.decode_indices(torch.from_numpy(coded)[None].long())[0])
    assert np.mean(codec.decode(data) != expected) < 0.01
    known, card = facts.read(folder), (folder / "README.md").read_text()
    figures = known["held_out"]
    assert figures["fixed_length_bpp"] == pytest.approx((5 + 4 * 5) / 16)
    assert 0 < figures["static_bpp"] < figures["fixed_length_bpp"]
    assert [each["size"] for each in known["codebooks"]] == [24, 32]
    counts = CodeCounts.none(model)
    for _, pixels in whole_images(split(read_index(shards), 2)[1], 1024, 4):
        found = CodeCounts.by_map(model, model.indices(to_float(pixels)[None]))
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    for each in counts:
        for name, value in each.figures().items():
            assert figures[name] == pytest.approx(value)
    assert "two levels (f4, 24 vectors; f2, 32 vectors) of 4 channels, widths 8, 8, 16" in card
    assert "**diffusers has no class for it, and no pipeline loads it**" in card
    assert "| diffusers | no | diffusers has no class for it" in card
    assert "`codec encode photos -o coded -m FOLDER`" in card
    assert card.count("tokens per vector") == 2
    assert "coarse usage " in card


RESUMED = [
    "run.n_images=16", "run.checkpoint_every=4", "run.keep_last=9", "vq.start=40%", "vq.revive_below=0.9",
    "vq.decay=0.5", "export.statistics_images=1", "data.n_validation=1",
]  # fmt: skip


def test_a_run_resumed_before_or_after_the_codebooks_began_ends_where_it_would_have(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.autoencoder.export_codebook_model", lambda *_, **__: {})  # others look at it
    assert main(arguments(shards, tmp_path / "whole", *RESUMED)) == 0
    source = tmp_path / "whole" / "checkpoints" / "images-000000004.pt"
    before = load(source)["module"]
    for prefix in LEVELS:
        assert not bool(before[f"{prefix}quantiser.started"])
        assert len(before[f"{prefix}quantiser._extra_state"]) > 24
    end = load(tmp_path / "whole" / "checkpoints" / "images-000000016.pt")
    for images in (4, 12):
        point = source.with_name(f"images-{images:09d}.pt")
        assert main(arguments(shards, tmp_path / str(images), *RESUMED, f"run.resume={point}")) == 0
        again = load(tmp_path / str(images) / "checkpoints" / "images-000000016.pt")
        for part in ("module", "ema"):
            for name, tensor in end[part].items():
                assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(again[part][name])), f"{part} {name}"
    steps = log(tmp_path / "4", "step")
    assert all(sum(line.get(f"{prefix}codebook_revived", 0) for line in steps) > 0 for prefix in LEVELS)
    sizes = "vq.coarse_codebook_size=25"
    assert main(arguments(shards, tmp_path / "other", *RESUMED, sizes, f"run.resume={source}")) == 2


# --- from somebody's folder -----------------------------------------------------------------------------------------


def test_a_decoder_alone_is_trained_for_indices_that_stay(run: Path, shards: Path, tmp_path: Path) -> None:
    base, out = run / "model", tmp_path / "r"
    overrides = [f"data.shards={shards}", f"run.out={out}", f"model.init_from={base}", "run.n_images=12"]
    assert main(["run", "tiny", *overrides]) == 0  # class, widths and K are the folder's
    a, b = (load_latent_model(folder) for folder in (base, out / "model"))
    decodes = ("decoder.", "post_quant_conv.", "coarse_upsample.")
    after = b.network.state_dict()
    changed = {name.split(".")[0] for name, tensor in a.network.state_dict().items() if not after[name].equal(tensor)}
    assert changed == {part.removesuffix(".") for part in decodes}
    with torch.inference_mode():
        x = to_float(held_out(shards))[None]
        assert torch.equal(a.indices(x), b.indices(x))
    assert model_folder.read(base).stream_id == model_folder.read(out / "model").stream_id  # so it reads base's files
    assert "coarse_commitment" not in log(out, "step")[-1]
    assert log(out, "step")[-1]["coarse_codebook_usage"] > 0


def test_all_of_a_folder_goes_on_with_both_codebooks(run: Path, shards: Path, tmp_path: Path) -> None:
    base = run / "model"
    trainer = tiny_trainer(shards, tmp_path / "r", f"model.init_from={base}", "model.trainable=all", "vq.decay=0.9")
    given, model = load_latent_model(base), latent_model(trainer.task.module.network)
    assert [weight.equal(other) for weight, other in zip(model.codebooks, given.codebooks, strict=True)] == [True, True]
    assert trainer.task.module.is_quantised
    trainer.step(trainer.feed.batches(0.0, 0))
    for weight, other in zip(model.codebooks, given.codebooks, strict=True):
        moved = float((weight - other).detach().norm() / other.norm())
        assert 0 < moved < 0.5  # from where it was, not anew


def test_what_two_levels_cannot_have_is_refused_in_one_line(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(run / "model"), str(tmp_path / "out")
    student = ["model.family=tiny", "model.block_out_channels=[8,8]", "kl.weight=0", f"model.teacher={model}"]
    for command, words in (
        (["cache", str(shards), "-m", model, "-o", out, "--size", "32", "--format", "indices"], "has 2 codebooks"),
        (["export", model, "-o", out, "--onnx"], "ONNX: a TwoLevelVQModel; only AutoencoderKL and AutoencoderTiny"),
        (["export", model, "-o", out, "--single-file"], "no single file: a TwoLevelVQModel"),
        (["run", "tiny", f"data.shards={shards}", f"run.out={out}", *student], "model.teacher: a TwoLevelVQModel"),
    ):
        capsys.readouterr()
        assert main(command) in (2, 3)
        lines = capsys.readouterr().err.strip().splitlines()
        assert words in lines[-1]


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_keep_bit_equal_codebooks(shards: Path, tmp_path: Path) -> None:
    """Through the pools, k-means, running means and revival; `train.checkpoint` digests every tensor of each rank."""
    settings = ["run.n_images=40", "optim.batch_size=2", "run.checkpoint_every=4", "run.keep_last=1", "vq.start=20%"]
    settings += ["vq.decay=0.5", "vq.revive_below=0.9", "data.n_validation=2", "run.validate_every=40"]
    out = tmp_path / "r"
    done = launch(2, arguments(shards, out, *settings))
    assert done.returncode == 0, done.stderr
    saved = log(out, "checkpoint")
    assert len(saved) == 10
    assert all(len(line["parameters"]) == 2 and len(set(line["parameters"])) == 1 for line in saved)
    for prefix in LEVELS:
        assert sum(line.get(f"{prefix}codebook_revived", 0) for line in log(out, "step")) > 0
    assert "coarse codebook: 24 vectors by k-means of" in done.stderr
