import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest

from codec import packed, quantiser, rangecoder, static, tables
from codec.errors import FormatError, ModelError
from codec.tables import Mode, TableSet

D = 3
EVERY = list(Mode)
Fitted = tuple[TableSet, np.ndarray, np.ndarray, np.ndarray]


def smooth(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Latents whose neighbours are alike, heavy-tailed, with another mean and size in every channel."""
    rng = np.random.default_rng(seed)
    z = rng.laplace(size=shape)
    z = z + np.roll(z, 1, axis=1) + np.roll(z, 1, axis=2) + np.roll(z, (1, 1), axis=(1, 2))
    scale, place = np.array([0.15, 0.5, 2.0]), np.array([5.0, 0.0, -2.0])
    return (z * scale[:, None, None] + place[:, None, None]).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    z = smooth((D, 100, 200))
    mean, step = z.mean(axis=(1, 2)), 3 * z.std(axis=(1, 2))
    return tables.fit([z[:, :, :120], z[:, :, 120:]], mean, step), mean, step, z


def some(fitted: Fitted, shape: tuple[int, int], quality: int, seed: int = 1) -> np.ndarray:
    _, mean, step, _ = fitted
    return tables.to_indices(smooth((D, *shape), seed), mean, step, quality)


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("quality", [0, 1, 50, 99, 100])
def test_indices_come_back_exactly_and_near_the_ideal_length(fitted: Fitted, quality: int, mode: Mode) -> None:
    table_set = fitted[0]
    indices = some(fitted, (50, 60), quality)
    coded, payload = table_set.encode(indices, quality, [mode])
    assert coded is mode
    decoded = table_set.decode(mode, payload, (50, 60), quality)
    np.testing.assert_array_equal(decoded, indices)
    assert decoded.dtype == np.int32
    ideal_bytes = table_set.bits(indices, quality, mode) / 8
    assert ideal_bytes - 2 <= len(payload) <= ideal_bytes * 1.001 + 2


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 40), (40, 1), (2, 2), (3, 5), (64, 9)])
def test_grids_of_any_shape_come_back(fitted: Fitted, shape: tuple[int, int], mode: Mode) -> None:
    for quality in (0, 60):
        indices = some(fitted, shape, quality)
        payload = fitted[0].encode(indices, quality, [mode])[1]
        np.testing.assert_array_equal(fitted[0].decode(mode, payload, shape, quality), indices)


@pytest.mark.parametrize("mode", EVERY)
def test_indices_up_to_the_limit_come_back(fitted: Fitted, mode: Mode) -> None:
    rng = np.random.default_rng(0)
    limit = tables.INDEX_LIMIT
    cases = [
        np.full((D, 4, 5), limit),
        np.full((D, 4, 5), -limit),
        np.where(rng.random((D, 9, 7)) < 0.5, limit, -limit),
        rng.integers(-limit, limit + 1, (D, 8, 8)),
        np.where(rng.random((D, 30, 30)) < 0.02, rng.integers(-limit, limit, (D, 30, 30)), 0),
        rng.integers(-300, 300, (D, 12, 12)),
        np.sign(rng.normal(size=(D, 10, 10))) * (1 << rng.integers(0, 21, (D, 10, 10))),
    ]
    for indices in (case.astype(np.int32) for case in cases):
        for quality in (0, 100):
            payload = fitted[0].encode(indices, quality, [mode])[1]
            np.testing.assert_array_equal(fitted[0].decode(mode, payload, indices.shape[1:], quality), indices)
            ideal_bytes = fitted[0].bits(indices, quality, mode) / 8
            assert ideal_bytes - 2 <= len(payload) <= ideal_bytes * 1.005 + 2  # dropped zeros may save a byte


def test_the_smallest_payload_wins_and_the_lowest_mode_of_equals(fitted: Fitted) -> None:
    table_set = fitted[0]
    alike = some(fitted, (40, 40), 40)
    rng = np.random.default_rng(3)
    shuffled = rng.permuted(alike.reshape(D, -1), axis=1).reshape(alike.shape)  # nothing to learn from neighbours
    noise = rng.integers(0, 1 << 20, (D, 20, 20), dtype=np.int32)
    for indices, expected in ((alike, Mode.CONTEXT), (shuffled, Mode.STATIC), (noise, Mode.RAW)):
        sizes = {mode: len(table_set.encode(indices, 40, [mode])[1]) for mode in Mode}
        mode, payload = table_set.encode(indices, 40)
        assert (mode, len(payload)) == (expected, min(sizes.values()))
        assert table_set.encode(indices, 40, [Mode.CONTEXT, Mode.STATIC])[0] is not Mode.RAW
    # Hardly any bits: the two coders end in the same number of bytes.
    least = np.rint(np.zeros((D, 1, 1))).astype(np.int32)
    sizes = [len(table_set.encode(least, 0, [mode])[1]) for mode in (Mode.STATIC, Mode.CONTEXT)]
    assert sizes[0] == sizes[1]
    assert table_set.encode(least, 0, [Mode.CONTEXT, Mode.STATIC])[0] is Mode.STATIC


@pytest.mark.parametrize("far", [1, 2, 255, 256, 65_535, 65_536, 2**20, -1, -(2**16), -(2**20)])
def test_an_index_outside_the_static_table_goes_through_the_escape(fitted: Fitted, far: int) -> None:
    table_set = fitted[0]
    indices = some(fitted, (3, 4), 20)
    first, cumulative = table_set.static.table(20, 1)
    last = first + cumulative.size - 3
    indices[1, 1, 1] = np.clip(far + (last if far > 0 else first), -(2**20), 2**20)
    indices[1, 2, 3] = -(2**20)
    payload = table_set.encode(indices, 20, [Mode.STATIC])[1]
    np.testing.assert_array_equal(table_set.decode(Mode.STATIC, payload, (3, 4), 20), indices)


@pytest.mark.parametrize("mode", EVERY)
def test_arbitrary_bytes_give_indices_or_a_format_error_and_nothing_else(fitted: Fitted, mode: Mode) -> None:
    table_set = fitted[0]
    rng = np.random.default_rng(mode)
    payload = table_set.encode(some(fitted, (9, 11), 30), 30, [mode])[1]
    cases = [rng.bytes(int(n)) for n in rng.integers(0, 400, 150)] + [b"", b"\xff" * 60, b"\0" * 60]
    cases += [payload[:n] for n in range(len(payload))] + [payload + rng.bytes(int(n)) for n in range(1, 40)]
    for _ in range(300):
        flipped = bytearray(payload)
        flipped[int(rng.integers(len(flipped)))] ^= 1 << int(rng.integers(8))
        cases.append(bytes(flipped))
    outcomes = set()
    for case in cases:
        try:
            decoded = table_set.decode(mode, case, (9, 11), 30)
        except FormatError:
            outcomes.add("refused")
        else:
            assert (decoded.shape, decoded.dtype) == ((D, 9, 11), np.int32)
            assert np.abs(decoded).max() <= tables.INDEX_LIMIT
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize("mode", EVERY)
def test_leftover_payload_is_a_format_error(fitted: Fitted, mode: Mode) -> None:
    payload = fitted[0].encode(some(fitted, (3, 4), 50), 50, [mode])[1]
    for extra in (b"\x01\x02\x03\x04\x05", b"\0"):
        with pytest.raises(FormatError, match=r"left over|zero byte"):
            fitted[0].decode(mode, payload + extra, (3, 4), 50)


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("payload", [b"", b"\x01", b"\0\0\0", b"\x12\x34\x56\x78\x9a"])
def test_short_payloads_of_large_grids_are_refused_at_once(
    fitted: Fitted, mode: Mode, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index is read of bytes that are not there; it once took minutes, escape after escape."""
    calls = 0
    escaped = rangecoder.Decoder.escaped

    def counted(decoder: rangecoder.Decoder, first: int, last: int) -> int:
        nonlocal calls
        calls += 1
        return escaped(decoder, first, last)

    monkeypatch.setattr(rangecoder.Decoder, "escaped", counted)
    start = time.process_time()
    with pytest.raises(FormatError, match="early"):
        fitted[0].decode(mode, payload, (1024, 1024), 100)
    assert time.process_time() - start < 5  # order and neighbours of the grid take most of it
    assert calls <= 2 * len(payload) + 2  # each takes six bits or more


def test_raw_payloads_are_checked(fitted: Fitted) -> None:
    payload = fitted[0].encode(some(fitted, (3, 4), 50), 50, [Mode.RAW])[1]
    with pytest.raises(FormatError, match="end early"):
        fitted[0].decode(Mode.RAW, payload[:-1], (3, 4), 50)
    with pytest.raises(FormatError, match="of 31 bits"):
        fitted[0].decode(Mode.RAW, b"\xff" * 1000, (3, 4), 50)
    with pytest.raises(FormatError, match="beyond"):
        fitted[0].decode(Mode.RAW, b"\x07" + b"\xff" * 1000, (3, 4), 50)
    indices = np.zeros((D, 1, 1), np.int32)  # 81 bits: seven of padding
    payload = fitted[0].encode(indices, 50, [Mode.RAW])[1]
    with pytest.raises(FormatError, match="left over"):
        fitted[0].decode(Mode.RAW, payload[:-1] + bytes([payload[-1] | 1]), (1, 1), 50)


def test_a_raw_payload_is_the_one_that_the_format_describes() -> None:
    indices = np.array([[[3, -1]], [[-7, -7]], [[-(2**20), 2**20]]], np.int32)
    bits = "00011" + f"{2**20 - 1:022b}" + "100" + "000"
    bits += "00000" + f"{2**20 - 7:022b}"
    bits += "10110" + f"{0:022b}" + f"{0:022b}" + f"{2**21:022b}"
    bits += "0" * (-len(bits) % 8)
    payload = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    assert packed.encode(indices) == payload
    np.testing.assert_array_equal(packed.decode(payload, 3, (1, 2)), indices)


def test_a_static_payload_is_the_one_that_the_format_describes() -> None:
    """Tables without any fit, and FORMAT.md section 5.2 read literally."""
    rng = np.random.Generator(np.random.PCG64(0))
    sizes = rng.integers(2, 9, 2 * tables.QUALITIES)
    cuts = [np.sort(rng.choice(65_535, size - 1, replace=False) + 1) for size in sizes.tolist()]
    frequencies = [np.diff(np.concatenate([[0], cut, [65_536]])) for cut in cuts]
    first = rng.integers(-4, 4, sizes.size).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    made = static.StaticTables(first, offsets, np.concatenate(frequencies).astype(np.uint16))
    indices = rng.integers(-5, 9, (2, 5, 7)).astype(np.int32)
    indices[0, 0, 0], indices[1, 4, 6] = 2**20, -(2**20)
    pairs = []
    for channel in range(2):
        number = 70 * 2 + channel
        table, least = frequencies[number].tolist(), int(first[number])
        for index in indices[channel].reshape(-1).tolist():
            inside = least <= index <= least + len(table) - 2
            symbol = index - least + 1 if inside else 0
            pairs.append((sum(table[:symbol]), table[symbol]))
            if not inside:
                pairs += rangecoder.escape(index, least, least + len(table) - 2)
    payload = made.encode(indices, 70)
    assert payload == rangecoder.encode(pairs)
    assert hashlib.sha256(payload).hexdigest() == "979e5e9ce8d39cb432ad6794d55605dbf391315de1f21aebe96bc102afa109fe"
    np.testing.assert_array_equal(made.decode(payload, (5, 7), 70), indices)
    assert made.bits(indices, 70).sum() == pytest.approx(sum(16 - np.log2(size) for _, size in pairs))


def test_an_unknown_mode_is_a_format_error(fitted: Fitted) -> None:
    with pytest.raises(FormatError, match="unknown coding mode 3"):
        fitted[0].decode(3, b"", (1, 1), 0)


def test_static_tables_fit_what_they_were_fitted_to(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    for quality in (0, 1, 50, 100):
        indices = tables.to_indices(z, mean, step, quality)
        entropy = tables.entropy_bits(z.reshape(D, -1), mean, step, quality) * z[0].size
        assert entropy <= table_set.bits(indices, quality, Mode.STATIC) < 1.02 * entropy + 100


def test_the_static_tables_count_the_indices_of_the_quantiser(fitted: Fitted) -> None:
    """Sorted values and edges against indices that are counted one by one."""
    table_set, mean, step, z = fitted
    for quality in (3, 77):
        for channel, plane in enumerate(tables.to_indices(z, mean, step, quality)):
            first, cumulative = table_set.static.table(quality, channel)
            numbers, counts = np.unique(plane, return_counts=True)
            kept = np.abs(numbers) <= 255
            assert (first, first + cumulative.size - 3) == (numbers[kept][0], numbers[kept][-1])
            weights = np.zeros(cumulative.size - 1)
            weights[numbers[kept] - first + 1] = counts[kept]
            weights[0] = counts[~kept].sum()
            np.testing.assert_array_equal(np.diff(cumulative), static.normalize(weights + 0.5))


def test_a_channel_that_never_varies_costs_almost_nothing() -> None:
    z = np.stack([np.zeros((20, 50)), np.random.default_rng(0).normal(size=(20, 50))]).astype(np.float32)
    table_set = tables.fit([z], np.zeros(2, np.float32), np.ones(2, np.float32))
    first, cumulative = table_set.static.table(100, 0)
    assert (first, cumulative.size) == (0, 3)
    assert cumulative[1] < 100  # the escape is rare
    assert table_set.context.bits(np.zeros((2, 20, 50), np.int32), 100)[0].sum() < 20


def test_the_step_halves_every_16_units_and_the_mean_is_index_zero() -> None:
    mean, step = np.array([1.0], np.float32), np.array([2.0], np.float32)
    z = np.array([[1.0, 3.0, 4.0, 6.0, -1.0]], np.float32)  # 0, 1, 1.5, 2.5, -1 steps: halves go to even
    assert tables.to_indices(z, mean, step, 0).tolist() == [[0, 1, 2, 2, -1]]
    assert tables.to_indices(z, mean, step, 16).tolist() == [[0, 2, 3, 5, -2]]
    np.testing.assert_array_equal(quantiser.from_steps(np.array([[0, 2, 3, 5, -2]]), mean, step, 16), z)


def test_latents_that_are_not_finite_are_refused() -> None:
    one = np.ones(1, np.float32)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            tables.to_indices(np.array([[value]], np.float32), one, one, 50)
        with pytest.raises(ValueError, match="not finite"):
            tables.fit([np.full((1, 2, 2), value, np.float32)], one, one)


def test_reconstruction_points_go_a_quarter_of_the_way_to_the_centroids(fitted: Fitted) -> None:
    table_set, mean, step, z = fitted
    for quality in (0, 20, 60):
        indices = tables.to_indices(z, mean, step, quality)
        scaled = quantiser.to_steps(z, mean, step, quality)
        z_q = table_set.dequantise(indices, quality, mean, step)
        assert z_q.dtype == np.float32
        points = quantiser.to_steps(z_q, mean, step, quality)
        for channel in range(D):
            for group in (-2, -1, 0, 1, 2):
                where = indices[channel] == group
                if where.sum() > 500:
                    expected = group + 0.25 * (scaled[channel][where].mean() - group)
                    np.testing.assert_allclose(points[channel][where], expected, atol=0.01)
            tail = indices[channel] >= 3
            if tail.sum() > 500:
                excess = 0.25 * (scaled - indices)[channel][tail].mean()
                np.testing.assert_allclose((points - indices)[channel][tail], excess, atol=0.01)
        plain = quantiser.from_steps(indices, mean, step, quality)
        assert ((z_q - z) ** 2).sum() < ((plain - z) ** 2).sum()
    # Off the data, every point still is nearer to its own index than to any other.
    assert np.abs(table_set.points.astype(int)).max() <= 16


def test_tensors_come_back(fitted: Fitted) -> None:
    table_set, mean, step, _ = fitted
    tensors = table_set.tensors()
    assert sum(tensor.nbytes for tensor in tensors.values()) < 1 << 20
    again = TableSet.from_tensors(tensors)
    assert again.digest(mean, step) == table_set.digest(mean, step)
    indices = some(fitted, (20, 20), 45)
    assert again.encode(indices, 45) == table_set.encode(indices, 45)
    with pytest.raises(KeyError):
        TableSet.from_tensors({name: tensor for name, tensor in tensors.items() if name != "points"})
    for name, tensor in tensors.items():
        with pytest.raises(ModelError, match="damaged"):
            TableSet.from_tensors(tensors | {name: tensor.astype(np.int64)})


def test_damaged_tables_are_refused(fitted: Fitted) -> None:
    tensors = fitted[0].tensors()

    def changed(name: str, at: int, by: int) -> dict[str, np.ndarray]:
        copy = tensors[name].copy()
        copy.reshape(-1)[at] += by
        return tensors | {name: copy}

    error_weight = 13
    cases = {
        "frequencies": changed("frequencies", 0, 1),
        "context_frequencies": changed("context_frequencies", 5, 1),
        "offsets": changed("offsets", 1, 1),
        "first": tensors | {"first": tensors["first"][:-1]},
        "context_reach": changed("context_reach", 2, 1),
        "context_thresholds": changed("context_thresholds", 3, -1000),
        "context_weights": changed("context_weights", error_weight, -30_000),
        "points": tensors | {"points": tensors["points"][:, :-1]},
    }
    for name, damaged in cases.items():
        assert not np.array_equal(damaged[name], tensors[name])
        with pytest.raises(ModelError, match="damaged"):
            TableSet.from_tensors(damaged)


def test_the_stream_id_changes_with_mean_step_and_every_part(fitted: Fitted) -> None:
    table_set, mean, step, _ = fitted
    own = table_set.digest(mean, step)
    ids = {own, table_set.digest(np.nextafter(mean, 99), step), table_set.digest(mean, np.nextafter(step, 99))}
    tensors = table_set.tensors()
    for name in ("first", "context_weights", "context_thresholds", "points"):
        copy = tensors[name].copy()
        copy.reshape(-1)[-1 if name == "context_thresholds" else 0] += 1
        ids.add(TableSet.from_tensors(tensors | {name: copy}).digest(mean, step))
    for name in ("frequencies", "context_frequencies"):
        copy = tensors[name].copy()
        copy[:2] += np.array([1, -1] if copy[1] > 1 else [-1, 1]).astype(copy.dtype)
        ids.add(TableSet.from_tensors(tensors | {name: copy}).digest(mean, step))
    assert len(ids) == 9
    assert table_set.digest(mean.copy(), step.copy()) == own


def test_the_stream_id_is_the_one_that_the_format_describes(fitted: Fitted) -> None:
    table_set, mean, step, _ = fitted
    text = b"latent-codec stream 1"
    tensors = table_set.tensors()
    names = [
        "first",
        "offsets",
        "frequencies",
        *(f"context_{n}" for n in ("weights", "thresholds", "reach", "frequencies")),
    ]
    for array in (mean, step, *(tensors[name] for name in [*names, "points"])):
        text += array.size.to_bytes(4, "little") + array.tobytes()
    assert table_set.digest(mean, step) == hashlib.sha256(text).hexdigest()[:16]


def test_coding_needs_no_torch() -> None:
    script = "import sys, codec.effort, codec.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
