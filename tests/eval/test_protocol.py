"""Protocols: what they do to pixels, and when two of them are the same."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec.errors import ImageError, UsageError
from eval import protocol
from eval.metrics import SETTINGS

SIDES = [(256, 256), (256, 300), (300, 256), (341, 511), (512, 512), (513, 700), (1100, 1030), (257, 1600)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def adm(image: np.ndarray, side: int) -> np.ndarray:
    """Center crop of Dhariwal & Nichol 2021, written from its description and not from our code.

    Halve by 2x2 averages while both sides are at least twice the target, then bicubic so that the shorter side is the
    target, then the middle.
    """
    while min(image.shape[:2]) >= 2 * side:
        h, w = image.shape[0] // 2, image.shape[1] // 2
        halves = Image.fromarray(image).resize((w, h), Image.Resampling.BOX)
        image = np.asarray(halves)
    factor = side / min(image.shape[:2])
    width, height = round(image.shape[1] * factor), round(image.shape[0] * factor)
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    y, x = (height - side) // 2, (width - side) // 2
    return image[y : y + side, x : x + side]


@pytest.mark.parametrize("size", [*SIDES, (200, 300), (90, 64)])
def test_imagenet_is_prepared_as_published(size: tuple[int, int]) -> None:
    image = picture(*size)
    prepared = protocol.get("imagenet256-val").prepare(image)
    assert prepared.shape == (256, 256, 3)
    np.testing.assert_array_equal(prepared, adm(image, 256))


def test_halving_by_boxes_is_the_mean_of_four_pixels() -> None:
    """The one step of the published algorithm that can be computed by hand."""
    image = picture(512, 512)
    means = image.reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert (
        np.abs(protocol.get("imagenet256-val").prepare(image) - means).max() <= 1
    )  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("size", SIDES)
def test_folder_is_resized_once_and_cut_from_the_middle(size: tuple[int, int]) -> None:
    image = picture(*size)
    shorter = min(size)
    width, height = (round(side * 256 / shorter) for side in (size[1], size[0]))
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 256) // 2, (width - 256) // 2
    prepared = protocol.get("folder-256").prepare(image)
    np.testing.assert_array_equal(prepared, small[top : top + 256, left : left + 256])


def test_what_has_the_side_already_keeps_its_pixels() -> None:
    image = picture(64, 101)
    for name in ("folder-64", "imagenet256-val"):
        rule = dataclasses.replace(protocol.get(name), side=64)
        np.testing.assert_array_equal(rule.prepare(image), image[:, 18:82])  # (101 - 64) // 2 = 18


def test_whole_images_stay_as_they_are() -> None:
    for image in (picture(33, 70), picture(512, 768)):
        assert protocol.get("folder").prepare(image) is image


@pytest.mark.parametrize("name", ["folder-256", "folder-512", "folder-1024", "folder-300"])
def test_folders_enlarge_nothing(name: str) -> None:
    rule = protocol.get(name)
    with pytest.raises(ImageError, match=f"smaller than the {rule.side} of protocol {name}"):
        rule.prepare(picture(rule.side - 1, rule.side + 20))


def test_named_sets_of_any_size_enlarge_as_published_and_say_so() -> None:
    """Both sets hold images below 256 pixels, and a figure of either is a figure of all its images."""
    for name in ("imagenet256-val", "coco2017-256"):
        assert protocol.get(name).prepare(picture(100, 120)).shape == (256, 256, 3)
        assert protocol.get(name).document("recon", {})["small_images"] == "enlarged"
    assert protocol.get("folder-256").document("recon", {})["small_images"] == "refused"


def test_kodak_takes_its_own_sizes_only() -> None:
    rule = protocol.get("kodak")
    for size in ((512, 768), (768, 512)):
        image = picture(*size)
        assert rule.prepare(image) is image
    with pytest.raises(ImageError, match="500 x 768 pixels, protocol kodak has 768 x 512: use --protocol folder"):
        rule.prepare(picture(768, 500))


@pytest.mark.parametrize(("name", "n_images"), [("kodak", 24), ("imagenet256-val", 50000), ("coco2017-256", 5000)])
def test_named_sets_are_whole(name: str, n_images: int) -> None:
    rule = protocol.get(name)
    rule.check_count(n_images)
    for wrong in (n_images - 1, n_images + 1, 0):
        with pytest.raises(UsageError, match=f"protocol {name} is {n_images} images .* got {wrong}"):
            rule.check_count(wrong)
    protocol.get("folder").check_count(7)


def test_every_setting_that_decides_a_pixel_or_a_number_is_in_the_hash() -> None:
    base = protocol.Protocol(name="p", images="some", side=256, resize="bicubic")
    document = base.document("recon", {"psnr": "a"}, posterior="mode")
    first = protocol.digest(document)
    assert len(first) == 16
    others = [
        dataclasses.replace(base, name="q").document("recon", {"psnr": "a"}, posterior="mode"),
        dataclasses.replace(base, version=2).document("recon", {"psnr": "a"}, posterior="mode"),
        dataclasses.replace(base, side=257).document("recon", {"psnr": "a"}, posterior="mode"),
        dataclasses.replace(base, resize="adm").document("recon", {"psnr": "a"}, posterior="mode"),
        dataclasses.replace(base, resize="none").document("recon", {"psnr": "a"}, posterior="mode"),
        dataclasses.replace(base, enlarge=True).document("recon", {"psnr": "a"}, posterior="mode"),
        base.document("rd", {"psnr": "a"}, posterior="mode"),
        base.document("recon", {"psnr": "b"}, posterior="mode"),
        base.document("recon", {"psnr": "a", "ssim": "a"}, posterior="mode"),
        base.document("recon", {"psnr": "a"}, posterior="sample"),
        base.document("recon", {"psnr": "a"}),
    ]
    hashes = [protocol.digest(other) for other in others]
    assert len({first, *hashes}) == len(others) + 1
    # Neither who describes the images, nor the order in which things are named, decides a number.
    same = dataclasses.replace(base, images="others").document("recon", {"psnr": "a"}, posterior="mode")
    assert protocol.digest(dict(reversed(same.items()))) == first


def test_protocols_differ_from_each_other_and_over_time_stay_the_same() -> None:
    hashes = {name: protocol.digest(rule.document("rd", SETTINGS)) for name, rule in protocol.PROTOCOLS.items()}
    assert len(set(hashes.values())) == len(protocol.PROTOCOLS)
    plain = protocol.get("folder-256").document("rd", {"psnr": "text"}, points="mean")
    assert (
        protocol.digest(plain) == "43b5b7d70550e2e1"
    )  # results already published carry it: raise `version` to change it


def test_differences_name_the_setting_and_both_values() -> None:
    a = protocol.get("folder-256").document("recon", {"psnr": "a", "ssim": "s"}, posterior="mode")
    b = protocol.get("folder-256").document("recon", {"psnr": "b", "ssim": "s"}, posterior="sample")
    assert protocol.differences(a, a) == []
    assert protocol.differences(a, b) == [
        "posterior: 'mode' against 'sample'",
        "metrics.psnr: 'a' against 'b'",
    ]


def test_names() -> None:
    assert protocol.get("folder-384").side == 384
    assert protocol.get("folder-256") == protocol.PROTOCOLS["folder-256"]
    with pytest.raises(UsageError, match=r"unknown 'kodac'.*did you mean kodak"):
        protocol.get("kodac")
    for wrong in ("folder-0", "folder-", "folder-2.5", "folder-1000000"):
        with pytest.raises(UsageError, match="unknown"):
            protocol.get(wrong)


def test_the_list_of_protocols_costs_nothing() -> None:
    code = "import sys, eval.protocol; print([name for name in ('numpy', 'PIL', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr
