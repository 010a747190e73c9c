import json
from pathlib import Path

import pytest

from codec import bitstream, images
from codec.runtime import Codec
from eval import bench_coder
from eval.bench_cli import coder_table
from eval.cli import main
from tests.codec.vq_models import make_two_level, make_vq
from tests.conftest import photo


def test_the_coder_is_measured_as_it_codes(model_dir: Path, tmp_path: Path) -> None:
    paths = []
    for n, size in enumerate([(40, 56), (33, 64)]):
        paths.append(tmp_path / f"{n}.png")
        paths[-1].write_bytes(images.save_png(photo(*size, seed=n)))
    result = json.loads(json.dumps(bench_coder.run(model_dir, paths, [0, 20, 60], efforts=[1])))
    assert (result["n_images"], result["stream_id"]) == (2, Codec.load(model_dir).stream_id)
    assert [row["quality"] for row in result["rows"]] == [0, 20, 60]
    for row in result["rows"]:
        assert row["n_latents"] == 4 * (20 * 28 + 17 * 32)
        modes = ["raw", "static", "context"]
        assert row["chosen_bytes"] <= min(row[f"{mode}_bytes"] for mode in modes)
        for mode in modes:
            assert row[f"{mode}_bytes"] == pytest.approx(row[f"ideal_{mode}_bytes"], rel=0.005, abs=4)
            assert min(row["ms"][mode].values()) >= 0
        found = row["effort"]["1"]
        assert found["ideal_context_bytes"] < row["ideal_context_bytes"]
        assert found["mse"] > row["mse"]
    errors = [row["mse"] for row in result["rows"]]
    assert errors == sorted(errors, reverse=True)


def test_the_modes_of_codebook_indices_are_measured_as_they_code(tmp_path: Path) -> None:
    folder = make_vq(tmp_path / "vq")
    paths = []
    for n, size in enumerate([(40, 56), (33, 64)]):
        paths.append(tmp_path / f"{n}.png")
        paths[-1].write_bytes(images.save_png(photo(*size, seed=n)))
    out = tmp_path / "bench.json"
    options = [*map(str, paths), "--what", "coder", "-m", str(folder), "-o", str(out)]
    assert main(["bench", *options]) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (result["codebook_size"], row["quality"], row["n_latents"]) == (32, None, 20 * 28 + 17 * 32)
    modes = ["fixed", "static", "adaptive", "context"]
    assert list(row["ms"]) == modes
    for mode in modes:
        assert row[f"{mode}_bytes"] == pytest.approx(row[f"ideal_{mode}_bytes"], abs=4)
    assert row["ideal_fixed_bytes"] == row["n_latents"] * 5 / 8
    assert row["context_bytes"] < row["entropy_bytes"] < row["fixed_bytes"]
    assert row["chosen_bytes"] <= min(row[f"{mode}_bytes"] for mode in modes)


def test_index_maps_are_measured_one_by_one(tmp_path: Path) -> None:
    folder, path = make_two_level(tmp_path / "two"), tmp_path / "a.png"
    path.write_bytes(images.save_png(photo(40, 56)))
    result = json.loads(json.dumps(bench_coder.run(folder, [path], [])))
    assert result["maps"] == [{"codebook_size": 20, "scale": 1}, {"codebook_size": 32, "scale": 2}]
    assert [(row["codebook_size"], row["n_latents"]) for row in result["rows"]] == [(20, 140), (32, 560)]
    shown = coder_table(result)
    for row in result["rows"]:
        assert row["chosen_bytes"] == min(row[f"{mode}_bytes"] for mode in row["ms"])
        assert any(line.startswith(f"{row['n_latents']} indices of {row['codebook_size']}; ") for line in shown)
    payload = bitstream.unpack(Codec.load(folder).encode(photo(40, 56))).tiles[0].payload
    assert len(payload) == sum(row["chosen_bytes"] for row in result["rows"]) + 2 + 2 + sum(
        row["chosen_bytes"] > 127 for row in result["rows"]
    )


def test_savings_are_those_at_equal_error() -> None:
    by_mse = [(0.01, 400.0), (0.04, 200.0), (0.16, 100.0)]
    assert bench_coder._saving(180.0, 0.04, by_mse) == pytest.approx(0.1)
    assert bench_coder._saving(200 / 2**0.5 * 0.9, 0.08, by_mse) == pytest.approx(0.1, abs=1e-4)
    assert bench_coder._saving(100.0, 0.2, by_mse) is None
