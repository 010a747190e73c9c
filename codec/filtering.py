"""3 x 3 convolutions on a CPU by Winograd's method along the rows, a stripe of rows at a time; for `codec.fast`.

    rows of source -> [scale, shift, SiLU] -> input transform -> n convolutions -> output transform -> rows of dest
     (H, W, C) float32                          along the rows   oneDNN, dtype        [+ dest]          and moments

m rows of output cost m + 2 products in place of 3 m. Activations are float32; only what a convolution reads and gives
is of its dtype. Strides of 2 and few channels are computed directly, in the same stripes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from codec import kernels
from codec.kernels import Affine, Buffers, Moments, as_image, as_rows, convolve, load, packed, stripe_of


@dataclass(frozen=True)
class Filtering:
    """Winograd's F(m, r) along one dimension: m outputs of r taps from n = m + r - 1 inputs by n products.

    y = AT [(G w) * (BT d)] with points 0, a, -a, b, -b, ..., infinity. Lavin & Gray 2015, arXiv:1509.09308, eq. 4; the
    choice of points decides the rounding errors: Barabasz et al. 2018, arXiv:1803.10986.

    Attributes:
        m: outputs of a tile.
        taps: r.
        a: a positive point.
        b: the second one; 0 = none, and n is 4 instead of 6.
    """

    m: int
    taps: int
    a: float
    b: float = 0.0

    @property
    def n(self) -> int:
        """Products of a tile, and its inputs."""
        return self.m + self.taps - 1

    def weights(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return G w: (Cout, Cin, r, s) -> (n, Cout, Cin, 1, s) float64; rows as `outputs` wants them scaled."""
        nodes = [0.0, self.a, -self.a] + ([self.b, -self.b] if self.b else [])
        rows = []
        for node in nodes:
            scale = abs(node) or 1.0  # so that the second output of a tile is a plain sum
            for other in nodes:
                scale /= (node - other) if other != node else 1.0
            rows.append([scale * node**power for power in range(self.taps)])
        rows.append([0.0] * (self.taps - 1) + [1.0])
        g = torch.tensor(rows, dtype=torch.float64)
        return torch.einsum("nr,oirs->nois", g, kernel.double())[:, :, :, None]

    def inputs(self, d: Sequence[torch.Tensor], out: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> None:
        """Write BT d.

        Args:
            d: n tensors of one shape, the k-th inputs of all tiles, float32.
            out: (n, shape), of any float dtype.
            p: scratch of that shape, float32; q too.
        """
        if not self.b:
            torch.sub(d[2], d[0], alpha=self.a**2, out=out[0])
            torch.add(d[2], d[1], alpha=self.a, out=out[1])
            torch.sub(d[2], d[1], alpha=self.a, out=out[2])
            torch.sub(d[3], d[1], alpha=self.a**2, out=out[3])
            return
        a2, b2 = self.a**2, self.b**2
        for first, x, other in ((1, self.a, b2), (3, self.b, a2)):
            torch.sub(d[4], d[2], alpha=other, out=p)
            torch.sub(d[3], d[1], alpha=other, out=q)
            torch.add(p, q, alpha=x, out=out[first])
            torch.sub(p, q, alpha=x, out=out[first + 1])
        torch.sub(d[4], d[2], alpha=a2 + b2, out=p)
        torch.add(p, d[0], alpha=a2 * b2, out=out[0])
        torch.sub(d[5], d[3], alpha=a2 + b2, out=p)
        torch.add(p, d[1], alpha=a2 * b2, out=out[5])

    def bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Return what the n products must get added so that every output gets the bias: (C,) -> (n, C) float64."""
        one = torch.zeros(1, 1, self.taps, 1, dtype=torch.float64)
        one[0, 0, 0] = 1.0  # a filter that repeats its input, and an input of ones
        ones = torch.empty(self.n, 1, dtype=torch.float64)
        self.inputs([torch.ones(1, dtype=torch.float64)] * self.n, ones, ones.new_empty(1), ones.new_empty(1))
        return self.weights(one).view(self.n, 1) * ones * bias.double()


F43 = Filtering(4, 3, 0.5**0.5, 2.0**0.5)  # a * b = 1 keeps both matrices' entries small
F23 = Filtering(2, 3, 1.0)
F32 = Filtering(3, 2, 1.0)


class Convolution:
    """A 3 x 3 convolution from stripe to stripe: stride 1 and padding 1, or stride 2 and padding 1 or 0.

    A stride of 2 without padding stands for diffusers' downsampling, which pads right and bottom alone.

    Attributes:
        dtype: what the products are computed in.
        filtering: along the rows; None = directly. A stride of 2 is always computed directly.
        stride: 1 or 2.
        channels: of the output.
    """

    def __init__(self, layer: torch.nn.Conv2d, dtype: torch.dtype, filtering: Filtering | None = None) -> None:
        weight = layer.weight.detach()
        bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.detach()
        self.dtype, self.stride, self.channels = dtype, int(layer.stride[0]), weight.shape[0]
        self._padding = int(layer.padding[0])
        self.filtering = filtering = filtering if self.stride == 1 else None
        if filtering is None:
            self._weights, self._biases = [packed(weight, dtype)], [bias.to(dtype)]
        else:
            self._weights = [packed(part, dtype) for part in filtering.weights(weight)]
            self._biases = list(filtering.bias(bias).to(dtype))

    def __call__(
        self,
        buffers: Buffers,
        source: torch.Tensor,
        dest: torch.Tensor,
        affine: Affine | None = None,
        *,
        add: bool = False,
        relu: bool = False,
        found: Moments | None = None,
    ) -> None:
        """Compute dest, or add to it.

        Args:
            buffers: memory.
            source: (H, W, Cin) float32, contiguous.
            dest: `size` of source, Cout; float32, contiguous, not source.
            affine: GroupNorm and SiLU before the convolution; None = neither.
            add: add to what is in dest.
            relu: replace what is below zero in dest, at the end.
            found: takes the moments of dest; None = not wanted.
        """
        run = self._direct if self.filtering is None else self._filtered
        m = self.filtering.m if self.filtering else 1
        n = self.filtering.n if self.filtering else 1
        height, width, _ = dest.shape
        row_bytes = 4 * n * width * max(source.shape[2], self.channels)
        tiles = max(1, kernels.STRIPE_BYTES // row_bytes)
        for row in range(0, height, tiles * m):
            rows = dest[row : row + tiles * m]
            run(buffers, source, row, rows, affine, add)
            if relu:
                rows.relu_()
            if found is not None:
                found.add(rows)

    def size(self, source: torch.Tensor) -> tuple[int, int, int]:
        """Return the shape of the output for (H, W, Cin)."""
        height, width, _ = source.shape
        if self.stride == 2:
            height, width = (height + self._padding) // 2, (width + self._padding) // 2
        return height, width, self.channels

    def _direct(
        self, buffers: Buffers, source: torch.Tensor, row: int, out: torch.Tensor, affine: Affine | None, add: bool
    ) -> None:
        _, width, channels = source.shape
        padding = (0, self._padding)
        if self._padding:
            n_rows = self.stride * (out.shape[0] - 1) + 3
            stripe = stripe_of(buffers, source, self.stride * row - 1, n_rows, affine)
        else:
            stripe = buffers.take("stripe", (2 * out.shape[0] + 1, width + 1, channels))
            stripe[:, width:].zero_()
            load(source, 2 * row, stripe[:, :width], affine)
        if self.dtype != torch.float32:
            stripe = buffers.take("stripe", stripe.shape, self.dtype).copy_(stripe)
        y = as_rows(convolve(as_image(stripe), self._weights[0], self._biases[0], self.stride, padding))
        if add:
            out.add_(y)
        else:
            out.copy_(y)

    def _filtered(
        self, buffers: Buffers, source: torch.Tensor, row: int, out: torch.Tensor, affine: Affine | None, add: bool
    ) -> None:
        filtering = self.filtering
        assert filtering is not None
        m, width = filtering.m, source.shape[1]
        tiles = -(-out.shape[0] // m)
        stripe = stripe_of(buffers, source, row - 1, tiles * m + 2, affine)
        products = self._products(buffers, stripe, tiles)
        if out.shape[0] == tiles * m:
            self._outputs(buffers, products, out.view(tiles, m, width, -1), add)
            return
        whole = buffers.take("last tiles", (tiles * m, width, self.channels))
        self._outputs(buffers, products, whole.view(tiles, m, width, -1), False)
        if add:
            out.add_(whole[: out.shape[0]])
        else:
            out.copy_(whole[: out.shape[0]])

    def _products(self, buffers: Buffers, stripe: torch.Tensor, tiles: int) -> list[torch.Tensor]:
        filtering = self.filtering
        assert filtering is not None
        _, width, channels = stripe.shape
        m, n = filtering.m, filtering.n
        shape = (tiles, width, channels)
        d = [stripe[k : k + m * (tiles - 1) + 1 : m] for k in range(n)]
        v = buffers.take("inputs", (n, *shape))
        filtering.inputs(d, v, buffers.take("p", shape), buffers.take("q", shape))
        return _convolved(buffers, v, self._weights, self._biases)

    def _outputs(self, buffers: Buffers, products: list[torch.Tensor], y: torch.Tensor, add: bool) -> None:
        """Write AT M, or add it: y is (tiles, m, W, C) float32."""
        filtering = self.filtering
        assert filtering is not None
        shape = products[0].shape
        s, t, u, v = (buffers.take(name, shape) for name in "stuv")
        torch.add(products[1], products[2], out=s)
        torch.sub(products[1], products[2], out=t)
        a, b = filtering.a, filtering.b
        if not b:
            if add:
                y[:, 0].add_(products[0]).add_(s)
                y[:, 1].add_(t).add_(products[3])
            else:
                torch.add(s, products[0], out=y[:, 0])
                torch.add(t, products[3], out=y[:, 1])
            return
        torch.add(products[3], products[4], out=u)
        torch.sub(products[3], products[4], out=v)
        if add:
            y[:, 0].add_(products[0]).add_(s, alpha=1 / a).add_(u, alpha=1 / b)
            y[:, 1].add_(t).add_(v)
            y[:, 2].add_(s, alpha=a).add_(u, alpha=b)
            y[:, 3].add_(products[5]).add_(t, alpha=a * a).add_(v, alpha=b * b)
        else:
            torch.add(products[0], s, alpha=1 / a, out=y[:, 0]).add_(u, alpha=1 / b)
            torch.add(t, v, out=y[:, 1])
            torch.mul(s, a, out=y[:, 2]).add_(u, alpha=b)
            torch.add(products[5], t, alpha=a * a, out=y[:, 3]).add_(v, alpha=b * b)


class DoublingConvolution:
    """Nearest 2 x enlargement followed by a 3 x 3 convolution with padding 1, computed on the small image.

    Every output pixel sees only 2 x 2 different pixels: for each parity of row and column the nine weights add up to
    four, 2.25 times fewer products; F(3, 2) along the rows saves another third. With x[-1] = x[H] = 0 this is exact.
    """

    def __init__(self, layer: torch.nn.Conv2d, dtype: torch.dtype) -> None:
        weight = layer.weight.detach().double()
        bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.detach()
        self.channels = weight.shape[0]
        phases = [paired(paired(weight, 2, p), 3, q) for p in (0, 1) for q in (0, 1)]
        parts = F32.weights(torch.cat(phases))  # (4, 4 Cout, Cin, 1, 2)
        self._weights = [packed(part, dtype) for part in parts]
        self._biases = list(F32.bias(bias.repeat(4)).to(dtype))

    def size(self, source: torch.Tensor) -> tuple[int, int, int]:
        """Return the shape of the output for (H, W, Cin)."""
        return 2 * source.shape[0], 2 * source.shape[1], self.channels

    def __call__(self, buffers: Buffers, source: torch.Tensor, dest: torch.Tensor) -> None:
        """Compute dest, (2 H, 2 W, Cout) float32, from source, (H, W, Cin) float32; both contiguous."""
        height, width, channels = source.shape
        n_tiles = -(-(height + 1) // 3)  # position i stands for the rows i - 1 and i; there are H + 1 of them
        at_once = max(1, kernels.STRIPE_BYTES // (4 * 4 * (width + 1) * max(channels, 2 * self.channels)))
        phases = dest.view(height, 2, width, 2, self.channels)
        for first in range(0, n_tiles, at_once):
            tiles = min(at_once, n_tiles - first)
            stripe = stripe_of(buffers, source, 3 * first - 1, 3 * tiles + 1, None)
            shape = (tiles, width, channels)
            d = [stripe[k : k + 3 * (tiles - 1) + 1 : 3] for k in range(4)]
            v = buffers.take("inputs", (4, *shape))
            F32.inputs(d, v, d[0], d[0])
            products = _convolved(buffers, v, self._weights, self._biases)
            self._outputs(buffers, products, phases, first)

    def _outputs(self, buffers: Buffers, products: list[torch.Tensor], phases: torch.Tensor, first: int) -> None:
        """Write the rows of some tiles to where they belong in (H, 2, W, 2, C)."""
        height, _, width, _, channels = phases.shape
        tiles = products[0].shape[0]
        both = buffers.take("s", products[0].shape)
        torch.add(products[1], products[2], out=both)
        parts = [part.view(tiles, width + 1, 4, channels) for part in (*products, both)]
        for p, q, j in ((p, q, j) for p in (0, 1) for q in (0, 1) for j in (0, 1, 2)):
            row = 3 * first + j - p  # of the small image; the first one may lie above it, the last ones below
            skip = 1 if row < 0 else 0
            row += 3 * skip
            count = min(tiles - skip, -(-(height - row) // 3))
            if count <= 0:
                continue
            one, two, three, four, sums = (part[skip : skip + count, q : q + width, 2 * p + q] for part in parts)
            out = phases[row : row + 3 * count : 3, p, :, q]
            if j == 1:
                torch.sub(two, three, out=out)
            else:
                torch.add(sums, one if j == 0 else four, out=out)


def paired(weight: torch.Tensor, dim: int, phase: int) -> torch.Tensor:
    """Add up the taps of a 3-tap filter that see the same pixel of a doubled row: (0 | 1 + 2) or (0 + 1 | 2)."""
    zero, one, two = weight.unbind(dim)
    return torch.stack([zero, one + two] if phase == 0 else [zero + one, two], dim)


def _convolved(
    buffers: Buffers, v: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Convolve each of (n, h, W, C) float32 with its weights, in their dtype; return n of (h, W', Cout) float32."""
    dtype = biases[0].dtype
    if dtype != torch.float32:
        v = buffers.take("inputs", v.shape, dtype).copy_(v)
    products = []
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = as_rows(convolve(as_image(v[k]), weight, bias, padding=(0, 1)))
        if dtype != torch.float32:
            y = buffers.take(f"product {k}", y.shape).copy_(y)
        products.append(y)
    return products
