"""The report of `codec-eval rd` and `recon`: one safe file that says what the JSON says, with lossless pictures."""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec import images
from eval import report
from eval.cli import main
from eval.report_pictures import Shown, Variant, choose, of_pairs, worst
from tests.conftest import photo
from tests.eval.pages import Page

HOSTILE = "\"><img src=x onerror=alert(1)><script>document.title='broken in'<!-- $a_$.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over three images, one with a hostile name, and a broken file."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "images").mkdir()
    for seed, name in enumerate(("a.png", "b.png", HOSTILE)):
        (folder / "images" / name).write_bytes(images.save_png(photo(64, 72, seed)))
    (folder / "images" / "broken<b>.png").write_bytes(b"no image")
    options = ["--baselines", "jpeg,webp", "--baseline-qualities", "webp=5,50", "--metrics", "psnr,ssim"]
    command = ["rd", str(folder / "images"), *options, "--picture-bpp", "2", "-o", str(folder / "out")]
    assert main(command) == 1
    return folder / "out"


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "rd.json").read_text())
    return found


def small_result(**changes: Any) -> dict[str, Any]:
    point = {"quality": 10, "bpp": 0.25, "psnr": 30.125, "encode_s": 0.5, "decode_s": None}
    codec = {
        "name": "jpeg",
        "label": "JPEG $a_$ <i>",
        "kind": "baseline",
        "points": [point],
        "rows": [],
        "ceiling": None,
    }
    dataset = {"name": "set", "n_images": 1, "names": ["x"], "sha256": "0" * 64, "sha256_of": "pixels"}
    result = {"kind": "rd", "command": "codec-eval rd", "protocol": {"name": "folder"}, "protocol_hash": "abc"}
    return {**result, "dataset": dataset, "codecs": [codec], "failed": [], **changes}


def test_the_page_asks_for_nothing_outside(run: Path) -> None:
    html = (run / "report.html").read_text()
    page = Page(html)
    assert len(page.addresses()) > 10
    assert all(address.startswith(("data:", "#")) for address in page.addresses())
    assert not re.search(r"""(src|href|url|import)\s*[=(]\s*["']?\s*(https?:)?//""", html)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    plots = [a["src"] for tag, a in page.tags if tag == "img" and a.get("class") == "plot"]
    assert len(plots) == 2
    for plot in plots:
        assert b"<svg" in (svg := base64.b64decode(plot.split(",")[1]))
        assert not re.search(rb"href=[\"'](?!#)", svg)


def test_tables_say_what_the_json_says(run: Path) -> None:
    page, result = Page((run / "report.html").read_text()), result_of(run)
    head, *rows = page.tables["Rate and distortion"]
    assert head[:4] == ["codec", "quality", "bpp", "PSNR ↑ [dB]"]
    points = [(codec["label"], point) for codec in result["codecs"] for point in codec["points"]]
    assert len(rows) == len(points) == 7
    for row, (label, point) in zip(rows, points, strict=True):
        low, high = point["intervals"]["psnr"]
        assert row[:2] == [label, str(point["quality"])]
        assert row[3] == f"{point['psnr']:.2f} | {low:.2f} to {high:.2f}"
    bd = result["comparisons"]["metrics"]["psnr"]["bd"]
    (webp,) = [row for row in bd if (row["codec"], row["anchor"]) == ("webp", "jpeg")]
    assert page.tables["BD-rate"][1][:2] == [
        "WebP",
        f"{webp['bd_rate_percent']:+.1f} % | {'little: ' * bool(webp['reason'])}{100 * webp['overlap']:.0f} % shared",
    ]
    for text in (result["protocol_hash"], result["command"], result["hardware"]["cpu"], result["dataset"]["sha256"]):
        assert text in page.text
    assert f"torch {result['versions']['torch']}" in page.text
    assert "3 images" in page.text


def test_the_worst_images_come_first(run: Path) -> None:
    page, result = Page((run / "report.html").read_text()), result_of(run)
    jpeg = result["codecs"][0]
    quality = min(jpeg["points"], key=lambda point: abs(point["bpp"] - 2))["quality"]
    rows = sorted((row for row in jpeg["rows"] if row["quality"] == quality), key=lambda row: row["ssim"])
    head, *table = page.tables[f"The worst 3 images of JPEG at quality {quality}"]
    assert [row[0] for row in table] == [row["image"] for row in rows]
    assert [row[2] for row in table] == [str(row["size_bytes"]) for row in rows]
    assert head[0] == "image"


def test_pictures_are_lossless_and_at_equal_size(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    index = json.loads(re.search(r'id="shown">(.*?)</script>', (run / "report.html").read_text(), re.S).group(1))
    assert {image["name"] for image in index} == {"a.png", "b.png", HOSTILE}
    for image in index:
        x = images.load(run.parent / "images" / image["name"])
        original, jpeg, webp = image["variants"]
        assert np.array_equal(page.picture(original["id"]), x)
        assert [jpeg["label"], webp["label"]] == ["JPEG", "WebP"]
        sizes = [int(re.search(r"(\d+) bytes", item["caption"]).group(1)) for item in (jpeg, webp)]
        assert abs(sizes[0] - sizes[1]) < 0.15 * max(sizes)
        for item in (jpeg, webp):
            mse = np.mean((page.picture(item["id"]).astype(float) - x) ** 2)
            assert f"PSNR {10 * np.log10(255**2 / mse):.2f} dB" in item["caption"]


def test_hostile_names_are_text(run: Path) -> None:
    html = (run / "report.html").read_text()
    page = Page(html)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "<script>document" not in html
    assert "<img src=x" not in html
    assert HOSTILE in page.text
    assert "broken<b>.png" in page.text
    assert "1 image failed" in page.text


def test_no_pictures_and_mathematical_names(tmp_path: Path) -> None:
    report.write(small_result(), [], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables["Rate and distortion"][1] == ["JPEG $a_$ <i>", "10", "0.250", "30.12", "500", "n/a"]
    assert not [tag for tag, _ in page.tags if tag == "canvas"]
    surrogate = small_result(failed=[{"image": "a\udcff.png", "reason": "a\udcff.png: damaged"}])
    report.write(surrogate, [], tmp_path / "report.html")
    assert "a\\udcff.png" in (tmp_path / "report.html").read_text()


def test_the_size_is_bounded_by_a_stated_crop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (200, 300, 3), dtype=np.uint8) for _ in range(4)]
    shown = [
        Shown(str(n), "why", (300, 200), [Variant("original", "", x), Variant("other", "", x ^ 1)])
        for n, x in enumerate(noise)
    ]
    report.write(small_result(), shown, tmp_path / "report.html", max_bytes=400_000)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    uris = [address for address in page.addresses() if address.startswith("data:image/webp")]
    assert 200_000 < sum(map(len, uris)) <= 400_000
    side = page.picture("picture-0-0").shape[0]
    assert f"{side} x {side} of 300 x 200 pixels are shown" in page.text
    assert page.picture("picture-0-0").shape == page.picture("picture-0-1").shape == (side, side, 3)
    assert np.array_equal(page.picture("picture-2-0") ^ 1, page.picture("picture-2-1"))


def test_large_images_are_cut_out_where_there_is_detail() -> None:
    x = np.full((1100, 1500, 3), 90, np.uint8)
    x[900:1000, 1300:1400:2] = 200
    shown = of_pairs("x", "why", x, [("codec", "caption", x ^ 1)])
    assert shown.size == (1500, 1100)
    original, other = (variant.pixels for variant in shown.variants)
    assert original.shape == (1024, 1024, 3)
    assert (original == 200).any()
    assert np.array_equal(original ^ 1, other)


def test_which_images_are_shown() -> None:
    names = [f"{n:02d}" for n in range(30)]
    rows = [
        {"image": name, "quality": q, "psnr": 20 + (7 * n) % 30, "ssim": None}
        for n, name in enumerate(names)
        for q in (1, 2)
    ]
    entry = {"label": "ours", "rows": rows, "points": [{"quality": 1, "bpp": 0.1}, {"quality": 2, "bpp": 0.4}]}
    found = worst(entry, 0.35)
    assert found is not None
    assert (found.quality, found.metric.key) == (2, "psnr")
    assert [row["psnr"] for row in found.rows] == list(range(20, 30))
    chosen = choose(names, found, 14)
    assert list(chosen)[:10] == [row["image"] for row in found.rows]
    assert chosen[found.rows[1]["image"]] == "worst no. 2 of 30 images by PSNR of ours at quality 2"
    others = sorted(map(int, list(chosen)[10:]))
    assert len(others) == 4
    assert min(b - a for a, b in itertools.pairwise(others)) > 3
    assert len(choose(names, found, 3)) == 3
    assert len(choose(names[:2], None, 5)) == 2
    assert worst({"label": "", "rows": [{"image": "a", "psnr": None}], "points": []}) is None
    assert choose(names, found, 0) == {}


def test_recon_has_a_report_too(model_dir: Path, photo_folder: Path, tmp_path: Path) -> None:
    command = ["recon", str(model_dir), "--data", str(photo_folder), "--metrics", "psnr", "--fid-network", "none"]
    assert main([*command, "--protocol", "folder", "--report-images", "2", "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "recon.json").read_text())
    page = Page((tmp_path / "report.html").read_text())
    model = result["models"][0]
    assert page.tables["Reconstruction"][1][1].startswith(f"{model['means']['psnr']:.2f} | ")
    rows = sorted(model["rows"], key=lambda row: row["psnr"])
    assert [row[0] for row in page.tables[f"The worst 3 images of {model['name']}"][1:]] == [
        row["image"] for row in rows
    ]
    x = images.load(photo_folder / rows[0]["image"])
    assert np.array_equal(page.picture("picture-0-0"), x)
    mse = np.mean((page.picture("picture-0-1").astype(float) - x) ** 2)
    assert 10 * np.log10(255**2 / mse) == pytest.approx(rows[0]["psnr"])
