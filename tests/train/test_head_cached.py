"""Commands that look at a latent cache: priors fitted to units and to latents, images drawn of them, evaluation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec import images
from codec.engine import Engine, EngineConfig
from codec.errors import ModelError, UsageError
from codec.head import Head
from codec.head.config import NetworkConfig, Space
from codec.head.fitted_folder import prior_id, read_fitted, write_fitted
from codec.head.flows import FlowSize
from codec.head.folder import Origin, write
from codec.head.network import ConditionalHead
from codec.head.second_stage import Standard
from codec.latent_model import Normalisation, encoder_id, load_network
from eval.class_folders import listed
from tests.conftest import make_model, photo
from tests.train.test_head_runs import TINY, config_of, data_of, set_of
from train.cli import main
from train.head.anomaly import elbo_bits
from train.head.fitting import FlowFitConfig, MixtureConfig
from train.head.likelihood import predicted
from train.head.second_stage import fit_prior
from train.head.task import HeadTask
from train.latent_dataset import LatentDataset

SPACE = Space(channels=4, height=8, width=8, n_classes=2)
N_HELD_OUT = 44  # holes need 40


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, caches of its latents by class and without classes, heads of them; do not change them."""
    folder = tmp_path_factory.mktemp("fitted")
    found = {"model": make_model(folder / "tiny"), "folder": folder}
    for cache, names, n_images in (("cache", ("coat", "hat"), 72), ("plain", ("", ""), 30)):
        for n in range(n_images):
            path = folder / f"{cache}-photos" / names[n % 2] / f"{n:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.save_png(photo(16, 16, seed=n)))
        assert main(["shards", str(folder / f"{cache}-photos"), "-o", str(folder / "s" / cache), "--jobs", "1"]) == 0
        command = ["cache", str(folder / "s" / cache), "-m", str(found["model"]), "-o", str(folder / cache)]
        assert main([*command, "--size", "16", "--jobs", "1", "--device", "cpu", "--dtype", "float32"]) == 0
        found[cache] = folder / cache
    engine = Engine.load(found["model"], EngineConfig(device="cpu", dtype="float32"))
    origin = Origin(
        model="tiny",
        encoder_id=encoder_id(load_network(found["model"])),
        decoder_id=engine.decoder_id,
        f=2,
        normalisation=Normalisation(0.0, 1.0),
    )
    for name, decoder, more in (
        ("gaussian", "gaussian", {"levels": 2, "spatial_units": 2}),
        ("matching", "flow-matching", {"prior": "standard"}),
        ("embedded", "gaussian", {}),
    ):
        space = replace(SPACE, n_classes=0, embedding_width=3) if name == "embedded" else SPACE
        torch.manual_seed(len(found))
        kind: Any = {"decoder": decoder, **more}
        network = ConditionalHead(NetworkConfig(units=6, width=16, depth=1, **kind), space)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
            network.encoder.last.bias[:6] += 3.0  # units that p(u|c) does not draw,
            network.encoder.last.bias[6:] -= 4.0  # and that are told exactly
        found[name] = folder / name
        classes = () if name == "embedded" else ("coat", "hat")
        about = {"n_held_out": N_HELD_OUT, "objective": {"condition_dropout": 0.1}}
        write(found[name], network, origin, classes, about)
    return found


@pytest.fixture
def run(there: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Run a verb: run(verb, *arguments, name="out", expected=0); names of `there` stand for its paths."""

    def go(verb: str, *more: Any, name: str = "out", expected: int = 0) -> tuple[Path, Any]:
        out = tmp_path / name
        words = [str(there.get(each, each)) if isinstance(each, str) else str(each) for each in more]
        assert main(["head", verb, *words, "-o", str(out), "--device", "cpu"]) == expected
        path = next(iter(out.glob("*.json")), None) if out.is_dir() else None
        return out, None if path is None else json.loads(path.read_text())

    return go


FAST = ("--components", 2)
FAST_FLOW = ("--kind", "flow", "--steps", 60, "--flow-steps", 2, "--width", 16, "--lr", "3e-3")


# --- fitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [MixtureConfig(components=2, per_class=True), FlowFitConfig(size=FlowSize(steps=2, width=8), steps=60, lr=3e-3)],
    ids=["mixture", "flow"],
)
def test_a_fitted_prior_beats_the_heads_own_on_units_that_chose_nothing(config: Any, tmp_path: Path) -> None:
    mirrored = [
        replace(each, mean=torch.cat([each.mean, each.mean.flip(-1)], dim=1)) for each in (set_of(64, 0), set_of(24, 1))
    ]
    data = data_of(training=mirrored[0], held_out=mirrored[1])
    task = HeadTask(config_of(replace(TINY, levels=2, prior="standard")), data)
    assert isinstance(task.module, ConditionalHead)
    with torch.no_grad():
        task.module.encoder.last.bias[:4] += 3.0  # units that N(0, I) does not draw
    fit = fit_prior(task.module, data, config)
    assert fit.own_nats == pytest.approx(fit.standard_nats, rel=1e-5)
    assert fit.held_out_nats < fit.standard_nats - 4
    is_flow = isinstance(config, FlowFitConfig)
    assert fit.n_vectors == {"fit": 116 if is_flow else 128, "stop": 12 if is_flow else 0, "held_out": 48}
    assert (fit.stop_nats is None) != is_flow
    # Held-out latents choose nothing: others in their place leave the prior as it is.
    other = fit_prior(task.module, replace(data, held_out=set_of(24, 7, by_class=5.0)), config)
    assert prior_id(other.prior) == prior_id(fit.prior)
    assert other.held_out_nats != fit.held_out_nats
    folder = tmp_path / "h"
    task.export(task.module, folder, {}, torch.device("cpu"))
    own, head = Head.load(folder, "cpu"), Head.load(folder, "cpu")
    write_fitted(tmp_path / "p", fit.prior, data.origin, data.classes, (head.head_id, (4,)), {})
    head.use(tmp_path / "p")
    assert float(head.draw_units(["hat"] * 50)[0].mean()) > 2 > float(own.draw_units(["hat"] * 50)[0].mean()) + 1
    assert [tuple(each.shape) for each in head.draw_units(["hat", None])] == [(2, 4), (2, 4, 4, 4)]
    assert head.sample(["hat", "coat", None]).shape == (3, 2, 4, 4)


def test_a_prior_comes_back_from_its_folder_and_draws_by_number(tmp_path: Path) -> None:
    data = data_of()
    fit = fit_prior(None, data, MixtureConfig(components=2, per_class=True))
    assert fit.own_nats is None
    assert fit.held_out_nats < fit.standard_nats - 10
    about = write_fitted(tmp_path / "p", fit.prior, data.origin, data.classes, ("", (2, 4, 4)), {})
    stored = read_fitted(tmp_path / "p")
    assert (stored.prior_id, stored.shape, stored.classes) == (about["prior_id"], (2, 4, 4), ("coat", "hat"))
    drawn = stored.draw(["coat"] * 200 + ["hat"] * 200, seed=1)
    assert drawn.shape == (400, 2, 4, 4)
    means = [float(part.mean()) for part in drawn.split(200)]
    assert means == pytest.approx([-2, 2], abs=0.4)  # of the two classes, see `set_of`
    assert set(drawn[:, 0].mean((1, 2)).sign().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(stored.draw(["hat"], seed=1, numbers=[203]), drawn[203:204])
    assert not torch.equal(stored.draw(["hat"], seed=2, numbers=[203]), drawn[203:204])
    middle = stored.draw([None] * 20, temperature=0.0)
    assert len({tuple(each.flatten().tolist()) for each in middle}) <= 4  # the components' means
    with pytest.raises(UsageError, match="no class shoe among coat, hat"):
        stored.draw(["shoe"])
    (tmp_path / "p" / "fitted.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="damaged"):
        read_fitted(tmp_path / "p")
    write_fitted(tmp_path / "n", Standard(32), data.origin, (), ("", (2, 4, 4)), {})
    assert read_fitted(tmp_path / "n").draw([None] * 500).std() == pytest.approx(1, abs=0.02)


# --- fit, sample, draw ----------------------------------------------------------------------------------------------


def test_samples_of_a_head_are_drawn_from_a_prior_fitted_to_its_units(
    run: Callable[..., Any], there: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prior, about = run("fit", "cache", "--head", "gaussian", *FAST, name="p")
    said = capsys.readouterr().out
    figures = about["figures"]
    assert figures["held_out_nats"] < figures["own_nats"] - 4
    assert f"mixture {figures['held_out_nats']:.2f}, the head's own {figures['own_nats']:.2f}" in said
    assert figures["n_vectors"]["held_out"] == N_HELD_OUT
    assert (about["classes"], about["shape"]) == (["coat", "hat"], [6])
    assert about["head_id"] == Head.load(there["gaussian"], "cpu").head_id
    assert "codec-train head fit " in about["command"]
    assert images.load(prior / "prior.png").shape[0] > 300
    own, _ = run("sample", "gaussian", "-m", "model", "--n", 3, name="own")
    out, about = run("sample", "gaussian", "-m", "model", "--n", 3, "--prior", prior, name="fitted")
    assert about["n_images"] == {"coat": 2, "hat": 1}
    assert about["prior"]["prior_id"] == read_fitted(prior).prior_id
    assert [str(each.relative) for each in listed(out)] == ["coat/000.png", "coat/001.png", "hat/000.png"]
    assert not np.array_equal(images.load(own / "hat/000.png"), images.load(out / "hat/000.png"))
    head = Head.load(there["gaussian"], "cpu")
    head.use(prior)
    engine = Engine.load(there["model"], EngineConfig(device="cpu", dtype="float32"))
    (expected,) = head.images(head.sample(["hat"]), engine)
    assert np.abs(images.load(out / "hat/000.png").astype(int) - expected).max() <= 1


def test_images_of_a_codec_are_drawn_without_a_head(run: Callable[..., Any], there: dict[str, Path]) -> None:
    prior, about = run("fit", "cache", *FAST, "--per-class", "--held-out", 20, name="p")
    assert (about["shape"], about["head_id"], about["prior"]["n_components"]) == ([4, 8, 8], "", 4)
    assert about["figures"]["held_out_nats"] < about["figures"]["standard_nats"]
    assert about["figures"]["own_nats"] is None
    out, about = run("draw", prior, "-m", "model", "--per-class", 2, "--classes", "hat,any")
    assert [str(each.relative) for each in listed(out)] == [f"{c}/00{n}.png" for c in ("any", "hat") for n in (0, 1)]
    assert about["kind"] == "head draw"
    stored = read_fitted(prior)
    engine = Engine.load(there["model"], EngineConfig(device="cpu", dtype="float32"))
    raw = stored.origin.normalisation.denormalize(stored.draw(["hat"], numbers=[1])).numpy()[0]
    assert np.abs(images.load(out / "hat/001.png").astype(int) - engine.decode(raw, 16, 16)).max() <= 1
    # N(0, I), which knows no classes, is drawn in the same way.
    prior, about = run("fit", "cache", "--kind", "standard", "--held-out", 20, name="n")
    assert about["figures"]["held_out_nats"] == about["figures"]["standard_nats"]
    out, _ = run("draw", prior, "-m", "model", "--n", 2, name="drawn")
    assert [str(each.relative) for each in listed(out)] == ["any/000.png", "any/001.png"]


def test_a_flow_says_what_it_stopped_by_and_what_it_is_worth_elsewhere(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, about = run("fit", "plain", *FAST_FLOW, "--held-out", 10)
    said = capsys.readouterr()
    assert "no sample has a class: the prior is unconditional" in said.err
    figures = about["figures"]
    assert figures["n_vectors"] == {"fit": 18, "stop": 2, "held_out": 10}
    assert figures["stop_nats"] == pytest.approx(-max(figures["traces"][0]))
    assert figures["stop_nats"] != figures["held_out_nats"]
    assert f"{figures['stop_nats']:.2f} of the 2 by which it stopped, fitted to 18" in said.out


def test_a_head_of_embeddings_gets_an_unconditional_prior(
    run: Callable[..., Any], there: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = LatentDataset(there["cache"])
    keys = np.array([dataset[n]["key"] for n in range(72)])
    np.savez(tmp_path / "e.npz", keys=keys, vectors=np.random.default_rng(0).normal(size=(72, 3)))
    _, about = run("fit", "cache", "--head", "embedded", *FAST, "--embeddings", tmp_path / "e.npz")
    assert "conditions are embeddings: the prior is unconditional" in capsys.readouterr().err
    assert about["classes"] == []
    run("fit", "cache", "--head", "embedded", *FAST, name="b", expected=2)
    assert "--embeddings: the head's conditions are embeddings" in capsys.readouterr().err


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bounds_of_a_head_agree_with_its_closed_form_and_tighten_with_draws(there: dict[str, Path]) -> None:
    head = Head.load(there["gaussian"], "cpu")  # of two levels
    z = torch.randn(5, *SPACE.shape, generator=torch.Generator().manual_seed(0))
    c = ["coat", "hat", None, "hat", "coat"]
    found = predicted(head, z, c, 150)
    assert found.iwae is not None
    assert found.effective is not None
    closed = elbo_bits(head, z, c, 150, seed=3)  # KL in closed form
    np.testing.assert_allclose(found.elbo, closed, atol=0.02)
    assert (found.iwae < found.elbo - 1e-4).all()
    assert ((found.effective >= 1) & (found.effective <= 150)).all()
    one = predicted(head, z, c, 1)
    np.testing.assert_allclose(one.iwae, one.elbo)
    wrong = predicted(head, z, ["hat", "coat", "hat", "coat", "hat"], 30)
    assert np.abs(wrong.elbo - found.elbo).min() > 1e-3  # the condition enters


def test_a_head_is_measured_on_a_cache(
    run: Callable[..., Any], there: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Head.load(there["gaussian"], "cpu")
    dataset = LatentDataset(there["cache"], sample=False, mirror=False)
    items = [dataset[n] for n in range(72)]
    u = head.encode(torch.stack([item["latents"] for item in items]), [None] * 72)[0]
    told, parity = (u[:, 1] > u[:, 1].median()).long(), np.random.default_rng(0).integers(0, 2, 72)
    keys = np.array([*[item["key"] for item in items], "unknown"])
    values = np.stack([[*told.tolist(), 0], [*parity, 0]], axis=1)
    np.savez(tmp_path / "f.npz", keys=keys, factors=values, names=np.array(["told", "parity"]))
    prior, fit = run("fit", "cache", "--head", "gaussian", *FAST, name="p")
    capsys.readouterr()
    more = ("--prior", prior, "--factors", tmp_path / "f.npz", "--draws", 8)
    out, about = run("evaluate", "gaussian", "cache", *more)
    said = capsys.readouterr().out
    assert (about["n_held_out"], about["head"]["head_id"]) == (N_HELD_OUT, head.head_id)
    bits = about["bits"]
    assert bits["iwae"]["value"] < bits["elbo"]["value"]
    low, high = bits["elbo"]["interval"]
    assert low < bits["elbo"]["value"] < high
    nats = about["prior_nats"]
    # The fit's own figures are of the same latents, other draws of their posteriors.
    assert nats["own"] == pytest.approx(fit["figures"]["own_nats"], rel=0.05)
    assert nats["fitted"] == pytest.approx(fit["figures"]["held_out_nats"], rel=0.1)
    assert bits["gain_of_fitted"] == pytest.approx((nats["own"] - nats["fitted"]) / 256 / np.log(2))
    assert about["holes"]["own"]["share"] > 0.5 > about["holes"]["fitted"]["share"]
    assert [len(level["kl_nats"]) for level in about["units"]] == [6, 2 * 4 * 4]
    assert sum(about["units"][0]["kl_nats"]) == pytest.approx(about["measured"]["kl_1"], rel=1e-4)
    factors = about["factors"]
    assert (factors["n"], factors["names"]) == (72, ["told", "parity"])
    assert int(np.argmax(factors["mig"]["information"][0])) == 1
    assert factors["sap"]["accuracy"][0][1] > 0.9 > max(factors["sap"]["accuracy"][1])
    assert images.load(out / "kl.png").shape[0] > 500
    for line in ("ELBO, bits a number (8 draws)", "IWAE", "active units, level 2", "prior in holes", "MIG", "SAP"):
        assert line in said
    assert about["command"].startswith("codec-train head evaluate ")


def test_a_flow_matching_head_has_no_importance_weighted_bound(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, about = run("evaluate", "matching", "cache", "--draws", 2, "--held-out", 6)
    said = capsys.readouterr()
    assert about["bits"]["iwae"] is None
    assert about["holes"] is None
    assert about["factors"] is None
    assert "no IWAE bound" in said.err
    assert "6 held-out samples, 40 are needed to look for holes" in said.err
    assert "held out 44 samples, here 6" in said.err


def test_what_does_not_belong_together_is_refused_in_one_line(
    run: Callable[..., Any],
    there: dict[str, Path],
    new_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*command: Any, code: int = 2) -> str:
        run(*command, name="x", expected=code)
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if not line.startswith(("note", "drawing"))]
        assert line.startswith("error: ")
        return line

    origin, units, latents = Head.load(there["gaussian"], "cpu").stored.origin, tmp_path / "units", tmp_path / "latents"
    write_fitted(units, Standard(6), origin, (), ("0123456789abcdef", (6,)), {})
    write_fitted(latents, Standard(256), origin, (), ("", (4, 8, 8)), {})
    sample = ("sample", "gaussian", "-m", "model")
    assert "units of head 0123456789abcdef, not of the units of head" in refused(*sample, "--prior", units, code=3)
    assert "a prior of latents, without a head" in refused(*sample, "--prior", latents, code=3)
    assert "no fitted prior here" in refused(*sample, "--prior", there["cache"], code=3)
    assert "not of the units of head" in refused("evaluate", "gaussian", "cache", "--prior", units, code=3)
    other = new_model("other", seed=1)
    assert "latents of encoder" in refused("draw", latents, "-m", other, code=3)
    assert "not of latents" in refused("draw", units, "-m", "model", code=3)
    assert "no class shoe among none" in refused("draw", latents, "-m", "model", "--classes", "shoe")
    assert "no class shoe among coat, hat" in refused(*sample, "--classes", "shoe")
    assert "no sample has a class" in refused("fit", "plain", "--head", "gaussian")
    assert "no sample has a class" in refused("evaluate", "gaussian", "plain")
    assert "there are no classes" in refused("fit", "plain", "--per-class", "--held-out", 5)
    assert "--kind vamp, expected mixture, flow, standard" in refused("fit", "cache", "--kind", "vamp")
    assert "at most one for each of" in refused("fit", "cache", "--components", 500, "--held-out", 5)
    assert "strength = nan" in refused("fit", "cache", "--strength", "nan")
    stranger = tmp_path / "stranger"
    about = json.loads((there["gaussian"] / "head.json").read_text())
    about["codec"]["encoder_id"] = "f" * 16
    stranger.mkdir()
    (stranger / "head.json").write_text(json.dumps(about))
    (stranger / "head.safetensors").write_bytes((there["gaussian"] / "head.safetensors").read_bytes())
    assert "latents of encoder ffffffffffffffff" in refused("fit", "cache", "--head", stranger, code=3)
    assert "latents of encoder ffffffffffffffff" in refused("evaluate", stranger, "cache", code=3)
    np.savez(tmp_path / "f.npz", keys=np.array(["a"]), factors=np.array([[1]]), names=np.array(["x"]))
    evaluate = ("evaluate", "gaussian", "cache", "--draws", 1, "--factors", tmp_path / "f.npz")
    assert "none of 72 samples has a key in it" in refused(*evaluate)
    assert "no class shoe among coat, hat" in refused(*evaluate, "--as", "shoe")
    np.savez(tmp_path / "f.npz", keys=np.array(["a"]), factors=np.array([[0.5]]), names=np.array(["x"]))
    assert "expected (N,) strings, (N, F) integers and (F,) strings" in refused(*evaluate)
