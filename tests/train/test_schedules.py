import math

import pytest

from codec.errors import UsageError
from train.loss_config import KLConfig
from train.recipe import load_recipe
from train.schedules import Moment, kl_factor, parse_moment


def test_a_moment_is_images_or_a_share() -> None:
    assert parse_moment("20000") == Moment(images=20000)
    assert parse_moment("12.5%") == Moment(share=0.125)
    assert parse_moment("500").passed(250, 0.99) == 0.5
    assert parse_moment("50%").passed(10**9, 0.25) == 0.5
    assert parse_moment("0").passed(0, 0) == parse_moment("0%").passed(0, 0) == 1.0  # no length: passed at once
    assert parse_moment("10").passed(-5, 0) == 0.0


@pytest.mark.parametrize("text", ["soon", "120%", "-5", "-5%", "1e3", "nan%", ""])
def test_what_is_no_moment_is_an_error_that_names_the_field(text: str) -> None:
    with pytest.raises(UsageError, match=r"adversarial\.start = .*images \(\"20000\"\), a share of the run"):
        load_recipe("tiny", [f'adversarial.start="{text}"'])


def test_images_may_stand_as_a_number() -> None:
    assert load_recipe("tiny", ["adversarial.start=5000", "kl.ramp=30%"]).adversarial.start == "5000"


def factors(schedule: str, n: int = 8, cycles: int = 2) -> list[float]:
    return [kl_factor(schedule, Moment(share=0.5), cycles, 0.5, 0, k / n) for k in range(n + 1)]


def test_the_weight_of_the_kl_follows_its_schedule() -> None:
    assert factors("constant") == [1.0] * 9
    assert factors("linear") == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors("capacity") == factors("linear")
    # Two cycles, each half growing and half at 1 (Fu et al. 2019, figure 1).
    assert factors("cyclical") == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1]
    sigmoid, exponential = factors("sigmoid"), factors("exponential")
    for found in (sigmoid, exponential):
        assert found[0] == 0
        assert found[4:] == pytest.approx([1.0] * 5)
        assert found == sorted(found)
    assert sigmoid[2] == pytest.approx(0.5)
    assert sigmoid[1] < 0.06
    assert exponential[2] == pytest.approx(math.expm1(2.5) / math.expm1(5))


def test_the_ramp_may_be_in_images() -> None:
    assert kl_factor("linear", Moment(images=200), 1, 1.0, 50, 0.9) == 0.25


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "capacity"}, "kl.capacity = 0.0"),
        ({"cycles": 0}, "kl.cycles = 0"),
        ({"cycle_ramp": 0.0}, "kl.cycle_ramp"),
        ({"free_bits": -1.0}, "kl.free_bits"),
        ({"ramp": "never"}, "kl.ramp"),
    ],
)
def test_impossible_schedules_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLConfig(**values)
