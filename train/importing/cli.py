"""`codec-train import`: somebody's autoencoder as a model folder. Imports torch and diffusers only when it works."""

from pathlib import Path
from typing import Annotated

import typer

from codec import options
from codec.console import Exit, error, note

_N_IMAGES = 200


def import_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_DIR",
            help="A folder of diffusers (an autoencoder, or a pipeline with one in vae/), or weights: .safetensors, "
            ".ckpt, .pt, .pth, .bin, in diffusers' or the original (LDM, CompVis, taming) layout, alone or inside a "
            "whole checkpoint.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The model folder; must be empty or not exist.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="SHARDS_OR_FOLDER",
            help="Images that latents are measured on and entropy tables fitted to; without any, "
            "a VQ model becomes a folder for diffusers alone, and others are refused. "
            "None of them should be one that you will test on.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Of the images, use N, drawn at random; 512 x 512 from their middle.")
    ] = _N_IMAGES,
    name: Annotated[str, typer.Option(help="Name of the model.", show_default="the folder's")] = "",
    averaged: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Averaged (EMA) weights, or the last ones, of a training checkpoint.",
            show_default="averaged where there are any",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A diffusers config.json (or its folder) with what a file of weights does not say: scaling_factor, "
            "shift_factor, norm_num_groups ...",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
) -> int:
    """Make a model folder of a published autoencoder: weights unchanged, entropy tables fitted to its latents.

    Code in a pickle is refused, never run. scaling_factor is what the source or --config states, else it is measured.

    Example: codec-train import vae-ft-mse.safetensors -o models/ft-mse --images shards/ --config sd/vae/config.json
    """
    from codec.engine import pick_device
    from train.importing.convert import ImportOptions, import_model

    imported = import_model(
        source,
        out,
        ImportOptions(
            images=images, n_images=limit, name=name, averaged=averaged, config=config, device=pick_device(device)
        ),
    )
    info, origin = imported.info, imported.info["imported"]
    if origin["left_out"]:
        note(f"left out: {origin['left_out']}")
    if origin["n_averaged"]:
        note(f"averaged (EMA) weights: {origin['n_averaged']} of {origin['n_tensors']} tensors")
    for picture, reason in imported.bad:
        error(f"{picture}: {reason} (left out of the statistics)")
    note(
        f"scaling_factor {info['scaling_factor']:.6g}, shift_factor {info['shift_factor']:.6g}: "
        + (f"from {origin['scaling_from']}" if origin["scaling_from"] != "measured" else "measured, nothing stated it")
    )
    if "stream_id" not in info:
        print(f"{out}: {info['name']}, a VQModel, f{info['f']}: for diffusers; give --images to encode with it")
        return Exit.OK
    usage = info.get("codebook")
    k = f" {usage['size']} codes (used {usage['usage']:.1%}, perplexity {usage['perplexity']:.0f})," if usage else ""
    print(
        f"{out}: {info['name']}, {info['family']}, f{info['f']}, {info['latent_channels']} channels,{k} decoder "
        f"{info['decoder_id']}, stream {info['stream_id']}; reconstructs at {info['unquantised_psnr']:.2f} dB"
    )
    return Exit.SOME_FAILED if imported.bad else Exit.OK
