"""Damaged files: an error, or a loss that is named; never wrong latents that claim to be right."""

import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from codec import bitstream, model_folder
from codec.coding import Coder
from codec.errors import FormatError, ModelError

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ("v1-context", "v1-raw", "v1-static")


@pytest.fixture(scope="module")
def coder() -> Coder:
    folder = model_folder.read(GOLDEN / "model")
    return Coder(folder, folder.decoder_id)


@pytest.fixture(scope="module")
def vq_coder() -> Coder:
    folder = model_folder.read(GOLDEN / "vq-model")
    return Coder(folder, folder.decoder_id)


@pytest.fixture(scope="module")
def maps_coder() -> Coder:
    folder = model_folder.read(GOLDEN / "maps-model")
    return Coder(folder, folder.decoder_id)


def fill(coder: Coder) -> np.ndarray:
    """Return what stands where a tile is lost."""
    if coder.folder.maps:
        return coder.folder.index_tables[coder.folder.stream_id].fill
    return coder.folder.mean[:, None, None]


def read_or_refuse(coder: Coder, data: bytes, original: bytes, expected: np.ndarray) -> str:
    """Read damaged bytes in both ways and return what came out of it; assert that nothing wrong was believed."""
    sealed = zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]  # also by a mutation of another chunk
    try:
        contents = bitstream.unpack(data)
        found = coder.read(contents)
        assert sealed, "damaged bytes were taken for a whole file"
        np.testing.assert_array_equal(found, expected)
    except (FormatError, ModelError):
        pass
    try:
        rescued = coder.rescue(data)
    except (FormatError, ModelError):
        return "refused"
    assert rescued.damage or rescued.lost or sealed, "nothing was said"
    z = coder.dequantise(bitstream.unpack(original).header, expected)
    whole = np.ones(expected.shape[1:], bool)
    for rows, columns in rescued.lost:
        whole[rows, columns] = False
        lost = np.broadcast_to(fill(coder), z[:, rows, columns].shape)
        np.testing.assert_array_equal(rescued.z[:, rows, columns], lost)
    assert rescued.z.shape == z.shape
    np.testing.assert_array_equal(rescued.z[:, whole], z[:, whole])
    return f"{len(rescued.lost)} lost"


@pytest.mark.parametrize("name", [*SMALL, pytest.param("v1-tiles", marks=pytest.mark.slow)])
def test_every_flipped_bit_and_every_truncation(coder: Coder, name: str) -> None:
    outcomes = flip_and_cut(coder, name, every=1)
    n_least = len(outcomes) / 2 if name == "v1-tiles" else 32  # of one tile, flips of the CRC-32 alone
    assert sum(outcome != "refused" for outcome in outcomes) >= n_least


@pytest.mark.parametrize(
    "name",
    [
        "vq-one-pixel",
        "vq-fixed",
        "vq-static",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vq-adaptive", "vq-context")),
    ],
)
def test_every_flipped_bit_and_every_truncation_of_codebook_indices(vq_coder: Coder, name: str) -> None:
    outcomes = flip_and_cut(vq_coder, name, every=1)
    assert sum(outcome != "refused" for outcome in outcomes) >= 32  # flips of the CRC-32 alone


@pytest.mark.parametrize(("name", "every"), [("vq-adaptive", 5), ("vq-context", 5), ("vq-every-code", 7)])
def test_some_flipped_bits_and_truncations_of_codebook_indices(vq_coder: Coder, name: str, every: int) -> None:
    outcomes = flip_and_cut(vq_coder, name, every)
    assert "0 lost" in outcomes  # flips of the CRC-32


def test_some_flipped_bits_and_truncations_of_many_tiles_of_codebook_indices(vq_coder: Coder) -> None:
    outcomes = flip_and_cut(vq_coder, "vq-tiles", every=17)
    assert sum(outcome != "refused" for outcome in outcomes) >= len(outcomes) / 2


@pytest.mark.parametrize(("name", "every"), [("maps-one-pixel", 1), ("maps-context", 97), ("maps-tiles", 61)])
def test_some_flipped_bits_and_truncations_of_index_maps(maps_coder: Coder, name: str, every: int) -> None:
    outcomes = flip_and_cut(maps_coder, name, every)
    assert sum(outcome != "refused" for outcome in outcomes) >= (len(outcomes) / 2 if name == "maps-tiles" else 1)


def test_some_flipped_bits_and_truncations_of_a_file_of_many_tiles(coder: Coder) -> None:
    outcomes = flip_and_cut(coder, "v1-tiles", every=7)
    assert sum(outcome != "refused" for outcome in outcomes) >= len(outcomes) / 2


def flip_and_cut(coder: Coder, name: str, every: int) -> list[str]:
    """Hold a golden file to the promises with each `every`th bit flipped, and cut at each `every`th byte."""
    original, expected = (GOLDEN / f"{name}.lcx").read_bytes(), np.load(GOLDEN / f"{name}.npy")
    outcomes = []
    for n in range(0, 8 * len(original), every):
        data = bytearray(original)
        data[n // 8] ^= 1 << n % 8
        outcomes.append(read_or_refuse(coder, bytes(data), original, expected))
    for n in range(0, len(original), every):
        outcomes.append(read_or_refuse(coder, original[:n], original, expected))
    n_header = 25
    n_first = len(range(0, 8 * n_header, every))
    assert outcomes[:n_first] == ["refused"] * n_first  # a changed header makes every sum wrong
    return outcomes


def mutated(rng: np.random.Generator, original: bytes) -> bytes:
    """Return bytes with one to four random changes: flips, runs of noise, cuts, insertions, repetitions."""
    data = bytearray(original)
    for _ in range(rng.integers(1, 5)):
        at, kind = int(rng.integers(len(data) + 1)), rng.integers(5)
        length = int(rng.integers(1, 40))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(len(data[at : at + length]))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = rng.bytes(length)
        else:
            data[at:at] = data[at : at + length]
    if rng.random() < 0.5 and len(data) > 4:  # with a right CRC-32, so that what is behind it is tested
        data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    return bytes(data)


def mutate(coder: Coder, count: int, names: str = "v1-*.lcx") -> tuple[float, float]:
    """Hold `count` mutations of golden files to the promises; return the most bytes and seconds that one took."""
    files = [(path.read_bytes(), np.load(path.with_suffix(".npy"))) for path in sorted(GOLDEN.glob(names))]
    rng = np.random.default_rng(0)
    slowest = 0.0
    tracemalloc.start()
    for n in range(count):
        original, expected = files[n % len(files)]
        start = time.process_time()
        read_or_refuse(coder, mutated(rng, original), original, expected)
        slowest = max(slowest, time.process_time() - start)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most, slowest


def test_random_mutations_are_refused_or_named(coder: Coder) -> None:
    most_bytes, slowest_s = mutate(coder, 500)
    assert most_bytes < 300e6
    assert slowest_s < 20


def test_random_mutations_of_codebook_indices_are_refused_or_named(vq_coder: Coder) -> None:
    most_bytes, slowest_s = mutate(vq_coder, 150, "vq-*.lcx")
    assert most_bytes < 300e6
    assert slowest_s < 20


def test_random_mutations_of_index_maps_are_refused_or_named(maps_coder: Coder) -> None:
    most_bytes, slowest_s = mutate(maps_coder, 40, "maps-*.lcx")
    assert most_bytes < 300e6
    assert slowest_s < 20


@pytest.mark.slow
def test_ten_thousand_random_mutations_are_refused_or_named(coder: Coder) -> None:
    most_bytes, slowest_s = mutate(coder, 10_000)
    assert most_bytes < 300e6
    assert slowest_s < 20
