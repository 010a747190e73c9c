"""The context coder against a second one, written index by index from FORMAT.md section 5.3, and its golden bytes."""

import hashlib

import numpy as np
import pytest

from codec import rangecoder, tables
from codec.context import ContextTables
from codec.errors import ModelError
from codec.quantiser import INDEX_LIMIT, QUALITIES
from codec.static import normalize
from codec.tables import Mode
from codec.wavefront import geometry

D = 6
GOLDEN = (  # 6 channels of 6 x 5 indices from -2 to 2, at quality 0
    "f767b707578fc8051fb1a2dc4c33f4369811744fe76515bf36f96f84d464bfb9e3bdeff796b9f79bcf08e8ffd14fae"
    "161971548ec85191f62ed75f2e7caf6ecca4f6003a760a162c3a7aebd57091d4c6348ea53aadc32c613b83d33f97d9"
    "a8b2dc12ec72bfa6796399a34af11f359f55b080b9af8aed78c33f9c0401387bb892184209c655fcde59ec8a4058"
)
GOLDEN_SHA256 = "da9c13cd77dd29a03cb46c02fd5a283bdfec6b5f97703a30fc0de7242e4fd91d"
CAUSES = [(-1, 0), (0, -1), (-1, -1), (1, -1), (-2, 0), (0, -2), (-2, -1), (-1, -2), (1, -2)]


def made(seed: int = 0) -> ContextTables:
    """Tables without any fit: integers from a generator, so that golden bytes depend on no floating point."""
    rng = np.random.Generator(np.random.PCG64(seed))
    thresholds = np.array([40, 120, 300, 380, 460, 540], np.int32)
    reach = np.array([1, 2, 3, 5, 8, 12, 16], np.int32)
    weights = np.concatenate(
        [
            rng.integers(-900, 1500, (QUALITIES, D, 9)),
            rng.integers(-800, 800, (QUALITIES, D, 4)),
            rng.integers(0, 700, (QUALITIES, D, 13)),
            rng.integers(0, 90, (QUALITIES, D, 1)),
        ],
        axis=2,
    )
    frequencies = []
    for far in reach.tolist():
        for _ in range(8):
            cuts = np.sort(rng.choice(65_535, 2 * far + 1, replace=False) + 1)
            frequencies.append(np.diff(np.concatenate([[0], cuts, [65_536]])))
    return ContextTables(weights.astype(np.int16), thresholds, reach, np.concatenate(frequencies).astype(np.uint16))


def grid(shape: tuple[int, int], size: float, seed: int = 0) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(-round(size), round(size) + 1, (D, *shape)).astype(np.int32)


def expected_intervals(table_set: ContextTables, indices: np.ndarray, quality: int) -> list[tuple[int, int]]:
    """FORMAT.md section 5.3, read literally: one index after another in Python integers."""
    channels, height, width = indices.shape
    v = {(x, y, c): 8 * int(indices[c, y, x]) for c in range(channels) for y in range(height) for x in range(width)}
    r: dict[tuple[int, int, int], int] = {}
    order = sorted(v, key=lambda at: (at[0] + 2 * at[1] + at[2], at[2], at[1]))
    n = table_set.reach.size
    bounds = table_set.thresholds.tolist()
    bounds += [bound << s for s in range(1, 13) for bound in bounds[-4:]]
    offsets = np.concatenate([[0], np.cumsum(np.repeat(2 * table_set.reach + 2, 8))]).tolist()

    def place(x: int, y: int, c: int, dx: int, dy: int) -> tuple[int, int, int] | None:
        if 0 <= x + dx < width and y + dy >= 0:
            return x + dx, y + dy, c
        if (dx, dy) == (-1, 0):
            return (x, y - 1, c) if y else None
        if (dx, dy) == (0, -1):
            return (x - 1, y, c) if x else None
        if dy == 0:
            return place(x, y, c, -1, 0)
        if dy == -1 or dx == 0:
            return place(x, y, c, 0, -1)
        return place(x, y, c, 0, -2)

    pairs = []
    for x, y, c in order:
        weights = table_set.weights[quality, c].tolist()
        causes = [place(x, y, c, dx, dy) for dx, dy in CAUSES]
        causes += [(x, y, c - k) if c >= k else None for k in range(1, 5)]
        p = sum(u * v[at] for u, at in zip(weights[:9], causes[:9], strict=True) if at is not None)
        p += sum(u * r[at] for u, at in zip(weights[9:13], causes[9:], strict=True) if at is not None)
        p = max(-(2**23), min(2**23, (p + 2048) >> 12))
        e = sum(u * abs(r[at]) for u, at in zip(weights[13:26], causes, strict=True) if at is not None)
        e = (e >> 6) + weights[26]
        r[x, y, c] = v[x, y, c] - p
        j = sum(bound <= e for bound in bounds)
        k, s = (j, 0) if j < n else (n - 4 + (j - n) % 4, 1 + (j - n) // 4)
        t = ((p - 4 * (2**s - 1)) >> s) + 4
        base, phase = t >> 3, t % 8
        index = int(indices[c, y, x])
        residual, far = (index >> s) - base, int(table_set.reach[k])
        table = table_set.frequencies[offsets[8 * k + phase] : offsets[8 * k + phase + 1]].tolist()
        symbol = residual + far + 1 if abs(residual) <= far else 0
        pairs.append((sum(table[:symbol]), table[symbol]))
        if symbol == 0:
            pairs += rangecoder.escape(residual, -far, far)
        if s:
            pairs.append(rangecoder.field(index % 2**s, s))
    return pairs


@pytest.mark.parametrize("size", [0, 1, 3, 40, 5000, INDEX_LIMIT])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 6), (9, 3)])
def test_payloads_are_those_of_the_format_read_literally(shape: tuple[int, int], size: int) -> None:
    table_set = made()
    for quality in (0, 57):
        indices = grid(shape, size, seed=size)
        payload = table_set.encode(indices, quality)
        pairs = expected_intervals(table_set, indices, quality)
        assert payload == rangecoder.encode(pairs)
        np.testing.assert_array_equal(table_set.decode(payload, shape, quality), indices)
        lengths = table_set.bits(indices, quality)
        assert lengths.shape == indices.shape
        assert lengths.sum() == pytest.approx(sum(16 - np.log2(size) for _, size in pairs), abs=1e-6)


def test_golden_payloads() -> None:
    """The bytes that other versions and machines wrote; a change of them is a change of the format."""
    payloads = [made().encode(grid((6, 5), size), quality) for size in (2, 70, 9000) for quality in (0, 100)]
    assert payloads[0].hex() == GOLDEN
    assert hashlib.sha256(b"".join(payloads)).hexdigest() == GOLDEN_SHA256


def test_every_cause_lies_on_an_earlier_front() -> None:
    for shape in ((1, 1, 1), (1, 5, 1), (7, 4, 9), (3, 1, 12)):
        found = geometry(shape)
        assert sorted(found.order.tolist()) == list(range(int(np.prod(shape))))
        cells, causes, channels = found.causes(found.order)
        front = np.full(2 * shape[0] * (shape[1] * shape[2] + 1), -1)
        for n, (begin, end) in enumerate(zip(found.ends, found.ends[1:], strict=False)):
            front[cells[begin:end]] = n
        front[front.size // 2 :] = front[: front.size // 2]  # residuals are known when the values are
        assert (front[causes] < front[cells]).all()
        assert found.ends[-1] == cells.size == channels.size


def test_long_grids_do_not_take_quadratic_time_or_memory() -> None:
    """Fronts of a long strip hold few indices; what is done for each of them must not grow with the strip."""
    indices = grid((1, 6000), 2)
    for laid in (indices[:1], indices[:1].transpose(0, 2, 1)):
        tables_of_one = made()
        one = ContextTables(
            tables_of_one.weights[:, :1], tables_of_one.thresholds, tables_of_one.reach, tables_of_one.frequencies
        )
        payload = one.encode(laid, 3)
        np.testing.assert_array_equal(one.decode(payload, laid.shape[1:], 3), laid)


def test_alike_neighbours_and_channels_pay() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 96, 128)).astype(np.float32)
    for axis in (1, 2):
        z = sum(np.roll(z, k, axis=axis) for k in range(4))
    mean, step = np.zeros(3, np.float32), z.std(axis=(1, 2))
    z[2] = z[1] + 0.3 * step[1] * rng.normal(size=z[1].shape)
    table_set = tables.fit([z[:, :48]], mean, step)
    indices = tables.to_indices(z[:, 48:], mean, step, 0)
    by_static, by_context = (table_set.static.bits(indices, 0), table_set.context.bits(indices, 0))
    saved = 1 - by_context.sum(axis=(1, 2)) / by_static.sum(axis=(1, 2))
    assert saved[0] > 0.2  # by its neighbours
    assert saved[2] > max(saved[:2]) + 0.03  # and by the channel before it
    mode, payload = table_set.encode(indices, 0)
    assert mode is Mode.CONTEXT
    assert len(payload) * 8 < 1.005 * by_context.sum() + 320


def test_weights_are_fitted_to_calm_and_busy_parts_alike() -> None:
    """Where the size of latents changes over the image, the expected error follows."""
    rng = np.random.default_rng(1)
    z = rng.laplace(size=(1, 128, 128)).astype(np.float32)
    z[:, :, 64:] *= 8
    mean, step = np.zeros(1, np.float32), np.ones(1, np.float32)
    table_set = tables.fit([z[:, ::2].copy()], mean, step)
    indices = tables.to_indices(z[:, 1::2].copy(), mean, step, 16)
    assert table_set.context.bits(indices, 16).sum() < 0.95 * table_set.static.bits(indices, 16).sum()


def test_tables_out_of_range_are_refused() -> None:
    good = made()
    parts = {
        "weights": good.weights,
        "thresholds": good.thresholds,
        "reach": good.reach,
        "frequencies": good.frequencies,
    }
    short = np.array([1, 1, 1, 1, 1, 1, 1], np.int32)
    for name, value in (
        ("weights", good.weights[:, :, :-1]),
        ("weights", good.weights[:-1]),
        ("weights", -np.abs(good.weights)),
        ("thresholds", good.thresholds[::-1]),
        ("thresholds", np.array([40, 120, 300, 380, 460, 600], np.int32)),
        ("thresholds", good.thresholds - 40),
        ("thresholds", good.thresholds[:3]),
        ("reach", good.reach - 1),
        ("reach", short),
        ("frequencies", np.concatenate([normalize(np.ones(9)), good.frequencies])),
    ):
        with pytest.raises(ModelError, match="damaged"):
            ContextTables(**(parts | {name: value}))
