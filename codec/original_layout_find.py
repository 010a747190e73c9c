"""The autoencoder inside whatever a file holds: prefixes, averaged weights, and what else there is.

    names of all tensors -> `find` -> the autoencoder's names without a prefix, where each lies, what is left out

Names may be those of the original layout or diffusers'. Nested dictionaries of a checkpoint are joined by dots
(`state_dict.first_stage_model.encoder.conv_in.weight`). Imports neither torch nor diffusers.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from codec.errors import ModelError

_ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
_AVERAGED = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
_LIT_EMA = "model_ema."  # LDM's averages: parameters' names without their dots
_USUAL = ("first_stage_model.", "vae.", "autoencoder.")
_TRAINING_STATE = re.compile(r"quantize\.(embedding\.)?(cluster_size|embed_avg|initted|used|re_embed)$")

# What else a file may be, told by a piece of one of its names; the first that fits is said.
_OTHERS = (
    (r"(^|\.)lora_(unet|te\d?)_|\.lora_(up|down|A|B)\b", "a LoRA"),
    (r"^control_model\.|controlnet_cond_embedding|^input_hint_block\.|^controlnet_", "a ControlNet"),
    (r"^string_to_param|^emb_params$|^clip_[lg]$", "a textual inversion"),
    (r"^taesd_|(^|\.)(encoder|decoder)\.layers\.0\.weight$", "an AutoencoderTiny (TAESD)"),
    (r"^1\.conv\.0\.weight$|^3\.conv\.0\.weight$", "one half of TAESD"),
    (r"(^|\.)encoder\.stages\.|(^|\.)encoder\.project_in\.", "an AutoencoderDC (DC-AE)"),
    (r"(^|\.)quantize\.(embed|proj)\.weight$", "a Gumbel VQGAN"),
    (r"norm_layer\.(weight|bias)$|\.conv_y\.weight$", "a VQ model with spatial norms (MoVQ)"),
    (r"condition_encoder\.|^decoder\.condition_", "an AsymmetricAutoencoderKL"),
    (r"mix_factor$|time_stack\.|temporal|conv_3d|^encoder\.downsamples\.|^decoder\.upsamples\.", "a video autoencoder"),
    (r"^vquantizer\.", "Stable Cascade's stage A"),
    (r"(double_blocks|joint_blocks|transformer_blocks|x_embedder)\.", "a diffusion transformer or UNet"),
    (r"(^|\.)(input_blocks|time_embed|time_embedding|diffusion_model)\.", "a diffusion UNet"),
    (r"(text_model|transformer\.resblocks|shared\.weight|token_embedding)", "a text encoder"),
    (r"(conv_first|RRDB|body)\.", "an upscaler"),
    (r"(^|\.)(discriminator|perceptual_loss)\.", "a training loss"),
)
_TOO_DIFFERENT = {  # names of autoencoders that have the anchors, and are none of these layouts
    re.compile(r"(^|\.)bn\.running_mean$|(^|\.)encoder\.quant_conv\."): "FLUX.2's autoencoder: import its diffusers "
    "folder instead",
    re.compile(r"mix_factor$|time_stack\."): "a video autoencoder; images only",
    re.compile(r"decoder\..*norm_layer\.weight$"): "a VQ model with spatial norms (MoVQ): import its diffusers folder",
    re.compile(r"(^|\.)quantize\.(embed|proj)\.weight$"): "a Gumbel VQGAN, which VQModel cannot hold",
    re.compile(r"decoder\.condition_encoder\."): "an AsymmetricAutoencoderKL: import its diffusers folder instead",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """The autoencoder of a file.

    Attributes:
        names: name without a prefix -> name in the file.
        prefix: what stood before, "" where nothing did.
        n_averaged: how many of the names are of averaged (EMA) weights.
        left_out: what else the file holds, for one line; empty = nothing.
    """

    names: Mapping[str, str]
    prefix: str
    n_averaged: int
    left_out: str


def find(names: Collection[str], averaged: bool | None = None) -> Found:
    """Find the one autoencoder among the tensors of a file.

    Args:
        names: of all its tensors.
        averaged: True = averaged weights or none; False = not the averaged ones; None = averaged where there are any.

    Returns:
        Where its tensors are.

    Raises:
        ModelError: there is none (says what the file looks like), more than one, or none of that kind.
    """
    prefixes = [name.removesuffix(_ANCHORS[0]) for name in names if name.endswith(_ANCHORS[0])]
    prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]
    known = set(names)
    complete = [prefix for prefix in prefixes if prefix + _ANCHORS[1] in known]
    if not complete:
        raise ModelError(_refusal(names, bool(prefixes)))
    for pattern, what in _TOO_DIFFERENT.items():
        if any(pattern.search(name) for name in names if name.startswith(tuple(complete))):
            raise ModelError(f"this is {what}")
    plain = [prefix for prefix in complete if not _AVERAGED.search(prefix)]
    averages = [prefix for prefix in complete if _AVERAGED.search(prefix)]
    if not plain and averaged is False:
        raise ModelError(f"only averaged (EMA) weights in it, as {averages[0]}*: use --ema")
    if averages and averaged is not False:
        prefix = _only(averages)
        chosen = _below(prefix, names)
        return _found(prefix, chosen, names, n_averaged=len(chosen))
    prefix = _only(plain)
    chosen = _below(prefix, names)
    swapped = _lit_ema(prefix, chosen, known) if averaged is not False else {}
    if averaged and not swapped:
        raise ModelError("no averaged (EMA) weights of an autoencoder in it: use --no-ema")
    return _found(prefix, chosen | swapped, names, n_averaged=len(swapped))


def looks_like(names: Iterable[str]) -> str:
    """Say what a file without an autoencoder seems to be, by its tensors' names; "" = no idea."""
    every = list(names)
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in every):
            return what
    return ""


def _below(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Return the autoencoder's tensors below a prefix."""
    bare = ((name.removeprefix(prefix), name) for name in names if name.startswith(prefix))
    return {short: name for short, name in bare if short.startswith(_PARTS) and not _TRAINING_STATE.match(short)}


def _lit_ema(prefix: str, chosen: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """Return where averages of these tensors lie in LDM's own way; some may have none (they were not trained)."""
    places = {short: f"{prefix}{_LIT_EMA}{short.replace('.', '')}" for short in chosen}
    return {short: place for short, place in places.items() if place in known}


def _found(prefix: str, chosen: Mapping[str, str], names: Iterable[str], *, n_averaged: int) -> Found:
    used = set(chosen.values())
    return Found(
        names=chosen,
        prefix=prefix,
        n_averaged=n_averaged,
        left_out=_summary(name for name in names if name not in used),
    )


def _only(prefixes: list[str]) -> str:
    """Return the prefix to take of several."""
    if len(prefixes) == 1:
        return prefixes[0]
    for usual in _USUAL:
        fitting = [prefix for prefix in prefixes if prefix.endswith(usual)]
        if len(fitting) == 1:
            return fitting[0]
    raise ModelError(f"{len(prefixes)} autoencoders in it: {', '.join(f'{prefix}*' for prefix in sorted(prefixes))}")


def _refusal(names: Collection[str], half: bool) -> str:
    if half or any(name.endswith(_ANCHORS[1]) for name in names):
        missing = _ANCHORS[1 if half else 0]
        return f"no tensor {missing}: one half of an autoencoder only"
    what = looks_like(names)
    some = ", ".join(sorted(names)[:3])
    return "no autoencoder in it" + (f"; it looks like {what}" if what else "") + f" ({len(names)} tensors: {some} ...)"


def _summary(names: Iterable[str]) -> str:
    """Group names by where they lie: "686 of model.diffusion_model, 197 of cond_stage_model"."""
    groups = Counter(_group(name) for name in names)
    return ", ".join(f"{count} of {group}" for group, count in groups.most_common(6)) + (
        f" and {len(groups) - 6} more kinds" if len(groups) > 6 else ""
    )


def _group(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("state_dict", "module")]
    if len(parts) > 1 and parts[0] in ("model", "first_stage_model", "conditioner", "text_encoders"):
        return ".".join(parts[:2])
    return parts[0]
