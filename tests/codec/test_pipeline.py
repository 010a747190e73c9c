"""The three stages: order, overlap, failures of single items, and an end by interruption."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from codec.pipeline import Outcome, pipelined


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def test_outcomes_come_in_the_order_of_the_items_whatever_takes_long(pool: ThreadPoolExecutor) -> None:
    def slowly(item: int) -> int:
        time.sleep(0.002 * (item % 5))
        return item

    outcomes = list(
        pipelined(
            range(20),
            slowly,
            lambda item, read: item + read,
            lambda item, made: (item, slowly(made)),
            readers=pool,
            writers=pool,
            ahead=3,
        )
    )
    assert outcomes == [Outcome(item, (item, 2 * item), None) for item in range(20)]


@pytest.mark.parametrize("stage", ["before", "network", "after"])
def test_a_failure_in_any_stage_is_that_item_s_alone(pool: ThreadPoolExecutor, stage: str) -> None:
    def fail_at(name: str, item: int) -> int:
        if item == 2 and name == stage:
            raise ValueError(stage)
        return item

    outcomes = list(
        pipelined(
            range(5),
            lambda item: fail_at("before", item),
            lambda item, _: fail_at("network", item),
            lambda item, _: fail_at("after", item),
            readers=pool,
            writers=pool,
            ahead=2,
        )
    )
    assert [outcome.value for outcome in outcomes] == [0, 1, None, 3, 4]
    assert str(outcomes[2].failure) == stage


def test_while_one_item_is_in_the_network_others_are_read_and_written(pool: ThreadPoolExecutor) -> None:
    """Each stage waits for another to have moved on: a pipeline that did one thing at a time would never end."""
    read, written = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def network(item: int, _: None) -> None:
        if item == 1:
            assert read[2].wait(10), "the next item was not read meanwhile"
        if item == 2:
            assert written[1].wait(10), "the last item was not written meanwhile"

    outcomes = list(
        pipelined(
            range(3),
            lambda item: read[item].set(),
            network,
            lambda item, _: written[item].set(),
            readers=pool,
            writers=pool,
            ahead=1,
        )
    )
    assert [outcome.failure for outcome in outcomes] == [None] * 3


def test_no_more_items_than_allowed_wait_on_either_side(pool: ThreadPoolExecutor) -> None:
    lock, alive, most = threading.Lock(), 0, 0

    def change(by: int) -> None:
        nonlocal alive, most
        with lock:
            alive += by
            most = max(most, alive)

    def after(item: int, _: None) -> None:
        time.sleep(0.005)
        change(-1)

    list(pipelined(range(40), lambda _: change(1), lambda *_: None, after, readers=pool, writers=pool, ahead=2))
    assert most <= 2 + 1 + 3  # waiting, in the network, after it


def test_what_is_no_failure_of_a_file_ends_the_run(pool: ThreadPoolExecutor) -> None:
    def network(item: int, _: int) -> int:
        if item == 1:
            raise KeyboardInterrupt
        return item

    outcomes = pipelined(range(9), lambda i: i, network, lambda _, made: made, readers=pool, writers=pool, ahead=2)
    with pytest.raises(KeyboardInterrupt):
        list(outcomes)
