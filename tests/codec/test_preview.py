import json
from pathlib import Path

import numpy as np
import pytest

from codec import facts, model_folder, preview
from codec.errors import ModelError
from codec.preview import Preview, PreviewFit

F, D = 4, 5


def scene(seed: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Latents of which three channels are the colours, scaled and far from zero, and the image that they belong to."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    z = rng.normal(size=(D, 6, 8))
    z[:3] = np.moveaxis(small / 127.5 - 1, -1, 0) * 3 + 70 + noise * rng.normal(size=(3, 6, 8))
    z[4] = 2.5  # a dead channel
    return z.astype(np.float32), np.repeat(np.repeat(small, F, axis=0), F, axis=1)


def fitted(noise: float = 0.0, **space: float) -> Preview:
    fit = PreviewFit(D)
    for seed in range(4):
        fit.update(*scene(seed, noise))
    found = fit.solve(**space)
    assert found is not None
    return found


def test_a_linear_map_is_found_exactly_whatever_the_space_of_the_latents() -> None:
    z, image = scene(9)  # not one of those it was fitted to
    for scale, shift in ((1.0, 0.0), (0.25, 69.0)):
        found = fitted(scale=scale, shift=shift)
        np.testing.assert_array_equal(found.apply((z - shift) * scale), image[::F, ::F])
        np.testing.assert_allclose(found.r2, 1, atol=1e-6)
        assert np.abs(found.weight[4]).max() == 0
    by_channel = np.array([1.0, 2, 3, 4, 5]), np.array([70.0, 60, 50, 0, 0])
    fit = PreviewFit(D)
    for seed in range(4):
        fit.update(*scene(seed))
    found = fit.solve(*by_channel)
    assert found is not None
    scales, shifts = (part[:, None, None] for part in by_channel)
    np.testing.assert_array_equal(found.apply((z - shifts) * scales), image[::F, ::F])


def test_r2_is_the_share_that_least_squares_explains() -> None:
    found = fitted(noise=2.0)
    rows, colours = [], []
    for seed in range(4):
        z, image = scene(seed, 2.0)
        rows.append(np.moveaxis(z, 0, -1).reshape(-1, D).astype(np.float64))
        colours.append(image[::F, ::F].reshape(-1, 3) / 127.5 - 1)
    x, y = np.concatenate(rows), np.concatenate(colours)
    design = np.column_stack([x[:, :4], np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    explained = 1 - ((y - design @ solution) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    assert 0.1 < explained.max() < 0.9
    np.testing.assert_allclose(found.r2, explained, rtol=1e-4)
    np.testing.assert_allclose(found.weight[:4], solution[:4], atol=1e-5)


def test_too_little_to_fit_to_is_no_preview_and_wrong_shapes_are_said() -> None:
    fit = PreviewFit(D)
    assert fit.solve() is None
    fit.update(np.zeros((D, 2, 2), np.float32), np.zeros((8, 8, 3), np.uint8))
    assert fit.solve() is None
    with pytest.raises(ValueError, match="8 x 9 pixels does not fit latents of 2 x 2"):
        fit.update(np.zeros((D, 2, 2), np.float32), np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected latents \(5, h, w\), got \(4, 6, 8\)"):
        fitted().apply(np.zeros((4, 6, 8)))


def test_it_is_kept_in_codec_json_and_the_model_stays_readable(new_model, tmp_path: Path) -> None:
    folder = new_model("with-codec")
    assert preview.read(folder) is None
    before = model_folder.read(folder)
    found = fitted()
    preview.write(folder, found)
    again = preview.read(folder)
    assert again is not None
    np.testing.assert_array_equal(again.weight, found.weight)
    np.testing.assert_array_equal(again.bias, found.bias)
    after = model_folder.read(folder)
    assert after.stream_id == before.stream_id
    assert {name: value for name, value in after.info.items() if name != "preview"} == before.info
    assert json.loads((folder / "codec.json").read_text())["preview"]["space"] == "normalized"
    assert not (folder / facts.FACTS_JSON).exists()

    plain = tmp_path / "plain"
    plain.mkdir()
    preview.write(plain, found)
    assert [path.name for path in plain.iterdir()] == [facts.FACTS_JSON]
    assert not model_folder.is_model_folder(plain)  # nothing that the codec would take for its own
    np.testing.assert_array_equal(getattr(preview.read(plain), "weight", None), found.weight)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"preview": {"weight": [[1, 2]], "bias": [0, 0, 0], "r2": [0, 0, 0], "space": "normalized"}}', r"\(1, 2\)"),
        ('{"preview": {"weight": [[1, 2, 3]], "bias": [0, 0, 0], "r2": [0, 0, 0], "space": "raw"}}', "of raw latents"),
        ('{"preview": {"weight": [[1, 2, 3]]}}', "damaged preview"),
        ('{"preview": 3}', "damaged preview"),
    ],
)
def test_what_is_damaged_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / facts.FACTS_JSON).write_text(text)
    with pytest.raises(ModelError, match=said):
        preview.read(tmp_path)
