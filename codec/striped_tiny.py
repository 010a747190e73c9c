"""AutoencoderTiny in bfloat16 on a CPU, a stripe of rows at a time; for `codec.fast`.

Its blocks are three convolutions with ReLU and no normalisation: a stripe goes through a whole block in the cache. With
64 channels, direct convolutions in bfloat16 beat the filtered ones of `codec.filtering`. Imports torch and diffusers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from codec import kernels
from codec.filtering import paired
from codec.kernels import Buffers, as_image, as_rows, convolve, packed


class StripedTiny:
    """An EncoderTiny or DecoderTiny for which `codec.striped.stripable` holds, ready to run."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Derive the weights.

        Args:
            module: its parameters on the CPU.
            dtype: of weights and activations.
        """
        layers: Any = module.layers
        self._dtype, self._layers, self._idle = dtype, list(layers), list[Buffers]()
        self._decoder = isinstance(self._layers[1], nn.ReLU)
        self._weights: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for layer, after in zip([None, *self._layers], self._layers, strict=False):
            for conv in after.modules():
                if isinstance(conv, nn.Conv2d):
                    self._weights[conv] = self._derived(conv, doubled=isinstance(layer, nn.Upsample))

    def _derived(self, conv: nn.Conv2d, doubled: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if doubled:  # the output pixels of each parity of row and column see 2 x 2 pixels; see DoublingConvolution
            weight = torch.cat([paired(paired(weight.double(), 2, p), 3, q) for p in (0, 1) for q in (0, 1)])
            bias = None if bias is None else bias.repeat(4)
        return packed(weight, self._dtype), None if bias is None else bias.to(self._dtype)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Compute a batch: (B, C, H, W) of any float dtype -> (B, C', H', W') float32."""
        with torch.inference_mode():
            buffers = self._idle.pop() if self._idle else Buffers()
            ys = [self._one(image.permute(1, 2, 0).float().contiguous(), buffers) for image in x]
            buffers.give_back(self._idle)
        return torch.cat(ys)  # out here: of the caller's mode

    def _one(self, x: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        x = x.div(3).tanh_().mul_(3) if self._decoder else x.add(1).div_(2)
        x = x.to(self._dtype)
        turn = 0
        for position, layer in enumerate(self._layers):
            if isinstance(layer, nn.ReLU | nn.Upsample):
                continue  # done with the convolution before, or after
            before = self._layers[position - 1] if position else None
            if isinstance(before, nn.Upsample):
                y = buffers.take(f"x{turn}", (2 * x.shape[0], 2 * x.shape[1], layer.out_channels), self._dtype)
                self._double(layer, x, y)
            elif isinstance(layer, AutoencoderTinyBlock):
                one, _, two, _, three = layer.conv
                y = buffers.take(f"x{turn}", x.shape, self._dtype)
                self._chain((one, two, three), x, y, residual=True)
            elif layer.stride[0] == 1:
                y = buffers.take(f"x{turn}", (*x.shape[:2], layer.out_channels), self._dtype)
                self._chain((layer,), x, y)
                if self._decoder and position == 0:
                    y.relu_()
            else:
                y = as_rows(convolve(as_image(x), *self._weights[layer], 2, (1, 1)))
            x, turn = y, 1 - turn
        y = as_image(x).to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # out of the buffers
        return y.mul_(2).sub_(1) if self._decoder else y

    def _chain(self, convs: Sequence[nn.Module], x: torch.Tensor, y: torch.Tensor, residual: bool = False) -> None:
        """Put 3 x 3 convolutions one after the other, ReLU between them; with the residual and another ReLU."""
        height, reach = x.shape[0], len(convs)
        step = max(1, kernels.STRIPE_BYTES // y[0].nbytes)
        for row in range(0, height, step):
            end = min(row + step, height)
            first, last = max(0, row - reach), min(height, end + reach)
            part = given = as_image(x[first:last])
            for conv in convs:  # each spoils one more row at the ends of the stripe, if the image goes on there
                part = convolve(part, *self._weights[conv], 1, (1, 1))
                if conv is not convs[-1]:
                    part.relu_()
            if residual:
                part.add_(given).relu_()
            y[row:end].copy_(as_rows(part)[row - first : end - first])

    def _double(self, conv: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        height, width, _ = x.shape
        phases = y.view(height, 2, width, 2, -1)
        step = max(1, kernels.STRIPE_BYTES // (4 * y[0].nbytes))
        for row in range(0, height, step):
            end = min(row + step, height)
            first, last = max(0, row - 1), min(height, end + 1)
            pairs = as_rows(convolve(as_image(x[first:last]), *self._weights[conv], 1, (1, 1)))
            pairs = pairs.view(last - first + 1, width + 1, 4, -1)  # [i, j] sees the rows i - 1 and i of the stripe
            for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
                found = pairs[row - first + p : end - first + p, q : q + width, 2 * p + q]
                phases[row:end, p, :, q].copy_(found)
