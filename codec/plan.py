"""What an `AutoencoderKL` or a relative does, as a list of steps to run stripe by stripe; what each holds in memory.

    encoder: conv, (resnet.., down).., resnet, attention, resnet, out      decoder: conv, ..., (resnet.., up).., out

Only blocks that are known to be these steps are accepted (diffusers' default ones); others are refused by name.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderKLFlux2, VQModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from codec.errors import ModelError

CLASSES = (AutoencoderKL, AutoencoderKLFlux2, AsymmetricAutoencoderKL, VQModel)
"""Networks of these steps; a mask, which the decoder of the third can take, and a codebook are no part of them."""

Kind = Literal["conv", "resnet", "attention", "down", "up", "out"]


@dataclass(frozen=True)
class Step:
    """One step from a whole feature map to the next.

    Attributes:
        kind: what it does.
        module: of diffusers; a plain convolution for "conv", the `Encoder` or `Decoder` itself for "out".
        channels: of its input and its output.
        shrink: pixels of the image per position of its larger map, along one axis.
        keep: whether the map inside a resnet, or the enlarged map, is kept rather than computed two or three times.
    """

    kind: Kind
    module: Any
    channels: tuple[int, int]
    shrink: int
    keep: bool = True


def read(coder: nn.Module, f: int) -> list[Step]:
    """Return the steps of the encoder or the decoder of an `AutoencoderKL`, its 1 x 1 quant convolutions left out.

    Args:
        coder: `network.encoder` or `network.decoder`.
        f: downsampling factor of the network.

    Raises:
        ModelError: a part is not one that can be run in stripes.
    """
    parts: Any = coder
    encodes = hasattr(parts, "down_blocks")
    shrink = 1 if encodes else f
    conv_in, conv_out = _plain(parts.conv_in), _plain(parts.conv_out)
    steps = [Step("conv", conv_in, (conv_in.in_channels, conv_in.out_channels), shrink)]
    if encodes:
        for block in parts.down_blocks:
            _expect(block, DownEncoderBlock2D)
            steps += [_resnet(resnet, shrink) for resnet in block.resnets]
            for sampler in block.downsamplers or ():
                steps.append(_down(sampler, shrink))
                shrink *= 2
    _expect(parts.mid_block, UNetMidBlock2D)
    first, *others = parts.mid_block.resnets
    steps.append(_resnet(first, shrink))
    for attention, resnet in zip(parts.mid_block.attentions, others, strict=True):
        steps += [] if attention is None else [_attention(attention, shrink)]
        steps.append(_resnet(resnet, shrink))
    if not encodes:
        for block in parts.up_blocks:
            _expect(block, UpDecoderBlock2D)
            steps += [_resnet(resnet, shrink) for resnet in block.resnets]
            for sampler in block.upsamplers or ():
                shrink //= 2
                steps.append(_up(sampler, shrink))
    _expect(parts.conv_norm_out, nn.GroupNorm)
    return [*steps, Step("out", coder, (conv_out.in_channels, conv_out.out_channels), shrink)]


def held_bytes(steps: list[Step], index: int, n_pixels: int, item_bytes: int) -> int:
    """Return what the maps take up at most while a step runs, in bytes; stripes in work not counted.

    Args:
        steps: as `read` returns them.
        index: of the step.
        n_pixels: of the padded image.
        item_bytes: of one number.
    """
    step = steps[index]
    area = n_pixels * item_bytes // step.shrink**2
    before, after = step.channels
    if step.kind == "resnet":
        shortcut = step.module.conv_shortcut is not None
        source = before * area
        if index > 0 and not steps[index - 1].keep and steps[index - 1].kind == "up":
            return before * area // 4 + after * area  # enlarged rows come from the smaller map and go
        if step.keep:
            return max(source, 2 * after * area) if shortcut else source + after * area
        return max(source, after * area)
    if step.kind == "attention":
        return int((before + 3 * step.module.to_k.out_features) * area)  # keys, values, and values being joined
    if step.kind == "up":
        return after * area if step.keep else before * area // 4
    return max(before, after) * area if step.kind in ("conv", "down") else before * area


def whole_bytes(steps: list[Step], index: int, n_pixels: int, item_bytes: int) -> int:
    """Return what diffusers' own forward holds at most in a step, in bytes; arguments as in `held_bytes`."""
    step = steps[index]
    area = n_pixels * item_bytes // step.shrink**2
    before, after = step.channels
    first = index  # the caller holds a block's input until the block ends
    while step.kind == "resnet" and steps[first].kind == "resnet" and steps[first - 1].shrink == step.shrink:
        first -= 1
    outside = steps[first].channels[1] if first < index - 1 else 0
    if step.kind == "resnet":
        return (outside + max(3 * before, before + 3 * after, (before if before != after else 0) + 4 * after)) * area
    if step.kind == "attention":
        return 8 * before * area
    if step.kind == "up":
        return (2 * before + after) * area
    return 2 * (before + after) * area


def striped_bytes(steps: list[Step], n_pixels: int) -> int:
    """Return what a network holds that `fast.accelerate` runs in stripes of its own: three float32 maps, kept."""
    turn, largest, inside, attended = 0, [0, 0], 0, 0
    for step in steps:
        area = 4 * n_pixels // step.shrink**2
        before, after = step.channels
        if step.kind == "resnet":
            inside = max(inside, after * area)
        if step.kind == "attention":
            attended = 6 * before * area
        if step.kind in ("conv", "up", "down") or (step.kind == "resnet" and step.module.conv_shortcut is not None):
            turn = 1 - turn
            largest[turn] = max(largest[turn], after * area // (4 if step.kind == "down" else 1))
    return sum(largest) + inside + attended


def fit(steps: list[Step], n_pixels: int, item_bytes: int, most_bytes: int | None) -> list[Step]:
    """Return the steps with those maps not kept that would take more than `most_bytes` (None: keep all)."""
    fitted = list(steps)
    for index, step in enumerate(steps):
        if step.kind != "resnet" or most_bytes is None:
            continue
        # an enlarged map is worth computing again only for a resnet that has its own shortcut, and so needs no copy
        enlarged = index > 0 and steps[index - 1].kind == "up" and step.module.conv_shortcut is not None
        first = index - 1 if enlarged else index
        for keep in ((True, True), (True, False), (False, False)):
            fitted[first], fitted[index] = replace(steps[first], keep=keep[0]), replace(step, keep=keep[1])
            held = max(held_bytes(fitted, at, n_pixels, item_bytes) for at in (first, index))
            if held <= most_bytes:
                break
    return fitted


def _resnet(block: Any, shrink: int) -> Step:
    _expect(block, ResnetBlock2D)
    plain = block.time_emb_proj is None and block.upsample is None and block.downsample is None
    if not plain or block.time_embedding_norm not in ("default", "group"):  # "group" is what decoders say
        raise ModelError("a ResnetBlock2D with a time embedding or resampling cannot be run in stripes")
    for conv in (block.conv1, block.conv2):
        _plain(conv)
    return Step("resnet", block, (block.conv1.in_channels, block.conv2.out_channels), shrink)


def _attention(attention: Any, shrink: int) -> Step:
    _expect(attention, Attention)
    for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross"):
        if getattr(attention, name, None):
            raise ModelError(f"an Attention with {name} cannot be run in stripes")
    if attention.group_norm is None or attention.to_k is None:
        raise ModelError("an Attention without group_norm or keys cannot be run in stripes")
    channels = attention.to_q.in_features
    return Step("attention", attention, (channels, channels), shrink)


def _down(sampler: Any, shrink: int) -> Step:
    _expect(sampler, Downsample2D)
    conv = sampler.conv
    if (
        not isinstance(conv, nn.Conv2d)
        or sampler.norm is not None
        or (conv.kernel_size, sampler.padding) != ((3, 3), 0)
    ):
        raise ModelError("a Downsample2D other than a 3 x 3 convolution padded at the end cannot be run in stripes")
    return Step("down", sampler, (conv.in_channels, conv.out_channels), shrink)


def _up(sampler: Any, shrink: int) -> Step:
    _expect(sampler, Upsample2D)
    if not isinstance(sampler.conv, nn.Conv2d) or sampler.norm is not None or not sampler.interpolate:
        raise ModelError("an Upsample2D other than a convolution after nearest cannot be run in stripes")
    conv = _plain(sampler.conv)
    return Step("up", sampler, (conv.in_channels, conv.out_channels), shrink)


def _plain(conv: Any) -> nn.Conv2d:
    """Return a convolution with zero padding that keeps the size of the map; raises ModelError for another one."""
    _expect(conv, nn.Conv2d)
    same = tuple(side // 2 for side in conv.kernel_size)
    if (conv.padding, conv.padding_mode, conv.dilation, conv.stride) != (same, "zeros", (1, 1), (1, 1)):
        raise ModelError(f"a convolution that cannot be run in stripes: {conv}")
    plain: nn.Conv2d = conv
    return plain


def _expect(module: Any, kind: type) -> None:
    if not isinstance(module, kind):
        raise ModelError(f"a {type(module).__name__} cannot be run in stripes, expected {kind.__name__}")
