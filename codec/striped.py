"""Encoders and decoders of diffusers on a CPU, one image at a time, by the kernels of `codec.kernels`.

    image (H, W, C) float32 -> convolutions between two or three buffers that stay as long as the network -> output

The walk follows diffusers' modules (resnet.py, vae.py, unet_2d_blocks.py of diffusers 0.42); `stripable` says whether a
network consists of what is known here. For `codec.fast`; imports torch and diffusers.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn

from codec.filtering import F43, Convolution, DoublingConvolution
from codec.kernels import Affine, Buffers, Moments, as_image, attention, moments, pointwise

LEAST_VALUES = {torch.float32: 1 << 21, torch.bfloat16: 1 << 23}
"""Values in the largest activations of an image, below which the steps of a stripe cost more than they save."""

FILTERED_CHANNELS = 64
"""With fewer, the transforms cost more than they save."""


def pays(module: Any, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether stripes are faster than diffusers' own code in channels last; measured on two cores with AVX512-BF16.

    Args:
        module: an encoder or decoder that is `stripable`.
        x: its input, (B, C, H, W).
        dtype: of the convolutions.
    """
    f, channels = 1, 0
    if isinstance(module, Decoder):
        f, channels = 2 ** sum(bool(block.upsamplers) for block in module.up_blocks), module.conv_out.in_channels
    elif isinstance(module, Encoder):
        channels = module.conv_in.out_channels
    else:
        f, channels = 2 ** sum(isinstance(layer, nn.Upsample) for layer in module.layers), module.layers[0].out_channels
    return f * f * x.shape[2] * x.shape[3] * int(channels) >= LEAST_VALUES[dtype]


def stripable(module: nn.Module) -> bool:
    """Whether `Striped` can compute this encoder or decoder: diffusers' usual ones, with SiLU or ReLU."""
    if isinstance(module, Encoder | Decoder):
        if not isinstance(module.conv_norm_out, nn.GroupNorm) or not _is_silu(module.conv_act):
            return False
        blocks = [*(module.down_blocks if isinstance(module, Encoder) else module.up_blocks), module.mid_block]
        return all(_known(layer) for block in blocks for layer in _layers(block))
    layers: Any = module.layers
    return all(_known_tiny(layer) for layer in layers)


class Striped:
    """An encoder or decoder, ready to run; holds its weights once more, transformed, and buffers for one image."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Derive the weights.

        Args:
            module: for which `stripable` holds, its parameters on the CPU.
            dtype: float32 or bfloat16, of the convolutions.
        """
        self._module: Any = module
        self._dtype = dtype
        self._idle: list[Buffers] = []
        self._convolutions: dict[nn.Module, Convolution | DoublingConvolution] = {}
        doubled = set(_doubled(module))
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                self._convolutions[layer] = self._convolution(name, layer, layer in doubled)

    def _convolution(self, name: str, layer: nn.Conv2d, doubled: bool) -> Convolution | DoublingConvolution:
        if doubled:
            return DoublingConvolution(layer, self._dtype)
        few = min(layer.in_channels, layer.out_channels) < FILTERED_CHANNELS
        first = name in ("conv_in", "layers.0")  # costs nothing, and would round what all the rest sees
        return Convolution(layer, torch.float32 if first else self._dtype, None if few else F43)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Compute a batch: (B, C, H, W) of any float dtype -> (B, C', H', W') float32."""
        with torch.inference_mode():
            buffers = self._idle.pop() if self._idle else Buffers()  # one set for each thread that is in here
            ys = []
            for image in x:
                walk = _Walk(self._convolutions, self._dtype, buffers)
                source = image.permute(1, 2, 0).float().contiguous()
                tiny = not isinstance(self._module, Encoder | Decoder)
                y = as_image((walk.tiny if tiny else walk.kl)(self._module, source))
                ys.append(y.clone(memory_format=torch.contiguous_format))  # out of the buffers
            buffers.give_back(self._idle)
        return torch.cat(ys)  # out here: of the caller's mode


class _Walk:
    """One image on its way through a network."""

    def __init__(self, convolutions: dict[nn.Module, Any], dtype: torch.dtype, buffers: Buffers) -> None:
        self._convolutions, self._dtype, self._buffers = convolutions, dtype, buffers
        self._turn = 0

    def kl(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Follow Encoder.forward or Decoder.forward, (H, W, C) float32."""
        x, found = self._into_next(module.conv_in, x)
        encoder = isinstance(module, Encoder)
        for block in (*module.down_blocks, module.mid_block) if encoder else (module.mid_block, *module.up_blocks):
            for layer in _layers(block):
                x, found = self._layer(layer, x, found)
        affine = found.affine(module.conv_norm_out)
        return self._convolve(module.conv_out, x, "h", affine)

    def _layer(self, layer: nn.Module, x: torch.Tensor, found: Moments) -> tuple[torch.Tensor, Moments]:
        if isinstance(layer, ResnetBlock2D):
            return self._resnet(layer, x, found)
        if isinstance(layer, Attention):
            return self._attention(layer, x, found)
        return self._into_next(layer.conv, x)

    def _resnet(self, block: Any, x: torch.Tensor, found: Moments) -> tuple[torch.Tensor, Moments]:
        inside, after = Moments(), Moments()
        h = self._convolve(block.conv1, x, "h", found.affine(block.norm1), found=inside)
        if block.conv_shortcut is not None:
            x = self._shortcut(block.conv_shortcut, x)
        self._convolutions[block.conv2](self._buffers, h, x, inside.affine(block.norm2), add=True, found=after)
        return x, after

    def _shortcut(self, layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        y = self._next((*x.shape[:2], layer.out_channels))
        weight = layer.weight[:, :, 0, 0].to(self._dtype)
        bias = None if layer.bias is None else layer.bias.to(self._dtype)
        for row in range(0, x.shape[0], _AT_ONCE):
            pixels = x[row : row + _AT_ONCE].view(-1, x.shape[2]).to(self._dtype)
            y[row : row + _AT_ONCE].view(-1, y.shape[2]).copy_(pointwise(pixels, weight, bias))
        return y

    def _attention(self, layer: Any, x: torch.Tensor, found: Moments) -> tuple[torch.Tensor, Moments]:
        scale, shift = found.affine(layer.group_norm)
        tokens = x.view(-1, x.shape[2])  # (H*W, C)
        normed = torch.addcmul(shift, tokens, scale)
        q, k, v = (
            pointwise(normed, part.weight.float(), None if part.bias is None else part.bias.float())
            for part in (layer.to_q, layer.to_k, layer.to_v)
        )
        heads = zip(*(part.chunk(layer.heads, 1) for part in (q, k, v)), strict=True)
        seen = torch.cat([attention(q, k, v, self._dtype) for q, k, v in heads], 1)
        out = layer.to_out[0]
        tokens.add_(pointwise(seen, out.weight.float(), None if out.bias is None else out.bias.float()))
        return x, moments(x)

    def tiny(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Follow EncoderTiny.forward or DecoderTiny.forward, (H, W, C) float32."""
        decoder = isinstance(module.layers[1], nn.ReLU)
        x = x.div(3).tanh_().mul_(3) if decoder else x.add(1).div_(2)
        layers = list(module.layers)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.Conv2d):
                x = self._plain(layer, x, relu=isinstance(after, nn.ReLU))
            elif isinstance(layer, AutoencoderTinyBlock):
                x = self._tiny_block(layer, x)
        return x.mul(2).sub_(1) if decoder else x

    def _tiny_block(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        one, _, two, _, three = block.conv
        h = self._convolve(one, x, "h", relu=True)
        h = self._convolve(two, h, "h2", relu=True)
        self._convolutions[three](self._buffers, h, x, add=True, relu=True)
        return x

    def _plain(self, layer: nn.Conv2d, x: torch.Tensor, relu: bool) -> torch.Tensor:
        convolution = self._convolutions[layer]
        y = self._next(convolution.size(x))
        if isinstance(convolution, DoublingConvolution):
            convolution(self._buffers, x, y)
        else:
            convolution(self._buffers, x, y, relu=relu)
        return y

    def _into_next(self, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, Moments]:
        convolution = self._convolutions[layer]
        y = self._next(convolution.size(x))
        if isinstance(convolution, DoublingConvolution):
            convolution(self._buffers, x, y)
            return y, moments(y)
        found = Moments()
        convolution(self._buffers, x, y, found=found)
        return y, found

    def _convolve(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        name: str,
        affine: Affine | None = None,
        *,
        relu: bool = False,
        found: Moments | None = None,
    ) -> torch.Tensor:
        convolution = self._convolutions[layer]
        y = self._buffers.take(name, convolution.size(x))
        convolution(self._buffers, x, y, affine, relu=relu, found=found)
        return y

    def _next(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the one of two buffers that the image is not in."""
        self._turn = 1 - self._turn
        return self._buffers.take(f"x{self._turn}", shape)


_AT_ONCE = 32  # rows that a shortcut converts


def _layers(block: Any) -> Iterator[nn.Module]:
    """Give resnets, attentions and the sampler of a block of diffusers in the order in which it calls them."""
    attentions = list(getattr(block, "attentions", []))
    if block.__class__.__name__ == "UNetMidBlock2D":
        attentions = [None, *attentions]  # they stand before the second resnet
        for attention_layer, resnet in zip(attentions, block.resnets, strict=True):
            yield from (layer for layer in (attention_layer, resnet) if layer is not None)
        return
    attentions += [None] * (len(block.resnets) - len(attentions))
    for resnet, attention_layer in zip(block.resnets, attentions, strict=True):
        yield from (layer for layer in (resnet, attention_layer) if layer is not None)
    yield from getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []


def _doubled(module: nn.Module) -> Iterator[nn.Module]:
    """Give the convolutions that follow a nearest enlargement by two."""
    for part in module.modules():
        if isinstance(part, Upsample2D):
            yield part.conv
        if isinstance(part, nn.Sequential):
            pairs = itertools.pairwise(part)
            yield from (after for layer, after in pairs if isinstance(layer, nn.Upsample))


def _is_silu(layer: nn.Module) -> bool:
    return isinstance(layer, nn.SiLU)


def _known(layer: Any) -> bool:
    if isinstance(layer, ResnetBlock2D):
        plain = layer.time_emb_proj is None and layer.upsample is None and layer.downsample is None
        norms = isinstance(layer.norm1, nn.GroupNorm) and isinstance(layer.norm2, nn.GroupNorm)
        return plain and norms and _is_silu(layer.nonlinearity) and layer.output_scale_factor == 1
    if isinstance(layer, Attention):
        usual = layer.residual_connection and layer.rescale_output_factor == 1 and layer.spatial_norm is None
        return usual and isinstance(layer.group_norm, nn.GroupNorm) and layer.norm_q is None and layer.norm_k is None
    if isinstance(layer, Downsample2D):
        return layer.use_conv and layer.padding == 0 and layer.norm is None and _is_3x3(layer.conv)
    if isinstance(layer, Upsample2D):
        usual = layer.use_conv and layer.interpolate and layer.norm is None and layer.name == "conv"
        return usual and not layer.use_conv_transpose and _is_3x3(layer.conv)
    return False


def _known_tiny(layer: Any) -> bool:
    if isinstance(layer, AutoencoderTinyBlock):
        acts = isinstance(layer.conv[1], nn.ReLU) and isinstance(layer.conv[3], nn.ReLU)
        return acts and isinstance(layer.skip, nn.Identity)
    if isinstance(layer, nn.Upsample):
        return layer.mode == "nearest" and layer.scale_factor == 2.0
    return isinstance(layer, nn.ReLU) or _is_3x3(layer)


def _is_3x3(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.groups == 1
