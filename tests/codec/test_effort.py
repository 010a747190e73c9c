import numpy as np
import pytest

from codec import effort, tables
from codec.quantiser import to_steps
from codec.tables import Mode, TableSet

LEVELS = [1, 2, 4, 5, 9]
Fitted = tuple[TableSet, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """Tables, mean, step, and latents that they were not fitted to."""
    rng = np.random.default_rng(0)
    z = rng.laplace(size=(2, 192, 96)).astype(np.float32)
    z += np.roll(z, 1, axis=1) + np.roll(z, 1, axis=2)
    mean, step = z.mean(axis=(1, 2)), 2 * z.std(axis=(1, 2))
    return tables.fit([z[:, :144]], mean, step), mean, step, z[:, 144:]


def cost(fitted: Fitted, indices: np.ndarray, quality: int, mode: Mode = Mode.CONTEXT) -> tuple[float, float]:
    """Return the sum of squared errors in steps, and the bits."""
    table_set, mean, step, z = fitted
    error = ((table_set.centroids(indices, quality) / 128 - to_steps(z, mean, step, quality)) ** 2).sum()
    return float(error), table_set.bits(indices, quality, mode)


def test_level_0_is_rounding(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    found = effort.search(z, mean, step, table_set, 30, 0)
    np.testing.assert_array_equal(found, tables.to_indices(z, mean, step, 30))


@pytest.mark.parametrize("quality", [0, 16, 60])
def test_search_lowers_the_sum_of_error_and_priced_bits(fitted: Fitted, quality: int) -> None:
    table_set, mean, step, z = fitted
    nearest = tables.to_indices(z, mean, step, quality)
    error, bits = cost(fitted, nearest, quality)
    sums = [error + effort.LAMBDA * bits]
    for level in LEVELS:
        found = effort.search(z, mean, step, table_set, quality, level)
        assert (found.dtype, found.shape) == (np.int32, z.shape)
        assert np.abs(found - nearest).max() <= 1
        error_then, bits_then = cost(fitted, found, quality)
        assert bits_then < bits
        assert error_then > error
        sums.append(error_then + effort.LAMBDA * bits_then)
        np.testing.assert_array_equal(found, effort.search(z, mean, step, table_set, quality, level))
    rounding, one, two, four, ordered, best = sums
    assert one < rounding
    assert two < one
    assert four <= 1.0001 * two  # rounds soon change little
    assert ordered == best < one


def test_fewer_bytes_at_the_same_error(fitted: Fitted) -> None:
    """What counts: against plain rounding at whatever quality has the same error."""
    table_set, mean, step, z = fitted
    plain = []
    for quality in range(0, 40, 2):
        error, bits = cost(fitted, tables.to_indices(z, mean, step, quality), quality)
        plain.append((error * tables.step_scale(quality) ** 2, bits))
    errors, sizes = np.log(np.array(plain[::-1])).T
    for quality in (4, 12):
        savings = []
        for level in (1, 9):
            found = effort.search(z, mean, step, table_set, quality, level)
            error, bits = cost(fitted, found, quality)
            equal = np.exp(np.interp(np.log(error * tables.step_scale(quality) ** 2), errors, sizes))
            savings.append(1 - bits / equal)
        assert savings[1] > savings[0] > 0.005


def test_each_index_in_order_is_the_best_for_what_lies_before_it(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    part = z[:, :7, :9]
    found = effort.search(part, mean, step, table_set, 8, 9)
    scaled = to_steps(part, mean, step, 8)
    nearest = tables.to_indices(part, mean, step, 8)
    choice = table_set.context.choose(found, 8)  # depends on causes alone

    def sums(indices: np.ndarray) -> np.ndarray:
        errors = (table_set.centroids(indices, 8) / 128 - scaled) ** 2
        return errors + effort.LAMBDA * table_set.context.cost(choice, indices)

    least = np.min([sums(nearest + by) for by in (-1, 0, 1)], axis=0)
    np.testing.assert_allclose(sums(found), least, rtol=0, atol=1e-12)
    assert (found != nearest).any()


def test_grids_that_static_tables_suit_are_searched_with_their_costs(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    rng = np.random.default_rng(1)
    shuffled = rng.permuted(z.reshape(2, -1), axis=1).reshape(z.shape)
    of_shuffled = (table_set, mean, step, shuffled)
    nearest = tables.to_indices(shuffled, mean, step, 40)
    found = effort.search(shuffled, mean, step, table_set, 40, 3)
    error, bits = cost(of_shuffled, nearest, 40, Mode.STATIC)
    error_then, bits_then = cost(of_shuffled, found, 40, Mode.STATIC)
    assert bits < cost(of_shuffled, nearest, 40)[1]
    assert error_then + effort.LAMBDA * bits_then < error + effort.LAMBDA * bits
    by_context = effort._in_order(
        *_options(of_shuffled, nearest, 40), table_set, 40
    )  # what the costs of the other mode would have chosen
    error_other, bits_other = cost(of_shuffled, by_context, 40, Mode.STATIC)
    assert error_then + effort.LAMBDA * bits_then < error_other + effort.LAMBDA * bits_other


def _options(fitted: Fitted, nearest: np.ndarray, quality: int) -> tuple[np.ndarray, np.ndarray]:
    table_set, mean, step, z = fitted
    options = nearest + np.array([0, -1, 1], np.int32)[:, None, None, None]
    scaled = to_steps(z, mean, step, quality)
    return options, np.stack([(table_set.centroids(option, quality) / 128 - scaled) ** 2 for option in options])


def test_indices_stay_within_the_limit(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    far = z[:, :3, :3] * 1e9
    for level in (1, 9):
        assert np.abs(effort.search(far, mean, step, table_set, 50, level)).max() <= tables.INDEX_LIMIT


def test_levels_and_latents_are_checked(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    for level in (-1, 10):
        with pytest.raises(ValueError, match=r"expected 0\.\.9"):
            effort.search(z, mean, step, table_set, 50, level)
    with pytest.raises(ValueError, match="not finite"):
        effort.search(np.full_like(z, np.nan), mean, step, table_set, 50, 1)
