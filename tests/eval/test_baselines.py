"""Classical codecs: round trips, sizes, the search for a size."""

import io

import numpy as np
import pytest
from PIL import Image

from codec.errors import UsageError
from eval.baselines import BASELINES, encode_near, get
from eval.metrics import psnr


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    rng = np.random.default_rng(2)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((97, 83), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(BASELINES))
def test_round_trip(name: str, image: np.ndarray) -> None:
    (baseline,) = get([name])
    files = [baseline.encode(image, quality) for quality in baseline.qualities]
    sizes = [len(data) for data in files]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    decoded = [baseline.decode(data) for data in files]
    assert all(x_hat.shape == image.shape and x_hat.dtype == np.uint8 for x_hat in decoded)
    assert psnr(image, decoded[-1]) > max(psnr(image, decoded[0]), 25)
    assert baseline.encode(image, 30) == baseline.encode(image, 30)


def test_flags_reach_the_encoder(image: np.ndarray) -> None:
    jpeg, webp = get(["jpeg", "webp"])
    file = Image.open(io.BytesIO(jpeg.encode(image, 30)))
    assert file.format == "JPEG"
    assert file.info["progressive"]
    assert [component[1:3] for component in file.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
    assert Image.open(io.BytesIO(webp.encode(image, 30))).format == "WEBP"
    assert "method=6" in webp.flags


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'wepb'.*'webp'"):
        get(["jpeg", "wepb"])


def test_qualities_can_be_chosen() -> None:
    jpeg, webp = get(["jpeg", "webp"], {"jpeg": [30, 5, 30]})
    assert jpeg.qualities == (5, 30)
    assert webp.qualities == (1, 10, 30, 50)
    with pytest.raises(UsageError, match=r"jpeg: qualities \(0, 5\), expected 1 to 100"):
        get(["jpeg"], {"jpeg": [5, 0]})
    with pytest.raises(UsageError, match="did you mean 'jpeg'"):
        get(["jpeg"], {"jepg": [5]})


def test_missing_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.baselines.features.check", lambda module: module != "avif")
    assert get(["webp"])
    with pytest.raises(UsageError, match="baseline avif"):
        get(["avif"])


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 3), (33, 3), (44, 4), (45, 4), (46, 5), (480, 48), (640, 63), (9999, 63)]
)
def test_search_for_a_size(size: int, expected: int) -> None:
    asked = []

    def encode(quality: int) -> bytes:
        asked.append(quality)
        return bytes(10 * quality)

    quality, data = encode_near(encode, (3, 63), size)
    assert (quality, len(data)) == (expected, 10 * expected)
    assert len(asked) == len(set(asked)) <= 8
