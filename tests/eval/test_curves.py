"""BD-rates and tables of equal rate or metric against independent calculations, hand cases and the package."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import Akima1DInterpolator

from codec.errors import UsageError
from eval import stored_curves
from eval.curves import Curve, bd, bpp_levels, compare, metric_levels, pick_anchor
from eval.metrics import KNOWN
from eval.results import write_json

PSNR, LPIPS, MS_SSIM = KNOWN["psnr"], KNOWN["lpips_sqz10"], KNOWN["ms_ssim"]

# Two curves of the shape that CompressAI stores: six qualities each, no two rates or values in common.
STORED = {
    "hyperprior": (
        [0.13129, 0.20889, 0.32198, 0.47835, 0.66863, 0.93882],
        [27.58, 29.20, 30.97, 32.84, 34.53, 36.74],
    ),
    "factorized": (
        [0.12244, 0.18836, 0.28673, 0.43893, 0.64540, 0.96669],
        [26.91, 28.24, 29.64, 31.30, 32.98, 35.38],
    ),
}


def codec(name: str, bpp: list[float], values: list[Any], key: str = "psnr") -> dict[str, Any]:
    points = [{"bpp": rate, key: value} for rate, value in zip(bpp, values, strict=True)]
    return {"name": name, "points": points}


def by_hand(anchor: tuple[list[float], list[float]], test: tuple[list[float], list[float]]) -> float:
    """Mean of log10 rate over the shared range of the metric, by many small steps."""
    low = max(min(anchor[1]), min(test[1]))
    high = min(max(anchor[1]), max(test[1]))
    grid = np.linspace(low, high, 20001)
    means = [np.trapezoid(Akima1DInterpolator(d, np.log10(r))(grid), grid) for r, d in (anchor, test)]
    return 100 * (10 ** ((means[1] - means[0]) / (high - low)) - 1)


def test_bd_rate_equals_an_independent_integral_and_the_package() -> None:
    from bjontegaard import bd_psnr, bd_rate

    anchor, test = STORED["hyperprior"], STORED["factorized"]
    found = compare([codec(name, *curve) for name, curve in STORED.items()], [PSNR], "hyperprior")
    row = found["metrics"]["psnr"]["bd"][0]
    assert (row["codec"], row["anchor"]) == ("factorized", "hyperprior")
    assert row["bd_rate_percent"] == pytest.approx(by_hand(anchor, test), abs=1e-3)
    points = (*anchor, *test)
    assert row["bd_rate_percent"] == bd_rate(*points, method="akima", require_matching_points=False)
    assert row["bd_metric"] == bd_psnr(*points, method="akima", require_matching_points=False)
    assert 10 < row["bd_rate_percent"] < 60
    assert row["bd_metric"] < 0
    assert row["overlap"] == pytest.approx((35.38 - 27.58) / (36.74 - 26.91))
    assert row["reason"] is None
    other = found["metrics"]["psnr"]["bd"][1]
    assert (other["codec"], other["anchor"]) == ("hyperprior", "factorized")
    assert (1 + other["bd_rate_percent"] / 100) * (1 + row["bd_rate_percent"] / 100) == pytest.approx(1)


@pytest.mark.parametrize("metric", [PSNR, LPIPS])
def test_twice_the_rate_is_a_hundred_percent(metric: Any) -> None:
    values = [30.0, 32.0, 34.5, 36.0] if metric is PSNR else [5.0, 4.1, 2.2, 1.0]
    rates = [0.1, 0.2, 0.45, 0.8]
    half, twice = (
        Curve.of(codec(name, [factor * rate for rate in rates], values, metric.key), metric)
        for name, factor in (("half", 1.0), ("twice", 2.0))
    )
    row = bd(half, twice)
    assert row["bd_rate_percent"] == pytest.approx(100)
    assert (row["overlap"], row["reason"]) == (1, None)
    assert bd(twice, half)["bd_rate_percent"] == pytest.approx(-50)
    worse = row["bd_metric"] < 0 if metric.higher_is_better else row["bd_metric"] > 0
    assert worse  # at equal rate, in the metric's own unit and direction
    for curve, factor in ((half, 1), (twice, 2)):
        for rate, value in zip(rates, values, strict=True):
            assert curve.bpp_at(value) == pytest.approx(factor * rate)
            assert curve.value_at(factor * rate) == pytest.approx(value)


def test_a_constant_difference_of_the_metric() -> None:
    rates = [0.1, 0.2, 0.4, 0.8]
    low, high = (
        Curve.of(codec(n, rates, [v + shift for v in (30, 31, 32, 33)]), PSNR) for n, shift in (("a", 0), ("b", 2))
    )
    assert bd(low, high)["bd_metric"] == pytest.approx(2)  # both straight in log rate
    assert bd(low, high)["bd_rate_percent"] == pytest.approx(-75)  # 1 dB doubles the rate
    assert low.bpp_at(31.5) == pytest.approx(0.1 * 2**1.5)
    assert low.value_at(0.1 * 2**1.5) == pytest.approx(31.5)


def test_nothing_is_extrapolated() -> None:
    curve = Curve.of(codec("a", [0.1, 0.2, 0.4], [30, 31, 32]), PSNR)
    assert [curve.bpp_at(value) for value in (29.99, 32.01)] == [None, None]
    assert [curve.value_at(bpp) for bpp in (0.0999, 0.401)] == [None, None]
    assert curve.bpp_at(30) == pytest.approx(0.1)
    assert curve.value_at(0.4) == pytest.approx(32)


def test_curves_that_do_not_overlap_say_so() -> None:
    found = compare([codec("a", [0.1, 0.2], [30, 31]), codec("b", [0.1, 0.2], [31.5, 33])], [PSNR], "a")
    row = found["metrics"]["psnr"]["bd"][0]
    assert (row["bd_rate_percent"], row["overlap"]) == (None, 0)
    assert row["reason"] == "no value of the metric that both reach"
    assert row["bd_metric"] == pytest.approx(1.75)
    short = compare([codec("a", [0.1, 0.2], [30, 31]), codec("b", [0.1, 0.2], [30.75, 33])], [PSNR], "a")
    row = short["metrics"]["psnr"]["bd"][0]
    assert row["overlap"] == pytest.approx(0.25 / 3)
    assert row["bd_rate_percent"] < 0
    assert "only 8 %" in row["reason"]


@pytest.mark.parametrize(
    ("bpp", "values", "problem", "has_rate"),
    [
        ([0.1], [30], "1 point, expected at least 2", False),
        ([0.1, 0.1, 0.2], [30, 31, 32], "two points at 0.100 bpp", False),
        ([0.1, 0.2, 0.3], [30, 32, 31], "the metric is no better at 0.300 than at 0.200 bpp", True),
        ([0.1, 0.2, 0.3], [None, math.inf, 31], "1 point, expected at least 2", False),
    ],
)
def test_curves_that_cannot_be_compared(bpp: list[float], values: list[Any], problem: str, has_rate: bool) -> None:
    good = Curve.of(codec("good", [0.1, 0.2, 0.4], [30, 31, 32]), PSNR)
    odd = Curve.of(codec("odd", bpp, values), PSNR)
    assert bd(good, odd)["reason"] == problem
    assert bd(odd, good)["reason"] == f"odd: {problem}"
    assert bd(good, odd)["bd_rate_percent"] is None
    assert odd.bpp_at(31) is None
    assert (odd.value_at(0.15) is not None) == has_rate


def test_ms_ssim_is_compared_in_decibels() -> None:
    curve = Curve.of(codec("a", [0.1, 0.2], [0.9, 0.99], "ms_ssim"), MS_SSIM)
    assert curve.value.tolist() == pytest.approx([10, 20])
    assert curve.bpp_at(15) == pytest.approx(0.1 * 2**0.5)
    assert Curve.of(codec("a", [0.1, 0.2, 0.3], [0.9, 0.99, 1.0], "ms_ssim"), MS_SSIM).bpp.size == 2


def test_levels_are_round_and_within_reach() -> None:
    assert metric_levels([(25.3, 33.1), (27.2, 36.0), (20.0, 30.0)]) == [26, 28, 30, 32]
    assert metric_levels([(1.03, 1.88)]) == [1.2, 1.4, 1.6, 1.8]
    assert metric_levels([(5, 5), (6, 6)]) == []
    assert metric_levels([]) == []
    assert bpp_levels([(0.1, 0.9), (0.16, 0.5), (0.3, 0.6)]) == [0.2, 0.3, 0.4, 0.5]
    assert bpp_levels([]) == []


def test_points_of_some_of_the_images_are_not_compared_with_rates_of_all() -> None:
    one = codec("one", *STORED["hyperprior"])
    for n, point in enumerate(one["points"]):
        point["n_values"] = {"bpp": 24, "psnr": 23 if n == 5 else 24}
    curve = Curve.of(one, PSNR)
    assert curve.bpp.tolist() == STORED["hyperprior"][0][:5]
    assert curve.bpp_at(36.0) is None


def test_a_metric_of_one_codec_alone_is_not_compared() -> None:
    pair = [codec("a", [0.1, 0.2], [30, 31]), codec("b", [0.1, 0.2], [0.9, 0.95], "ms_ssim")]
    assert compare(pair, [PSNR, MS_SSIM], "a")["metrics"] == {}


def test_the_anchor() -> None:
    codecs = [("ours", "model"), ("webp", "baseline"), ("jpeg", "baseline"), ("x (file)", "file")]
    assert pick_anchor(codecs, None) == "jpeg"
    assert pick_anchor(codecs[:2], None) == "webp"
    assert pick_anchor([codecs[0], codecs[3]], None) == "ours"
    assert pick_anchor(codecs, "x (file)") == "x (file)"
    assert pick_anchor([], None) is None
    with pytest.raises(UsageError, match=r"no codec 'wepb', did you mean 'webp'\?"):
        pick_anchor(codecs, "wepb")


DOCUMENT = {
    "name": "hyperprior",
    "description": "stored",
    "results": {
        "bpp": [0.4, 0.2],
        "psnr-rgb": [32, 30],
        "ms-ssim-rgb": [0.97, 0.95],
        "encoding_time": [0.2, 0.1],
        "decoding_time": [0.4, 0.3],
    },
}


def test_a_stored_curve_is_read(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(DOCUMENT))
    found = stored_curves.read(path)
    assert (found["name"], found["label"], found["kind"]) == ("hyperprior", "hyperprior (file)", "file")
    assert found["points"] == [
        {"quality": None, "bpp": 0.2, "psnr": 30, "ms_ssim": 0.95, "encode_s": 0.1, "decode_s": 0.3},
        {"quality": None, "bpp": 0.4, "psnr": 32, "ms_ssim": 0.97, "encode_s": 0.2, "decode_s": 0.4},
    ]
    assert found["rows"] == []
    old_keys = {"results": {"bpp": [0.2, 0.4], "psnr": [30, 32]}}
    path.write_text(json.dumps(old_keys))
    assert stored_curves.read(path)["name"] == "curve"
    assert [point["psnr"] for point in stored_curves.read(path)["points"]] == [30, 32]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"psnr-rgb": [30]}, "no results.bpp"),
        ([1, 2], "no results.bpp"),
        ({"bpp": [0.1]}, "none of psnr-rgb, ms-ssim-rgb"),
        ({"bpp": [0.1, 0.2], "psnr-rgb": [30]}, "1 values of psnr-rgb, 2 of bpp"),
        ({"bpp": [0.1, "a"], "psnr-rgb": [30, 31]}, "got 'a'"),
        ({"bpp": [0, 0.1], "psnr-rgb": [30, 31]}, "above 0"),
        ({"bpp": [0.1, 0.2], "ms-ssim-rgb": [12.0, 15.0]}, "not dB"),
        ({"bpp": [], "psnr-rgb": []}, "expected a list"),
    ],
)
def test_other_files_are_refused_as_curves(results: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"name": "x", "results": results}))
    with pytest.raises(UsageError, match=message) as caught:
        stored_curves.read(path)
    assert str(path) in str(caught.value)


def test_what_is_written_has_compressais_keys_and_comes_back(tmp_path: Path) -> None:
    points = [
        {"quality": q, "bpp": bpp, "psnr": psnr, "ms_ssim": m, "encode_s": 0.5, "decode_s": 0.25}
        for q, bpp, psnr, m in ((90, 0.8, 33.0, 0.98), (10, 0.2, 30.0, 0.95))
    ]
    common = {"kind": "baseline", "flags": "libjpeg", "points": points}
    gap = [{**points[0], "psnr": None}, points[1]]
    codecs = [
        {**common, "name": "jpeg", "label": "JPEG"},
        {**common, "name": "a/b c", "label": "gap", "points": gap},
        {**common, "name": "x (file)", "label": "x (file)", "kind": "file"},
        {**common, "name": "empty", "label": "empty", "points": []},
    ]
    dataset = {"name": "two", "n_images": 2, "sha256": "0"}
    result = {"codecs": codecs, "dataset": dataset, "protocol_hash": "h", "commit": None}
    codecs[2]["description"] = {"file": str(tmp_path / "read.json")}
    earlier = [{**common, "name": name, "label": name} for name in ("old", "read")]
    stored_curves.write({**result, "codecs": earlier}, tmp_path)
    (tmp_path / "theirs.json").write_text(json.dumps(DOCUMENT))
    written = stored_curves.write(result, tmp_path)
    # What an earlier run wrote is gone, but for the curve that this one has read; what others put there stays.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_b_c.json", "jpeg.json", "read.json", "theirs.json"]
    document = json.loads(written[0].read_text())
    assert (document["name"], document["results"]) == (
        "JPEG",
        {
            "bpp": [0.2, 0.8],
            "psnr-rgb": [30.0, 33.0],
            "ms-ssim-rgb": [0.95, 0.98],
            "encoding_time": [0.5, 0.5],
            "decoding_time": [0.25, 0.25],
        },
    )
    assert "libjpeg" in document["description"]
    assert "psnr-rgb" not in json.loads(written[1].read_text())["results"]  # no gaps in a list
    assert [point["psnr"] for point in stored_curves.read(written[0])["points"]] == [30.0, 33.0]
    write_json({"unrelated": 1}, tmp_path / "jpeg.json")
    with pytest.raises(UsageError):
        stored_curves.read(tmp_path / "jpeg.json")
