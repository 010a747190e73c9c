"""The prior over indices: exact likelihoods, samples, what it learns, its run, its folder, what is refused."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel

from codec import images
from codec.errors import ModelError, UsageError
from codec.pixels import to_uint8
from tests.conftest import photo
from tests.train.test_ranks import launch
from tests.train.test_token_cache import tokens_of
from tests.train.tiny_vq import make_vq
from train.best import check_same
from train.cache.codebook import Codebook
from train.cli import main
from train.prior.config import NetworkConfig, PriorConfig, TokenDataConfig
from train.prior.folder import read_folder
from train.prior.network import Grid, Memory, PriorNetwork
from train.prior.sampling import Sampling, choose, draw, numbers_of, probabilities
from train.prior.task import PriorTask, bits_of_sequences
from train.prior.tokens import TokenData, TokenFeed, TokenSet, load_data
from train.recipe import load_any, load_recipe
from train.set_config import CardConfig
from train.task import Step
from train.trainer import Trainer

TINY = NetworkConfig(width=32, depth=1)


def network_of(k: int = 3, height: int = 2, width: int = 2, config: NetworkConfig = TINY) -> PriorNetwork:
    """A network in float64 whose weights are far from those at the start."""
    network = PriorNetwork(config, Grid(codebook_size=k, channels=2, height=height, width=width, n_classes=2))
    rng = torch.Generator().manual_seed(1)
    frequencies = torch.rand(k, generator=rng) + 0.2
    network.initialise(torch.randn(k, 2, generator=rng), frequencies / frequencies.sum(), seed=0)
    with torch.no_grad():
        network.head.weight.normal_(0, 0.3, generator=rng)
        network.classes.normal_(0, 1, generator=rng)
        network.residual.normal_(0, 0.3, generator=rng)
    return network.double().requires_grad_(False).eval()


# --- likelihood -----------------------------------------------------------------------------------------------------


def test_the_probabilities_of_all_grids_sum_to_one() -> None:
    network = network_of()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for label in (0, 1, 2):
        bits = bits_of_sequences(network, grids, [label] * len(grids))
        assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-12)
        assert float(bits.max() - bits.min()) > 1
    by_class = [bits_of_sequences(network, grids, [label] * len(grids)) for label in (0, 1)]
    assert not torch.allclose(*by_class)


def test_an_index_depends_on_those_before_it_alone() -> None:
    network = network_of(k=5, height=3, width=3)
    a = torch.randint(5, (1, 9), generator=torch.Generator().manual_seed(0))
    for at in range(9):
        b = a.clone()
        b[0, at] = (b[0, at] + 1) % 5
        same = (network(a, torch.tensor([0])) == network(b, torch.tensor([0]))).all(-1)[0]
        assert same[: at + 1].all()
        assert not same[at + 1 :].any()


def test_a_new_network_gives_the_training_frequencies() -> None:
    network = PriorNetwork(TINY, Grid(codebook_size=4, channels=2, height=2, width=2, n_classes=1))
    frequencies = torch.tensor([0.5, 0.25, 0.2, 0.05])
    network.initialise(torch.randn(4, 2), frequencies, seed=0)
    logits = network(torch.randint(4, (2, 4)), torch.tensor([0, 1]))
    torch.testing.assert_close(logits.softmax(-1), frequencies.expand(2, 4, 4))


def test_the_seed_alone_decides_the_weights_at_the_start() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        network = PriorNetwork(TINY, Grid(codebook_size=4, channels=2, height=2, width=2, n_classes=1))
        network.initialise(torch.eye(4, 2), torch.full((4,), 0.25), seed)
        return network.state_dict()

    torch.manual_seed(0)
    first = made(1)
    torch.manual_seed(1)
    again, other = made(1), made(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rows"], other["rows"])


# --- sampling -------------------------------------------------------------------------------------------------------


def test_steps_with_a_memory_give_the_logits_of_the_whole() -> None:
    network = network_of(k=7, height=3, width=4, config=NetworkConfig(width=64, depth=2))
    indices, labels = torch.randint(7, (3, 12)), torch.tensor([0, 1, 2])
    whole, memory = network(indices, labels), Memory(network, 3)
    for at in range(12):
        step = network.step(indices[:, at - 1] if at else None, at, labels, memory)
        torch.testing.assert_close(step, whole[:, at], rtol=1e-11, atol=1e-11)


def drawn_without_memory(network: PriorNetwork, label: int, numbers: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Draw one image with a whole pass for each index."""
    indices = torch.zeros(1, network.grid.n, dtype=torch.int64)
    for at in range(network.grid.n):
        logits = network(indices, torch.tensor([label]))[:, at].log_softmax(-1)
        if how.guidance != 1:
            without = network(indices, torch.tensor([network.grid.n_classes]))[:, at].log_softmax(-1)
            logits = without + how.guidance * (logits - without)
        indices[:, at] = choose(probabilities(logits, how), numbers[None, at])
    return indices[0].unflatten(0, (network.grid.height, network.grid.width))


@pytest.mark.parametrize("how", [Sampling(), Sampling(guidance=3.0), Sampling(temperature=0.7, top_k=4, top_p=0.9)])
def test_samples_are_those_of_whole_passes(how: Sampling) -> None:
    network, numbers = network_of(k=7, height=3, width=3), numbers_of(0, "a", 5, 9)
    together = draw(network, [0, 1, 0, 1, 2], numbers, how, batch=2)
    assert together.shape == (5, 3, 3)
    for row, (label, number) in enumerate(zip([0, 1, 0, 1, 2], numbers, strict=True)):
        assert torch.equal(together[row], drawn_without_memory(network, label, number, how))


def test_guidance_of_one_is_conditional_sampling_and_more_leans_to_the_class() -> None:
    network, numbers = network_of(k=7, height=3, width=3).float(), numbers_of(0, "a", 300, 9)
    labels = [0] * 300
    plain = draw(network, labels, numbers, Sampling(), batch=100)
    nearly = draw(network, labels, numbers, Sampling(guidance=1 + 1e-12), batch=100)  # both passes, the same formula
    assert torch.equal(plain, nearly)
    guided = draw(network, labels, numbers, Sampling(guidance=4.0), batch=100)

    def leaning(indices: torch.Tensor) -> float:
        flat = indices.flatten(1)
        return float((bits_of_sequences(network, flat, [2] * 300) - bits_of_sequences(network, flat, labels)).mean())

    assert leaning(guided) > leaning(plain) + 1


def test_samples_are_the_same_in_any_batch_and_number() -> None:
    network = network_of(k=50, height=4, width=4).float()
    five, twenty = numbers_of(3, "hat", 5, 16), numbers_of(3, "hat", 20, 16)
    assert torch.equal(five, twenty[:5])
    assert not torch.equal(numbers_of(4, "hat", 5, 16), five)
    assert not torch.equal(numbers_of(3, "coat", 5, 16), five)
    a = draw(network, [0] * 5, five, Sampling(guidance=2.0), batch=1)
    b = draw(network, [0] * 20, twenty, Sampling(guidance=2.0), batch=16)
    assert torch.equal(a, b[:5])


def test_samples_have_the_probabilities_of_the_network() -> None:
    network = network_of()
    drawn = draw(network, [0] * 4000, numbers_of(0, "a", 4000, 4), Sampling(), batch=1000).flatten(1)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    expected = 2.0 ** -bits_of_sequences(network, grids, [0] * 81)
    code = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
    found = torch.bincount(code, minlength=81) / 4000
    assert float((found - expected).abs().max()) < 4 * math.sqrt(float(expected.max()) / 4000)
    assert float((found - expected).abs().sum()) < 0.2


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.12, 0.3, 0.08]], dtype=torch.float64).log()
    expected = {
        Sampling(): [0.5, 0.12, 0.3, 0.08],
        Sampling(top_k=2): [0.625, 0, 0.375, 0],
        Sampling(top_p=0.79): [0.625, 0, 0.375, 0],
        Sampling(top_p=0.81): [50 / 92, 12 / 92, 30 / 92, 0],
        Sampling(top_p=0.1): [1, 0, 0, 0],
        Sampling(temperature=0.5): [2500 / 3608, 144 / 3608, 900 / 3608, 64 / 3608],
    }
    for how, shares in expected.items():
        torch.testing.assert_close(probabilities(logits, how), torch.tensor([shares], dtype=torch.float64))
    shares = torch.tensor([[0.5, 0.0, 0.5]]).expand(4, 3)
    assert choose(shares, torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-7])).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"guidance": -1.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


# --- learning -------------------------------------------------------------------------------------------------------


def data_of(tokens: Callable[[int], list[int]], n: int = 64, k: int = 6) -> TokenData:
    """Indices 2 x 2 of images number 0, 1, ... with classes in turn."""
    rows = torch.tensor([tokens(number) for number in range(n)], dtype=torch.int32)[:, None]
    names = [str(number) for number in range(n)]
    every = TokenSet(keys=names, sha256=names, labels=torch.arange(n) % 2, indices=rows)
    codebook = Codebook(name="m", size=k, codebook_id="c", encoder_id="e", decoder_id="d", f=4)
    return TokenData(
        training=every,
        held_out=every.some(range(8)),
        classes=["a", "b"],
        codebook=codebook,
        vectors=torch.randn(k, 3, generator=torch.Generator().manual_seed(0)),
        shape=(2, 2),
        size=8,
        n_dropped=0,
    )


def trained(data: TokenData, out: Path, network: NetworkConfig = TINY, n_images: int = 4096) -> Trainer:
    config = load_any(
        "small-prior",
        [
            *(f"run.{key}" for key in (f"out={out}", f"n_images={n_images}", "validate_every=1024")),
            *(f"optim.{key}" for key in ("lr=1e-2", "warmup_images=64", "ema_decay=0.9", "weight_decay=0")),
            "run.precision=no",
        ],
    )
    assert isinstance(config, PriorConfig)
    task = PriorTask(network, data, card=CardConfig())
    feed = TokenFeed(data.training, out, batch_size=config.optim.batch_size, seed=0)
    trainer = Trainer(config, task, feed, Accelerator(cpu=True))
    trainer.run()
    return trainer


def test_a_prior_learns_what_a_class_looks_like(tmp_path: Path) -> None:
    # Class a: index 3 everywhere; class b: two indices, the second row like the first.
    rng = np.random.default_rng(0)
    data = data_of(lambda n: [3] * 4 if n % 2 == 0 else [*(pair := rng.choice([1, 4], 2).tolist()), *pair])
    trainer = trained(data, tmp_path / "run")
    network = trainer.ema.module
    assert isinstance(network, PriorNetwork)
    drawn = draw(network, [0] * 20 + [1] * 20, numbers_of(0, "x", 40, 4), Sampling())
    assert (drawn[:20] == 3).float().mean() > 0.97
    assert torch.isin(drawn[20:], torch.tensor([1, 4])).float().mean() > 0.97
    assert (drawn[20:, 0] == drawn[20:, 1]).float().mean() > 0.95
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "validation"][-1]
    # Of class a nothing is left to tell, of class b two indices of one bit: half a bit an index, a quarter on average.
    assert last["loss"] == pytest.approx(0.25, abs=0.1)
    assert last["unigram_entropy"] == pytest.approx(data.unigram_entropy())
    assert last["unigram_bits"] == pytest.approx(1.5, abs=0.1)
    assert last["gain_bits"] == pytest.approx(last["unigram_bits"] - last["loss"])
    assert last["loss"] < last["bits_unlabelled"] < last["unigram_bits"]
    # Without the class: one bit an image to tell it, shared by four indices.
    assert last["bits_unlabelled"] == pytest.approx(0.5, abs=0.15)


def step_at(positions: range) -> Step:
    return Step(number=0, images=0, share=0.0, seed=0, positions=positions, autocast=torch.enable_grad)


def test_what_is_random_in_a_step_belongs_to_positions(tmp_path: Path) -> None:
    data = data_of(lambda n: [n % 6, (n + 1) % 6, (n * n) % 6, 2])
    config = NetworkConfig(width=32, depth=2, dropout=0.3, token_noise=0.3, label_dropout=0.5, label_smoothing=0.1)
    task = PriorTask(config, data, card=CardConfig())
    torch.nn.init.normal_(task.module.head.weight, std=0.3)
    feed = TokenFeed(data.training, tmp_path, batch_size=8, seed=0)
    batch = next(iter(feed.batches(0.0, 0)))
    whole = task.generator_step(task.module, batch, step_at(range(8)))
    halves = []
    for start in (0, 4):
        part = {name: batch[name][start : start + 4] for name in ("indices", "label")}
        halves.append(task.generator_step(task.module, part, step_at(range(start, start + 4))))
    mean = sum(half.objective.item() for half in halves) / 2
    assert whole.objective.item() == pytest.approx(mean, rel=1e-5)
    again = task.generator_step(task.module, batch, step_at(range(8, 16)))
    assert again.objective.item() != pytest.approx(whole.objective.item(), rel=1e-4)
    assert float(whole.values["bits"]) * math.log(2) != pytest.approx(whole.objective.item(), rel=1e-4)


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    task = PriorTask(NetworkConfig(width=32, depth=1, dropout=0.25), data_of(lambda n: [0] * 4), card=CardConfig())
    kept = task._kept(4, step_at(range(64)), torch.device("cpu"))
    assert kept is not None
    assert kept.shape == (64, 3, 4, 32)
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(kept.float().mean()) == pytest.approx(1, abs=0.02)
    task = PriorTask(NetworkConfig(width=32, depth=1, dropout=0.1), data_of(lambda n: [0] * 4), card=CardConfig())
    kept = task._kept(4, step_at(range(4)), torch.device("cpu"))
    assert kept is not None
    assert float(kept.max()) == pytest.approx(256 / 230, rel=1e-6)  # not as bfloat16 rounds it


def test_the_feed_takes_the_mirror_half_the_time(tmp_path: Path) -> None:
    rows = torch.arange(40, dtype=torch.int32).reshape(10, 2, 2)
    names = [str(n) for n in range(10)]
    tokens = TokenSet(keys=names, sha256=names, labels=torch.zeros(10, dtype=torch.int64), indices=rows)
    feed = TokenFeed(tokens, tmp_path, batch_size=10, seed=0)
    batches = [batch for batch, _ in zip(feed.batches(0.0, 0), range(50), strict=False)]
    assert sorted(batches[0]["key"]) == names
    mirrored = torch.stack([batch["indices"][:, 0] % 4 // 2 for batch in batches])
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    for batch in batches[:3]:
        assert all(int(row[0]) // 4 == int(key) for row, key in zip(batch["indices"], batch["key"], strict=True))


# --- a run, its folder, its samples ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vq(tmp_path_factory.mktemp("vq") / "model")


@pytest.fixture(scope="module")
def cache(vq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes; do not change it."""
    folder = tmp_path_factory.mktemp("tokens")
    for n in range(12):
        path = folder / "photos" / ("hat", "coat")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(40, 44, seed=n)))
    assert main(["shards", str(folder / "photos"), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    assert main(tokens_of(folder / "shards", vq, folder / "c")) == 0
    return folder / "c"


def overrides(cache: Path, out: Path, *more: str) -> list[str]:
    how = ["prior.width=32", "prior.depth=1", "data.n_validation=3", "optim.batch_size=4", "run.seed=1"]
    how += ["run.n_images=48", "run.validate_every=16", "run.checkpoint_every=16", "run.log_every=1"]
    how += ["optim.warmup_images=8", "prior.dropout=0.2", "run.precision=no"]
    return ["run", "small-prior", f"data.cache={cache}", f"run.out={out}", *how, *more]


@pytest.fixture(scope="module")
def run_folder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny prior; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "prior"
    assert main(overrides(cache, out)) == 0
    return out


def state_of(out: Path, images_seen: int = 48) -> dict[str, Any]:
    path = out / "checkpoints" / f"images-{images_seen:09d}.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def test_held_out_images_are_not_learned_from(cache: Path) -> None:
    data = load_data(TokenDataConfig(cache=str(cache), n_validation=3))
    assert (len(data.training), len(data.held_out), data.shape, data.size) == (9, 3, (8, 8), 32)
    assert not set(data.training.sha256) & set(data.held_out.sha256)
    assert data.training.indices.shape == (9, 2, 64)
    assert data.classes == ["coat", "hat"]
    assert float(data.frequencies().sum()) == pytest.approx(1)
    more = load_data(TokenDataConfig(cache=str(cache), n_validation=4))
    assert set(data.held_out.sha256) < set(more.held_out.sha256)
    with pytest.raises(UsageError, match="0 samples to learn from"):
        load_data(TokenDataConfig(cache=str(cache), validation_cache=str(cache)))


def test_a_run_logs_what_it_is_to_beat_and_exports(run_folder: Path, vq: Path) -> None:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["event"] == "validation"]
    assert [line["images"] for line in validations] == [16, 32, 48]
    wanted = {"loss", "bits_unlabelled", "unigram_bits", "gain_bits", "train_bits", "unigram_entropy", "raw_loss"}
    assert wanted <= validations[-1].keys()
    assert {"loss", "bits"} <= next(line for line in lines if line["event"] == "step").keys()
    prior = read_folder(run_folder)
    assert prior.classes == ("coat", "hat")
    codebook = Codebook.of(vq, "")
    assert (prior.codebook.codebook_id, prior.codebook.encoder_id) == (codebook.codebook_id, codebook.encoder_id)
    card = (run_folder / "model" / "README.md").read_text()
    assert codebook.codebook_id in card
    assert f"with the class {min(line['loss'] for line in validations):.3f}" in card


def test_the_best_checkpoint_is_exported(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    # Three images are learned by heart.
    few = ["data.n_validation=9", "prior.dropout=0", "prior.token_noise=0", "optim.lr=0.01", "optim.ema_decay=0"]
    assert (
        main(overrides(cache, out, *few, "run.n_images=320", "run.validate_every=32", "run.checkpoint_every=32")) == 0
    )
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {line["images"]: line["loss"] for line in lines if line["event"] == "validation"}
    best = min(losses, key=lambda images_seen: losses[images_seen])
    assert best < 320
    assert losses[320] > losses[best] + 0.1
    weights = read_folder(out).network.state_dict()
    kept = torch.load(out / "checkpoints" / "best.pt", weights_only=True)["ema"]
    assert all(torch.equal(weights[name], kept[f"module.{name}"]) for name in weights)
    assert json.loads((out / "model" / "config.json").read_text())["record"]["images_seen"] == best


def test_a_run_is_exported_anew(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    assert main(["export", str(run_folder), "-o", str(out)]) == 0
    assert read_folder(out).prior_id == read_folder(run_folder).prior_id
    first = run_folder / "checkpoints" / "images-000000032.pt"
    assert main(["export", str(first), "-o", str(tmp_path / "q")]) == 0
    assert json.loads((tmp_path / "q" / "config.json").read_text())["record"]["images_seen"] == 32
    capsys.readouterr()
    assert main(["export", str(run_folder), "--onnx"]) == 2
    assert "a run of a prior" in capsys.readouterr().err
    assert main(["export", str(run_folder), "-o", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_run_is_not_exported_or_resumed_with_other_tokens(
    vq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, tokens, out = tmp_path / "photos", tmp_path / "c", tmp_path / "r"
    for n in range(10):
        path = photos / ("hat", "coat")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(40, 44, seed=n)))
    assert main(["shards", str(photos), "-o", str(tmp_path / "a"), "--jobs", "1"]) == 0
    assert main(tokens_of(tmp_path / "a", vq, tokens)) == 0
    assert main(overrides(tokens, out, "run.n_images=16")) == 0
    (photos / "hat" / "0.png").write_bytes(images.save_png(photo(40, 44, seed=77)))
    assert main(["shards", str(photos), "-o", str(tmp_path / "b"), "--jobs", "1"]) == 0
    assert main(tokens_of(tmp_path / "b", vq, tokens)) == 0
    capsys.readouterr()
    assert main(["export", str(out), "-o", str(tmp_path / "p")]) == 2
    assert "the data are not those of the run: " in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    assert main(overrides(tokens, out, "run.resume=auto")) == 2
    assert "the run cannot go on" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_labels() -> None:
    data = data_of(lambda n: [n % 6] * 4)
    other = replace(data, training=replace(data.training, labels=1 - data.training.labels))
    state = {"task": PriorTask(TINY, data, card=CardConfig()).state_dict()}
    check_same(state, PriorTask(TINY, data, card=CardConfig()), "no")
    with pytest.raises(UsageError, match="the data are not those of the run: labels of the training"):
        check_same(state, PriorTask(TINY, other, card=CardConfig()), "no")


def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
    cache: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    (out / "checkpoints").mkdir(parents=True)
    name = "images-000000032.pt"
    (out / "checkpoints" / name).write_bytes((run_folder / "checkpoints" / name).read_bytes())
    assert main(overrides(cache, out, "run.resume=auto")) == 0
    whole, resumed = state_of(run_folder), state_of(out)
    for part in ("module", "ema"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])
    moments = [state["generator"]["optimizer"]["state"][0]["exp_avg"] for state in (whole, resumed)]
    assert torch.equal(*moments)
    capsys.readouterr()
    assert main(overrides(cache, out, "run.resume=auto", "prior.width=64")) == 2
    assert "prior.width 32 -> 64" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stay_equal_and_match_one_process(cache: Path, run_folder: Path, tmp_path: Path) -> None:
    done = launch(2, overrides(cache, tmp_path / "r", "optim.batch_size=2"))
    assert done.returncode == 0, done.stderr
    one, two = state_of(run_folder), state_of(tmp_path / "r")
    for name, tensor in one["module"].items():
        torch.testing.assert_close(two["module"][name], tensor, atol=5e-3, rtol=0)


def test_samples_are_images_of_classes(run_folder: Path, vq: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "s", tmp_path / "few"
    command = ["sample", str(run_folder), "-m", str(vq), "--device", "cpu", "--seed", "5"]
    assert main([*command, "-o", str(out), "--per-class", "3", "--guidance", "1.5"]) == 0
    alone = ["--per-class", "2", "--guidance", "1.5", "--classes", "hat", "--batch", "1"]
    assert main([*command, "-o", str(few), *alone]) == 0
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert found == [f"{name}/{n:03d}.png" for name in ("coat", "hat") for n in range(3)] + ["sheet.png"]
    for n in range(2):
        assert (few / "hat" / f"{n:03d}.png").read_bytes() == (out / "hat" / f"{n:03d}.png").read_bytes()
    about = json.loads((out / "samples.json").read_text())
    assert about["settings"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.5, "seed": 5}
    assert about["prior"]["prior_id"] == read_folder(run_folder).prior_id
    assert about["model"]["codebook_id"] == Codebook.of(vq, "").codebook_id
    indices = torch.tensor(about["tokens"]["coat"][1]).reshape(1, 8, 8)
    network = VQModel.from_pretrained(vq).eval()
    with torch.no_grad():
        z_q = network.quantize.embedding(indices).movedim(-1, 1)
        expected = to_uint8(network.decode(z_q, force_not_quantize=True).sample[0])
    pixels = images.load(out / "coat" / "001.png")
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def test_another_model_is_refused(
    run_folder: Path, vq: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(model: Path, *more: str) -> tuple[int, str]:
        code = main(["sample", str(run_folder), "-m", str(model), "-o", str(tmp_path / "s"), "--per-class", "1", *more])
        return code, capsys.readouterr().err

    other = VQModel.from_pretrained(vq)
    other.quantize.embedding.weight.data[0] += 1
    other.save_pretrained(tmp_path / "codebook")
    code, said = asked(tmp_path / "codebook")
    assert code == 3
    assert "indices of codebook" in said
    code, said = asked(model_dir)
    assert (code, "no codebook, which a prior needs" in said) == (3, True)
    code, said = asked(vq, "--classes", "shoe")
    assert (code, "no class shoe among coat, hat" in said) == (2, True)
    decoder = VQModel.from_pretrained(vq)
    decoder.decoder.conv_out.bias.data += 0.1
    decoder.save_pretrained(tmp_path / "decoder")
    code, said = asked(tmp_path / "decoder")
    assert (code, "another decoder" in said) == (0, True)


def test_bad_folders_and_caches_are_refused(
    cache: Path, run_folder: Path, shards: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="no prior here"):
        read_folder(model_dir)
    for name in ("config.json", "prior.safetensors"):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes((run_folder / "model" / name).read_bytes())
    read_folder(tmp_path / "p")
    weights = (tmp_path / "p" / "prior.safetensors").read_bytes()
    (tmp_path / "p" / "prior.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 0x40]))
    with pytest.raises(ModelError, match=r"prior\.safetensors has the prior id [0-9a-f]{16}, not [0-9a-f]{16}"):
        read_folder(tmp_path / "p")
    (tmp_path / "p" / "prior.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ModelError, match="damaged"):
        read_folder(tmp_path / "p")
    assert main(["run", "small-prior", f"run.out={tmp_path / 'r'}"]) == 2
    assert "Set data.cache=FOLDER" in capsys.readouterr().err
    assert main(["run", "small-prior", f"run.out={tmp_path / 'r'}", "data.shards=x"]) == 2
    assert "unknown key data.shards" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a recipe of task prior"):
        load_recipe("small-prior")
    assert main(["run", "tiny", "task=poem"]) == 2
    assert "task = 'poem', allowed: autoencoder, prior" in capsys.readouterr().err
