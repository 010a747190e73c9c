"""CPU kernels of `codec.fast`: memory, normalisation and attention for images held as (H, W, C) float32.

Between plain kernels every tensor of a large image travels to memory and back several times, and new memory costs more
than the arithmetic on it (each page is cleared at its first use). So these work on stripes, some rows that stay in the
processor's cache, and in buffers that are used again. No autograd. Imports torch only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

STRIPE_BYTES = 8 << 20
"""Of transformed rows in a stripe: leaves room for what comes of them in a cache of 32 MB."""

KEPT_BYTES = 1 << 30
"""Buffers of more than this are given back to the system after an image."""

Affine = tuple[torch.Tensor, torch.Tensor]
"""Scale and shift, (C,) float32 each: what a normalisation does to a channel."""


class Buffers:
    """Memory that is used again: one flat buffer for each name, as large as the largest tensor that it held."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a contiguous tensor of any content; the one that had this name and dtype before is lost."""
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # else the buffer could be written to in that mode only
                flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype)
        return flat[:size].view(tuple(shape))

    def give_back(self, idle: "list[Buffers]") -> None:
        """Wait in a list for the next image, unless they hold more than `KEPT_BYTES`."""
        if sum(flat.nbytes for flat in self._flat.values()) <= KEPT_BYTES:
            idle.append(self)


class Moments:
    """Mean and variance of every channel of an image, gathered stripe by stripe."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, rows: torch.Tensor) -> None:
        """Count some rows, (h, W, C) float32, contiguous."""
        mean, variance = torch.batch_norm_update_stats(as_image(rows), None, None, 0.0)  # biased, two passes
        self._parts.append((rows.shape[0], mean, variance))

    def affine(self, norm: torch.nn.GroupNorm) -> Affine:
        """Return what GroupNorm does to the rows seen, in float64 from the moments of the stripes on."""
        counts, means, variances = zip(*self._parts, strict=True)
        share = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
        mean = torch.stack(means).double()  # (stripes, C)
        square = ((torch.stack(variances).double() + mean**2) * share).sum(0).view(norm.num_groups, -1).mean(1)
        mean = (mean * share).sum(0).view(norm.num_groups, -1).mean(1)
        deviation = (square - mean**2).clamp_min(0.0).add(norm.eps).sqrt()
        per_group = norm.num_channels // norm.num_groups
        scale = norm.weight.double() / deviation.repeat_interleave(per_group)
        shift = norm.bias.double() - mean.repeat_interleave(per_group) * scale
        return scale.float(), shift.float()


def moments(x: torch.Tensor) -> Moments:
    """Return the moments of (H, W, C) float32."""
    found = Moments()
    step = max(1, STRIPE_BYTES // x[0].nbytes)
    for row in range(0, x.shape[0], step):
        found.add(x[row : row + step])
    return found


def as_image(rows: torch.Tensor) -> torch.Tensor:
    """View (h, W, C) as what torch's convolutions take, (1, C, h, W), channels last."""
    return rows.permute(2, 0, 1)[None]


def as_rows(image: torch.Tensor) -> torch.Tensor:
    """View (1, C, h, W) as (h, W, C); `as_image` backwards."""
    return image[0].permute(1, 2, 0)


def load(source: torch.Tensor, first: int, out: torch.Tensor, affine: Affine | None) -> None:
    """Copy rows of an image into a stripe; rows outside the image are zero, after normalisation and SiLU.

    Args:
        source: (H, W, C) float32.
        first: row of the image that becomes the stripe's row 0; may be negative.
        out: (h, W, C) float32.
        affine: of the GroupNorm before the SiLU; None = neither.
    """
    begin, end = max(first, 0), min(first + out.shape[0], source.shape[0])
    out[: begin - first].zero_()
    out[end - first :].zero_()
    inside = out[begin - first : end - first]
    if affine is None:
        inside.copy_(source[begin:end])
        return
    torch.addcmul(affine[1], source[begin:end], affine[0], out=inside)
    functional.silu(inside, inplace=True)


def packed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a convolution's weight as `convolve` wants it: in dtype, in oneDNN's own order where that can be had.

    Otherwise oneDNN puts the weights in order in each call, a tenth of the time with the few rows of a stripe. torch
    has the two operations for its compiler's use; where one is missing, weights stay plain.
    """
    weight = weight.to(dtype)
    if _HAS_PACKED:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        sizes = [1, weight.shape[1], 8, 256]  # only a hint: others give right results too
        blocks: torch.Tensor = reorder(weight.contiguous().to_mkldnn(), 0, 1, 1, 1, sizes)
        return blocks
    return weight.contiguous(memory_format=torch.channels_last)


def convolve(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Convolve (1, Cin, h, w), channels last, with weights of `packed`; zeros around it."""
    if weight.is_mkldnn:
        strides = [stride, stride]
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            image, weight, bias, padding, strides, [1, 1], 1, "none", [], ""
        )
        return y
    return functional.conv2d(image, weight, bias, stride, padding)


_HAS_PACKED = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)


def stripe_of(buffers: Buffers, source: torch.Tensor, first: int, n_rows: int, affine: Affine | None) -> torch.Tensor:
    """Return rows of an image as `load` gives them; without copying where nothing changes."""
    if affine is None and first >= 0 and first + n_rows <= source.shape[0]:
        return source[first : first + n_rows]
    stripe = buffers.take("stripe", (n_rows, *source.shape[1:]))
    load(source, first, stripe, affine)
    return stripe


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply (n, Cin) by (Cout, Cin): oneDNN's convolution, twice as fast as MKL's product on some processors."""
    y = functional.conv2d(as_image(x[None]), weight[:, :, None, None], bias)
    return as_rows(y)[0]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(C)) v of one head, 256 queries at a time.

    Args:
        q: (n, C) float32.
        k: (n, C) float32.
        v: (n, C) float32.
        dtype: of the second product; the scores are always float32, since rounding them costs the most.

    Returns:
        (n, C) float32.
    """
    out = torch.empty(q.shape)
    q, k = q * q.shape[1] ** -0.5, k.contiguous()
    v = v.to(dtype) if dtype != torch.float32 else v.t().contiguous()
    for row in range(0, q.shape[0], 256):
        share = torch.softmax(pointwise(q[row : row + 256], k), -1)
        out[row : row + 256] = pointwise(share, v) if dtype == torch.float32 else torch.mm(share.to(dtype), v)
    return out
