"""A model folder that comes with the package: the weights once, in float16, and nothing that only others need.

    model folder -> weights in float16 -> config.json, weights + codec.json, codec.safetensors + README.md, LICENSE

The codec, and diffusers' `from_pretrained`, load it into float32 all the same. Both ids are those of the folder that it
was made of (they are over float16), so each decodes the other's files. Entry: `ship`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codec import model_folder
from codec.errors import ModelError, UsageError
from codec.files import check_writable, write_atomic
from codec.latent_model import decoder_id, load_network
from train.card_sections import update_card
from train.export import save_network
from train.export_folder import check_empty
from train.formats import FP16_VARIANT, check_folder, outputs, stored_formats, weights_digest
from train.half_precision import from_json, measure_half

LARGEST_BYTES = 16 * 2**20
LICENCE_FILE = "LICENSE"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def ship(source: Path, out: Path, *, licence_file: Path, licence: str = "") -> dict[str, Any]:
    """Write the folder, whose name becomes the model's.

    Args:
        source: a model folder of the codec; only read.
        out: a new folder.
        licence_file: of the weights; goes along as LICENSE.
        licence: in a few words, for the card and for `codec models`; "" = as they are stated in the source.

    Returns:
        What was written: ids, bytes of the weights, largest change of the fixture's image by the rounding.

    Raises:
        ModelError: no model of the codec; its weights overflow in float16, are not those that codec.json states, or
            more than 16 MiB; loaded again they give something else.
        UsageError: `out` is in use or cannot be written; no licence.
    """
    folder = model_folder.read(source)
    network: Any = load_network(source).eval().requires_grad_(False)
    if not licence_file.is_file():
        raise UsageError(f"{licence_file}: no such file; name the licence of the weights with --licence-file")
    licence = licence or folder.info.get("licence", "")
    if not licence:
        raise UsageError(f"{source}: states no licence of the weights; say it in a few words with --licence")
    its_id = decoder_id(network)
    if its_id != folder.decoder_id:
        raise ModelError(f"{source}: its decoder is {its_id}, codec.json says {folder.decoder_id}: export it again")
    known = stored_formats(source, network).get("float16")
    half = measure_half(network) if known is None else from_json(known)
    before = outputs(network)[1]
    network.half()
    overflowing = [name for name, tensor in network.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if overflowing:
        raise ModelError(f"{source}: weights that float16 cannot hold: {overflowing[0]}")
    check_empty(out)
    check_writable(out)
    try:
        save_network(network, out)
        size_bytes = (out / WEIGHTS).stat().st_size
        if size_bytes > LARGEST_BYTES:
            raise ModelError(
                f"{source}: {size_bytes / 2**20:.1f} MiB in float16, at most {LARGEST_BYTES >> 20} are shipped"
            )
        check_folder(network.float(), out)
        shutil.copyfile(source / model_folder.CODEC_TENSORS, out / model_folder.CODEC_TENSORS)
        shutil.copyfile(licence_file, out / LICENCE_FILE)
        formats = {"float16": half.to_json(), "weights": weights_digest(network)}
        info = {**folder.info, "name": out.resolve().name, "licence": licence, "shipped": "float16", "formats": formats}
        write_atomic(out / model_folder.CODEC_JSON, (json.dumps(info, indent=2) + "\n").encode())
        _write_card(source, out, network, licence)
        again = model_folder.read(out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return {
        "folder": str(out),
        "stream_id": again.stream_id,
        "decoder_id": again.decoder_id,
        "weights_bytes": size_bytes,
        "largest_change": float((outputs(network)[1] - before).abs().max()),
        "float16": half.verdict,
    }


def _write_card(source: Path, out: Path, network: nn.Module, licence: str) -> None:
    """Write the source's card under the new name; what it says of files and formats is written anew."""
    path, name = source / "README.md", out.resolve().name
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {name}\n"
    note = (
        f"Comes with latent-codec as `{name}`: `codec encode` takes it by this name, and "
        f'`codec.Codec.load("{name}").folder` is this folder. The weights are the trained ones, rounded to float16; '
        f"whoever computes in float32 loads them as they are. Licence: [{LICENCE_FILE}]({LICENCE_FILE})."
    )
    text = re.sub(r"^# .*$", lambda _: f"# {name}\n\n{note}", text, count=1, flags=re.MULTILINE)
    write_atomic(out / "README.md", text.replace("-m THIS_FOLDER", f"-m {name}").encode())
    update_card(out, network, licence)
    rows = (out / "README.md").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith(f"| `{FP16_VARIANT}` |")]  # the weights are in float16 themselves
    write_atomic(out / "README.md", "".join(kept).encode())
