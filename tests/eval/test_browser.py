"""The pages in a real headless Chromium, from file://: no errors, nothing fetched, and the controls work."""

import base64
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec import images
from eval import report
from eval.cli import main
from eval.metrics import KNOWN
from eval.report_pictures import Shown, Variant, Worst
from tests.conftest import photo
from tests.eval.test_report import small_result

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium, chromedriver and selenium",
)

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --hide-scrollbars --force-color-profile=srgb"
)
WIDTH, HEIGHT = 96, 64  # of the pictures
ORIGINAL, LEFT, RIGHT = (40, 90, 160), (200, 20, 20), (20, 20, 190)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    downloads = {"download.default_directory": str(tmp_path_factory.mktemp("downloads"))}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    driver.downloads = Path(downloads["download.default_directory"])  # type: ignore[attr-defined]
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two images: plain colours, of which the canvas can be asked; and one name that is a script."""
    plain = [np.full((HEIGHT, WIDTH, 3), colour, np.uint8) for colour in (ORIGINAL, LEFT, RIGHT)]
    plain[1][HEIGHT // 2, WIDTH // 4] = 255  # one white pixel, to see that it stays sharp
    variants = [
        Variant(label, f"caption of {label}", x) for label, x in zip(("original", "ours", "JPEG"), plain, strict=True)
    ]
    other = [Variant(label, "", photo(48, 80, seed)) for seed, label in enumerate(("original", "ours"))]
    name = "<script>document.title='broken in'</script>"
    shown = [Shown("plain.png", "worst", (WIDTH, HEIGHT), variants), Shown(name, "chosen", (80, 48), other)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    rows = [{"image": "plain.png", "quality": 10, "bpp": 0.25, "size_bytes": 192, "psnr": 20.0}]
    found = Worst("a model with a rather long name", 10, KNOWN["psnr"], rows)
    report.write(small_result(), shown, path, worst=found)
    return path


def open_page(browser: Any, path: Path, width: int = 1280, height: int = 900, scale: float = 1) -> None:
    """Open a page; it must log no error and ask for nothing outside."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [request["params"] for request in requests if request["method"] == "Network.requestWillBeSent"]
    asked = [one["request"]["url"] for one in sent if one["documentURL"] == path.as_uri()]  # not the empty tab's
    assert path.as_uri() in asked
    assert all(url == path.as_uri() or url.startswith("data:") for url in asked)
    assert complaints(browser) == []


def complaints(browser: Any) -> list[str]:
    """Return what the console says, except about reading the canvas, which only these tests do again and again."""
    return [line["message"] for line in browser.get_log("browser") if "readback" not in line["message"]]


def wait(condition: Callable[[], Any]) -> Any:
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def ready(browser: Any, key: str) -> None:
    """Wait until the viewer shows image, left, right, mode."""
    wait(lambda: browser.execute_script("return document.getElementById('canvas').dataset.ready") == key)


def pixel(browser: Any, x: float, y: float) -> tuple[int, ...]:
    """Return the colour of the canvas at a place given as shares of its width and height."""
    script = (
        "const c = document.getElementById('canvas');"
        "return [...c.getContext('2d').getImageData(arguments[0] * c.width, arguments[1] * c.height, 1, 1).data]"
    )
    return tuple(browser.execute_script(script, x, y)[:3])


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver.common.by import By

    browser.find_element(By.ID, "canvas").send_keys(keys)


def choose(browser: Any, name: str, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def zoom_of(browser: Any) -> float:
    text = browser.execute_script("return document.getElementById('zoom').value")
    return float(text.removesuffix(" %")) / 100


def test_the_slider_and_the_difference(browser: Any, page: Path) -> None:
    open_page(browser, page)
    ready(browser, "0,0,1,0")
    assert browser.title == "Rate-distortion: set"
    choose(browser, "left", "ours")
    ready(browser, "0,1,1,0")
    choose(browser, "right", "JPEG")
    ready(browser, "0,1,2,0")
    assert pixel(browser, 0.4, 0.3) == LEFT
    assert pixel(browser, 0.6, 0.3) == RIGHT
    browser.execute_script(
        "const s = document.getElementById('split'); s.value = 900; s.dispatchEvent(new Event('input'))"
    )
    assert pixel(browser, 0.6, 0.3) == LEFT
    press(browser, "s")
    ready(browser, "0,2,1,0")
    assert pixel(browser, 0.6, 0.3) == RIGHT
    choose(browser, "mode", "difference × 4")
    ready(browser, "0,2,1,4")
    expected = tuple(min(255, 4 * abs(a - b)) for a, b in zip(LEFT, RIGHT, strict=True))
    assert pixel(browser, 0.3, 0.3) == pixel(browser, 0.7, 0.8) == expected
    assert "caption of JPEG" in browser.find_element("id", "left-caption").text


def test_dragging_zooming_and_sharp_pixels(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    open_page(browser, page)
    ready(browser, "0,0,1,0")
    canvas = browser.find_element("id", "canvas")
    assert pixel(browser, 0.4, 0.3) == ORIGINAL
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(-300, 0).release().perform()
    assert pixel(browser, 0.4, 0.3) == LEFT
    before = zoom_of(browser)
    browser.find_element("id", "in").click()
    assert zoom_of(browser) > before
    browser.find_element("id", "one").click()
    assert zoom_of(browser) == 1
    box = browser.execute_script("const c = document.getElementById('canvas'); return [c.width, c.height]")
    left, top = (box[0] - WIDTH) // 2, (box[1] - HEIGHT) // 2
    at = ((left + WIDTH // 4 + 0.5) / box[0], (top + HEIGHT // 2 + 0.5) / box[1])
    press(browser, "[[[[[[[[[[[")  # all of the right picture
    assert pixel(browser, *at) == (255, 255, 255)
    assert pixel(browser, at[0] - 1 / box[0], at[1]) == pixel(browser, at[0] + 1 / box[0], at[1]) == LEFT
    browser.execute_script(
        "const c = document.getElementById('canvas'), b = c.getBoundingClientRect();"
        "const at = {clientX: b.x + b.width / 2, clientY: b.y + 9};"
        "c.dispatchEvent(new WheelEvent('wheel', {deltaY: -200, cancelable: true, ...at}))"
    )
    assert zoom_of(browser) == 2
    press(browser, "0")
    assert zoom_of(browser) == pytest.approx(before, abs=0.01)
    press(browser, "n")
    ready(browser, "1,0,1,0")
    assert browser.title == "Rate-distortion: set"  # its name is a script, and did not run


def test_two_fingers_zoom(browser: Any, page: Path) -> None:
    open_page(browser, page, 390, 844, 2)
    ready(browser, "0,0,1,0")
    before = zoom_of(browser)
    browser.execute_script(
        """const c = document.getElementById('canvas'), b = c.getBoundingClientRect();
        c.setPointerCapture = () => {};
        const send = (name, id, x) => c.dispatchEvent(new PointerEvent(name,
          {pointerId: id, clientX: b.x + x, clientY: b.y + b.height / 2, bubbles: true}));
        send('pointerdown', 1, 150); send('pointerdown', 2, 200); send('pointermove', 2, 250);
        send('pointerup', 2, 250);
        send('pointerup', 1, 150);"""
    )
    assert zoom_of(browser) == pytest.approx(2 * before, rel=0.02)


@pytest.mark.parametrize("width", [360, 768])
def test_no_sideways_scrolling(browser: Any, page: Path, width: int) -> None:
    open_page(browser, page, width, 800)
    ready(browser, "0,0,1,0")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    labelled = browser.execute_script(
        "return [...document.querySelectorAll('select, input, button, canvas')].filter(e => e.offsetParent).every("
        "e => e.getAttribute('aria-label') || e.textContent.trim() && e.tagName === 'BUTTON' || e.closest('label'))"
    )
    assert labelled


def test_on_paper(browser: Any, page: Path) -> None:
    open_page(browser, page)
    ready(browser, "0,0,1,0")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    seen = browser.execute_script(
        "return ['viewer', 'picture-0-0', 'picture-0-1', 'picture-0-2'].map("
        "id => document.getElementById(id).getClientRects().length > 0)"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert seen == [False, True, True, False]  # a pair in the viewer's place
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page /") + pdf.count(b"/Type /Page>") <= 4


def test_answering_with_keys(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.png").write_bytes(images.save_png(photo(64, 72, seed)))
    command = ["prefer", str(tmp_path / "images"), "--baselines", "jpeg,webp", "--bpp", "2", "--max-difference", "0.2"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    open_page(browser, tmp_path / "out" / "page.html", 1280, 900)
    body = browser.find_element("tag name", "body")
    body.send_keys("2")  # a slip, taken back
    body.send_keys("\ue003")
    browser.find_element("css selector", "[data-choice=a]").click()
    browser.switch_to.active_element.send_keys(" ")  # space shows the next picture, and answers nothing
    assert browser.find_element("id", "where").text.startswith("Pair 2 ")
    browser.switch_to.active_element.send_keys("\ue003")
    for index, pair in enumerate(key["pairs"]):
        assert browser.find_element("id", "where").text == f"Pair {index + 1} of {len(key['pairs'])}"
        for side in ("a", "b"):
            shown = browser.execute_script(f"return document.getElementById('picture-{side}').naturalWidth")
            assert shown == pair["crop"][2]
        right = pair["right"] or ("a" if pair["a"] == "WebP" else "b")
        body.send_keys("1" if right == "a" else "2")
        if index == 1:
            browser.refresh()  # answers are kept
            body = browser.find_element("tag name", "body")
    assert browser.find_element("id", "end").is_displayed()
    browser.find_element("id", "judge").send_keys("a judge")
    browser.find_element("id", "save").click()
    saved = wait(lambda: next(iter(browser.downloads.glob("answers*.json")), None))
    assert main(["prefer", "--score", str(tmp_path / "out"), str(saved)]) == 0
    result = json.loads((tmp_path / "out" / "preferences.json").read_text())
    assert result["preferences"][0]["wins"] == [0, 3]
    assert result["judges"][0]["judge"] == "a judge"
    assert result["judges"][0]["n_controls_right"] == result["judges"][0]["n_controls"] == 2
    assert complaints(browser) == []
