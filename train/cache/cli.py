"""`codec-train cache`: latents of image shards, for diffusion training. Imports torch only when it works."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from codec import options
from codec.console import Exit, error, note
from codec.errors import UsageError
from codec.files import check_writable, write_atomic
from codec.launch import Launch


def cache_command(
    shards: Annotated[
        Path,
        typer.Argument(metavar="SHARDS", help="Folder of tar shards of images, from codec-train shards or anyone."),
    ],
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="Model folder, or a name that `codec models` lists.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the cache; empty, or begun by this command.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="fp16, bf16, int8 (a scale per channel), lcx (entropy-coded), or indices of a VQModel's codebook.",
        ),
    ] = "fp16",
    size: Annotated[
        int, typer.Option(min=1, help="Pixels a side of what is encoded, a multiple of the model's f.")
    ] = 256,
    crop: Annotated[
        str, typer.Option(help="centre: the largest square in the middle; random:N: N squares of any size and place.")
    ] = "centre",
    quality: Annotated[
        int | None,
        typer.Option("-q", "--quality", min=0, max=100, help="Of lcx: 0 smallest .. 100 best.", show_default="90"),
    ] = None,
    latent_psnr: Annotated[
        float | None, typer.Option(help="Of lcx, instead of -q: least PSNR of each latent in dB (peak: 6 deviations).")
    ] = None,
    contexts: Annotated[
        bool, typer.Option("--contexts", help="Of lcx: a tenth smaller, and many times slower to write and to read.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="Images in the network at once, 1 or an even number; for GPUs.")
    ] = 1,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=0, help="Images worked on at once; 0 = one per core.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: Annotated[
        str, typer.Option(help="local: this process and its like of accelerate launch; ray: a Ray cluster's workers.")
    ] = "local",
    as_json: options.Json = False,
) -> int:
    """Encode images and their mirrors once, for many epochs: WebDataset shards of latents or of codebook indices.

    The same command finishes what was interrupted, and encodes only what changed in SHARDS. On many GPUs or machines:
    accelerate launch -m train cache ... with a folder that all of them see.

    Example: codec-train cache shards -m runs/first/model -o latents --format bf16 --size 256
    """
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine}, expected local or ray")
    launch = Launch.from_environment()
    if engine == "ray" and launch.count > 1:
        raise UsageError(f"--engine ray starts its own workers; this is one of {launch.count} processes")

    from codec import model_folder
    from train.cache.build import write_cache  # torch takes seconds to import
    from train.cache.plan import CacheConfig

    config = CacheConfig(
        shards=shards,
        model=model_folder.resolve(model),
        out=out,
        format=format,
        size=size,
        crop=crop,
        quality=quality,
        latent_psnr=latent_psnr,
        contexts=contexts,
        batch=batch,
        jobs=jobs,
        device=device,
        dtype=dtype,
    )
    report = write_cache(config, launch, engine)
    if launch.index == 0:
        for _, reason in report.bad:
            error(reason)
        facts = {"n_encoded": report.n_encoded, "n_removed": report.n_removed, "changed": report.changed}
        print(json.dumps({**report.header, **facts}) if as_json else _sentence(out, report.header, facts), flush=True)
    launch.gather(None)  # a launcher ends the others as soon as one has failed: not before the summary is out
    return Exit.SOME_FAILED if report.bad else Exit.OK


def _sentence(out: Path, header: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    n, statistics = header["n_samples"], header["statistics"]
    what = "indices" if "n_used" in statistics else "latents"
    parts = [
        f"{out}: {'done' if facts['changed'] else 'nothing to do, already complete'}: {n} samples of "
        f"{header['n_images']} images in {len(header['shards'])} shards, {header['size_bytes'] / 1e6:.1f} MB, "
        f"{header['size_bytes'] / n:.0f} bytes each ({header['payload_bytes'] / n:.0f} of {what})",
        f"{facts['n_encoded']} encoded, {n - facts['n_encoded']} kept, {facts['n_removed']} removed",
    ]
    if "n_used" in statistics:
        size = header["settings"]["codebook"]["size"]
        parts.append(
            f"{statistics['n_used']} of {size} codebook vectors used, perplexity {statistics['perplexity']:.1f}, "
            f"{statistics['entropy_bits']:.2f} bits an index by itself"
        )
    elif statistics["psnr_db"] is not None:
        parts.append(f"latent PSNR {statistics['psnr_db']:.1f} dB (SNR {statistics['snr_db']:.1f} dB)")
    if header["n_bad"]:
        parts.append(f"{header['n_bad']} images bad, see bad_images.jsonl")
    return "; ".join(parts)


def cache_bench_command(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE...", help="Finished caches of the same images.")],
    n_images: Annotated[int, typer.Option(min=1, help="Samples read in a block; 1 or more.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Blocks of each side, which take turns; 1 or more.")] = 5,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write everything measured here, as JSON.")
    ] = None,
) -> int:
    """Measure formats of a latent cache: bytes, error, and reading in one process against one .npy file per image.

    Set the threads with OMP_NUM_THREADS; measure on a machine that does nothing else.

    Example: codec-train cache-bench latents/fp16 latents/int8 latents/lcx -o bench.json
    """
    if out is not None:
        check_writable(out.parent)

    from train.cache.bench import compare_formats, table  # torch takes seconds to import
    from train.journal import environment

    result = {"benchmark": "latent cache", **environment(), **compare_formats(caches, n_images, repeats, note)}
    print("\n".join(table(result)))
    if out is not None:
        write_atomic(out, (json.dumps(result, indent=2) + "\n").encode())
        print(out)
    return Exit.OK
