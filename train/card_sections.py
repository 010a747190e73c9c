"""The parts of a model card that change when a model gets further formats: where it loads, preview, files, licence.

    config.json + codec.json (formats, preview) + the files that lie there -> sections -> README.md, the rest unchanged

Entry: `update_card`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import nn

from codec import facts, preview
from codec.adapters import CodebookModel, ConditionalKLModel, TwoLevelModel
from codec.files import write_atomic
from codec.latent_model import LatentModel, latent_model
from codec.model_folder import CODEC_TENSORS
from train.formats import FP16_VARIANT, ONNX_FOLDER, config_of, no_single_file, stored_formats
from train.half_precision import Half, from_json
from train.onnx_export import DECODER, ENCODER, TOLERANCE, no_onnx

_CLASSIC = "AutoencoderKL, f8, 4 latent channels"  # what ComfyUI calls the shape of Stable Diffusion's own VAE
_ALL_RIGHTS = (
    "Weights: no licence is granted, so all rights are reserved; ask whoever published them "
    "(`codec-train export FOLDER --licence NAME` states one)."
)


def update_card(folder: Path, network: nn.Module, licence: str = "") -> None:
    """Write the sections anew into README.md of a folder, which is made where there is none.

    Args:
        folder: of the autoencoder itself.
        network: what lies in it.
        licence: of the weights; "" leaves what the card says.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.resolve().name}\n"
    known, formats = facts.read(folder), stored_formats(folder, network)
    text = with_section(text, "Where it loads", where_it_loads(network, known, formats))
    found = preview.read(folder)
    if found is not None:
        text = with_section(text, "Preview", preview_lines(found, "codec.json" if "stream_ids" in known else None))
    text = with_section(text, "Files", _files(folder))
    if licence:
        text = with_licence(text, licence)
    write_atomic(path, text.encode())


def with_section(text: str, title: str, lines: Sequence[str]) -> str:
    """Return Markdown with one section in place of that of this title; "Where it loads" goes first, others last."""
    section = "\n".join([f"## {title}", "", *lines, "", ""])
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        return text[: found.start()] + section + text[found.end() :]
    first = re.search(r"^## ", text, re.MULTILINE)
    if title == "Where it loads" and first:
        return text[: first.start()] + section + text[first.start() :]
    return text.rstrip("\n") + "\n\n" + section


def licence_lines(licence: str, data_licence: str, base: str) -> list[str]:
    """Return the section on licences.

    Args:
        licence: of the weights; "" = none is granted.
        data_licence: of the training images; "" = not stated.
        base: the model that these weights were made from; "" = none.
    """
    return [
        f"- Weights: {licence}." if licence else f"- {_ALL_RIGHTS}",
        f"- Training images: {data_licence or 'not stated'}.",
        *([f"- Made from {base}, whose licence binds these weights too."] if base else []),
    ]


def with_licence(text: str, licence: str) -> str:
    """Return a card that states another licence of the weights: in its section and, where there is one, at the top."""
    top = re.match(r"---\n.*?^---\n", text, re.MULTILINE | re.DOTALL)
    if top:
        text = (
            re.sub(r"^license:.*$", f"license: {licence_id(licence)}", top[0], flags=re.MULTILINE) + text[top.end() :]
        )
    line = f"- Weights: {licence}."
    changed = re.sub(r"^- Weights: .*$", lambda _: line, text, flags=re.MULTILINE)
    return changed if line in changed.splitlines() else with_section(text, "Licence", [line])


def licence_id(licence: str) -> str:
    """Return what model hubs take for `license`: an identifier, or "other"."""
    return licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", licence) else "other"


def where_it_loads(network: nn.Module, known: Mapping[str, Any], formats: Mapping[str, Any]) -> list[str]:
    """Return a table of programs, whether the model loads there, and how or why not.

    Args:
        network: the model.
        known: codec.json.
        formats: what `train.formats.write_formats` found.
    """
    model, kind = latent_model(network), type(network).__name__
    if isinstance(model, ConditionalKLModel):
        return _table([*_conditional_rows(kind), *_float16_rows(network, formats)])
    rows = [
        _diffusers_row(model, kind),
        *_single_file_rows(network, known, formats),
        *_float16_rows(network, formats),
        _onnx_row(network, formats),
        ("other diffusion models", *_other_models(model, known)),
    ]
    if "stream_ids" in known and int(config_of(network)["in_channels"]) == 3:
        rows.append(("latent-codec", "yes", "`codec encode photos -o coded -m FOLDER`"))
    return [*_table(rows), *_shift_lines(model)]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    return ["| where | loads | how, or why not |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _conditional_rows(kind: str) -> list[tuple[str, str, str]]:
    why = "they have no place for the class of an image, without which these latents say little"
    return [
        ("latent-codec, in Python", "yes", "`codec.latent_model.load_conditional(FOLDER)`"),
        ("diffusers; ComfyUI; AUTOMATIC1111, Forge", "no", f"none has a class or a pipeline for a {kind}"),
        ("`codec encode`, caches, `codec-eval`, ONNX", "no", why),
    ]


def _diffusers_row(model: LatentModel, kind: str) -> tuple[str, str, str]:
    if isinstance(model, CodebookModel) and model.fsq_levels:
        how = f"`{kind}.from_pretrained(FOLDER).decode(VECTORS, force_not_quantize=True)`; its own quantisation is not "
        return "diffusers", "decodes", f"{how}that of this lattice: indices are `load_latent_model(FOLDER).indices(x)`"
    if isinstance(model, TwoLevelModel):
        how = (
            "diffusers has no class for it, nor has any pipeline: `codec.latent_model.load_latent_model(Path(FOLDER))`"
        )
        return "diffusers", "no", how
    return "diffusers", "yes", f"`{kind}.from_pretrained(FOLDER)`"


def preview_lines(found: preview.Preview, file: str | None) -> list[str]:
    """Return what the preview is good for, and how it is used.

    Args:
        found: the preview.
        file: where it is stored; None = facts.json.
    """
    shares = ", ".join(f"{colour} {value:.3f}" for colour, value in zip("RGB", found.r2, strict=True))
    return [
        "What a sampler's latents look like, without the decoder: a linear map of normalized latents, fitted to the "
        f"training images averaged over f x f pixels. Share of the variance that it explains: {shares}. ComfyUI calls "
        "the two `latent_rgb_factors` and `latent_rgb_factors_bias`.",
        "",
        "```python",
        f'p = json.load(open("{file or facts.FACTS_JSON}"))["preview"]',
        'x = torch.einsum("dhw,dc->hwc", z, torch.tensor(p["weight"])) + torch.tensor(p["bias"])  # z normalized',
        "image = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()  # (h, w, 3)",
        "```",
    ]


def _single_file_rows(
    network: nn.Module, known: Mapping[str, Any], formats: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    single = formats.get("single_file")
    if single is None:
        why = no_single_file(network) or "not written: `codec-train export FOLDER` writes one"
        return [("diffusers, single file; ComfyUI; AUTOMATIC1111, Forge", "no", why)]
    limits = {who: why for who, _, why in (limit.partition(": ") for limit in single["limits"])}
    against = {who: "; ".join(why for names, why in limits.items() if who in names) for who in ("ComfyUI", "LDM")}
    comfy = single["comfyui"]
    how = f'`AutoencoderKL.from_single_file("{single["file"]}", config=FOLDER)`; without `config=` it is taken for the '
    rows = [("diffusers, single file", "yes", f"{how}VAE of Stable Diffusion 1.5")]
    if comfy:
        note = "it normalizes latents as the diffusion model's format says, not by this model's scaling_factor"
        rows.append(("ComfyUI", "yes", f"`{single['file']}` is taken for: {comfy}; {note}"))
    else:
        rows.append(("ComfyUI", "no", against["ComfyUI"] or "its rules take the file for another kind of model"))
    if comfy != _CLASSIC:
        why = against["LDM"] or "they know the shape of Stable Diffusion's VAE alone: 128, 256, 512, 512, 4 channels"
        rows.append(("AUTOMATIC1111, Forge", "no", why))
    elif "training" in known and not known.get("latents_of"):
        why = "they put a VAE under checkpoints of Stable Diffusion, and these are not its latents"
        rows.append(("AUTOMATIC1111, Forge", "no", why))
    else:
        whose = known.get("latents_of") or "the diffusion model that it was made for"
        rows.append(
            ("AUTOMATIC1111, Forge", "yes", f"`{single['file']}`, under checkpoints with the latents of {whose}")
        )
    return rows


def _float16_rows(network: nn.Module, formats: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    half: Half | None = from_json(formats["float16"]) if "float16" in formats else None
    if half is None:
        rows = [("in float16", "not measured", "`codec-train export FOLDER --fp16` tries it")]
    else:
        word = {"safe": "yes", "imprecise": "less precise", "at risk": "at risk", "overflows": "no"}[half.verdict]
        set_here = isinstance(network, AutoencoderKL) and config_of(network)["force_upcast"]  # others ignore it
        upcast = "; `force_upcast` is set: pipelines decode in float32" * bool(set_here)
        rows = [("in float16", word, half.describe() + upcast)]
    if "fp16" in formats:
        files = ", ".join(f"`{name}`" for name in formats["fp16"]["files"])
        warning = "; OVERFLOWS where it is computed in float16: load it into bfloat16 or float32"
        overflows = half is not None and half.verdict == "overflows"
        rows.append(("float16 files", "yes", f'{files}: `variant="fp16"`{warning * overflows}'))
    else:
        rows.append((f"`{FP16_VARIANT}`", "no", "not written: `codec-train export FOLDER --fp16`"))
    return rows


def _onnx_row(network: nn.Module, formats: Mapping[str, Any]) -> tuple[str, str, str]:
    onnx = formats.get("onnx")
    if onnx is None:
        return ("ONNX", "no", no_onnx(network) or "not written: `codec-train export FOLDER --onnx`")
    sizes = " and ".join(" x ".join(map(str, shape)) for shape in onnx["compared_at"])
    worst = onnx["max_difference"]
    return (
        "ONNX",
        "yes",
        f"`{ONNX_FOLDER}/{ENCODER}`, `{ONNX_FOLDER}/{DECODER}`, opset {onnx['opset']}, any size, raw latents; "
        f"onnxruntime {onnx['onnxruntime']} differs from torch by {worst['encoder']:.1g} and {worst['decoder']:.1g} at "
        f"images of {sizes} (allowed: {TOLERANCE:g})",
    )


def _other_models(model: LatentModel, known: Mapping[str, Any]) -> tuple[str, str]:
    shape = f"f{model.f}, {model.channels} latent channels"
    if known.get("latents_of"):
        return "yes", f"those that use the latents of {known['latents_of']} ({shape}), in place of its VAE"
    if "training" in known:
        return "no", f"these latents ({shape}) are its own: a diffusion model has to be trained on them"
    return "some", f"those that were trained on these latents ({shape})"


def _shift_lines(model: LatentModel) -> list[str]:
    if model.shift_factor == 0:
        return []
    return [
        "",
        "Pipelines of Stable Diffusion 1, 2, XL, LDM, PixArt and DiT ignore `shift_factor` (here "
        f"{abs(model.shift_factor * model.scaling_factor):.2g} of a standard deviation), those of Stable Diffusion 3 "
        "and Flux do not. A diffusion model for the former has to be trained on z * scaling_factor.",
    ]


def _files(folder: Path) -> list[str]:
    """List the weights with size and SHA-256."""
    patterns = ("*.safetensors", "*.bin", f"{ONNX_FOLDER}/*.onnx")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    paths = sorted(found - {folder / CODEC_TENSORS})  # tables, which may be added to
    return [
        "| file | bytes | SHA-256 |",
        "|---|---|---|",
        *(f"| {path.relative_to(folder)} | {path.stat().st_size} | {_sha256(path)} |" for path in paths),
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
