"""Which network tensors of the original (LDM, CompVis, taming) layout belong to: told by their names and shapes alone.

    names and shapes -> config of a diffusers AutoencoderKL or VQModel

What shapes cannot tell (groups of the norms, activation) is what every original program has: 32 and silu. Imports
neither torch nor diffusers. Entry: `infer_config`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from codec.errors import ModelError

PLAIN_DOWN, ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PLAIN_UP, ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

_LEVEL = re.compile(r"(?P<side>encoder\.down|decoder\.up)\.(?P<level>\d+)\.(?P<kind>block|attn)\.(?P<n>\d+)\.")
_CODEBOOK = "quantize.embedding.weight"

Shapes = Mapping[str, Sequence[int]]


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """Return diffusers' config of the network that tensors of the original layout belong to.

    Args:
        shapes: name -> shape, without a prefix; other names than an autoencoder's do no harm.

    Returns:
        `_class_name` and every field that decides the network's shape; nothing on scaling.

    Raises:
        ModelError: tensors are missing, or there is no such network in diffusers; says which and why.
    """
    down, up = _Side(shapes, "encoder.down"), _Side(shapes, "decoder.up")
    n_levels, n_blocks = down.n_levels, down.n_blocks
    if up.n_levels != n_levels:
        raise ModelError(f"the encoder has {n_levels} levels, the decoder {up.n_levels}")
    if up.n_blocks != n_blocks + 1:
        raise ModelError(f"{n_blocks} blocks a level in the encoder, {up.n_blocks} in the decoder; expected one more")
    widths = [_shape(shapes, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(n_levels)]
    if (first := _shape(shapes, "encoder.conv_in.weight")[0]) != widths[0]:
        raise ModelError(f"the first convolution has {first} channels, the first level {widths[0]}; expected as many")
    channels = _shape(shapes, "decoder.conv_in.weight")[1]
    config = {
        "in_channels": _shape(shapes, "encoder.conv_in.weight")[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight")[0],
        "down_block_types": [ATTENTION_DOWN if level in down.attends else PLAIN_DOWN for level in range(n_levels)],
        "up_block_types": [ATTENTION_UP if level in up.attends else PLAIN_UP for level in reversed(range(n_levels))],
        "block_out_channels": widths,
        "layers_per_block": n_blocks,
        "act_fn": "silu",
        "latent_channels": channels,
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }
    if _CODEBOOK in shapes:
        return {"_class_name": "VQModel", **config, **_codebook(shapes, channels)}
    return {"_class_name": "AutoencoderKL", **config, **_quant_convs(shapes, channels)}


class _Side:
    """What the names say of the levels of the encoder or the decoder.

    Attributes:
        n_levels: resolutions.
        n_blocks: residual blocks of each.
        attends: levels with attention after each of their blocks.
    """

    def __init__(self, shapes: Shapes, side: str) -> None:
        """Raises ModelError where there are none, or they differ among each other."""
        found: dict[str, dict[int, set[int]]] = {"block": {}, "attn": {}}
        for name in shapes:
            match = _LEVEL.match(name)
            if match and match["side"] == side:
                found[match["kind"]].setdefault(int(match["level"]), set()).add(int(match["n"]))
        blocks = found["block"]
        if not blocks:
            raise ModelError(f"no tensors {side}.*: not both an encoder and a decoder of an autoencoder")
        self.n_levels = max(blocks) + 1
        if missing := sorted(set(range(self.n_levels)) - set(blocks)):
            raise ModelError(f"no tensors {side}.{missing[0]}.block.*, although there are {self.n_levels} levels")
        self.n_blocks = max(map(max, blocks.values())) + 1
        for level, numbers in sorted(blocks.items()):
            if numbers != set(range(self.n_blocks)):
                raise ModelError(f"{len(numbers)} blocks in {side}.{level}, {self.n_blocks} in others")
        self.attends = frozenset(found["attn"])
        for level, numbers in sorted(found["attn"].items()):
            if numbers != set(range(self.n_blocks)):
                raise ModelError(f"attention after {len(numbers)} of the {self.n_blocks} blocks of {side}.{level}")


def _quant_convs(shapes: Shapes, channels: int) -> dict[str, Any]:
    """The fields that only an AutoencoderKL has."""
    moments = _shape(shapes, "encoder.conv_out.weight")[0]
    if moments != 2 * channels:
        raise ModelError(
            f"the encoder puts out {moments} channels for {channels} latent channels; expected {2 * channels}, mean "
            "and log-variance (an autoencoder without a variance is none that AutoencoderKL can hold)"
        )
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{name}.weight" in shapes and tuple(_shape(shapes, f"{name}.weight")[:2]) != (size, size):
            raise ModelError(
                f"{name}.weight is {tuple(_shape(shapes, f'{name}.weight'))}: the latents (embed_dim) and what the "
                "decoder takes (z_channels) differ, which AutoencoderKL cannot hold"
            )
    return {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _codebook(shapes: Shapes, channels: int) -> dict[str, Any]:
    """The fields that only a VQModel has."""
    size, dimension = _shape(shapes, _CODEBOOK)
    moments = _shape(shapes, "encoder.conv_out.weight")[0]
    if moments != channels:
        raise ModelError(f"the encoder puts out {moments} channels, the decoder takes {channels}: not a VQModel")
    if "quant_conv.weight" not in shapes or "post_quant_conv.weight" not in shapes:
        raise ModelError("a codebook without quant_conv and post_quant_conv: not a VQModel")
    return {"num_vq_embeddings": size, "vq_embed_dim": dimension, "norm_type": "group"}


def _shape(shapes: Shapes, name: str) -> Sequence[int]:
    if name not in shapes:
        raise ModelError(f"no tensor {name}")
    return shapes[name]
