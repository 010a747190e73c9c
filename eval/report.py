"""One self-contained HTML file about a result: plots, tables, pictures to compare, and how all was measured.

    result (rd.json, recon.json), Shown pictures -> tables, SVG plots, lossless WebP -> report.html

Entry: `write`. The page needs no network and is the same on a phone, a screen and paper, see report.html and report.js.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codec.files import write_atomic
from eval import report_pages, report_plots, report_tables
from eval.report_pictures import Shown, Worst

MAX_BYTES = 18_000_000  # of the pictures in a page, as base64
_TITLES = {"rd": "Rate-distortion", "recon": "Reconstruction"}
_APART = (  # shown elsewhere on the page
    *("kind", "command", "versions", "protocol", "protocol_hash", "dataset"),
    *("codecs", "models", "failed", "comparisons"),
)


def write(
    result: Mapping[str, Any],
    shown: Sequence[Shown],
    path: Path,
    *,
    worst: Worst | None = None,
    note: str = "",
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write the page, atomically.

    Args:
        result: the content of rd.json or recon.json.
        shown: the pictures, see `eval.report_pictures`; none = a page without.
        path: of the page.
        worst: the images for the table of the worst; None = no such table.
        note: a sentence above the pictures: how these were made.
        max_bytes: of all pictures together; they are cut out around their busiest place until they fit.
    """
    kind = _TITLES.get(str(result.get("kind", "rd")), "Result")
    dataset = result["dataset"]
    n_images = dataset["n_images"]
    places = {image.name: index for index, image in enumerate(shown)}
    gallery = _gallery(shown, max_bytes)
    page = report_pages.render(
        "report",
        title=f"{kind}: {dataset['name']}",
        lead=f"{n_images} image{'' if n_images == 1 else 's'}, protocol {result['protocol']['name']} "
        f"{result['protocol_hash']}",
        failed=result["failed"],
        plots=report_plots.plots(result),
        shown=gallery,
        pictures_note=note or "Stored without loss; the numbers are of the whole images.",
        index=[
            {
                "name": image["name"],
                "why": "; ".join(filter(None, (image["why"], image["crop"]))),
                "variants": [{key: item[key] for key in ("label", "caption", "id")} for item in image["variants"]],
            }
            for image in gallery
        ],
        tables=report_tables.tables(result, worst, places),
        about=list(_about(result)),
    )
    write_atomic(path, page)


def _gallery(shown: Sequence[Shown], max_bytes: int) -> list[dict[str, Any]]:
    """Return what the template shows of each image, pictures encoded."""
    files, boxes = report_pages.fit([[variant.pixels for variant in image.variants] for image in shown], max_bytes)
    gallery = []
    for index, (image, group, box) in enumerate(zip(shown, files, boxes, strict=True)):
        _, _, width, height = box
        whole = (width, height) == image.size
        gallery.append(
            {
                "name": image.name,
                "why": image.why,
                "crop": "" if whole else f"{width} x {height} of {image.size[0]} x {image.size[1]} pixels are shown",
                "width": width,
                "height": height,
                "variants": [
                    {
                        "label": variant.label,
                        "caption": variant.caption,
                        "id": f"picture-{index}-{number}",
                        "uri": report_pages.data_uri(file),
                    }
                    for number, (variant, file) in enumerate(zip(image.variants, group, strict=True))
                ],
            }
        )
    return gallery


def _about(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield terms and texts: command, data, protocol, what made the numbers."""
    yield "command", str(result.get("command") or "not known")
    dataset = result["dataset"]
    yield "images", f"{dataset['n_images']} of {dataset['name']}, SHA-256 {dataset['sha256']} ({dataset['sha256_of']})"
    yield "protocol hash", result["protocol_hash"]
    yield from _flat("protocol", result["protocol"])
    for entry in [*result.get("codecs", ()), *result.get("models", ())]:
        name = entry.get("label", entry["name"])
        if entry.get("flags"):
            yield name, entry["flags"]
        yield from _flat(name, entry.get("description") or {})
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items() if version),
    )
    for key, value in result.items():
        if key not in _APART:
            yield from _flat(key, value)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested values, each with its path; None says nothing."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}: {key}", item)
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value))
    elif value is not None:
        yield prefix, str(value)
