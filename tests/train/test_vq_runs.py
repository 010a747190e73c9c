"""VQModels through the real trainer: each kind, export and reload, resume, ranks, accumulation, fine-tuning."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file

from codec import facts, fsq, model_folder
from codec.adapters import CodebookModel
from codec.latent_model import load_latent_model
from codec.pixels import to_float, to_uint8
from codec.runtime import Codec
from codec.shards import read_index
from tests.train.conftest import log, tiny_trainer
from tests.train.test_ranks import launch
from train.checkpoint import Checkpoints, load
from train.cli import main
from train.data import split, whole_images
from train.trainer import Trainer
from train.vq.usage import CodeCounts

VQ = ["model.family=vq", "kl.weight=0", "export.statistics_images=4", "vq.codebook_size=32"]
KINDS = {
    "ema": ["vq.kind=ema"],
    "gradient": ["vq.kind=gradient", "vq.rotation_trick=true"],
    "cosine": ["vq.kind=ema", "vq.cosine=true", "vq.codebook_dim=3"],
    "cosine by gradient": ["vq.kind=gradient", "vq.cosine=true"],
    "simvq": ["vq.kind=simvq"],
    "lfq": ["vq.kind=lfq"],
    "fsq": ["vq.kind=fsq", "vq.codebook_size=45", "vq.fsq_levels=[5,3,3]"],
}


QUICK = ("ema", "simvq", "fsq")  # of which a run is always tested; the others are slow


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    return ["run", "tiny", f"data.shards={shards}", f"run.out={out}", *VQ, *more]


EACH_KIND = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]


class Runs:
    """A run of each kind, ended and exported, trained when it is first asked for; do not change them."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def __getitem__(self, kind: str) -> Path:
        out = self.folder / kind
        if not out.exists():
            assert main(arguments(self.shards, out, *KINDS[kind], "run.validate_every=16")) == 0
        return out


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shards, tmp_path_factory.mktemp("vq"))


def held_out(shards: Path) -> torch.Tensor:
    _, image = next(iter(whole_images(split(read_index(shards), 2)[1], 256, 2)))
    return to_float(image)[None]


@pytest.mark.parametrize("kind", EACH_KIND)
def test_each_kind_trains_logs_and_validates(kind: str, runs: Runs) -> None:
    steps, (first, *_, validation) = log(runs[kind], "step"), log(runs[kind], "validation")
    assert validation["raw_loss"] < first["raw_loss"]
    size = 45 if kind == "fsq" else 32
    assert 1 <= steps[-1]["codebook_perplexity"] <= steps[-1]["codebook_usage"] * size + 1e-3
    assert validation["tokens_per_code"] >= 16
    assert 0 < validation["perplexity"] <= validation["usage"] * size + 1e-3
    assert validation["raw_perplexity"] > 0
    term = {"gradient": "vq", "cosine by gradient": "vq", "simvq": "vq"}.get(kind, "commitment")
    assert term in steps[-1]
    assert ("grad_entropy" in steps[-1]) == (kind == "lfq")


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_exported_folder_gives_the_same_indices_and_images(kind: str, runs: Runs, shards: Path) -> None:
    """Against what the trainer's own averaged module gives, and against diffusers' quantisation."""
    run, x = runs[kind], held_out(shards)
    _, state = Checkpoints(run / "checkpoints", 1).newest()
    trainer = tiny_trainer(shards, run.parent / f"{kind}-again", *VQ, *KINDS[kind])
    trainer.resume(state)
    average = trainer.ema.module
    model = load_latent_model(run / "model")
    assert isinstance(model, CodebookModel)
    network = VQModel.from_pretrained(run / "model").eval()
    with torch.inference_mode():
        ours = average.quantiser(average._model.encode(x).mean, average.network.quantize.embedding.weight)
        image = average.network.decode(ours.z_q, force_not_quantize=True).sample
        indices = model.indices(x)
        assert torch.equal(indices, ours.indices)
        assert len(indices.unique()) > 2
        torch.testing.assert_close(model.decode_indices(indices), image, atol=1e-5, rtol=0)
        z = network.encode(x).latents
        _, _, (_, _, theirs) = network.quantize(z)
        whole = network(x).sample
        vectors = network.quantize.embedding.weight[indices].movedim(-1, 1).contiguous()
        by_vectors = network.decode(vectors, force_not_quantize=True).sample
    torch.testing.assert_close(by_vectors, image, atol=1e-5, rtol=0)
    card = (run / "model" / "README.md").read_text()
    if kind == "fsq":
        assert not torch.equal(theirs, indices.flatten())
        assert torch.equal(network.quantize.embedding.weight, fsq.codebook((5, 3, 3)))
        assert json.loads((run / "model" / "config.json").read_text())["fsq_levels"] == [5, 3, 3]
        assert "Its own quantisation is wrong for this model" in card
        assert "| diffusers | decodes |" in card
    else:
        assert torch.equal(theirs, indices.flatten())
        torch.testing.assert_close(whole, image, atol=1e-5, rtol=0)
        assert "wrong" not in card
    if kind in ("cosine", "cosine by gradient"):
        assert torch.allclose(network.quantize.embedding.weight.norm(dim=1), torch.ones(32), atol=1e-5)
    if kind == "lfq":
        assert network.quantize.embedding.weight.abs().eq(1).all()


def test_the_card_and_facts_hold_what_is_measured(runs: Runs, shards: Path) -> None:
    folder = runs["ema"] / "model"
    known, card = facts.read(folder), (folder / "README.md").read_text()
    assert (known["family"], known["codebook_size"], known["latent_channels"]) == ("vq", 32, 4)
    model = load_latent_model(folder)
    training, validation = split(read_index(shards), 2)
    counts, psnr = [], []
    for samples in ([training[i] for i in _order(len(training))[:4]], validation):
        found = CodeCounts.of(torch.empty(0, dtype=torch.int64), 32)
        for _, image in whole_images(samples, 1024, 2):
            indices = model.indices(to_float(image)[None])
            found += CodeCounts.of(indices, 32)
            x_hat = to_uint8(model.decode_indices(indices)[0])
            psnr.append(((image.astype(float) - x_hat) ** 2).mean())
        counts.append(found)
    figures = known["held_out"]
    assert figures["perplexity"] == pytest.approx(counts[1].perplexity)
    assert figures["static_bpp"] == pytest.approx(counts[1].bits_under(counts[0]) / 4)
    assert figures["fixed_length_bpp"] == 5 / 4
    assert f"usage {counts[1].usage:.1%} of 32 vectors, perplexity {counts[1].perplexity:.4g}" in card
    assert "indices of a fixed length: 1.2500 bits per pixel" in card
    codec = Codec.load(folder, dtype="float32")
    sizes = [8 * len(codec.encode(image)) / image[..., 0].size for _, image in whole_images(validation, 1024, 2)]
    assert figures["bpp"] == pytest.approx(np.mean(sizes))
    assert f"files of `codec encode`: {np.mean(sizes):.4f} bits per pixel" in card
    assert known["codebook"]["n_tokens"] == counts[0].n_tokens
    assert "ema: vectors are running means" in card
    fixture = load_file(runs["ema"] / "fixture.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model.decode(fixture["z"]), fixture["x_hat"], atol=1e-5, rtol=0)


def _order(n: int) -> list[int]:
    return list(np.random.default_rng(0).permutation(n))


# --- resume, accumulation, discarded steps --------------------------------------------------------------------------

RESUMED = [
    "run.n_images=32", "run.checkpoint_every=8", "run.keep_last=9", "vq.start=40%", "vq.revive_below=0.9",
    "vq.decay=0.5", "export.statistics_images=1", "data.n_validation=1",
]  # fmt: skip


def _assert_equal(a: Any, b: Any, name: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            _assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_equal(x, y, f"{name}.{n}")
    else:
        assert a == b, name


@pytest.mark.parametrize(
    "kind", [each for each in EACH_KIND if each.values[0] in ("ema", "cosine by gradient", "simvq", "lfq")]
)
def test_a_run_resumed_before_or_after_the_codebook_began_ends_where_it_would_have(
    kind: str, shards: Path, tmp_path: Path
) -> None:
    settings = [*KINDS[kind], *RESUMED]
    assert main(arguments(shards, tmp_path / "whole", *settings)) == 0
    checkpoints = tmp_path / "whole" / "checkpoints"
    end = load(checkpoints / "images-000000032.pt")
    before = load(checkpoints / "images-000000008.pt")["module"]
    if kind != "lfq":
        assert not bool(before["quantiser.started"])
        assert len(before["quantiser._extra_state"]) > 32
    revived = sum(line.get("codebook_revived", 0) for line in log(tmp_path / "whole", "step"))
    assert (revived > 0) == (kind in ("ema", "cosine by gradient"))
    for images in (8, 24):
        out = tmp_path / str(images)
        source = checkpoints / f"images-{images:09d}.pt"
        assert main(arguments(shards, out, *settings, f"run.resume={source}")) == 0
        again = load(out / "checkpoints" / "images-000000032.pt")
        for part in ("module", "ema", "generator", "task", "validation"):
            _assert_equal(end[part], again[part], f"{images} {part}")


def test_another_codebook_cannot_be_resumed(
    shards: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = runs["ema"] / "checkpoints" / "images-000000064.pt"
    assert main(arguments(shards, tmp_path / "r", "vq.kind=gradient", f"run.resume={source}")) == 2
    assert "changed model: vq.kind ema -> gradient" in capsys.readouterr().err


def test_accumulated_batches_count_as_one_step(shards: Path, tmp_path: Path) -> None:
    """The codebook after the step with which it began, and two more, against one batch of as many images."""
    settings = [*VQ, "vq.start=0", "vq.decay=0.5", "vq.revive_below=0.5", "optim.lr=1e-9"]
    one = tiny_trainer(shards, tmp_path / "1", *settings, "optim.batch_size=4")
    two = tiny_trainer(shards, tmp_path / "2", *settings, "optim.batch_size=2", "optim.accumulate=2")
    for _ in range(3):
        values = [trainer.step(trainer.feed.batches(0.0, trainer.progress.images)) for trainer in (one, two)]
    a, b = (trainer.task.module.quantiser for trainer in (one, two))
    assert torch.allclose(a.share, b.share, atol=1e-5)
    assert torch.allclose(a.total, b.total, atol=1e-4)
    assert values[0]["codebook_perplexity"] == pytest.approx(values[1]["codebook_perplexity"], rel=1e-3)
    assert float(a.share.max()) > 1.5 / 32  # it has learned something


def test_a_discarded_step_and_evaluation_leave_the_codebook_untouched(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(shards, tmp_path / "r", *VQ, "vq.start=0", "optim.accumulate=2", "vq.revive_below=0.9")
    batches = trainer.feed.batches(0.0, 0)
    trainer.step(batches)
    trainer.step(batches)
    module = trainer.task.module

    def codebook() -> dict[str, torch.Tensor]:
        held = {"weight": module.network.quantize.embedding.weight, **module.quantiser.state_dict()}
        return {name: tensor.detach().clone() for name, tensor in held.items()}

    before, plain = codebook(), trainer.task.generator_step
    trainer.validate()
    _assert_equal(codebook(), before, "after validation")

    def poisoned(wrapped, batch, where):
        terms = plain(wrapped, batch, where)
        return replace(terms, objective=terms.objective * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(trainer.task, "generator_step", poisoned)
        trainer.step(batches)
    _assert_equal(codebook(), before, "after a step that was left out")
    tokens = trainer.task._latents.codebooks[0]._tokens
    assert not tokens._batches  # nothing of it comes along with the next one
    trainer.step(batches)
    assert not torch.equal(codebook()["weight"], before["weight"])


# --- from somebody's folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "fsq"])
def test_a_decoder_alone_is_trained_for_indices_that_stay(kind: str, runs: Runs, shards: Path, tmp_path: Path) -> None:
    base, out = runs[kind] / "model", tmp_path / "r"
    # The family, K and levels are the folder's.
    assert main(["run", "tiny", f"data.shards={shards}", f"run.out={out}", f"model.init_from={base}"]) == 0
    before, after = (VQModel.from_pretrained(folder).state_dict() for folder in (base, out / "model"))
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same == (not name.startswith(("decoder.", "post_quant_conv."))), name
    x = held_out(shards)
    a, b = (load_latent_model(folder) for folder in (base, out / "model"))
    with torch.inference_mode():
        assert torch.equal(a.indices(x), b.indices(x))
    assert a.scaling_factor == b.scaling_factor
    assert model_folder.read(base).stream_id == model_folder.read(out / "model").stream_id  # so it reads base's files
    assert "vq" not in log(out, "step")[-1]
    assert log(out, "step")[-1]["codebook_usage"] > 0
    assert "the decoder alone" in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize("override", ["vq.cosine=true", "vq.kind=lfq"])
def test_a_decoder_alone_learns_from_the_folders_vectors_whatever_the_recipe_says(
    override: str, runs: Runs, shards: Path, tmp_path: Path
) -> None:
    base = runs["ema"] / "model"
    trainer = tiny_trainer(shards, tmp_path / "r", f"model.init_from={base}", override)
    model, module = load_latent_model(base), trainer.task.module
    assert isinstance(model, CodebookModel)
    with torch.inference_mode():
        z = model.encode(held_out(shards)).mean
        codes = module.quantiser(z, model.codebook)
    assert torch.equal(codes.indices, model.quantise(z))
    torch.testing.assert_close(codes.z_q, model.codebook[model.quantise(z)].movedim(-1, 1))
    trainer.step(trainer.feed.batches(0.0, 0))


def test_all_of_a_folder_goes_on_with_its_codebook(runs: Runs, shards: Path, tmp_path: Path) -> None:
    base = runs["ema"] / "model"
    overrides = [f"model.init_from={base}", "model.trainable=all", "vq.decay=0.9"]
    trainer = tiny_trainer(shards, tmp_path / "r", *overrides)
    vectors = VQModel.from_pretrained(base).quantize.embedding.weight
    weight = trainer.task.module.network.quantize.embedding.weight
    assert torch.equal(weight, vectors)
    quantiser = trainer.task.module.quantiser
    assert bool(quantiser.started)
    batches = trainer.feed.batches(0.0, 0)
    trainer.step(batches)
    assert not torch.equal(weight, vectors)
    assert float((weight - vectors).detach().norm() / vectors.detach().norm()) < 0.5  # from where it was, not anew


def test_what_a_vqmodel_cannot_have_is_refused(
    runs: Runs, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, words in (
        ("kl.weight=0.1", "kl.weight = 0.1, allowed: 0 with model.family vq"),
        ("rate.probability=0.5", "rate.probability = 0.5, allowed: 0 with model.family vq: of a VQModel's latents"),
        ("latents.noise=0.1", "latents.noise"),
        ("latents.equivariance=0.5", "latents.equivariance"),
        ("run.gradient_checkpointing=true", "diffusers has none"),
        ("vq.codebook_size=1", "vq.codebook_size = 1, allowed: >= 2"),
        ("vq.start=100", "vq.start = '100', allowed: less than run.n_images = 64"),
    ):
        assert main(arguments(shards, tmp_path / "r", override)) == 2
        assert words in capsys.readouterr().err
    base = f"model.init_from={runs['ema'] / 'model'}"
    assert main(["run", "tiny", f"data.shards={shards}", f"run.out={tmp_path / 'r'}", base, "rate.probability=1"]) == 2
    assert "rate.probability = 1.0, allowed: 0 with model.family vq" in capsys.readouterr().err


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "cosine by gradient"])
def test_two_processes_keep_bit_equal_codebooks(kind: str, shards: Path, tmp_path: Path) -> None:
    """Through the pool, k-means, running means and revival; `train.checkpoint` digests every tensor of each rank."""
    settings = [*KINDS[kind], "run.n_images=40", "optim.batch_size=2", "run.checkpoint_every=4", "run.keep_last=1"]
    settings += ["vq.start=20%", "vq.decay=0.5", "vq.revive_below=0.9", "data.n_validation=2", "run.validate_every=40"]
    out = tmp_path / "r"
    done = launch(2, arguments(shards, out, *settings))
    assert done.returncode == 0, done.stderr
    saved = log(out, "checkpoint")
    assert len(saved) == 10
    assert all(len(line["parameters"]) == 2 and len(set(line["parameters"])) == 1 for line in saved)
    assert sum(line.get("codebook_revived", 0) for line in log(out, "step")) > 0
    assert "32 vectors by k-means of 256 latents" in done.stderr


def test_the_trainer_type_is_the_one_that_trains_everything_else(shards: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(shards, tmp_path / "r", *VQ)
    assert type(trainer) is Trainer
    assert type(trainer.task).__name__ == "AutoencoderTask"
    described = trainer.task.describe()
    assert described["codebook"] == "ema, K 32, d 4, from 2% of the run on"
    assert "(0.25 commitment)" in described["loss"]
