"""`codec-eval lint`, config.json and codec.json and the model card: what can be said without the weights."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from codec.errors import ModelError
from eval.lint_findings import Findings

_CLASSES = (AutoencoderKL, AutoencoderTiny, VQModel)  # their fields are known here
SMALLEST_TILE = 128  # pixels; below, a tile sees too little of the image for its tone to agree with its neighbours'
_LARGEST_TILE = 4096  # pixels; above, `enable_tiling` does nothing for any image that needs it
_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_WRITTEN_BY_DIFFUSERS = ("block_out_channels",)  # into the config of an AutoencoderTiny, which does not take it
_NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_EMA = re.compile(r"(^|_)ema(_|$)")
_NO_LICENCE = re.compile(r"licen[cs]e\W*(not stated|unknown|none|tbd|todo)\b", re.IGNORECASE)


def read_config(folder: Path, findings: Findings) -> dict[str, Any] | None:
    """Return config.json; None, and a finding, where it is no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        reason = None if isinstance(config, dict) else f"expected a JSON object, got {type(config).__name__}"
    except (OSError, ValueError) as exception:
        config, reason = None, str(exception)
    if reason is None:
        return dict(config)
    findings.add("config-unreadable", "config.json", reason, "save the model again with save_pretrained")
    return None


def network_class(config: Mapping[str, Any], findings: Findings) -> Any:
    """Return the diffusers class that a config names; None, and a finding, for a name that is missing or unknown."""
    name = config.get("_class_name")
    for kind in _CLASSES:
        if kind.__name__ == name:
            return kind
    known = ", ".join(kind.__name__ for kind in _CLASSES)
    what = "is missing" if name is None else f"{name!r} is not a class that lint knows"
    findings.add("class", "_class_name", what, f"name the class that the weights are of; known are {known}")
    return None


def parameters(kind: Any) -> dict[str, Any]:
    """Return what the class takes: field -> default."""
    signature = inspect.signature(kind.__init__).parameters
    return {name: one.default for name, one in signature.items() if name != "self"}


def arguments(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return what diffusers would build the network with: the config's fields that the class takes, else its defaults.

    Without the normalisation, which has no influence on the network and is checked elsewhere.
    """
    fields = {name: config.get(name, default) for name, default in parameters(kind).items()}
    return {name: value for name, value in fields.items() if name not in _NORMALISATION and name != "sample_size"}


def check_fields(config: Mapping[str, Any], kind: Any, findings: Findings) -> None:
    """Check every field but the normalisation: known, of the right type, in agreement with the others."""
    known = parameters(kind)
    for name, value in config.items():
        if name in known:
            _check_type(name, value, known[name], findings)
        elif _EMA.search(name.lower()):
            findings.add("ema-field", name, f"{value!r} says how the model was trained; stale once it is", "remove it")
        elif not name.startswith("_") and not (kind.__name__ == "AutoencoderTiny" and name in _WRITTEN_BY_DIFFUSERS):
            what = f"{value!r}, but {kind.__name__} has no such field: diffusers ignores it"
            findings.add("unknown-field", name, what, "remove it, or correct its name")
    if findings.has("field-type"):
        return
    fields = {**known, **config}
    if "force_upcast" in known and "force_upcast" not in config and kind.__name__ != "AutoencoderTiny":
        what = f"not stated: diffusers takes {known['force_upcast']}, other programs may not"
        findings.add("upcast-missing", "force_upcast", what, "state it: true unless float16 was tried on real images")
    for name in ("in_channels", "out_channels"):
        if fields[name] != 3:
            what = f"{fields[name]}, and an image has 3"
            findings.add("image-channels", name, what, "use a network for RGB; pipelines give and expect 3 channels")
    if kind.__name__ == "AutoencoderTiny":
        _check_tiny(fields, findings)
    else:
        _check_blocks(fields, findings)
    if kind.__name__ == "AutoencoderKL":  # the only one whose tiles follow it
        _check_sample_size(config, fields, findings)


def _check_type(name: str, value: Any, default: Any, findings: Findings) -> None:
    if name in _NORMALISATION or name == "sample_size":
        return
    if name == "vq_embed_dim":
        fits, expected = value is None or _is_count(value), "a number above 0, or null"
    elif isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, tuple):
        fits = isinstance(value, list) and bool(value) and all(isinstance(item, type(default[0])) for item in value)
        expected = f"a list of {type(default[0]).__name__}"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a text"
    elif isinstance(default, int):
        fits, expected = _is_count(value), "a whole number above 0"
    else:
        fits, expected = is_number(value), "a number"
    if not fits:
        findings.add("field-type", name, f"{value!r}, expected {expected}", f"write {expected}, e.g. {_json(default)}")


def _check_tiny(fields: Mapping[str, Any], findings: Findings) -> None:
    encoder, decoder = fields["num_encoder_blocks"], fields["num_decoder_blocks"]
    for side, blocks in (("encoder", encoder), ("decoder", decoder)):
        widths = fields[f"{side}_block_out_channels"]
        if len(widths) != len(blocks):
            what = f"{len(blocks)} entries, {side}_block_out_channels has {len(widths)}"
            findings.add("block-types", f"num_{side}_blocks", what, "one entry for each level")
    shrinks = 2 ** (len(encoder) - 1)
    enlarges = fields["upsampling_scaling_factor"] ** (len(decoder) - 1)
    if shrinks != enlarges:
        what = f"the encoder shrinks by {shrinks}, the decoder enlarges by {enlarges}"
        findings.add("factor", "num_decoder_blocks", what, "as many levels in the decoder as in the encoder")
    stated = fields.get("block_out_channels")
    if isinstance(stated, list) and 2 ** (len(stated) - 1) != shrinks and shrinks == enlarges:
        what = f"{len(stated)} entries, from which pipelines take f {2 ** (len(stated) - 1)}; the network has {shrinks}"
        findings.add("factor", "block_out_channels", what, f"{len(encoder)} entries, as decoder_block_out_channels has")


def _check_blocks(fields: Mapping[str, Any], findings: Findings) -> None:
    widths, groups = fields["block_out_channels"], fields["norm_num_groups"]
    for name, known in _BLOCKS.items():
        types = fields[name]
        for unknown in sorted(set(types) - set(known)):
            findings.add("block-types", name, f"{unknown!r} is no block of an autoencoder", f"use {' or '.join(known)}")
        if len(types) != len(widths):
            what = f"{len(types)} entries, block_out_channels has {len(widths)}"
            findings.add("block-types", name, what, "one entry for each level")
    if uneven := [width for width in widths if width % groups]:
        what = f"{groups} groups do not divide {', '.join(map(str, uneven))} channels"
        findings.add(
            "norm-groups", "norm_num_groups", what, f"state the number that it was trained with, as {_gcd(widths)}"
        )


def _check_sample_size(config: Mapping[str, Any], fields: Mapping[str, Any], findings: Findings) -> None:
    """What cannot work at all; that a size is too small is said once its tiles were tried, see `eval.lint_network`."""
    size, f = fields["sample_size"], 2 ** (len(fields["block_out_channels"]) - 1)
    advice = "state the crop that it was trained on, e.g. 256 or 512"
    if isinstance(size, list):
        what = f"{size}: enable_tiling compares it with a number and fails"
    elif not _is_count(size):
        what = f"{size!r}, expected a whole number of pixels"
    elif size % f:
        what = f"{size} is no multiple of f {f}: tiles of images and of latents do not fit together"
    elif size < 2 * f:
        what = f"{size} is a single latent of f {f}: enable_tiling fails"
    elif size > _LARGEST_TILE:
        what = f"{size}: enable_tiling does nothing for images up to {size} pixels"
    else:
        return
    findings.add("sample-size", "sample_size", what, advice)


def check_codec(folder: Path, config: Mapping[str, Any], model: Any, its_id: str | None, findings: Findings) -> None:
    """Check the codec's files in a folder, where there are some.

    Args:
        folder: of the network.
        config: config.json.
        model: the adapter of the network; None where it could not be built.
        its_id: the decoder id of the weights; None where they could not be loaded as they are.
        findings: takes what is wrong.
    """
    from codec import model_folder  # reads numpy's tensors only

    if not model_folder.is_model_folder(folder):
        return
    again = "export the model again with codec-train export"
    try:
        ours = model_folder.read(folder)
    except ModelError as exception:
        findings.add("codec-json", model_folder.CODEC_JSON, str(exception).removeprefix(f"{folder}: "), again)
        return
    stated = {"f": ours.f, "latent_channels": ours.channels}
    stated |= {name: ours.info[name] for name in ("family", "receptive_field") if name in ours.info}
    stated |= {name: ours.info[name] for name in ("scaling_factor", "shift_factor") if name in ours.info}
    if model is not None:
        real = {"f": model.f, "latent_channels": model.channels, "family": model.family}
        real |= {"receptive_field": model.receptive_field}
        if not findings.has("scaling", "scaling-missing", "shift", "stale-scaling"):  # else said already
            real |= {name: config[name] for name in ("scaling_factor", "shift_factor") if is_number(config.get(name))}
        for name, value in stated.items():
            if name in real and not _same(value, real[name]):
                what = f"{value!r} in {model_folder.CODEC_JSON}, the network and its config.json say {real[name]!r}"
                findings.add("codec-fields", name, what, again)
    if its_id is not None and its_id != ours.decoder_id:
        what = f"{ours.decoder_id} is stated, the weights and config.json have {its_id}: one was changed after export"
        mend = f"{again}, or write {its_id} if the change was meant; files made before will decode with another decoder"
        findings.add("decoder-id", model_folder.CODEC_JSON, what, mend)


def check_card(folder: Path, findings: Findings) -> None:
    """Look for README.md in a folder, or for that of the pipeline that it is a part of, and for a licence in it."""
    places = [folder / "README.md"]
    if (folder.parent / "model_index.json").is_file():
        places.append(folder.parent / "README.md")
    texts = [place.read_text(encoding="utf-8", errors="replace") for place in places if place.is_file()]
    if not texts:
        mend = "write one: data, licence, training, how latents are normalised"
        findings.add("card-missing", "README.md", "no model card: nobody knows what it may be used for", mend)
    elif not any(re.search("licen[cs]e", _NO_LICENCE.sub("", text), re.IGNORECASE) for text in texts):
        mend = 'say under which licence model and data stand (a line "license: ..." at the top, or a sentence)'
        findings.add("card-licence", "README.md", "states no licence", mend)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _same(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) if is_number(a) and is_number(b) else bool(a == b)


def _gcd(widths: list[int]) -> int:
    return math.gcd(*widths, 32)


def _json(value: Any) -> str:
    return json.dumps(value)
