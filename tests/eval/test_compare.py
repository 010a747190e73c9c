"""`codec-eval compare`: what is compared, what is refused and why."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval.cli import main

PSNR, LPIPS = [20.0, 30.0, 40.0, 25.0], [0.5, 0.4, 0.3, 0.2]
NAMES = ["a.png", "b.png", "c.png", "d.png"]


def rows(psnr: Sequence[float | None], lpips: Sequence[float | None], **more: Any) -> list[dict[str, Any]]:
    every = zip(NAMES, psnr, lpips, strict=True)
    return [{"image": name, "psnr": one, "lpips_alex": other, **more} for name, one, other in every]


def recon(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "recon",
        "protocol": {
            "name": "folder-256",
            "posterior": "mode",
            "metrics": {"psnr": "p", "lpips_alex": "l", "fid": "f"},
        },
        "dataset": {"names": NAMES, "sha256": "1" * 64, "sha256_of": "pixels"},
        "weights": {"lpips_alex": {"name": "alexnet", "sha256": "2" * 64}},
        "models": list(models) or [model("small", PSNR, LPIPS)],
    }


def model(name: str, psnr: Sequence[float | None], lpips: Sequence[float | None], fid: float = 5.0) -> dict[str, Any]:
    return {"name": name, "rows": rows(psnr, lpips), "distribution": {"fid": fid}}


def rd(codecs: dict[str, dict[int, Sequence[float]]], ceiling: Sequence[float]) -> dict[str, Any]:
    entries = []
    for name, points in codecs.items():
        every = [row for q, psnr in points.items() for row in rows(psnr, LPIPS, quality=q, bpp=q / 100)]
        entries.append({"name": name, "rows": every, "ceiling_rows": rows(ceiling, LPIPS) if name == "ours" else []})
    return {**recon(), "kind": "rd", "codecs": entries}


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, list[str]]]:
    """Write results, compare them, return exit code, the comparison (None if refused) and the lines on stderr."""

    def run(*results: Any) -> tuple[int, Any, list[str]]:
        paths = [tmp_path / f"{'abc'[index]}.json" for index in range(len(results))]
        for path, result in zip(paths, results, strict=True):
            path.write_text(result if isinstance(result, str) else json.dumps(result))
        code = main(["compare", *map(str, paths), "--json"])
        out, err = capsys.readouterr()
        err = err.replace(f"{tmp_path}/", "")
        return code, json.loads(out) if out else None, err.splitlines()

    return run


def test_differences_are_paired_image_by_image(compare: Callable[..., Any]) -> None:
    better = recon(model("small", [value + 1 for value in PSNR], [value - 0.1 for value in LPIPS], fid=4.5))
    code, found, _ = compare(recon(), better)
    assert code == 0
    (comparison,) = found["comparisons"]
    psnr, lpips, fid = comparison["rows"]
    assert (psnr["metric"], psnr["a"], psnr["b"], psnr["n_images"]) == ("psnr", 28.75, 29.75, 4)
    # Values spread over 20 dB, their differences not at all: only a paired interval is a point.
    assert psnr["difference"] == pytest.approx(1)
    assert psnr["interval"] == pytest.approx([1, 1])
    assert psnr["beyond"]
    assert psnr["better"] == "b"
    assert lpips["difference"] == pytest.approx(-0.1)
    assert lpips["better"] == "b"  # lower is better
    assert (fid["metric"], fid["difference"], fid["interval"], fid["beyond"]) == ("fid", -0.5, None, None)

    _, found, _ = compare(better, recon())
    assert [row["better"] for row in found["comparisons"][0]["rows"]] == ["a", "a", None]


def test_the_interval_is_that_of_scipy(compare: Callable[..., Any]) -> None:
    change = [0.5, -0.2, 1.5, 0.1]
    _, found, _ = compare(recon(), recon(model("small", np.add(PSNR, change).tolist(), LPIPS)))
    psnr, lpips, _ = found["comparisons"][0]["rows"]
    reference = stats.bootstrap(
        (change,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    )
    assert psnr["interval"] == pytest.approx(list(reference.confidence_interval), abs=0.03)
    assert psnr["interval"][0] < 0 < psnr["interval"][1]
    assert (psnr["beyond"], psnr["better"]) == (False, None)
    assert (lpips["difference"], lpips["beyond"], lpips["better"]) == (0, False, None)


def test_an_image_without_a_value_in_one_result_is_left_out_of_both(compare: Callable[..., Any]) -> None:
    _, found, _ = compare(recon(), recon(model("small", [None, 31, 41, 26], [None] * 4)))
    psnr, fid = found["comparisons"][0]["rows"]
    assert (psnr["n_images"], psnr["a"], psnr["b"], psnr["difference"]) == (3, 95 / 3, 98 / 3, 1)
    assert fid["metric"] == "fid"


def test_one_image_has_no_interval(compare: Callable[..., Any]) -> None:
    _, found, _ = compare(recon(), recon(model("small", [21, None, None, None], LPIPS)))
    psnr = found["comparisons"][0]["rows"][0]
    assert (psnr["difference"], psnr["interval"], psnr["beyond"], psnr["better"]) == (1, None, None, None)


def test_images_are_paired_by_pixels_where_folders_were_named_otherwise(compare: Callable[..., Any]) -> None:
    other = recon(model("small", [value + 1 for value in PSNR], LPIPS))
    other["dataset"]["names"] = [f"sub/{name}" for name in NAMES]
    for row in other["models"][0]["rows"]:
        row["image"] = f"sub/{row['image']}"
    other["models"][0]["rows"].reverse()
    code, found, _ = compare(recon(), other)
    assert code == 0
    assert found["comparisons"][0]["rows"][0]["interval"] == pytest.approx([1, 1])


def test_models_of_one_name_are_compared_else_each_with_each(compare: Callable[..., Any]) -> None:
    def names(a: dict[str, Any], b: dict[str, Any]) -> set[tuple[str, str]]:
        _, found, _ = compare(a, b)
        return {(row["a_name"], row["b_name"]) for row in found["comparisons"][0]["rows"]}

    one, two, three = (model(name, PSNR, LPIPS) for name in ("one", "two", "three"))
    assert names(recon(one, two), recon(two, three)) == {("two", "two")}
    assert names(recon(one, two), recon(three)) == {("one", "three"), ("two", "three")}


def test_rd_at_equal_quality_and_ceilings(compare: Callable[..., Any]) -> None:
    higher = [value + 2 for value in PSNR]
    a = rd({"ours": {10: PSNR, 50: PSNR}, "jpeg": {5: PSNR}}, PSNR)
    b = rd({"ours": {50: higher, 90: higher}, "webp": {5: PSNR}}, higher)
    code, found, _ = compare(a, b)
    assert code == 0
    about = [
        (row["a_name"], row["quality"], row["metric"], row["difference"]) for row in found["comparisons"][0]["rows"]
    ]
    assert about == [
        ("ours", 50, "bpp", 0),
        ("ours", 50, "psnr", 2),
        ("ours", 50, "lpips_alex", 0),
        ("ours", "ceiling", "psnr", 2),
        ("ours", "ceiling", "lpips_alex", 0),
    ]
    assert found["comparisons"][0]["alone_a"] == ["ours at 10", "jpeg at 5"]
    assert found["comparisons"][0]["alone_b"] == ["ours at 90", "webp at 5"]
    code, _, lines = compare(a, rd({"avif": {10: PSNR}}, PSNR))
    assert code == 2
    assert lines == ["error: no codec of one name and quality in both: ours, jpeg against avif"]


def test_other_versions_and_number_types_are_said(compare: Callable[..., Any]) -> None:
    a, b = (
        recon({**model("small", PSNR, LPIPS), "description": {"dtype": dtype}})
        | {"versions": {"lpips": version, "rich": version}}
        for dtype, version in (("float32", "0.1.4"), ("bfloat16", "0.1.5"))
    )
    code, found, _ = compare(a, b)
    assert code == 0
    assert found["comparisons"][0]["notes"] == [
        "version of lpips: '0.1.4' against '0.1.5'",
        "small computes in: 'float32' against 'bfloat16'",
    ]
    assert compare(a, a)[1]["comparisons"][0]["notes"] == []


def test_a_metric_of_one_result_only_is_named_and_left_out(compare: Callable[..., Any]) -> None:
    other = recon()
    del other["protocol"]["metrics"]["lpips_alex"]
    del other["weights"]["lpips_alex"]
    other["protocol"]["metrics"]["dists"] = "d"
    code, found, _ = compare(recon(), other)
    assert code == 0
    (comparison,) = found["comparisons"]
    assert [row["metric"] for row in comparison["rows"]] == ["psnr", "fid"]
    assert (comparison["only_a"], comparison["only_b"]) == (["lpips_alex"], ["dists"])


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "protocol": (
        lambda r: r["protocol"].update(name="folder-512", posterior="sample: seed 3"),
        [
            "protocol.name: 'folder-256' against 'folder-512'",
            "protocol.posterior: 'mode' against 'sample: seed 3'",
        ],
    ),
    "a metric's settings": (
        lambda r: r["protocol"]["metrics"].update(psnr="of luma"),
        ["protocol.metrics.psnr: 'p' against 'of luma'"],
    ),
    "no metric": (lambda r: r["protocol"].update(metrics={"flip": "f"}), ["protocol.metrics: none in both"]),
    "weights": (
        lambda r: r["weights"]["lpips_alex"].update(sha256="3" * 64),
        [f"weights.lpips_alex.sha256: '{'2' * 64}' against '{'3' * 64}'"],
    ),
    "other images": (
        lambda r: r["dataset"].update(names=["a.png", "z.png"], sha256="4" * 64),
        [
            "dataset: 4 images against 2, 1 of the same name; only in the first: b.png, c.png, d.png; "
            "only in the second: z.png"
        ],
    ),
    "other pixels": (
        lambda r: r["dataset"].update(sha256="4" * 64),
        ["dataset: 4 images of the same names with other pixels, or in another order"],
    ),
    "another hash": (
        lambda r: r["dataset"].update(sha256_of="files"),
        ["dataset: hash of 'pixels' against hash of 'files'"],
    ),
    "all at once": (
        lambda r: (r["protocol"].update(name="kodak"), r["dataset"].update(sha256="4" * 64)),
        [
            "protocol.name: 'folder-256' against 'kodak'",
            "dataset: 4 images of the same names with other pixels, or in another order",
        ],
    ),
    "another command": (
        lambda r: r.update(kind="rd", codecs=[]),
        ["kind: 'recon' against 'rd'"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refusals_say_why_one_line_each(compare: Callable[..., Any], change: str) -> None:
    edit, expected = CHANGES[change]
    other = copy.deepcopy(recon())
    edit(other)
    code, found, lines = compare(recon(), other)
    assert (code, found) == (2, None)
    assert lines == [f"error: a.json against b.json: {line}" for line in expected]


def test_of_several_results_each_is_held_against_the_first(compare: Callable[..., Any]) -> None:
    better, best = (recon(model("small", [value + n for value in PSNR], LPIPS)) for n in (1, 2))
    code, found, _ = compare(recon(), better, best)
    assert code == 0
    assert [entry["rows"][0]["difference"] for entry in found["comparisons"]] == [1, 2]
    best["dataset"]["sha256"] = "5" * 64
    code, found, lines = compare(recon(), better, best)  # nothing is printed of the pair that would do
    assert (code, found, len(lines)) == (2, None, 1)
    assert lines[0].startswith("error: a.json against c.json: dataset: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "b.json: cannot be read as a result"),
        ("[1]", "b.json: not a result of codec-eval: expected a JSON object, got list"),
        ("{}", "b.json: not a result of codec-eval: it does not say of which kind it is"),
        ('{"kind": "lint"}', "b.json: a result of codec-eval lint; compare takes those of rd and recon"),
        ('{"kind": "recon"}', "b.json: a damaged result: its protocol, dataset or models are not as expected"),
        (json.dumps({**recon(), "models": [{"name": "x", "rows": [{}]}]}), "b.json: a damaged result"),
        (json.dumps({**recon(), "protocol": {}}), "b.json: a damaged result"),
        (json.dumps({**recon(), "dataset": {"names": NAMES}}), "b.json: a damaged result"),  # of whichever pixels
    ],
)
def test_what_is_no_result_is_refused(compare: Callable[..., Any], content: str, message: str) -> None:
    code, _, lines = compare(recon(), content)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]


def test_missing_file_and_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(recon()))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read as a result" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a.json")]) == 2
    assert "expected at least two results, got 1" in capsys.readouterr().err


def test_the_table_says_what_lies_beyond_the_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = recon(
        model("small", [value + 1 for value in PSNR], np.add(LPIPS, [0.1, -0.1, 0.1, -0.1]).tolist(), 4.5),
        model("large", PSNR, LPIPS),
    )
    for name, result in (("a", recon()), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line(metric: str) -> str:
        return next(line for line in lines if f" {metric} " in line)

    assert "+1 .. +1" in line("psnr")
    assert "B better" in line("psnr")
    assert "within the interval" in line("lpips_alex")
    assert "-0.5" in line("fid")
    assert "no interval" in line("fid")
    assert "only in B, with nothing to compare it with: large" in lines
    assert "note: of 4 images such an interval is narrower than it says: its verdicts are hints" in lines


def test_bd_rates_are_printed_with_their_overlap_or_the_reason_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, low: float, lpips: list[float]) -> str:
        result = rd({"ours": {10: PSNR}}, PSNR)
        points = zip([0.1, 0.2, 0.4, 0.8], [low, low + 3, low + 6, low + 9], lpips, strict=True)
        keys = ("bpp", "psnr", "lpips_alex")
        result["codecs"][0]["points"] = [dict(zip(keys, point, strict=True)) for point in points]
        (tmp_path / name).write_text(json.dumps(result))
        return str(tmp_path / name)

    paths = [write("a.json", 26.0, [0.4, 0.3, 0.2, 0.1]), write("b.json", 32.0, [0.4, 0.3, 0.35, 0.1])]
    assert main(["compare", *paths]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BD-rate of B against A, ours")]
    assert lines == [
        "BD-rate of B against A, ours, psnr: -75.00 % (overlap of the curves 20 %; says little)",
        "BD-rate of B against A, ours, lpips_alex: none (the metric is no better at 0.400 than at 0.200 bpp)",
    ]


def test_rd_curves_of_a_codec_that_both_have(compare: Callable[..., Any]) -> None:
    """The same metric at 20 % fewer bits everywhere is a BD-rate of -20 %."""

    def curves(scale: float) -> dict[str, Any]:
        result = rd({"ours": {10: PSNR, 50: PSNR}, "jpeg": {5: PSNR}}, PSNR)
        points = zip([0.1, 0.2, 0.4, 0.8], [26.0, 29.0, 32.0, 35.0], strict=True)
        result["codecs"][0]["points"] = [{"bpp": scale * bpp, "psnr": value} for bpp, value in points]
        return result

    code, found, _ = compare(curves(1.0), curves(0.8))
    assert code == 0
    bd = {row["metric"]: row for row in found["comparisons"][0]["bd"]}
    assert bd["psnr"]["codec"] == "ours"
    assert bd["psnr"]["bd_rate_percent"] == pytest.approx(-20, abs=1e-6)
    assert bd["psnr"]["overlap"] == 1
    assert bd["lpips_alex"]["bd_rate_percent"] is None  # the points have none
    assert {row["codec"] for row in bd.values()} == {"ours"}
