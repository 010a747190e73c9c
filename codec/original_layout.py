"""The layout of LDM and CompVis checkpoints, which ComfyUI and A1111 read, to and from diffusers'.

    diffusers state dict  <- names and shapes ->  state dict of the original layout, without a prefix

Nothing is computed, only renamed and reshaped. The two differ in names, in the order of the decoder's levels (the
original counts from the finest, diffusers from the coarsest) and in attention weights: 1 x 1 convolutions
(C, C, 1, 1) there, linear layers (C, C) here. Entries: `to_original`, `from_original`, `original_limits`,
`comfy_detects`. `codec.original_layout_config` finds the config that tensors belong to, `codec.original_layout_find`
the autoencoder in a whole checkpoint.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from codec.errors import ModelError
from codec.original_layout_config import ATTENTION_DOWN, ATTENTION_UP, PLAIN_DOWN, PLAIN_UP, infer_config

_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
_DIFFUSERS_LEVEL = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.")
_LDM_GROUPS = 32
_COMFY_WIDTHS = {8: (128, 256, 512, 512), 4: (128, 256, 512)}  # by f
_COMFY_OTHERS = (  # names by which ComfyUI takes a file for another kind of model before it comes to these
    "decoder.mid.block_1.mix_factor",
    "vquantizer.codebook.weight",
    "taesd_decoder.1.weight",
    "bn.running_mean",
)


def to_original(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the tensors of an AutoencoderKL or VQModel to the original layout, without a prefix.

    Args:
        state: diffusers' state dict; any dtype, any number of levels and blocks.
        config: diffusers' config with `_class_name`.

    Returns:
        The same tensors in the same order, attention weights with two more axes of 1. Contiguous where they were.

    Raises:
        ModelError: the layout has no place for the model (another class, other blocks, unknown tensors); says why.
    """
    n_levels, _ = _levels(config)
    modules = _modules(n_levels, int(config["layers_per_block"]))
    original = {}
    for name, tensor in state.items():
        module, _, leaf = modern_name(name).rpartition(".")
        if module not in modules:
            raise ModelError(f"the original layout has no place for the tensor {name}")
        there = modules[module]
        original[f"{there}.{leaf}"] = tensor[:, :, None, None] if _is_matrix(there, tensor.ndim) else tensor
    return original


def from_original(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename tensors of the original layout to diffusers'; the opposite of `to_original`.

    Args:
        state: original names without a prefix; attention weights as convolutions or as matrices.
        config: what `codec.original_layout_config.infer_config` found for them.

    Returns:
        The same tensors; names that this layout does not know keep theirs, and the network will not.
    """
    modules = _modules(len(config["block_out_channels"]), int(config["layers_per_block"]))
    back = {there: here for here, there in modules.items()}
    result = {}
    for name, tensor in state.items():
        there, _, leaf = name.rpartition(".")
        here = back.get(there, there)
        is_attention = ".attentions." in here and leaf == "weight" and tensor.ndim == 4
        result[f"{here}.{leaf}" if leaf else name] = tensor.flatten(1) if is_attention else tensor
    return result


def original_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Rename the shapes of a file in diffusers' layout that has no config beside it, for `infer_config`.

    Args:
        shapes: diffusers' name -> shape, without a prefix.
    """
    levels = [int(match[1]) for match in map(_DIFFUSERS_LEVEL.match, shapes) if match]
    blocks = [int(match[2]) for match in map(_DIFFUSERS_LEVEL.match, shapes) if match]
    return _renamed_shapes(shapes, max(levels, default=0) + 1, max(blocks, default=0) + 1)


def is_diffusers_layout(names: Iterable[str]) -> bool:
    """Whether names without a prefix are diffusers', not the original ones."""
    return any(_DIFFUSERS_LEVEL.match(name) for name in names)


def modern_name(name: str) -> str:
    """Return diffusers' present name of a tensor: attention blocks were called query, key, value, proj_attn once."""
    block, _, leaf = name.rpartition(".")
    before, _, last = block.rpartition(".")
    return f"{before}.{_OLD_ATTENTION[last]}.{leaf}" if ".attentions." in name and last in _OLD_ATTENTION else name


def original_limits(config: Mapping[str, Any]) -> list[str]:
    """Say where the original file of a model will not load, or not work, although `to_original` can write it.

    Args:
        config: diffusers' config with `_class_name`.

    Returns:
        One plain sentence each, "<program>: <reason>"; empty = LDM, ComfyUI and diffusers' from_single_file with
        `config=` all take it.

    Raises:
        ModelError: as `to_original`.
    """
    _, attends = _levels(config)
    if config["_class_name"] == "VQModel":
        return ["diffusers, ComfyUI: neither from_single_file nor ComfyUI loads a VQModel"]
    widths = tuple(config["block_out_channels"])
    groups, activation = config["norm_num_groups"], config["act_fn"]
    quant, post_quant = config["use_quant_conv"], config["use_post_quant_conv"]
    limits = []
    if attends:
        limits.append("diffusers: from_single_file does not map attention inside levels, only in the middle")
    if any(width % widths[0] for width in widths):
        limits.append(f"LDM: its configs know widths that are multiples of the first, not {_listed(widths)}")
    for said in (
        f"GroupNorm of {_LDM_GROUPS} groups, not {groups}" * (groups != _LDM_GROUPS),
        f"silu, not {activation}" * (activation not in ("silu", "swish")),
    ):
        if said:
            limits.append(f"LDM, ComfyUI: they always compute {said}")
    if quant != post_quant:
        limits.append("ComfyUI: one of quant_conv and post_quant_conv without the other is not read")
    elif not quant:
        limits.append("LDM: it always has quant_conv and post_quant_conv (ComfyUI does without)")
    fixed = _not_comfys(config)
    if fixed:
        limits.append(f"ComfyUI: {fixed}")
    return limits


def comfy_detects(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Say as what ComfyUI would load a bare VAE file, by its rules: two fixed networks, told apart by a few names.

    It cannot see from a file that a network has other groups in its norms; `original_limits` can.

    Args:
        shapes: name -> shape of every tensor of the file, in the original layout without a prefix, or in diffusers'.

    Returns:
        What it is taken for, like "AutoencoderKL, f8, 4 latent channels"; None where it would not load.
    """
    if any(name in shapes for name in _COMFY_OTHERS):
        return None
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:  # diffusers' names; renamed for four levels only
        shapes = _renamed_shapes(shapes, 4, 2)
    if "decoder.conv_in.weight" not in shapes:
        return None
    deep = "encoder.down.2.downsample.conv.weight" in shapes or "decoder.up.3.upsample.conv.weight" in shapes
    f = 8 if deep else 4
    attention = [shape for name, shape in shapes.items() if name.endswith((".q.weight", ".proj_out.weight"))]
    try:
        config = infer_config(shapes)
    except ModelError:
        return None
    if config["_class_name"] != "AutoencoderKL" or tuple(config["block_out_channels"]) != _COMFY_WIDTHS[f]:
        return None
    if _not_comfys(config) or _levels(config)[1] or any(len(shape) != 4 for shape in attention):
        return None
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        return None
    kind = "AutoencoderKL" if config["use_post_quant_conv"] else "AutoencodingEngine (no quant convs, as SD3 and Flux)"
    return f"{kind}, f{f}, {config['latent_channels']} latent channels"


def _not_comfys(config: Mapping[str, Any]) -> str:
    """Say what about the shape of a network is not that of ComfyUI's two; empty where it is one of them."""
    widths, _, attends = tuple(config["block_out_channels"]), *_levels(config)
    if attends:
        return "its network has attention in the middle only, not inside levels"
    if widths not in _COMFY_WIDTHS.values() or config["layers_per_block"] != 2:
        known = " and ".join(_listed(known) for known in _COMFY_WIDTHS.values())
        return (
            f"it knows networks of widths {known} with 2 blocks a level, not {_listed(widths)} with "
            f"{config['layers_per_block']}"
        )
    if not config["mid_block_add_attention"]:
        return "its network has attention in the middle, this one has not"
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        return f"it knows 3 image channels, not {config['in_channels']} and {config['out_channels']}"
    if config["latent_channels"] == 64:
        return "it takes 64 latent channels for HunyuanImage's autoencoder"
    return ""


def _renamed_shapes(shapes: Mapping[str, Sequence[int]], n_levels: int, n_blocks: int) -> dict[str, Sequence[int]]:
    """As `to_original`, of shapes; names that it does not know keep theirs."""
    modules = _modules(n_levels, n_blocks)
    renamed: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        module, _, leaf = modern_name(name).rpartition(".")
        there = modules.get(module, module)
        renamed[f"{there}.{leaf}"] = (*shape, 1, 1) if _is_matrix(there, len(shape)) else shape
    return renamed


def _is_matrix(module: str, n_axes: int) -> bool:
    """Whether a tensor of a module (original name) is an attention weight as diffusers keeps them."""
    return n_axes == 2 and module.rpartition(".")[2] in _ATTENTION.values()


def _levels(config: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """Return the number of levels, and those with attention, 0 = finest.

    Raises:
        ModelError: the original layout has no such network.
    """
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise ModelError(f"the original layout is one of AutoencoderKL and VQModel; this is {kind}")
    if config.get("norm_type", "group") != "group":
        raise ModelError(f"the original layout has group norms, not {config['norm_type']} ones")
    down, up = tuple(config["down_block_types"]), tuple(config["up_block_types"])[::-1]
    n_levels = len(config["block_out_channels"])
    if not len(down) == len(up) == n_levels:
        raise ModelError(f"{len(down)} down blocks, {len(up)} up blocks and {n_levels} widths")
    for types, known in ((down, {PLAIN_DOWN, ATTENTION_DOWN}), (up, {PLAIN_UP, ATTENTION_UP})):
        if others := sorted(set(types) - known):
            raise ModelError(f"the original layout has no blocks of type {', '.join(others)}")
    attends = frozenset(level for level in range(n_levels) if down[level] == ATTENTION_DOWN)
    if attends != {level for level in range(n_levels) if up[level] == ATTENTION_UP}:
        raise ModelError("in the original layout a level has attention in encoder and decoder, or in neither")
    return n_levels, attends


def _modules(n_levels: int, n_blocks: int) -> dict[str, str]:
    """Return diffusers' name -> original name of every module with tensors that such a network can have.

    Args:
        n_levels: resolutions; f = 2 ** (n_levels - 1).
        n_blocks: residual blocks of a level of the encoder; the decoder has one more.
    """
    names = {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}

    def place(here: str, there: str, parts: Mapping[str, str]) -> None:
        names.update({f"{here}.{part}": f"{there}.{original}" for part, original in parts.items()})

    for side in ("encoder", "decoder"):
        place(side, side, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        for n in range(2):
            place(f"{side}.mid_block.resnets.{n}", f"{side}.mid.block_{n + 1}", _RESNET)
        place(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _ATTENTION)
    for level in range(n_levels):
        down = f"encoder.down_blocks.{level}", f"encoder.down.{level}", n_blocks
        up = f"decoder.up_blocks.{n_levels - 1 - level}", f"decoder.up.{level}", n_blocks + 1
        for here, there, blocks in (down, up):
            for n in range(blocks):
                place(f"{here}.resnets.{n}", f"{there}.block.{n}", _RESNET)
                place(f"{here}.attentions.{n}", f"{there}.attn.{n}", _ATTENTION)
        names[f"{down[0]}.downsamplers.0.conv"] = f"{down[1]}.downsample.conv"
        names[f"{up[0]}.upsamplers.0.conv"] = f"{up[1]}.upsample.conv"
    return names


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
