"""Training of the conditional head: its data, objectives, validation, collapse, runs by the command, its folder."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec import images
from codec.errors import UsageError
from codec.head import Head
from codec.head.config import NetworkConfig
from codec.head.folder import Origin
from codec.head.network import ConditionalHead
from codec.latent_model import Normalisation
from tests.conftest import make_model, photo
from tests.train.test_ranks import launch
from train.best import check_same
from train.cli import main
from train.config import OptimConfig, RunConfig
from train.denoiser_feed import LatentFeed, LatentSet
from train.head.config import HeadConfig, LatentDataConfig, ObjectiveConfig
from train.head.latents import HeadData, load_data
from train.head.measure import ConditionTally, UnitTally
from train.head.task import HeadTask
from train.latent_dataset import LatentDataset
from train.progress import means
from train.task import Step

TINY = NetworkConfig(units=4, width=16, depth=1, decoder="gaussian", flow_width=16)
CPU = torch.device("cpu")


def set_of(n: int, seed: int, by_class: float = 2.0) -> LatentSet:
    """Latents (2, 4, 4) of two classes: a mean for each, one number for an image, and noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    image = torch.randn(n, 1, 1, 1, 1, generator=rng) * torch.tensor([1.0, -0.5]).reshape(1, 1, 2, 1, 1)
    mean = (
        by_class * (labels * 2.0 - 1).reshape(n, 1, 1, 1, 1) + image + 0.3 * torch.randn(n, 1, 2, 4, 4, generator=rng)
    )
    return LatentSet(keys=[f"{seed}-{k}" for k in range(n)], labels=labels, mean=mean, std=None)


def data_of(n: int = 64, **how: Any) -> HeadData:
    origin = Origin(model="m", encoder_id="e", decoder_id="d", f=2, normalisation=Normalisation(0.0, 1.0))
    parts = {"training": set_of(n, 0), "held_out": set_of(24, 1), "classes": ["coat", "hat"], "embeddings": None}
    return HeadData(**{**parts, **how}, origin=origin, n_dropped=0, digests=("", ""))


def config_of(head: NetworkConfig = TINY, n_images: int = 1000, **objective: Any) -> HeadConfig:
    return HeadConfig(
        head=head,
        objective=ObjectiveConfig(**{"beta": 1.0, "schedule": "constant", **objective}),
        optim=OptimConfig(lr=5e-3, batch_size=16, warmup_images=0),
        run=RunConfig(n_images=n_images, precision="no"),
    )


def step_at(number: int, size: int = 16, share: float = 1.0) -> Step:
    first = number * size
    return Step(
        number=number, images=first, share=share, seed=0, positions=range(first, first + size), autocast=nullcontext
    )


def trained(task: HeadTask, data: HeadData, steps: int, out: Path) -> list[float]:
    """Take optimizer steps without the loop; return the errors."""
    feed = LatentFeed(data.training, out, batch_size=16, seed=0).batches(0.0, 0)
    optimizer = torch.optim.Adam(task.module.parameters(), lr=5e-3)
    errors = []
    for number in range(steps):
        terms = task.generator_step(task.module, next(feed), step_at(number))
        optimizer.zero_grad()
        terms.objective.backward()
        optimizer.step()
        errors.append(float(terms.values["error"]))
    return errors


def validated(task: HeadTask) -> tuple[dict[str, float], list[str]]:
    """Return metrics and lines of a validation of averaged weights, which are the module's own."""
    twin = ConditionalHead(task.module.config, task.module.space)  # type: ignore[arg-type]
    twin.load_state_dict(task.module.state_dict())
    metrics = means(task.evaluate(twin, CPU, 0, 1)[0])
    return metrics, task.after_validation(metrics, step_at(0))


# --- learning, measuring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["gaussian", "flow-matching"])
def test_a_head_learns_and_validation_says_how_much(decoder: Any, tmp_path: Path) -> None:
    data, config = data_of(), config_of(replace(TINY, decoder=decoder), beta=0.5)
    task = HeadTask(config, data)
    before, _ = validated(task)
    trained(task, data, 120, tmp_path)
    after, lines = validated(task)
    assert after["loss"] < before["loss"]
    assert after["bits"] < before["bits"]
    # The latents are no Gaussians of channels; but given class and image, noise of 0.3 is left.
    assert after["bits"] > math.log2(0.3) + 0.5 * math.log2(2 * math.pi * math.e)
    assert after["bits"] < after["marginal_bits"] - 0.5 or decoder != "gaussian"
    assert after["gain_bits"] == pytest.approx(after["marginal_bits"] - after["bits"])
    assert after["recon_db"] > (3 if decoder == "gaussian" else -1)  # of an independent sample: -3
    assert after["kl_other"] > after["kl"]
    assert 1 <= after["active_units"] <= 4
    assert not any("WARNING" in line for line in lines)


def test_dear_units_collapse_to_the_condition_and_free_bits_cure_it(tmp_path: Path) -> None:
    data, found = data_of(), {}
    for free_bits in (0.0, 0.5):
        task = HeadTask(config_of(beta=100.0, free_bits=free_bits), data)
        trained(task, data, 120, tmp_path)
        found[free_bits] = validated(task)
    metrics, lines = found[0.0]
    assert metrics["kl"] < 0.2
    assert metrics["condition_db"] > 3  # the condition alone says the class
    assert any(f"condition used: {metrics['condition_db']:+.2f} dB over shuffled conditions" in line for line in lines)
    cured, lines = found[0.5]
    assert cured["active_units"] >= 3 > metrics["active_units"]
    assert cured["kl"] > metrics["kl"] + 0.2
    assert not any("WARNING" in line for line in lines)


def collapsed(network: ConditionalHead) -> None:
    """Make q(u|z, c) = p(u|c) = N(0, I) for all z, in place."""
    with torch.no_grad():
        for layer in (network.encoder.last, network.prior.layers[-1]):  # type: ignore[index, union-attr]
            layer.weight.zero_()
            layer.bias.zero_()


def test_a_collapsed_head_is_called_collapsed() -> None:
    task = HeadTask(config_of(), data_of())
    metrics, lines = validated(task)
    assert metrics["active_units"] > 0
    assert not any("WARNING" in line for line in lines)
    assert isinstance(task.module, ConditionalHead)
    collapsed(task.module)
    metrics, lines = validated(task)
    assert (metrics["active_units"], metrics["units"]) == (0, 4)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    warning = next(line for line in lines if "WARNING" in line)
    assert "posterior collapse: none of 4 units says anything" in warning
    assert "objective.free_bits" in warning


def test_units_are_counted_over_all_samples() -> None:
    rng = np.random.default_rng(0)
    says, silent, noise = rng.normal(0, 1, (20, 1)), np.full((20, 1), 0.3), rng.normal(0, 1, (20, 1))
    table, kl = np.concatenate([says, silent, noise], axis=1), np.tile([1.0, 1.0, 0.001], (20, 1))
    tallies = [UnitTally(table[n : n + 1], kl[n : n + 1], 0.01, "") for n in range(20)]
    figures = means([{"units": tally} for tally in tallies])
    assert figures == {"units": 3, "active_units": 1, "unit_kl_most": 1.0, "unit_kl_median": 1.0}
    sums = [ConditionTally(1.0, 10.0, 100.0, "", True), ConditionTally(1.0, 190.0, 100.0, "", True)]
    assert means([{"x": one} for one in sums]) == {"recon_db": pytest.approx(20), "condition_db": pytest.approx(20)}
    assert means([{"x": ConditionTally(1.0, 10.0, 100.0, "p_", False)}]) == {"p_recon_db": pytest.approx(20)}


@pytest.mark.parametrize("kind", ["beta", "tcvae"])
def test_validation_is_the_same_over_any_number_of_ranks(kind: str) -> None:
    task = HeadTask(config_of(replace(TINY, levels=2, decoder="flow-matching"), kind=kind), data_of())
    assert isinstance(task.module, ConditionalHead)
    one = means(task.evaluate(task.module, CPU, 0, 1)[0])
    rows = [row for rank in (0, 1) for row in task.evaluate(task.module, CPU, rank, 2)[0]]
    assert len(rows) == 24
    two = means(rows)
    assert one.keys() == two.keys()
    assert {"kl_1", "kl_2", "units_2", "active_units_2"} <= one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


# --- objectives -----------------------------------------------------------------------------------------------------


def terms_of(config: HeadConfig, number: int = 0, share: float = 1.0) -> Any:
    data = data_of()
    batch = {"latents": data.training.mean[:16, 0], "label": data.training.labels[:16]}
    task = HeadTask(config, data)
    return task, task.generator_step(task.module, batch, step_at(number, share=share)), batch


def test_the_objective_is_the_error_and_the_weighted_kl() -> None:
    for share, weight in ((0.0, 0.0), (0.1, 1.0), (1.0, 2.0)):
        _, terms, _ = terms_of(config_of(beta=2.0, schedule="linear", ramp="20%"), share=share)
        values = {name: float(value) for name, value in terms.values.items()}
        assert values["kl_weight"] == pytest.approx(weight)
        assert float(terms.objective.detach()) == pytest.approx(values["error"] + weight * values["kl"] / 32, rel=1e-5)
    _, free, _ = terms_of(config_of(beta=2.0, free_bits=50.0))
    assert float(free.objective.detach()) == pytest.approx(float(free.values["error"]) + 2.0 * 4 * 50 / 32, rel=1e-5)


def test_conditions_are_hidden_by_position() -> None:
    config = config_of(condition_dropout=0.5)
    data = data_of()
    task = HeadTask(config, data)
    seen: list[torch.Tensor] = []
    module = task.module
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    z, labels = data.training.mean[:, 0], data.training.labels
    for size, first in ((64, 0), (32, 0), (32, 32)):
        batch = {"latents": z[first : first + size], "label": labels[first : first + size]}
        where = replace(step_at(0), positions=range(first, first + size))
        task.generator_step(module, batch, where)
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert 16 < int(seen[0].sum()) < 48


def test_tcvae_weighs_the_total_correlation_alone() -> None:
    _, one, _ = terms_of(config_of(kind="tcvae", total_correlation=1.0))
    _, six, _ = terms_of(config_of(kind="tcvae", total_correlation=6.0))
    more = 5 * float(six.values["total_correlation"]) / 32
    assert float((six.objective - one.objective).detach()) == pytest.approx(more, rel=1e-3)
    assert more != 0


def test_the_critic_of_factorvae_learns_and_is_not_moved_by_the_head() -> None:
    task, terms, batch = terms_of(config_of(kind="factor", total_correlation=3.0, critic_width=32))
    critic = task.critic
    tc, values = terms.values["total_correlation"], terms.values
    expected = values["error"] + (values["kl"] + 3.0 * tc) / 32
    assert float(terms.objective.detach()) == pytest.approx(float(expected), rel=1e-5)
    terms.objective.backward()
    assert all(p.grad is None for p in critic.parameters())
    before = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
    assert not terms.carry.units.requires_grad
    found = task.critic_step(critic, batch, terms.carry, step_at(0))
    found.objective.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for name, p in critic.named_parameters() if "weight" in name
    )
    assert all(torch.equal(p.grad, before[name]) for name, p in task.module.named_parameters() if name in before)
    # Units that say the same: the critic tells them from permuted ones.
    u = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    carry = replace(terms.carry, units=u)
    for number in range(60):
        found = task.critic_step(critic, {}, carry, step_at(number, 64))
        optimizer.zero_grad()
        found.objective.backward()
        optimizer.step()
    assert float(found.values["critic_accuracy"]) > 0.9
    assert float(critic(u).detach().mean()) > 1
    assert HeadTask(config_of(), data_of()).critic is None


def test_what_units_say_about_the_class_is_paid_for_as_a_critic_reads_it() -> None:
    task, terms, batch = terms_of(config_of(independence=3.0, critic_width=32))
    critic, n = task.critic, len(batch["label"])
    values = {name: float(value) for name, value in terms.values.items()}
    expected = values["error"] + (values["kl"] + 3.0 * values["class_nats"]) / 32
    assert float(terms.objective.detach()) == pytest.approx(expected, rel=1e-5)
    terms.objective.backward()
    assert all(p.grad is None for p in critic.parameters())
    # Units that are the class: the critic reads it, all of its entropy, and then the head is pushed to say less.
    told = torch.arange(n) % 4 > 0
    u = (2.0 * batch["label"] - 1)[:, None].expand(n, 4) * (2.0 * told - 1)[:, None]  # wrong where it was not told
    carry = replace(terms.carry, units=u, told=told)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for number in range(60):
        found = task.critic_step(critic, batch, carry, step_at(number))
        optimizer.zero_grad()
        found.objective.backward()
        optimizer.step()
    assert float(found.values["critic_loss"]) < 0.01
    moved = u.clone().requires_grad_()
    said = task._said_of_the_class(moved, carry, step_at(0))
    assert float(said.detach()) == pytest.approx(math.log(2), abs=0.05)
    said.backward()
    assert moved.grad is not None
    assert float((moved.grad * u)[told].sum()) > 0  # smaller units say less
    assert not moved.grad[~told].any()
    with pytest.raises(ValueError, match=r"objective\.independence"):
        config_of(kind="factor", independence=1.0)


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def cache_of(folder: Path, model: Path, names: Callable[[int], str], *more: str) -> Path:
    """Cache twelve images in 8 x 8 latents."""
    for n in range(12):
        path = folder / "photos" / names(n) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(24, 28, seed=n)))
    assert main(["shards", str(folder / "photos"), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    command = ["cache", str(folder / "shards"), "-m", str(model), "-o", str(folder / "c"), "--size", "16"]
    assert main([*command, "--jobs", "1", "--device", "cpu", "--dtype", "float32", *more]) == 0
    return folder / "c"


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of twelve images of two classes; do not change it."""
    return cache_of(tmp_path_factory.mktemp("latents"), model, lambda n: ("hat", "coat")[n % 2])


def test_data_are_normalized_latents_and_held_out_ones_apart(cache: Path) -> None:
    data = load_data(LatentDataConfig(cache=str(cache), n_validation=3))
    assert (len(data.training), len(data.held_out), data.classes) == (9, 3, ["coat", "hat"])
    assert not set(data.training.keys) & set(data.held_out.keys)
    assert data.training.mean.shape == (9, 2, 4, 8, 8)
    assert data.training.std is not None
    direct = LatentDataset(cache, sample=False, mirror=False)
    for n in range(12):
        item = direct[n]
        part = data.training if f"{item['key']}#0" in data.training.keys else data.held_out
        at = list(part.keys).index(f"{item['key']}#0")
        torch.testing.assert_close(part.mean[at, 0], item["latents"])
        assert part.labels[at] == item["label"]
    space = data.space
    assert (space.shape, space.n_classes, space.embedding_width) == ((4, 8, 8), 2, 0)
    with pytest.raises(UsageError, match="0 samples to learn from"):
        load_data(LatentDataConfig(cache=str(cache), validation_cache=str(cache)))


def test_embeddings_are_found_by_the_images_keys(cache: Path, tmp_path: Path) -> None:
    keys = [item["key"] for item in (LatentDataset(cache)[n] for n in range(12))]
    vectors = np.arange(24, dtype=np.float64).reshape(12, 2)
    np.savez(tmp_path / "e.npz", keys=np.array([*keys[::-1], "unknown"]), vectors=np.concatenate([vectors, [[0, 0]]]))
    config = LatentDataConfig(
        cache=str(cache), n_validation=3, condition="embedding", embeddings=str(tmp_path / "e.npz")
    )
    data = load_data(config)
    assert data.space.embedding_width == 2
    for part in (data.training, data.held_out):
        for key, vector in zip(part.keys, data.conditions(part.labels), strict=True):
            assert vector.tolist() == vectors[11 - keys.index(key.removesuffix("#0"))].tolist()
    np.savez(tmp_path / "e.npz", keys=np.array(keys[1:]), vectors=vectors[1:])
    with pytest.raises(UsageError, match=rf"1 of 12 samples have no row in .*e\.npz; first: {keys[0]}"):
        load_data(config)
    np.savez(tmp_path / "e.npz", keys=np.array(keys), vectors=vectors[1:])
    with pytest.raises(UsageError, match=r"expected \(N,\) strings and \(N, E\) finite floats"):
        load_data(config)
    with pytest.raises(UsageError, match=r"not an \.npz file"):
        load_data(replace(config, embeddings=str(cache / "cache.json")))


def test_images_without_classes_are_refused_or_learned_without(model: Path, tmp_path: Path) -> None:
    none = cache_of(tmp_path, model, lambda n: "")
    with pytest.raises(UsageError, match=r"no sample has a class .* data.condition=none learns without"):
        load_data(LatentDataConfig(cache=str(none)))
    data = load_data(LatentDataConfig(cache=str(none), condition="none", n_validation=3))
    assert not data.has_conditions
    task = HeadTask(config_of(), data)
    metrics = means(task.evaluate(ConditionalHead(TINY, data.space), CPU, 0, 1)[0])
    assert "condition_db" not in metrics
    assert "recon_db" in metrics
    batch = {"latents": data.training.mean[:, 0], "label": data.training.labels}
    terms = task.generator_step(task.module, batch, step_at(0, len(data.training)))
    assert math.isfinite(float(terms.objective.detach()))


# --- a run, its folder ----------------------------------------------------------------------------------------------


def overrides(cache: Path, out: Path, *more: str) -> list[str]:
    how = ["head.width=16", "head.depth=1", "head.units=4", "data.n_validation=3", "optim.batch_size=4"]
    how += ["run.n_images=24", "run.validate_every=8", "run.checkpoint_every=8", "run.log_every=1", "run.seed=1"]
    how += ["optim.warmup_images=8", "run.precision=no"]
    return ["run", "small-head", f"data.cache={cache}", f"run.out={out}", *how, *more]


@pytest.fixture(scope="module")
def run_folder(cache: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny head; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "head"
    assert main(overrides(cache, out, f"data.codec={model}")) == 0
    return out


def state_of(out: Path, images_seen: int = 24) -> dict[str, Any]:
    path = out / "checkpoints" / f"images-{images_seen:09d}.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def test_a_run_logs_exports_and_its_head_makes_images(run_folder: Path, model: Path) -> None:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["event"] == "validation"]
    assert [line["images"] for line in validations] == [8, 16, 24]
    wanted = {"loss", "error", "bits", "marginal_bits", "gain_bits", "kl", "units", "active_units"}
    wanted |= {"recon_db", "condition_db", "pixel_recon_db", "pixel_condition_db", "raw_loss"}
    assert wanted <= validations[-1].keys()
    assert {"loss", "error", "kl", "kl_weight"} <= next(line for line in lines if line["event"] == "step").keys()
    picture = images.load(run_folder / "validation" / "images-000000024.png")
    assert picture.shape == (4 * 16, 3 * 16, 3)
    head = Head.load(run_folder, "cpu")
    assert head.classes == ("coat", "hat")
    found = head.images(head.sample(["hat"] * 2, guidance=2.0, temperature=1.0, seed=0, steps=2), model)
    assert [image.shape for image in found] == [(16, 16, 3)] * 2
    best = min(validations, key=lambda line: line["loss"])
    about = json.loads((run_folder / "model" / "head.json").read_text())
    assert about["record"]["images_seen"] == best["images"]
    card = (run_folder / "model" / "README.md").read_text()
    assert f"at most {best['bits']:.3f} bits a number" in card
    assert "head.sample(['coat'] * 8" in card


@pytest.mark.parametrize(("condition", "dropout"), [("class", 0.1), ("class", 0.0), ("none", 0.1)])
def test_the_folder_says_whether_the_head_can_do_without_a_condition(
    condition: Any, dropout: float, tmp_path: Path
) -> None:
    data = data_of(classes=["coat", "hat"] if condition == "class" else [])
    config = replace(config_of(condition_dropout=dropout), data=LatentDataConfig(condition=condition))
    task = HeadTask(config, data)
    task.export(task.module, tmp_path / "h", {}, CPU)
    card, guided = (tmp_path / "h" / "README.md").read_text(), dropout > 0 and condition == "class"
    assert ("guidance=2.0" in card) == guided
    assert ("It always needs one, and knows no guidance." in card) == (dropout == 0)
    assert Head.load(tmp_path / "h", "cpu").stored.knows_none == (dropout > 0)


def test_a_run_is_exported_anew(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "-o", str(tmp_path / "h")]) == 0
    assert Head.load(tmp_path / "h", "cpu").head_id == Head.load(run_folder, "cpu").head_id
    capsys.readouterr()
    assert main(["export", str(run_folder), "--onnx"]) == 2
    assert "a run of a head" in capsys.readouterr().err


def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
    cache: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, name = tmp_path / "r", "images-000000016.pt"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / name).write_bytes((run_folder / "checkpoints" / name).read_bytes())
    assert main(overrides(cache, out, "run.resume=auto")) == 0
    whole, resumed = state_of(run_folder), state_of(out)
    for part in ("module", "ema"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])
    capsys.readouterr()
    assert main(overrides(cache, out, "run.resume=auto", "head.units=5")) == 2
    assert "head.units 4 -> 5" in capsys.readouterr().err
    assert main(overrides(cache, out, "run.resume=auto", "data.n_validation=4")) == 2
    assert "the data are not those of the run: training samples" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_conditions(cache: Path, tmp_path: Path) -> None:
    keys = np.array([item["key"] for item in (LatentDataset(cache)[n] for n in range(12))])
    vectors, file = np.random.default_rng(0).normal(size=(12, 3)), tmp_path / "e.npz"

    def task_of(keys: np.ndarray, vectors: np.ndarray) -> HeadTask:
        np.savez(file, keys=keys, vectors=vectors)
        how = LatentDataConfig(cache=str(cache), n_validation=3, condition="embedding", embeddings=str(file))
        return HeadTask(config_of(), load_data(how))

    state = {"task": task_of(keys, vectors).state_dict()}
    check_same(state, task_of(keys[::-1], vectors[::-1]), "no")  # the same, in another order
    with pytest.raises(UsageError, match="the data are not those of the run: conditions of the training"):
        check_same(state, task_of(keys, vectors + 1e-3), "no")
    data = data_of()
    state = {"task": HeadTask(config_of(), data).state_dict()}
    other = HeadTask(config_of(), replace(data, held_out=replace(data.held_out, labels=1 - data.held_out.labels)))
    with pytest.raises(UsageError, match="the data are not those of the run: conditions of the held-out samples"):
        check_same(state, other, "no")
    for name in ("training", "held-out samples"):  # as a checkpoint of an earlier version is
        del state["task"][f"conditions of the {name}"]
    check_same(state, other, "no")


def test_what_cannot_be_trained_is_refused(
    cache: Path, tmp_path: Path, new_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        assert main([*overrides(cache, tmp_path / "r"), *more]) in (2, 3)
        return capsys.readouterr().err

    assert "Set data.cache=FOLDER" in refused("data.cache=")
    assert "unknown key head.unit; did you mean head.units?" in refused("head.unit=3")
    assert "latents of encoder" in refused(f"data.codec={new_model('other', seed=1)}")
    tcvae = ("objective.kind=tcvae", "objective.free_bits=0")
    assert "9 samples to learn from, batches of 16" in refused(*tcvae, "optim.batch_size=16")
    assert "objective.free_bits" in refused(tcvae[0])
    assert "head.posterior" in refused(*tcvae, "head.posterior=iaf")
    assert "data.embeddings" in refused("data.condition=embedding")
    assert not (tmp_path / "r" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["beta", "factor", "independence"])
def test_two_ranks_stay_equal_and_match_one_process(kind: str, cache: Path, tmp_path: Path) -> None:
    how = ["objective.critic_width=32", "objective.free_bits=0"]
    how += [] if kind == "independence" else [f"objective.kind={kind}", "objective.independence=0"]
    done = launch(2, overrides(cache, tmp_path / "two", *how, f"optim.batch_size={2 if kind == 'beta' else 4}"))
    assert done.returncode == 0, done.stderr  # ranks whose parameters differ end in an error
    if kind == "beta":
        assert main(overrides(cache, tmp_path / "one", *how)) == 0
        one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
        for name, tensor in one["module"].items():
            torch.testing.assert_close(two["module"][name], tensor, atol=5e-3, rtol=0)
