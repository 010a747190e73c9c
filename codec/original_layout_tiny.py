"""The layout of TAESD's own files, one for the encoder and one for the decoder, to diffusers' AutoencoderTiny.

Both number the layers of one long sequence. The encoder's are diffusers'; the decoder's begin with a clamp that
diffusers has outside the sequence, so that its numbers are one higher. Imports neither torch nor diffusers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from codec.errors import ModelError

Value = TypeVar("Value")
Shapes = Mapping[str, Sequence[int]]


def tiny_names(encoder: Mapping[str, Value], decoder: Mapping[str, Value]) -> dict[str, Value]:
    """Return diffusers' name -> tensor (or shape) of the two files together.

    Raises:
        ModelError: a name does not begin with the number of a layer.
    """
    joined = {f"encoder.layers.{name}": value for name, value in encoder.items()}
    for name, value in decoder.items():
        joined[f"decoder.layers.{_layer(name) - 1}.{name.partition('.')[2]}"] = value
    return joined


def tiny_config(encoder: Shapes, decoder: Shapes) -> dict[str, Any]:
    """Return diffusers' config of the network that the two files belong to.

    Args:
        encoder: name -> shape.
        decoder: the same.

    Raises:
        ModelError: it is not such a network.
    """
    (first, *downs, last), (start, *ups) = _convolutions(encoder), _convolutions(decoder)
    if not ups or len(downs) + 1 != len(ups) or last != max(map(_layer, encoder)):
        raise ModelError(
            f"{len(downs)} reductions in the encoder, {len(ups) - 1} enlargements in the decoder: not TAESD"
        )
    starts = [first, *downs]
    n_encoder = [_blocks(encoder, begin, end) for begin, end in zip(starts, [*downs, last], strict=True)]
    n_decoder = [_blocks(decoder, begin, end) for begin, end in zip([start, *ups[:-1]], ups, strict=True)]
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": encoder[f"{first}.weight"][1],
        "out_channels": decoder[f"{ups[-1]}.weight"][0],
        "encoder_block_out_channels": [encoder[f"{layer}.weight"][0] for layer in starts],
        "decoder_block_out_channels": [decoder[f"{layer}.weight"][1] for layer in ups],
        "num_encoder_blocks": n_encoder,
        "num_decoder_blocks": n_decoder,
        "latent_channels": encoder[f"{last}.weight"][0],
    }


def _convolutions(shapes: Shapes) -> list[int]:
    """Return the numbers of the layers that are convolutions by themselves, in order."""
    found = sorted(_layer(name) for name in shapes if name.partition(".")[2] == "weight")
    if len(found) < 2:
        raise ModelError("no sequence of numbered layers: not TAESD")
    return found


def _blocks(shapes: Shapes, begin: int, end: int) -> int:
    """Return how many residual blocks lie between two layers."""
    return len({_layer(name) for name in shapes if ".conv." in name and begin < _layer(name) < end})


def _layer(name: str) -> int:
    number = name.partition(".")[0]
    if not number.isdigit():
        raise ModelError(f"no numbered layer: {name}; not TAESD")
    return int(number)
