"""The reports of `codec-eval rd` and `recon`: a result and the codecs that made it -> pictures -> report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codec import images
from codec.console import progress, stderr
from codec.files import Source
from eval.metrics import KNOWN, Metrics
from eval.protocol import Protocol
from eval.report import write
from eval.report_pictures import Shown, choose, encode, numbers, of_pairs, worst

if TYPE_CHECKING:
    from eval.rd import RateDistortion
    from eval.recon import Reconstructor

N_IMAGES = 12
_CAPTIONED = ("psnr", "ms_ssim")  # quick ones; every image's other numbers are in the JSON


def of_rd(
    result: Mapping[str, Any], sources: Sequence[Source], how: "RateDistortion", bpp: float, n: int, path: Path
) -> None:
    """Write the report of rd.json.

    Args:
        result: the content of rd.json.
        sources: the images that were measured, in the order of result["dataset"]["names"].
        how: what was measured.
        bpp: rate of the pictures, in bits per pixel.
        n: images shown at most: the worst ten of the first codec, then others; 0 = none.
        path: of the page.
    """
    by_name = dict(zip(result["dataset"]["names"], sources, strict=True))
    found = worst(result["codecs"][0], bpp)
    shown = encode(
        choose(list(by_name), found, n),
        lambda name: how.protocol.prepare(images.load(by_name[name].path)),
        how.models,
        how.baselines,
        bpp,
        Metrics(metrics=[KNOWN[key] for key in _CAPTIONED]),
    )
    note = (
        f"Each image at equal file size: the first codec near {bpp:g} bits per pixel, the others as near to its bytes "
        "as they come. Stored without loss; the numbers are of the whole images."
    )
    write(result, shown, path, worst=found, note=note)


def of_recon(
    result: Mapping[str, Any],
    sources: Sequence[Source],
    models: "Sequence[Reconstructor]",
    protocol: Protocol,
    n: int,
    path: Path,
) -> None:
    """Write the report of recon.json; see `of_rd`."""
    by_name = dict(zip(result["dataset"]["names"], sources, strict=True))
    first = result["models"][0]
    found = worst({"label": first["name"], "points": [], "rows": first["rows"]})
    rows = {(model["name"], row["image"]): row for model in result["models"] for row in model["rows"]}
    shown: list[Shown] = []
    with progress(disable=not stderr.is_terminal) as bar:
        for name, why in bar.track(choose(list(by_name), found, n).items(), description="pictures"):
            x = protocol.prepare(images.load(by_name[name].path))
            pairs = [(model.name, numbers(rows[model.name, name]), model(name, x).x_hat) for model in models]
            shown.append(of_pairs(name, why, x, pairs))
    note = "What each model makes of the prepared image; stored without loss, the numbers are of the whole image."
    write(result, shown, path, worst=found, note=note)
