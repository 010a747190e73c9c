"""The identity control: a PNG round trip in a codec's place must measure as perfect, or nothing here can be trusted."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from codec.errors import UsageError

TOLERANCE = 1e-4
PERFECT = {"psnr": math.inf, "ssim": 1.0, "ms_ssim": 1.0, "ssimulacra2": 100.0}
"""Metric -> its value for two equal images; 0 for those that are not here, which are distances."""


def check(values: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Check what a PNG round trip measured.

    Args:
        values: metric -> one value per image; None where it is not defined.

    Returns:
        {"method", "n_images", "passed", "measured"} for the record.

    Raises:
        UsageError: a value is not that of equal images.
    """
    wrong, measured = [], {}
    for key, found in values.items():
        perfect = PERFECT.get(key, 0.0)
        numbers = [value for value in found if value is not None]
        off = [value for value in numbers if value != perfect and not abs(value - perfect) <= TOLERANCE]
        if off:
            wrong.append(f"{key} {off[0]:.6g}, expected {'infinite' if math.isinf(perfect) else f'{perfect:g}'}")
        elif numbers:
            measured[key] = "infinite" if math.isinf(numbers[0]) else statistics.fmean(numbers)
    if wrong:
        raise UsageError(f"the identity control failed, nothing was measured: a PNG round trip gave {'; '.join(wrong)}")
    return {
        "method": "PNG round trip in a codec's place, same code path",
        "n_images": max(map(len, values.values()), default=0),
        "passed": True,
        "measured": measured,
    }
