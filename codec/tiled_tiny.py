"""An `AutoencoderTiny` run as one stream of rows: every layer keeps the few rows that its kernel needs.

Nothing is computed twice, no feature map is ever whole. A region needs only the latents that its pixels can see.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn
from torch.nn import functional

from codec.errors import ModelError
from codec.rows import Convolution, Rows, Stripes, activate


def check(layers: Sequence[nn.Module]) -> None:
    """Raise ModelError when a layer is not one that can be run in stripes."""
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            scale = layer.scale_factor
            if layer.mode != "nearest" or not isinstance(scale, int | float) or scale != int(scale):
                raise ModelError(f"an AutoencoderTiny with {layer} cannot be run in stripes")
        elif not isinstance(layer, nn.Conv2d | AutoencoderTinyBlock) and any(True for _ in layer.children()):
            raise ModelError(f"an AutoencoderTiny with a {type(layer).__name__} cannot be run in stripes")


def seen(layers: Sequence[nn.Module], low: int, high: int) -> tuple[int, int]:
    """Return the first input position along one axis, and the one after the last, that outputs low..high-1 depend on.

    Positions before the first row and after the last one are counted too.
    """
    for layer in reversed(layers):
        if isinstance(layer, nn.Conv2d):
            low, high = _seen_by(layer, low, high)
        elif isinstance(layer, AutoencoderTinyBlock):
            for conv in reversed([part for part in layer.conv if isinstance(part, nn.Conv2d)]):
                low, high = _seen_by(conv, low, high)
        elif isinstance(layer, nn.Upsample):
            scale = _scale(layer)
            low, high = low // scale, -(-high // scale)
    return low, high


def buffer_bytes(layers: Sequence[nn.Module], width: int, stripes: Stripes) -> int:
    """Return about what all layers hold at once, in bytes, for an input of `width` columns: input, output, halos."""
    held = 0
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            width *= _scale(layer)
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d):
                row_bytes = max(conv.in_channels, conv.out_channels) * width * stripes.dtype.itemsize
                held += (2 * stripes.rows(row_bytes) + 6) * row_bytes
                width //= conv.stride[0]
    return held


def run(layers: Sequence[nn.Module], rows: Rows, height: int, stripes: Stripes) -> Rows:
    """Run the layers of an `EncoderTiny` or a `DecoderTiny`.

    Args:
        layers: `encoder.layers` or `decoder.layers`, as `check` passed them.
        rows: the input, float32, on the network's device.
        height: of the input.
        stripes: what is worked on at once.
    """
    enlarge = 1
    ends = (layers[0], layers[-1])
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            enlarge *= _scale(layer)
        elif isinstance(layer, nn.Conv2d):
            rows = Convolution(layer, stripes.exact if layer in ends else stripes, enlarge=enlarge).stream(rows, height)
            height = height * enlarge // layer.stride[0]
            enlarge = 1
        elif isinstance(layer, AutoencoderTinyBlock):
            rows = _block(layer, rows, height, stripes)
        else:
            rows = _activated(layer, rows)
    return rows


def _block(block: Any, rows: Rows, height: int, stripes: Stripes) -> Rows:
    waiting: list[torch.Tensor] = []  # inputs whose outputs have not come yet

    def tee() -> Rows:
        for piece in rows:
            waiting.append(piece)
            yield piece

    first, act, second, _, third = block.conv
    inner = Convolution(first, stripes).stream(tee(), height)
    inner = Convolution(second, stripes, activation=act).stream(inner, height)
    for piece in Convolution(third, stripes, activation=act).stream(inner, height):
        top = 0
        while top < piece.shape[2]:
            n_rows = min(piece.shape[2] - top, waiting[0].shape[2])
            part = piece[:, :, top : top + n_rows]
            part += _skipped(block.skip, waiting[0][:, :, :n_rows])
            activate(part, block.fuse)
            waiting[0] = waiting[0][:, :, n_rows:]
            if waiting[0].shape[2] == 0:
                waiting.pop(0)
            top += n_rows
        yield piece


def _skipped(skip: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    if not isinstance(skip, nn.Conv2d):
        return rows
    return functional.conv2d(rows, skip.weight.to(rows.dtype))  # 1 x 1, no bias


def _activated(layer: nn.Module, rows: Rows) -> Rows:
    for piece in rows:
        activate(piece, layer)
        yield piece


def _scale(layer: nn.Upsample) -> int:
    scale: Any = layer.scale_factor
    return int(scale)


def _seen_by(conv: nn.Conv2d, low: int, high: int) -> tuple[int, int]:
    stride, padding = conv.stride[0], int(conv.padding[0])
    return low * stride - padding, (high - 1) * stride - padding + conv.kernel_size[0]
