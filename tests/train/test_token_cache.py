"""codec-train cache --format indices, and TokenDataset: exact, tied to one codebook, the same draws everywhere."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from torch.utils.data import DataLoader

from codec.errors import FormatError, ModelError, UsageError
from codec.latent_model import load_latent_model
from codec.pixels import to_float
from codec.shards import read_index, read_sample
from tests.train.test_cache import command, contents, foreign_shard, header, middle, one_line, png, set_of
from tests.train.test_ranks import launch
from tests.train.tiny_vq import make_vq
from train.cache.codebook import Codebook
from train.cache.model import Encoder
from train.cache.reader import CacheReader
from train.cache.tokens import TokenFormat, Tokens, TokenSums
from train.cli import main
from train.latent_dataset import LatentDataset
from train.token_dataset import TokenDataset

N = 6


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vq(tmp_path_factory.mktemp("vq") / "model")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, with captions and classes; do not change it."""
    members: dict[str, bytes] = {}
    for n in range(N):
        members |= {f"{n}.png": png(n, (40, 50 + n)), f"{n}.cls": b"%d" % (10 * (n % 3)), f"{n}.txt": b"caption %d" % n}
    del members["4.cls"]
    return foreign_shard(tmp_path_factory.mktemp("source"), members)


def tokens_of(shards: Path, model: Path, out: Path, *more: str) -> list[str]:
    return command(shards, model, out, "--format", "indices", *more)


@pytest.fixture(scope="module")
def cache(source: Path, vq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    out = tmp_path_factory.mktemp("cache") / "tokens"
    assert main(tokens_of(source, vq, out)) == 0
    return out


def test_a_cache_holds_the_indices_that_direct_encoding_gives(cache: Path, source: Path, vq: Path) -> None:
    reader, model = CacheReader(cache), load_latent_model(vq)
    counts = np.zeros(16, np.int64)
    for n, ref in enumerate(read_index(source)):
        piece = middle(read_sample(ref))
        for mirrored, image in ((False, piece), (True, np.ascontiguousarray(piece[:, ::-1]))):
            tokens, facts = reader.read_tokens(n, mirrored)
            with torch.inference_mode():
                expected = model.indices(to_float(image)[None])[0].numpy()  # type: ignore[attr-defined]
            np.testing.assert_array_equal(tokens.indices, expected)
            assert tokens.indices.dtype == np.int64
            counts += np.bincount(expected.ravel(), minlength=16)
        assert (facts["key"], facts["caption"], facts["class"]) == (ref.key, f"caption {n}", ref.label)
        assert "mse" not in facts
    said, shares = header(cache)["statistics"], counts[counts > 0] / counts.sum()
    assert said["n_tokens"] == counts.sum() == N * 2 * 64
    assert said["n_used"] == (counts > 0).sum() > 4
    assert said["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert said["perplexity"] == pytest.approx(2 ** said["entropy_bits"])


def test_the_header_names_codebook_encoder_and_decoder(cache: Path, vq: Path) -> None:
    found, codebook = header(cache), Codebook.of(vq, "")
    assert found["settings"]["codebook"] == {"size": 16, "id": codebook.codebook_id}
    assert (found["model"]["encoder_id"], found["model"]["decoder_id"]) == (codebook.encoder_id, codebook.decoder_id)
    assert found["shape"] == [8, 8]
    network = VQModel.from_pretrained(vq)
    vectors = network.quantize.embedding.weight.detach().numpy()
    np.testing.assert_array_equal(CacheReader(cache).vectors(), vectors)
    assert len({codebook.codebook_id, codebook.encoder_id, codebook.decoder_id}) == 3


@pytest.mark.parametrize(("size", "kind"), [(65536, "<u2"), (65537, "<u4")])
def test_the_stored_type_holds_every_index(size: int, kind: str) -> None:
    form = TokenFormat(size)
    sides = [Tokens(np.array([[0, size - 1]])), Tokens(np.array([[size - 1, 7]]))]
    written = form.write(sides)
    assert np.dtype(kind).itemsize * 4 + 128 == len(written.members[0])
    for mirrored in (False, True):
        np.testing.assert_array_equal(form.read(written.members, mirrored).indices, sides[mirrored].indices)
    for damaged in (written.members[0][:-1], b"", b"\x93NUMPY"):
        with pytest.raises(FormatError):
            form.read((damaged,), False)


def test_an_index_beyond_the_codebook_is_damage() -> None:
    written = TokenFormat(8).write([Tokens(np.array([[7]]))] * 2)
    with pytest.raises(FormatError, match="index 7, expected less than 7"):
        TokenFormat(7).read(written.members, False)


def test_counts_add_up_whatever_the_order() -> None:
    sides = [Tokens(np.array([[1, 1], [9, 3]])), Tokens(np.array([[3, 3], [3, 0]]))]
    a, b = TokenSums(10), TokenSums(10)
    for one in sides:
        a.add(TokenSums.of([one], 10))
    for one in reversed(sides):
        b.add(TokenSums.of([one], 10))
    assert json.dumps(a.to_json()) == json.dumps(b.to_json()) == json.dumps(TokenSums.of(sides, 10).to_json())
    assert TokenSums.from_json(a.to_json()).counts == {0: 1, 1: 2, 3: 4, 9: 1}
    assert a.statistics()["usage"] == 0.4


def test_a_refresh_encodes_what_is_new_and_gives_the_bytes_of_a_fresh_cache(
    vq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Encoder.__call__

    def counted(self: Encoder, pieces: Sequence[np.ndarray]) -> Any:
        seen.append(len(pieces))
        return encode(self, pieces)

    monkeypatch.setattr(Encoder, "__call__", counted)
    before, after = set_of(tmp_path / "a", range(3)), set_of(tmp_path / "b", (0, 1, 5, 2))
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert main(tokens_of(before, vq, out)) == 0
    assert main(tokens_of(before, vq, out)) == 0
    assert sum(seen) == 3
    assert main(tokens_of(after, vq, out)) == 0
    assert sum(seen) == 4
    assert main(tokens_of(after, vq, fresh, "--jobs", "2")) == 0
    assert contents(out) == contents(fresh)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(cache: Path, source: Path, vq: Path, tmp_path: Path) -> None:
    done = launch(2, tokens_of(source, vq, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(cache)


def test_a_model_without_a_codebook_is_refused(
    source: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tokens_of(source, model_dir, tmp_path / "c")) == 3
    assert "no codebook, which --format indices needs" in one_line(capsys)


def test_another_codebook_or_format_is_refused(
    cache: Path, source: Path, vq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = VQModel.from_pretrained(vq)
    network.quantize.embedding.weight.data[3] += 1
    network.save_pretrained(tmp_path / "other")  # the same encoder
    shutil.copytree(cache, tmp_path / "c")
    assert main(tokens_of(source, tmp_path / "other", tmp_path / "c")) == 2
    assert "codebook" in one_line(capsys)
    assert main(command(source, vq, tmp_path / "c")) == 2
    assert "format indices, not fp16" in one_line(capsys)
    with pytest.raises(ModelError, match="indices of codebook"):
        TokenDataset(cache, tmp_path / "other")
    encoder = VQModel.from_pretrained(vq)
    encoder.encoder.conv_in.bias.data += 1
    with pytest.raises(ModelError, match="indices of encoder"):  # as of two models of FSQ with the same levels
        TokenDataset(cache, encoder)
    decoder = VQModel.from_pretrained(vq)
    decoder.decoder.conv_out.bias.data += 1
    assert len(TokenDataset(cache, decoder)) == N  # a decoder trained further still reads them


def test_latents_of_a_model_with_a_codebook_are_cached_as_before(source: Path, vq: Path, tmp_path: Path) -> None:
    assert main(command(source, vq, tmp_path / "c")) == 0
    moments, _ = CacheReader(tmp_path / "c").read(0)
    assert moments.mean.shape == (4, 8, 8)
    assert moments.std is None
    with pytest.raises(UsageError, match="a cache of latents"):
        TokenDataset(tmp_path / "c")


def test_latent_datasets_refuse_indices(cache: Path) -> None:
    with pytest.raises(UsageError, match="codebook indices"):
        LatentDataset(cache)


def test_a_mirror_is_drawn_half_the_time_by_seed_epoch_and_number_alone(cache: Path, vq: Path) -> None:
    dataset, reader = TokenDataset(cache, vq), CacheReader(cache)
    assert (len(dataset), dataset.shape, dataset.codebook.size) == (N, (8, 8), 16)
    mirrored = []
    for epoch in range(200):
        dataset.set_epoch(epoch)
        item = dataset[1]
        mirrored.append(item["mirrored"])
        np.testing.assert_array_equal(item["indices"].numpy(), reader.read_tokens(1, item["mirrored"])[0].indices)
    assert 75 < sum(mirrored) < 125
    again = TokenDataset(cache, vq)
    again.set_epoch(7)
    dataset.set_epoch(7)
    loaded = list(DataLoader(again, batch_size=None, shuffle=False, num_workers=2))
    for n in reversed(range(N)):
        assert torch.equal(loaded[n]["indices"], dataset[n]["indices"])
    assert [bool(item["mirrored"]) for item in loaded] != [False] * N
    assert not any(TokenDataset(cache, mirror=False)[n]["mirrored"] for n in range(N))
    other = TokenDataset(cache, seed=1)
    drawn = [[dataset_[n]["mirrored"] for n in range(N)] for dataset_ in (TokenDataset(cache), other)]
    assert drawn[0] != drawn[1]


def test_items_have_labels_and_captions(cache: Path) -> None:
    dataset = TokenDataset(cache)
    assert [dataset[n]["label"] for n in range(N)] == [0, 10, 20, 0, -1, 20]
    assert dataset[3]["indices"].dtype == torch.int64
    assert (dataset[3]["caption"], dataset[-1]["caption"]) == ("caption 3", "caption 5")
    assert TokenDataset(cache, classes=["20", "10", "0"])[2]["label"] == 0


def test_formats_are_compared(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache-bench", str(cache), "--repeats", "1", "-o", str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out
    assert "(h, w) = (8, 8)" in said
    assert "of uint16" in said
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["format"] for row in result["rows"]] == ["indices", ".npy uint16"]
    assert result["rows"][0]["payload_bytes"] == 128 + 2 * 64 * 2
