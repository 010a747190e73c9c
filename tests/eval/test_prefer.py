"""`codec-eval prefer` from end to end: blind pairs at equal size, answers scored against known intervals."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codec import images
from eval.cli import main
from eval.prefer_score import interval, sign_test
from tests.conftest import photo

NAMES = ("church.png", "harbour.png", "lion.png", "meadow.png")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of four images in JPEG and WebP, and its key."""
    folder = tmp_path_factory.mktemp("prefer")
    for seed, name in enumerate(NAMES):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(images.save_png(photo(96, 112, seed)))
    assert make(folder / "images", folder / "out") == 0
    return folder / "out"


def make(source: Path, out: Path, *options: str) -> int:
    size = ["--bpp", "2", "--max-difference", "0.1", "--crop", "80", "--controls", "0.5"]
    return main(["prefer", str(source), "--baselines", "jpeg,webp", "-o", str(out), *size, *options])


def key_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "key.json").read_text())
    return found


def answer(out: Path, path: Path, choices: dict[str, str], judge: str = "") -> Path:
    answers = [{"pair": pair, "choice": choice} for pair, choice in choices.items()]
    path.write_text(json.dumps({"page": key_of(out)["page"], "judge": judge, "answers": answers}))
    return path


def choices_for(out: Path, codec: str, right: bool = True) -> dict[str, str]:
    """Answers of a judge who always prefers a codec, and is right about the controls or wrong."""
    found = {}
    for pair in key_of(out)["pairs"]:
        best = pair["right"] if pair["kind"] == "control" else "a" if pair["a"] == codec else "b"
        other = "b" if best == "a" else "a"
        found[pair["pair"]] = best if right or pair["kind"] == "pair" else other
    return found


def pixels(out: Path, pair: str, what: str) -> np.ndarray:
    return np.asarray(Image.open(out / "pairs" / f"{pair}-{what}.png"))


def test_pairs_show_what_the_key_says(page: Path) -> None:
    key = key_of(page)
    pairs = [pair for pair in key["pairs"] if pair["kind"] == "pair"]
    assert sorted(pair["image"] for pair in pairs) == sorted(NAMES)
    for pair in pairs:
        x = images.load(page.parent / "images" / pair["image"])
        left, top, width, height = pair["crop"]
        box = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(pixels(page, pair["pair"], "original"), x[box])
        sizes = {pair["a"]: pair["size_bytes"][0], pair["b"]: pair["size_bytes"][1]}
        assert abs(sizes["JPEG"] - sizes["WebP"]) <= 0.1 * max(sizes.values())
        side = "a" if pair["a"] == "JPEG" else "b"
        file = io.BytesIO()
        flags = {"optimize": True, "progressive": True, "subsampling": "4:2:0"}
        Image.fromarray(x).save(file, "JPEG", quality=pair["qualities"]["ab".index(side)], **flags)
        assert len(file.getvalue()) == sizes["JPEG"]
        assert np.array_equal(pixels(page, pair["pair"], side), np.asarray(Image.open(file))[box])


def test_controls_have_a_right_answer(page: Path) -> None:
    controls = [pair for pair in key_of(page)["pairs"] if pair["kind"] == "control"]
    assert len(controls) == 2
    assert {"(original)", "(spoilt)"} <= {pair[side] for pair in controls for side in "ab"}
    for pair in controls:
        other = "b" if pair["right"] == "a" else "a"
        x = pixels(page, pair["pair"], "original").astype(float)
        right, wrong = (np.mean((pixels(page, pair["pair"], side) - x) ** 2) for side in (pair["right"], other))
        assert wrong > right
        assert (right == 0) == (pair[pair["right"]] == "(original)")


def test_nothing_outside_the_key_names_a_codec_or_an_image(page: Path) -> None:
    key = key_of(page)
    html = (page / "page.html").read_text()
    assert html.count("data:image/webp;base64,") == 3 * len(key["pairs"])
    text = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", html).lower()
    names = "\n".join(path.name for path in (page / "pairs").iterdir()).lower()
    for secret in ("jpeg", "webp", "spoilt", "(original)", "key.json", *NAMES):
        assert secret not in text
        assert secret not in names
        assert secret not in (page / "answers.csv").read_text().lower()
    assert len(list((page / "pairs").iterdir())) == 3 * len(key["pairs"])
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)


def test_the_seed_decides_order_and_sides(page: Path, tmp_path: Path) -> None:
    source = page.parent / "images"
    assert make(source, tmp_path / "same") == 0
    assert (tmp_path / "same" / "page.html").read_bytes() == (page / "page.html").read_bytes()
    orders = []
    for seed in (1, 2):
        assert make(source, tmp_path / "out", f"--seed={seed}") == 0
        key = key_of(tmp_path / "out")
        assert len(list((tmp_path / "out" / "pairs").iterdir())) == 3 * len(key["pairs"])  # of this page alone
        orders.append([(pair["image"], pair["a"]) for pair in key["pairs"] if pair["kind"] == "pair"])
    sides = {first for order in orders for _, first in order}
    assert {"JPEG", "WebP"} <= sides
    assert len({tuple(image for image, _ in order) for order in orders}) > 1


def test_a_planted_preference(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [answer(page, tmp_path / f"{n}.json", choices_for(page, "WebP"), f"judge {n}") for n in range(2)]
    assert main(["prefer", "--score", str(page), *map(str, files), "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "preferences.json").read_text())
    (row,) = result["preferences"]
    assert row["codecs"] == ["JPEG", "WebP"]
    assert (row["wins"], row["ties"], row["n"], row["share"]) == ([0, 8], 0, 8, 0.0)
    # Two judges of the same four images are four trials, not eight: the closed form for no success.
    assert row["n_images"] == 4
    assert row["interval"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 4))]
    assert row["p"] == pytest.approx(2 / 2**4)
    assert [image["image"] for image in row["images"]] == sorted(NAMES)
    assert all(image["wins"] == [0, 2] for image in row["images"])
    assert [judge["n_controls_right"] for judge in result["judges"]] == [2, 2]
    assert not any(judge["flagged"] for judge in result["judges"])
    assert result["page"] in json.dumps(key_of(page)["page"])
    printed = capsys.readouterr().out
    assert "JPEG preferred in 0.0%, interval 0.0% to 60.2%" in printed


def test_ties_count_half(page: Path, tmp_path: Path) -> None:
    choices = choices_for(page, "JPEG")
    for pair in key_of(page)["pairs"]:
        if pair["image"] in NAMES[:2] and pair["kind"] == "pair":
            choices[pair["pair"]] = "0"
    path = answer(page, tmp_path / "a.json", choices)
    assert main(["prefer", "--score", str(page), str(path), "-o", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "preferences.json").read_text())["preferences"]
    assert (row["wins"], row["ties"], row["share"]) == ([2, 0], 2, 0.75)
    assert row["interval"] == list(interval(3, 4))
    assert row["p"] == sign_test(2, 0) == 0.5


def test_no_difference_on_a_control_does_not_count_against_a_judge(page: Path, tmp_path: Path) -> None:
    choices = choices_for(page, "JPEG")
    control = next(pair for pair in key_of(page)["pairs"] if pair["kind"] == "control")
    choices[control["pair"]] = "0"
    assert main(["prefer", "--score", str(page), str(answer(page, tmp_path / "a.json", choices))]) == 0
    (judge,) = json.loads((page / "preferences.json").read_text())["judges"]
    assert (judge["n_controls"], judge["n_controls_right"], judge["flagged"]) == (1, 1, False)


def test_a_judge_who_fails_the_controls(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = answer(page, tmp_path / "good.json", choices_for(page, "JPEG"), "good")
    bad = answer(page, tmp_path / "bad.json", choices_for(page, "WebP", right=False), "bad")
    command = ["prefer", "--score", str(page), str(good), str(bad), "-o", str(tmp_path)]
    assert main(command) == 0
    result = json.loads((tmp_path / "preferences.json").read_text())
    assert [judge["flagged"] for judge in result["judges"]] == [False, True]
    assert result["preferences"][0]["wins"] == [4, 4]
    assert "bad: 6 answers" in (printed := capsys.readouterr().out)
    assert "controls right 0 of 2  FLAGGED" in printed
    assert main([*command, "--drop-flagged"]) == 0
    assert json.loads((tmp_path / "preferences.json").read_text())["preferences"][0]["wins"] == [4, 0]
    assert main(["prefer", "--score", str(page), str(bad), "--drop-flagged"]) == 2


def test_answers_filled_in_by_hand(page: Path, tmp_path: Path) -> None:
    names = {"a": "1", "b": "2"}
    choices = choices_for(page, "JPEG")
    lines = (page / "answers.csv").read_text().splitlines()
    filled = [lines[0], *(line + names[choices[line[:-1]]] for line in lines[1:-1]), lines[-1]]  # the last stays empty
    (tmp_path / "mine.csv").write_text("\n".join(filled))
    assert main(["prefer", "--score", str(page), str(tmp_path / "mine.csv"), "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "preferences.json").read_text())
    assert result["judges"][0]["judge"] == "mine"
    assert (result["judges"][0]["n_answers"], result["judges"][0]["n_unanswered"]) == (5, 1)
    assert result["preferences"][0]["wins"][1] == 0


def test_intervals_against_published_values() -> None:
    # Clopper-Pearson at 95 %, as in the tables of exact binomial limits
    assert interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=5e-5)
    assert interval(10, 20) == pytest.approx((0.2720, 0.7280), abs=5e-5)
    assert interval(0, 10) == (0.0, pytest.approx(0.3085, abs=5e-5))
    assert interval(0, 0) == (0.0, 1.0)
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
    assert sign_test(0, 0) is None


def _spoil(page: Path, answers: Any) -> Any:
    return {"page": key_of(page)["page"], "answers": answers}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no json", "neither JSON nor CSV"),
        ("[1, 2]", "no list of answers"),
        ({"page": "0123456789abcdef", "answers": []}, "answers to page 0123456789abcdef"),
        ([], "no answers"),
        ([{"pair": "FIRST", "choice": "3"}], "choice '3'"),
        ([{"pair": "FIRST"}], "without pair or choice"),
        ([{"pair": "nope-001", "choice": "1"}], "'nope-001' is not on page"),
        ([{"pair": "FIRST", "choice": "1"}] * 2, "answered twice"),
        ("pair,choice\nnope,1\n", "'nope' is not on page"),
        ("pair,choice\nFIRST\n", "expected pair,choice"),
    ],
)
def test_answers_that_cannot_be_counted(
    page: Path, tmp_path: Path, what: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = _spoil(page, what) if isinstance(what, list) else what
    text = content if isinstance(content, str) else json.dumps(content)
    path = tmp_path / "answers.json"
    path.write_text(text.replace("FIRST", key_of(page)["pairs"][0]["pair"]))
    assert main(["prefer", "--score", str(page), str(path), "-o", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert str(path) in printed
    assert not (tmp_path / "preferences.json").exists()


def test_the_same_answers_twice(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = answer(page, tmp_path / "one.json", choices_for(page, "JPEG"))
    copy = tmp_path / "copy.json"
    copy.write_bytes(one.read_bytes())
    assert main(["prefer", "--score", str(page), str(one), str(copy)]) == 2
    assert "the same answers as" in capsys.readouterr().err


def test_usage_errors(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = page.parent / "images", str(tmp_path / "out")
    assert main(["prefer", "--score", str(tmp_path), str(page / "answers.csv")]) == 2
    assert "key.json: no such file" in capsys.readouterr().err
    (tmp_path / "key.json").write_text("{}")
    assert main(["prefer", "--score", str(tmp_path), str(page / "answers.csv")]) == 2
    assert "not the key of a page" in capsys.readouterr().err
    assert main(["prefer", str(source), "--baselines", "jpeg", "-o", out]) == 2
    assert "at least two codecs" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["prefer", str(tmp_path / "empty"), "-o", out]) == 2
    assert "no images found" in capsys.readouterr().err
    assert main(["prefer", str(source)]) == 2
    assert main(["prefer", str(source), "-m", str(tmp_path / "none"), "-o", out]) == 3


def test_unequal_sizes_and_broken_images(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "images"
    source.mkdir()
    Image.new("RGB", (64, 64), (90, 10, 30)).save(source / "flat.png")  # JPEG's least file is far above WebP's
    assert make(source, tmp_path / "out") == 2
    assert "sizes differ" in capsys.readouterr().err
    (source / "fine.png").write_bytes((page.parent / "images" / "lion.png").read_bytes())
    (source / "broken.png").write_bytes(b"no image")
    assert make(source, tmp_path / "out") == 1
    key = key_of(tmp_path / "out")
    assert [item["image"] for item in key["left_out"]] == ["flat.png"]
    assert [item["image"] for item in key["failed"]] == ["broken.png"]
    assert {pair["image"] for pair in key["pairs"] if pair["kind"] == "pair"} == {"fine.png"}
    printed = capsys.readouterr().err
    assert "flat.png: JPEG against WebP left out" in printed
    assert "broken.png" in printed
