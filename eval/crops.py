"""Which part of a large image to show. Must not import torch."""

import numpy as np


def busiest(x: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Return top and left of the crop with the most detail (mean absolute gradient), on a grid of 16 pixels."""
    gray = x.mean(2)
    detail = np.zeros(gray.shape)
    detail[1:] += np.abs(np.diff(gray, axis=0))
    detail[:, 1:] += np.abs(np.diff(gray, axis=1))
    total = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # total[i, j] sums detail[:i, :j]
    tops = np.unique([*range(0, x.shape[0] - height + 1, 16), x.shape[0] - height])
    lefts = np.unique([*range(0, x.shape[1] - width + 1, 16), x.shape[1] - width])
    sums = total[np.ix_(tops + height, lefts + width)] - total[np.ix_(tops, lefts + width)]
    sums += total[np.ix_(tops, lefts)] - total[np.ix_(tops + height, lefts)]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(tops[row]), int(lefts[column])
