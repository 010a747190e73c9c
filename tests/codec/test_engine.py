"""Which way an image takes through the network, and what happens when one fails."""

from pathlib import Path

import numpy as np
import pytest
import torch

from codec import Codec, engine, tiled
from codec.engine import Engine, EngineConfig
from codec.errors import NonFiniteError, UsageError
from tests.conftest import photo


def load(model_dir: Path, notes: list[str], **how: object) -> Engine:
    return Engine.load(model_dir, EngineConfig(device="cpu", **how), notes=notes.append)  # type: ignore[arg-type]


def test_an_image_beyond_the_budget_goes_in_tiles_and_comes_out_the_same(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = (load(model_dir, [], dtype="float32", memory_bytes=size) for size in (0, 1_000_000))
    image = photo(181, 203)
    assert whole.fits(181, 203, "encode")
    assert not small.fits(181, 203, "encode")
    calls = []
    for name in ("encode", "decode"):
        monkeypatch.setattr(tiled, name, _counted(calls, name, getattr(tiled, name)))
    z, in_tiles = whole.encode(image), small.encode(image)
    assert calls == ["encode"]
    np.testing.assert_allclose(in_tiles, z, atol=1e-4 * np.abs(z).max())
    difference = whole.decode(z, 181, 203).astype(int) - small.decode(z, 181, 203)
    assert calls == ["encode", "decode"]
    assert np.abs(difference).max() <= 1


def _counted(calls: list[str], name: str, function: object) -> object:
    def call(*args: object, **kwargs: object) -> object:
        calls.append(name)
        return function(*args, **kwargs)  # type: ignore[operator]

    return call


def test_the_way_depends_on_the_size_of_the_machine_and_not_on_what_is_free(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else encoding twice would give different bytes."""
    one = load(model_dir, [])
    budget = one.budget_bytes
    monkeypatch.setattr(engine.memory, "available", lambda _: 1000)
    assert one.budget_bytes == budget
    assert one.fits(64, 64, "encode")


def test_out_of_memory_is_tried_again_in_tiles(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    one, image = load(model_dir, notes, dtype="float32"), photo(64, 50)
    expected = one.encode(image)

    def fails(*_: object) -> np.ndarray:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e18 bytes")

    monkeypatch.setattr(engine, "_encode_whole", fails)
    np.testing.assert_allclose(one.encode(image), expected, atol=1e-4)
    assert len(notes) == 1
    assert "out of memory" in notes[0]

    def other(*_: object) -> np.ndarray:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(engine, "_encode_whole", other)
    with pytest.raises(RuntimeError, match="shapes"):
        one.encode(image)


@pytest.mark.parametrize("budget", [0, 500_000])
def test_numbers_beyond_the_type_are_computed_again_in_float32_and_never_become_a_picture(
    model_dir: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    narrow = load(model_dir, notes, dtype="bfloat16", memory_bytes=budget)
    wide = load(model_dir, [], dtype="float32")
    z = wide.encode(photo(40, 40))
    expected = wide.decode(z, 40, 40)
    striped = tiled.decode

    def overflows(model: object, z: np.ndarray, *size: int, **how: object) -> np.ndarray:
        return striped(model, np.full_like(z, np.inf) if how["dtype"] == torch.bfloat16 else z, *size, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(tiled, "decode", overflows)
    monkeypatch.setattr(narrow.model, "decode", lambda z: torch.full((1, 3, 40, 40), torch.nan))
    decoded = narrow.decode(z, 40, 40)
    assert np.abs(decoded.astype(int) - expected).max() <= 1
    assert len(notes) == 1
    assert "beyond bfloat16; done again in float32" in notes[0]
    with pytest.raises(NonFiniteError):
        wide.decode(np.full_like(z, np.nan), 40, 40)


def test_types_and_devices_that_are_not_there_are_usage_errors(model_dir: Path) -> None:
    for how in ({"dtype": "float8"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="float"):
            load(model_dir, [], **how)
    with pytest.raises(UsageError, match="device warp"):
        Codec.load(model_dir, "warp")
