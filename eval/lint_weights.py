"""`codec-eval lint`, the weights: which files, which names, which shapes, and what config.json says of them.

    files -> tensors -> the names of diffusers now -> config.json, corrected where the weights know better -> network

Goes on where `codec.latent_model.load_network` refuses, so that one run names all that has to be mended.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from codec.model_folder import CODEC_JSON
from eval.lint_findings import Findings

Tensors = dict[str, torch.Tensor]

_STEM = "diffusion_pytorch_model"
_EMA = re.compile(r"(^|[._])ema([._]|$)|(^|\.)(cluster_size|embed_avg)$")
_TRAINING = re.compile(r"^(loss|discriminator|disc|optimizer|lpips|perceptual_loss|teacher)\.")
_ORIGINAL = re.compile(r"^(first_stage_model\.)?(encoder\.(down|mid)|decoder\.(up|mid))\.")
_WRAPPERS = ("module.", "_orig_mod.", "first_stage_model.", "vae.", "model.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SAVE_AGAIN = "load the model with diffusers and save it again with save_pretrained"


def read_tensors(folder: Path, findings: Findings) -> Tensors | None:
    """Read the weights that diffusers would read, or failing that those that were meant; None where there are none."""
    files = _find(folder, findings)
    tensors: Tensors = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= _from_pickle(path)
        except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as exception:
            findings.add("weights-damaged", path.name, f"cannot be read: {exception}", "copy or download it again")
            return None
    if not tensors:
        return None
    narrow = sorted({_dtype(tensor) for tensor in tensors.values() if tensor.is_floating_point()} - {"F32", "F64"})
    wide = any(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors.values())
    if narrow and not wide and not findings.has("weights-variant") and not _meant_half(folder):
        what = f"all tensors are {', '.join(narrow)}: enough to use the model, too little to train it further"
        mend = f"publish the float32 weights, and these beside them as {_STEM}.fp16.safetensors (variant)"
        findings.add("weights-half", files[0].name, what, mend)
    return tensors


def _meant_half(folder: Path) -> bool:
    """Whether a model of the codec says that it was made in float16 alone, to come with the package."""
    try:
        return bool(json.loads((folder / CODEC_JSON).read_text(encoding="utf-8"))["shipped"] == "float16")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _find(folder: Path, findings: Findings) -> list[Path]:
    main, index, unsafe = (folder / f"{_STEM}{end}" for end in (".safetensors", ".safetensors.index.json", ".bin"))
    if main.is_file():
        return [main]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / str(name) for name in names]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exception:
            reason = f"{type(exception).__name__}: {exception}"
            findings.add("weights-damaged", index.name, f"cannot be read: {reason}", "copy or download it again")
            return []
    if unsafe.is_file():
        what = "a pickle, which can run code when it is loaded, and no safetensors beside it"
        findings.add("weights-unsafe", unsafe.name, what, f"{_SAVE_AGAIN} (safe_serialization=True)")
        return [unsafe]
    variants = sorted([*folder.glob(f"{_STEM}.*.safetensors"), *folder.glob(f"{_STEM}.*.bin")])
    if variants:
        variant = variants[0].name.split(".")[1]
        what = f"only weights of the variant {variant!r}: from_pretrained without variant= finds nothing"
        findings.add("weights-variant", variants[0].name, what, f"add the plain {main.name}, in float32")
        return variants[:1]
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and path.name != "codec.safetensors"
    )
    what = f"no {main.name}" + (
        f"; there is {', '.join(others[:3])}, which diffusers does not look for" if others else ""
    )
    mend = "convert or rename it" if others else "copy the weights into the folder"
    findings.add("weights-missing", main.name, what, mend)
    return []


def _from_pickle(path: Path) -> Tensors:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a state dict, got {type(loaded).__name__}")
    return {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "F32", "float64": "F64"}.get(name, name)


def renamed(tensors: Tensors, findings: Findings) -> Tensors | None:
    """Return the tensors under the names of today's diffusers, without what is no part of the network.

    None where the names are those of the original latent-diffusion code, which other tools convert.
    """
    if any(_ORIGINAL.match(name) for name in tensors) and not any(".resnets." in name for name in tensors):
        first = next(name for name in tensors if _ORIGINAL.match(name))
        what = f"{first} and others: the names of the original latent-diffusion code"
        mend = "convert it with diffusers' from_single_file and save_pretrained"
        findings.add("original-keys", "weights", what, mend)
        return None
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            what = f"every name begins with {wrapper!r}, which diffusers does not know"
            findings.add("keys-unexpected", "weights", what, f"remove {wrapper!r} from the names")
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    for code, pattern in (("ema-keys", _EMA), ("training-keys", _TRAINING)):
        strangers = sorted(name for name in tensors if pattern.search(name))
        if strangers:
            averages = "; publish the averages themselves if they are the better weights" * (code == "ema-keys")
            what = f"{_some(strangers)}: diffusers ignores them, a stricter loader fails"
            findings.add(code, "weights", what, f"save the network's own tensors only{averages}")
            tensors = {name: tensor for name, tensor in tensors.items() if name not in set(strangers)}
    old = sorted(name for name in tensors if _modern(name) != name)
    if old:
        what = f"{_some(old)}: diffusers renames them while it loads, other programs do not know them"
        findings.add("attention-names", "weights", what, _SAVE_AGAIN)
    return {_modern(name): tensor for name, tensor in tensors.items()}


def _modern(name: str) -> str:
    if ".attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def check_values(tensors: Tensors, findings: Findings) -> None:
    """Look for NaN and infinity."""
    bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        first = next(iter(sorted(bad)))
        what = f"{_some(sorted(bad))}: NaN or infinite (measured {bad[first]} of {tensors[first].numel()} in the first)"
        findings.add("weights-nonfinite", first, what, "go back to an earlier checkpoint, or copy the file again")


def corrected(arguments: Mapping[str, Any], kind: Any, tensors: Tensors, findings: Findings) -> dict[str, Any]:
    """Return what to build the network with: config.json's fields, or what the weights say where they disagree."""
    right = dict(arguments)
    name = kind.__name__
    if name == "AutoencoderKL":
        for part in ("quant_conv", "post_quant_conv"):
            there = f"{part}.weight" in tensors
            if bool(right[f"use_{part}"]) != there:
                what = f"{json.dumps(right[f'use_{part}'])}, but the weights have {'a' if there else 'no'} {part}"
                findings.add("quant-conv", f"use_{part}", what, f"write {json.dumps(there)}")
                right[f"use_{part}"] = there
    layer, axis = {
        "AutoencoderKL": ("decoder.conv_in.weight", 1),
        "AutoencoderTiny": ("decoder.layers.0.weight", 1),
        "VQModel": ("decoder.conv_in.weight", 1),
    }[name]
    if layer in tensors and tensors[layer].ndim == 4 and tensors[layer].shape[axis] != right["latent_channels"]:
        channels = int(tensors[layer].shape[axis])
        what = f"{right['latent_channels']}, but {layer} takes {channels}"
        findings.add("latent-channels", "latent_channels", what, f"write {channels}")
        right["latent_channels"] = channels
    codebook = tensors.get("quantize.embedding.weight")
    if name == "VQModel" and codebook is not None and codebook.ndim == 2:
        dimensions = right["vq_embed_dim"] or right["latent_channels"]
        stated = {"num_vq_embeddings": right["num_vq_embeddings"], "vq_embed_dim": dimensions}
        for (field, value), real in zip(stated.items(), codebook.shape, strict=True):
            if value != real:
                what = f"{value}, but the codebook is {codebook.shape[0]} vectors of {codebook.shape[1]}"
                findings.add("codebook", field, what, f"write {real}")
                right[field] = real
    return right


def build(kind: Any, arguments: Mapping[str, Any], tensors: Tensors, findings: Findings) -> torch.nn.Module | None:
    """Build the network and give it the tensors, in float32, for inference; None where that cannot be done."""
    if findings.has("block-types", "norm-groups", "factor"):
        return None  # what would follow is the same fault in other words
    try:
        with torch.device("meta"):
            network: torch.nn.Module = kind(**{name: _tuple(value) for name, value in arguments.items()})
    except Exception as exception:  # diffusers and torch raise many types for fields that do not go together
        reason = f"{type(exception).__name__}: {exception}"
        findings.add("load", "config.json", f"diffusers cannot build it: {reason}", "correct the fields that it names")
        return None
    wanted = network.state_dict()
    other = [name for name in sorted(wanted.keys() & tensors.keys()) if wanted[name].shape != tensors[name].shape]
    missing, extra = (
        # With other widths there are shortcuts elsewhere too, which goes without saying.
        [name for name in sorted(names) if not (other and ".conv_shortcut." in name)]
        for names in (wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys())
    )
    if missing:
        what = f"{_some(missing)}: diffusers warns and leaves them random"
        findings.add(
            "keys-missing", "weights", what, "save the whole network, or correct the config.json that asks for them"
        )
    if extra:
        what = f"{_some(extra)}: diffusers ignores them, a stricter loader fails"
        findings.add(
            "keys-unexpected", "weights", what, "remove them, or correct the config.json that has no place for them"
        )
    if other:
        have, need = (tuple(which[other[0]].shape) for which in (tensors, wanted))
        what = f"{_some(other)}: {have} in the file, config.json makes it {need}"
        findings.add("shapes", other[0], what, "state the widths, layers and channels that the weights were made with")
    if missing or other:
        return None
    state = {name: tensors[name].float() if tensors[name].is_floating_point() else tensors[name] for name in wanted}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
