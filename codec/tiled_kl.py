"""An `AutoencoderKL` run in stripes: global GroupNorm statistics, attention over all positions, no seams.

A resnet keeps its input x and the map h inside it, and adds its result to x in place:

    x -> norm1, SiLU, conv1 -> h (statistics) -> norm2, SiLU, conv2 -> added to x, or to shortcut(x)

x goes as shortcut(x) and h come. Where memory does not suffice, h is computed twice rather than kept, and so is the
enlarged map before it (`plan.Step.keep`). Every activation is normalised by the statistics of the whole map.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from codec.plan import Step
from codec.rows import Convolution, FeatureMap, Moments, Norm, Rows, Stripes

MOST_SCORES = 2**28
"""Query-key pairs at a time: what attention needs on devices where it writes them out."""


class Source(Protocol):
    """A whole map that can be read more than once; `FeatureMap` is one.

    Attributes:
        height: H.
        moments: statistics of it.
    """

    height: int
    moments: Moments

    def rows(self) -> Rows:
        """Return the pieces; the map stays."""
        ...

    def consume(self) -> Rows:
        """Return the pieces and forget them."""
        ...


class Recomputed:
    """The map that a convolution makes of another one, computed at every reading."""

    def __init__(self, source: Source, convolution: Convolution) -> None:
        """Compute it once, for its statistics."""
        self.height = source.height * convolution.enlarge
        self._source = source
        self._convolution = convolution
        self.moments = _moments(self.rows())

    def rows(self) -> Rows:
        """See `Source.rows`."""
        return self._convolution.stream(self._source.rows(), self._source.height)

    def consume(self) -> Rows:
        """See `Source.consume`."""
        return self._convolution.stream(self._source.consume(), self._source.height)


def run(steps: Iterable[Step], rows: Rows, height: int, stripes: Stripes) -> Rows:
    """Run the steps of an encoder or a decoder (`plan.read`, `plan.fit`).

    Args:
        steps: the first one a "conv", the last one "out".
        rows: the input, float32, on the network's device.
        height: of the input.
        stripes: what is worked on at once.

    Returns:
        The output's pieces, float32; everything up to the last convolutions is done when the first one is drawn.

    Raises:
        NonFiniteError: a feature map holds a value that is not finite.
    """
    source: Source = FeatureMap(height)
    for step in steps:
        module = step.module
        if step.kind == "conv":
            inputs = Convolution(module, stripes.exact).stream(rows, height)
            source = FeatureMap.of((piece.to(stripes.dtype) for piece in inputs), height)
        elif step.kind == "resnet":
            source = _resnet(module, source, stripes, step.keep)
        elif step.kind == "attention":
            assert isinstance(source, FeatureMap), "a resnet or a convolution made it"
            _attend(module, source)
        elif step.kind == "down":
            convolution = Convolution(module.conv, stripes, pad_end=True)
            source = FeatureMap.of(convolution.stream(source.consume(), source.height), source.height // 2)
        elif step.kind == "up":
            convolution = Convolution(module.conv, stripes, enlarge=2)
            if step.keep:
                source = FeatureMap.of(convolution.stream(source.consume(), source.height), source.height * 2)
            else:
                source = Recomputed(source, convolution)
        else:
            norm = Norm(module.conv_norm_out, source.moments)
            convolution = Convolution(module.conv_out, stripes.exact, norm, module.conv_act)
            yield from convolution.stream(source.consume(), source.height)


def _moments(rows: Rows) -> Moments:
    moments = Moments()
    for piece in rows:
        moments.add(piece)
    return moments


def _resnet(block: Any, source: Source, stripes: Stripes, keep: bool) -> FeatureMap:
    """Run a `ResnetBlock2D`; the source is used up, or becomes the result."""
    height, act = source.height, block.nonlinearity
    first = Convolution(block.conv1, stripes, Norm(block.norm1, source.moments), act)
    hidden = None if keep else _moments(first.stream(source.rows(), height))
    result, inputs = _residual(block, source)
    rows = first.stream(inputs, height)
    if hidden is None:
        kept = FeatureMap.of(rows, height)
        rows, hidden = kept.consume(), kept.moments
    second = Convolution(block.conv2, stripes, Norm(block.norm2, hidden), act)
    result.add(second.stream(rows, height), float(block.output_scale_factor))
    return result


def _residual(block: Any, source: Source) -> tuple[FeatureMap, Rows]:
    """Return what a resnet's result is added to, and the rows of its input, which must be drawn before."""
    if block.conv_shortcut is None and isinstance(source, FeatureMap):
        return source, source.rows()
    residual = FeatureMap(source.height)

    def tee() -> Rows:
        for piece in source.consume():
            residual.append(piece if block.conv_shortcut is None else _pointwise(block.conv_shortcut, piece))
            yield piece

    return residual, tee()


def _pointwise(conv: nn.Conv2d, rows: torch.Tensor) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.to(rows.dtype)
    out = functional.conv2d(rows, conv.weight.to(rows.dtype), bias)
    return out.contiguous(memory_format=torch.channels_last)


def _attend(attention: Any, source: FeatureMap) -> None:
    """Run an `Attention` over all positions in place: keys and values whole, queries in chunks."""
    norm = Norm(attention.group_norm, source.moments)
    key, value = (
        torch.cat([_heads(attention, _linear(layer, _tokens(norm, piece))) for piece in source.rows()], dim=2)
        for layer in (attention.to_k, attention.to_v)
    )  # (1, heads, h*w, D/heads)
    most = max(1, MOST_SCORES // (key.shape[1] * key.shape[2]))
    moments = Moments()
    for piece in source.rows():
        positions = piece.permute(0, 2, 3, 1).view(-1, piece.shape[1])  # (r*w, C), the same memory
        for part, tokens in zip(torch.split(positions, most), torch.split(_tokens(norm, piece), most), strict=True):
            query = _heads(attention, _linear(attention.to_q, tokens))
            seen = functional.scaled_dot_product_attention(query, key, value)
            seen = _linear(attention.to_out[0], seen.transpose(1, 2).flatten(2)[0])  # (r*w, C)
            part.copy_(part + seen if attention.residual_connection else seen)
            part /= attention.rescale_output_factor
        moments.add(piece)
    source.moments = moments


def _tokens(norm: Norm, rows: torch.Tensor) -> torch.Tensor:
    """Return normalised rows as (r*w, C)."""
    tokens = torch.empty_like(rows, memory_format=torch.channels_last)
    norm.apply(rows, tokens)
    return tokens.permute(0, 2, 3, 1).view(-1, rows.shape[1])


def _linear(layer: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(tokens.dtype)
    return functional.linear(tokens, layer.weight.to(tokens.dtype), bias)


def _heads(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return (n, heads * D) as (1, heads, n, D)."""
    return torch.unflatten(tokens, 1, (attention.heads, -1)).transpose(0, 1)[None]
