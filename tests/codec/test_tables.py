import numpy as np
import pytest

from codec import tables
from codec.errors import FormatError, ModelError
from codec.tables import TableSet

D = 3


@pytest.fixture(scope="module")
def fitted() -> tuple[TableSet, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z = (rng.laplace(size=(D, 20_000)) * np.array([[0.3], [1], [4]]) + np.array([[5], [0], [-2]])).astype(np.float32)
    mean, step = z.mean(axis=1), 3 * z.std(axis=1)
    return tables.fit(z, mean, step), mean, step, z


@pytest.mark.parametrize("quality", [0, 1, 50, 99, 100])
def test_indices_come_back_exactly_and_near_the_ideal_length(fitted, quality: int) -> None:
    table_set, mean, step, z = fitted
    indices = tables.to_indices(z[:, :3000].reshape(D, 50, 60), mean, step, quality)
    payload = table_set.encode(indices, quality)
    np.testing.assert_array_equal(table_set.decode(payload, (50, 60), quality), indices)
    ideal_bytes = table_set.bits(indices, quality) / 8
    assert ideal_bytes <= len(payload) <= ideal_bytes * 1.001 + 2
    # The tables fit: their code length is within 2 % of the order-0 entropy of what they were fitted to.
    all_indices = tables.to_indices(z, mean, step, quality)
    entropy = tables.entropy_bits(z, mean, step, quality) * z.shape[1]
    assert table_set.bits(all_indices[:, None], quality) < 1.02 * entropy + 100


@pytest.mark.parametrize("far", [1, 2, 255, 256, 65_535, 65_536, 2**20, -1, -(2**16), -(2**20)])
def test_an_index_outside_the_table_goes_through_the_escape(fitted, far: int) -> None:
    table_set, mean, step, z = fitted
    indices = tables.to_indices(z[:, :12].reshape(D, 3, 4), mean, step, 20)
    first, cumulative = table_set.table(20, 1)
    last = first + cumulative.size - 3
    indices[1, 1, 1] = np.clip(far + (last if far > 0 else first), -(2**20), 2**20)
    indices[1, 2, 3] = -(2**20)
    np.testing.assert_array_equal(table_set.decode(table_set.encode(indices, 20), (3, 4), 20), indices)


def test_a_channel_that_never_varies_costs_almost_nothing() -> None:
    z = np.stack([np.zeros(1000), np.random.default_rng(0).normal(size=1000)]).astype(np.float32)
    table_set = tables.fit(z, np.zeros(2, np.float32), np.ones(2, np.float32))
    assert table_set.bits(np.zeros((2, 40, 50), np.int32)[:1].repeat(2, 0), 0) > 0
    first, cumulative = table_set.table(100, 0)
    assert (first, cumulative.size) == (0, 3)
    assert cumulative[1] < 100  # the escape is rare


def test_the_step_halves_every_16_units_and_the_mean_is_index_zero() -> None:
    mean, step = np.array([1.0], np.float32), np.array([2.0], np.float32)
    z = np.array([[1.0, 3.0, 4.0, 6.0, -1.0]], np.float32)  # 0, 1, 1.5, 2.5, -1 steps: halves go to even
    assert tables.to_indices(z, mean, step, 0).tolist() == [[0, 1, 2, 2, -1]]
    assert tables.to_indices(z, mean, step, 16).tolist() == [[0, 2, 3, 5, -2]]
    np.testing.assert_array_equal(tables.from_indices(tables.to_indices(z, mean, step, 16), mean, step, 16), z)


def test_latents_that_are_not_finite_are_refused() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        tables.to_indices(np.array([[np.nan]], np.float32), one, one, 50)


def test_leftover_payload_is_a_format_error(fitted) -> None:
    table_set, mean, step, z = fitted
    payload = table_set.encode(tables.to_indices(z[:, :12].reshape(D, 3, 4), mean, step, 50), 50)
    with pytest.raises(FormatError, match="left over"):
        table_set.decode(payload + b"\x01\x02\x03\x04\x05", (3, 4), 50)


def test_damaged_tables_are_refused(fitted) -> None:
    table_set = fitted[0]
    changed = table_set.frequencies.copy()
    changed[0] += 1
    with pytest.raises(ModelError, match="sum to 65536"):
        TableSet(table_set.first, table_set.offsets, changed)


def test_the_stream_id_changes_with_mean_step_and_tables(fitted) -> None:
    table_set, mean, step, _ = fitted
    changed = table_set.first.copy()
    changed[3] += 1
    ids = {
        table_set.digest(mean, step),
        table_set.digest(np.nextafter(mean, 99), step),
        table_set.digest(mean, np.nextafter(step, 99)),
        TableSet(changed, table_set.offsets, table_set.frequencies).digest(mean, step),
    }
    assert len(ids) == 4
    assert table_set.digest(mean.copy(), step.copy()) in ids
