"""Images shared among ranks, and intervals of their means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec import images
from codec.errors import ModelError, NonFiniteError, UsageError
from codec.files import find
from codec.images import EXTENSIONS
from codec.launch import Launch
from eval import bootstrap
from eval.measure import Measured, over_images
from eval.protocol import get


class Rank(Launch):
    """A process among others that are simulated: it gathers what they gave before."""

    def gather(self, value: Any) -> list[Any]:
        return [*OTHERS, value] if self.index == self.count - 1 else [value]


OTHERS: list[Any] = []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(images.save_png(np.full((4 + n, 6, 3), n, np.uint8)))
    (tmp_path / "2.png").write_bytes(b"broken")
    return tmp_path


def on_ranks(folder: Path, count: int, work: Any) -> Measured[Any]:
    """Run one rank after another, the last gathers."""
    sources = find([folder], EXTENSIONS)
    OTHERS.clear()
    for index in range(count):
        rank = Rank(index, count)
        if index < count - 1:
            kept: list[Any] = []
            object.__setattr__(rank, "gather", lambda value, kept=kept: kept.append(value) or [([], None)])
            over_images(sources, get("folder"), work, rank)
            OTHERS.extend(kept)
        else:
            return over_images(sources, get("folder"), work, rank)
    raise AssertionError


def height(name: str, x: np.ndarray) -> tuple[str, int]:
    if name == "4.png":
        raise ValueError("too tall")
    return name, x.shape[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_image_is_measured_once_in_order(folder: Path, count: int) -> None:
    found = on_ranks(folder, count, height)
    assert found.names == ["0.png", "1.png", "3.png"]
    assert found.values == [("0.png", 4), ("1.png", 5), ("3.png", 7)]
    assert [failure["image"] for failure in found.failed] == ["2.png", "4.png"]
    assert found.failed[1]["reason"] == f"{folder / '4.png'}: too tall"
    assert found.sha256 == on_ranks(folder, 1, height).sha256
    assert found.sha256 != on_ranks(folder, 1, lambda name, x: name).sha256  # of those that count


def test_a_model_without_finite_numbers_fails_on_its_images(folder: Path) -> None:
    def work(name: str, x: np.ndarray) -> None:
        if name == "0.png":
            raise NonFiniteError("the latents are not finite")

    found = over_images(find([folder], EXTENSIONS), get("folder"), work)
    assert found.names == ["1.png", "3.png", "4.png"]
    assert found.failed[0]["reason"] == f"{folder / '0.png'}: the latents are not finite"


def test_a_wrong_model_stops_every_rank(folder: Path) -> None:
    def work(name: str, x: np.ndarray) -> None:
        if name == "0.png":  # that of the first rank
            raise ModelError("another model")

    with pytest.raises(ModelError, match="another model"):
        on_ranks(folder, 2, work)


def test_part_of_a_named_set_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="protocol kodak is 24 images"):
        over_images(find([folder], EXTENSIONS), get("kodak"), height)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        found = bootstrap.interval(rng.normal(3.0, 2.0, 40).tolist())
        assert found is not None
        covered.append(found[0] <= 3.0 <= found[1])
    assert 0.9 < np.mean(covered) < 0.98


def test_the_interval_is_that_of_normal_theory_for_many_values() -> None:
    values = np.random.default_rng(2).normal(0, 1, 2000)
    found = bootstrap.interval(values.tolist())
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_value_has_no_interval(values: Sequence[float]) -> None:
    assert bootstrap.interval(values) is None


def test_large_sets_go_by_parts() -> None:
    values = np.random.default_rng(3).normal(0, 1, 5001)
    found = bootstrap.interval(values.tolist())
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 / np.sqrt(5001), rel=0.1)
