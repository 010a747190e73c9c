"""Convolutional networks computed in stripes of rows: bounded memory, the same numbers. Imports torch, not diffusers.

    rows -> Convolution.stream -> rows -> FeatureMap (kept whole, in bands) -> rows -> ...

A stream is an iterator over pieces (1, C, r, W) of one feature map from its top row to its last; their heights differ.
A convolution keeps the few rows that its kernel shares with the next piece, so nothing is computed twice, and tiled
equals untiled up to the order of additions. Pieces are in channels_last layout, where rows are contiguous in memory.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from codec.errors import NonFiniteError

Rows = Iterator[torch.Tensor]
"""Pieces (1, C, r, W) of a feature map, from its top row to its last."""

KL_STRIPE_BYTES = 16 * 2**20
TINY_STRIPE_BYTES = 8 * 2**20
"""Of the widest maps' pieces. All layers of an `AutoencoderTiny` hold some at once, one layer of an `AutoencoderKL`."""

BAND_BYTES = 40 * 2**20
"""Of what a kept map is freed in. Above 32 MiB glibc gives freed memory back at once, whatever lies around it."""

MOST_POSITIONS = 2**16
"""Pixels whose statistics are summed in float32 before they are joined in float64."""


@dataclass(frozen=True)
class Stripes:
    """How much of a feature map is worked on at once, and in which numbers.

    Attributes:
        dtype: of the feature maps and of the products; see `exact`.
        size_bytes: of a piece of the map, about; a piece has at least one row.
        n_rows: rows of a piece, whatever their size; None: by `size_bytes`. For tests.
    """

    dtype: torch.dtype = torch.float32
    size_bytes: int = KL_STRIPE_BYTES
    n_rows: int | None = None

    def rows(self, row_bytes: int) -> int:
        """Return the rows of a piece of a map whose rows have this size."""
        return self.n_rows or max(1, self.size_bytes // row_bytes)

    @property
    def exact(self) -> "Stripes":
        """The same in float32: for the first and last convolutions, which cost little and whose rounding is seen."""
        return replace(self, dtype=torch.float32)


def split(rows: torch.Tensor, most: int) -> Rows:
    """Cut a piece into pieces of at most `most` rows; they are views of it."""
    for top in range(0, rows.shape[2], most):
        yield rows[:, :, top : top + most]


class Moments:
    """Mean and variance per channel over all positions of a map that comes in pieces."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._means: list[torch.Tensor] = []
        self._variances: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Take in one piece, (1, C, r, W) of any float type, on any device."""
        for part in split(rows, max(1, MOST_POSITIONS // rows.shape[3])):
            mean, variance = _mean_variance(part)
            self._counts.append(part.shape[2] * part.shape[3])
            self._means.append(mean)
            self._variances.append(variance)

    def groups(self, n_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and biased variance of the group that each channel is in, (C) float32 each.

        Raises:
            NonFiniteError: the map holds a value that is not finite.
        """
        # joining parts: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm", eq. 2.1
        device = self._means[0].device
        count = torch.tensor(self._counts, dtype=torch.float64, device=device)
        weight = (count / count.sum())[:, None]
        means, variances = torch.stack(self._means).double(), torch.stack(self._variances).double()
        mean = (weight * means).sum(0)
        variance = (weight * (variances + (means - mean) ** 2)).sum(0)
        mean, variance = mean.view(n_groups, -1), variance.view(n_groups, -1)
        centre = mean.mean(1, keepdim=True)
        spread = (variance + (mean - centre) ** 2).mean(1, keepdim=True)
        if not bool(torch.isfinite(spread).all()):
            raise NonFiniteError("activations overflow inside the network")
        return centre.expand_as(mean).flatten().float(), spread.expand_as(mean).flatten().float()


def _mean_variance(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance per channel, (C) float32."""
    if rows.device.type != "cpu":
        variance, mean = torch.var_mean(rows.float(), dim=(0, 2, 3), correction=0)
        return mean, variance
    scratch = torch.zeros(2, rows.shape[1])  # running statistics, which nobody reads
    # `var_mean` takes 20 to 50 times as long for channels_last
    mean, variance = torch.ops.aten.batch_norm_update_stats(rows, scratch[0], scratch[1], 0.0)
    return mean.float(), variance.float()


class Norm:
    """A GroupNorm whose statistics are known: one factor and one offset per channel."""

    def __init__(self, layer: nn.GroupNorm, moments: Moments) -> None:
        """Raises NonFiniteError when the map that it is for holds a value that is not finite."""
        self._mean, self._variance = moments.groups(layer.num_groups)
        self._weight = layer.weight.float() if layer.weight is not None else None
        self._bias = layer.bias.float() if layer.bias is not None else None
        self._eps = layer.eps

    def apply(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """Write the normalised rows, (1, C, r, W), into a tensor of that shape."""
        rows = rows.to(into.dtype)
        weight, bias, mean, variance = self._weight, self._bias, self._mean, self._variance
        if rows.device.type != "cpu":
            into.copy_(functional.batch_norm(rows, mean, variance, weight, bias, False, 0.0, self._eps))
            return
        nothing = [rows.new_empty(0, dtype=torch.float32) for _ in range(2)]
        torch.ops.aten.native_batch_norm.out(
            rows,
            weight,
            bias,
            mean,
            variance,
            False,
            0.0,
            self._eps,
            out=into,
            save_mean=nothing[0],
            save_invstd=nothing[1],
        )


def activate(rows: torch.Tensor, activation: nn.Module) -> None:
    """Apply an elementwise activation to a tensor in place."""
    if isinstance(activation, nn.SiLU):
        functional.silu(rows, inplace=True)
    elif isinstance(activation, nn.ReLU):
        rows.relu_()
    else:
        rows.copy_(activation(rows))


@dataclass(frozen=True)
class Convolution:
    """A convolution and what stands directly before it.

    Attributes:
        conv: zero padding, no dilation.
        stripes: the size of its pieces.
        norm: applied to the input first; None: nothing.
        activation: elementwise, after `norm`; None: nothing.
        enlarge: each pixel of the input becomes a square of this side, before the convolution.
        pad_end: one row and one column of zeros at the bottom and the right instead of the layer's own padding, as
            diffusers' `Downsample2D` does it.
    """

    conv: nn.Conv2d
    stripes: Stripes
    norm: Norm | None = None
    activation: nn.Module | None = None
    enlarge: int = 1
    pad_end: bool = False

    def stream(self, rows: Rows, height: int) -> Rows:
        """Return the output's pieces, fresh tensors that lag behind the input's pieces; `height`: rows of the input."""
        n_kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        padding = int(self.conv.padding[0])
        above, below = (0, 1) if self.pad_end else (padding, padding)
        enlarge = 1 if self._doubles else self.enlarge
        weight, bias = self._parameters()
        kept: torch.Tensor | None = None  # rows that the next output needs too
        work: torch.Tensor | None = None
        done = 0
        for piece in rows:
            positions = self.enlarge**2 * piece.shape[3]
            channels = max(self.conv.in_channels, self.conv.out_channels)
            most = self.stripes.rows(positions * channels * self.stripes.dtype.itemsize)
            for part in split(piece, most):
                done += part.shape[2]
                n_new = part.shape[2] * enlarge
                n_kept = above if kept is None else kept.shape[2]
                n_work = n_kept + n_new + (below if done == height else 0)
                work = self._workspace(work, part, n_work, part.shape[3] * enlarge)
                if kept is None:
                    work[:, :, :above] = 0
                else:
                    work[:, :, :n_kept] = kept
                self._prepare(part, work[:, :, n_kept : n_kept + n_new])
                work[:, :, n_kept + n_new :] = 0
                n_out = (n_work - n_kernel) // stride + 1
                if n_out > 0:
                    yield self._convolve(work, weight, bias)
                kept = work[:, :, max(n_out, 0) * stride :].clone()

    @property
    def _doubles(self) -> bool:
        """Whether it is computed on the small map: of nine weights, those that see the same pixel are added first."""
        conv = self.conv
        return self.enlarge == 2 and conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.groups == 1

    def _workspace(self, work: torch.Tensor | None, rows: torch.Tensor, n_rows: int, width: int) -> torch.Tensor:
        shape = (1, rows.shape[1], n_rows, width + (1 if self.pad_end else 0))
        if work is None or work.shape != shape:
            work = torch.empty(shape, dtype=self.stripes.dtype, device=rows.device, memory_format=torch.channels_last)
        return work

    def _prepare(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        if self.pad_end:
            into[:, :, :, -1] = 0
            into = into[:, :, :, :-1]
        if self.norm is not None:
            self.norm.apply(rows, into)
        elif self.enlarge > 1 and not self._doubles:
            # (1, C, r, enlarge, W, enlarge); `interpolate` is 7 times slower
            squares = torch.unflatten(torch.unflatten(into, 3, (-1, self.enlarge)), 2, (-1, self.enlarge))
            squares.copy_(rows[:, :, :, None, :, None])
        else:
            into.copy_(rows)
        if self.activation is not None:
            activate(into, self.activation)

    def _parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.conv.weight, self.conv.bias
        if self._doubles:  # (4 * Cout, Cin, 2, 2), one part for each parity of row and column
            weight = torch.cat([_paired(_paired(weight, 2, p), 3, q) for p in (0, 1) for q in (0, 1)])
            bias = None if bias is None else bias.repeat(4)
        dtype = self.stripes.dtype
        return weight.to(dtype, memory_format=torch.channels_last), None if bias is None else bias.to(dtype)

    def _convolve(self, work: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        conv = self.conv
        padding = (0, 0 if self.pad_end else int(conv.padding[1]))
        out = functional.conv2d(work, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
        if not self._doubles:
            return out.contiguous(memory_format=torch.channels_last)
        height, width = work.shape[2] - 2, work.shape[3]
        shape = (1, conv.out_channels, 2 * height, 2 * width)
        doubled = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=torch.channels_last)
        for phase, part in enumerate(out.chunk(4, dim=1)):
            p, q = divmod(phase, 2)
            doubled[:, :, p::2, q::2] = part[:, :, p : p + height, q : q + width]
        return doubled


def _paired(weight: torch.Tensor, dim: int, parity: int) -> torch.Tensor:
    """Add up the weights of a row of three that see the same pixel of a doubled row: (0, 1 + 2) or (0 + 1, 2)."""
    zero, one, two = weight.float().unbind(dim)
    return torch.stack([zero, one + two] if parity == 0 else [zero + one, two], dim)


class FeatureMap:
    """One whole feature map, (1, C, H, W), kept as bands of rows that are freed as they are consumed.

    Attributes:
        height: H.
        moments: its statistics: of all rows when `of` made it, else of those that `add` changed.
    """

    def __init__(self, height: int) -> None:
        """Start empty."""
        self.height = height
        self.moments = Moments()
        self._bands: deque[torch.Tensor] = deque()
        self._left = height  # rows for which there is no band yet
        self._free = 0  # rows at the end of the last band that are not filled

    @classmethod
    def of(cls, rows: Rows, height: int) -> "FeatureMap":
        """Keep a stream of `height` rows, and collect its statistics."""
        kept = cls(height)
        for piece in rows:
            kept.append(piece)
            kept.moments.add(piece)
        return kept

    def append(self, rows: torch.Tensor) -> None:
        """Copy the next rows, without their statistics."""
        while rows.shape[2] > 0:
            if self._free == 0:
                self._free = self._band(rows)
            band = self._bands[-1]
            n_rows = min(self._free, rows.shape[2])
            top = band.shape[2] - self._free
            band[:, :, top : top + n_rows] = rows[:, :, :n_rows]
            self._free -= n_rows
            rows = rows[:, :, n_rows:]

    def _band(self, rows: torch.Tensor) -> int:
        _, channels, _, width = rows.shape
        n_rows = min(self._left, max(1, -(-BAND_BYTES // (channels * width * rows.element_size()))))
        shape = (1, channels, n_rows, width)
        band = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)
        self._bands.append(band)
        self._left -= n_rows
        return n_rows

    def rows(self) -> Rows:
        """Return the pieces; the map stays."""
        yield from self._bands

    def consume(self) -> Rows:
        """Return the pieces and forget them."""
        while self._bands:
            yield self._bands.popleft()

    def add(self, rows: Rows, divisor: float = 1.0) -> None:
        """Add a stream to this map in place, divide by `divisor`, and collect its statistics anew.

        The map may still grow while the stream is drawn, as long as its rows are there before those to be added.
        """
        self.moments = Moments()
        place, offset = 0, 0
        for piece in rows:
            top = 0
            while top < piece.shape[2]:
                band = self._bands[place]
                n_rows = min(piece.shape[2] - top, band.shape[2] - offset)
                part = band[:, :, offset : offset + n_rows]
                part += piece[:, :, top : top + n_rows]
                if divisor != 1.0:
                    part /= divisor
                self.moments.add(part)
                top, offset = top + n_rows, offset + n_rows
                if offset == band.shape[2]:
                    place, offset = place + 1, 0
