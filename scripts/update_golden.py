"""Remakes tests/golden: files of format version 1 in every mode, with the latents that a reader must find in them.

    python scripts/update_golden.py

Run it only when the format's version changes: other programs may hold their readers to these files. Old versions stay.
"""

from pathlib import Path

import numpy as np

from codec import bitstream, index_tables, map_tables, model_folder, pictures, tables
from codec.bitstream import Header, Tile
from codec.coding import Coder, Settings
from codec.files import write_atomic
from codec.index_maps import IndexMap, to_grids, to_planes
from codec.index_tables import IndexMode
from codec.pictures import Picture
from codec.tables import Mode

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DECODER_ID = "0123456789abcdef"
CHANNELS, F = 2, 4
K = 20
MAPS = (IndexMap(K, 1), IndexMap(12, 2))


def smooth(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Return (D, h, w) float32 latents with the correlation between neighbours that real ones have."""
    z = rng.normal(size=(CHANNELS, h + 8, w + 8))
    for axis in (1, 2):
        z = sum(np.roll(z, shift, axis) for shift in range(-2, 3)) / np.sqrt(5)
    return (3 * z[:, 4 : 4 + h, 4 : 4 + w] + np.array([1.0, -2.0])[:, None, None]).astype(np.float32)


def remake(folder: Path) -> None:
    """Write the model's tables, the files and the latents."""
    rng = np.random.default_rng(0)
    mean, step = np.array([1.0, -2.0], np.float32), np.array([6.0, 4.0], np.float32)
    info = {"name": "golden", "family": "kl", "f": F, "latent_channels": CHANNELS, "decoder_id": DECODER_ID}
    grids = [smooth(rng, 64, 64) for _ in range(8)]
    path = folder / "model"
    path.mkdir(parents=True, exist_ok=True)
    model = model_folder.write(path, info=info, mean=mean, step=step, table_sets=[tables.fit(grids, mean, step)])
    coder = Coder(model, DECODER_ID)
    z = smooth(rng, 11, 17)
    for mode in Mode:
        write(folder, coder, f"v1-{mode.name.lower()}", z, Settings(quality=30, modes=(mode,)))
    contents = bitstream.unpack((folder / "v1-context.lcx").read_bytes())
    np.save(folder / "v1-context.z.npy", coder.dequantise(contents.header, coder.read(contents)))
    write(folder, coder, "v1-tiles", smooth(rng, 20, 17), Settings(quality=60, tile=8))
    write(folder, coder, "v1-effort", z, Settings(quality=30, effort=9))
    write(folder, coder, "v1-one-pixel", z[:, :1, :1], Settings(quality=0), width=1, height=1)
    gradient = np.indices((44, 68)).sum(axis=0).astype(np.uint8)
    picture = Picture(
        pixels=np.repeat(gradient[..., None], 3, axis=2),
        alpha=gradient * 2,
        gray=True,
        exif=b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        deep=True,
    )
    chunks = [*pictures.to_chunks(picture), bitstream.Chunk(200, b"a chunk of the future that may be passed over")]
    write(folder, coder, "v1-chunks", z, Settings(quality=30), chunks=chunks)
    np.save(folder / "v1-chunks.alpha.npy", picture.alpha)
    extremes = np.resize(np.array([0, 1, -1, 2**20, -(2**20), 65536, -65537, 300], np.int32), (CHANNELS, 11, 17))
    for mode in Mode:
        header = Header(stream_id=model.stream_id, decoder_id=DECODER_ID, quality=99, width=68, height=44, f=F, tile=0)
        table_set = model.table_sets[model.stream_id]
        payload = table_set.encode(extremes, 99, (mode,))[1]
        tile = Tile(mode, bitstream.tile_check(header, 0, extremes), payload)
        save(folder, f"v1-extremes-{mode.name.lower()}", bitstream.pack(header, [tile]), extremes)


def remake_vq(folder: Path) -> None:
    """Write index tables, files of codebook indices in every mode, and the indices."""
    rng = np.random.default_rng(1)
    codebook = rng.normal(size=(K, CHANNELS)) * 3 + np.array([1.0, -2.0])
    info = {"name": "golden-vq", "family": "vq", "f": F, "latent_channels": CHANNELS, "decoder_id": DECODER_ID}
    fitted = index_tables.fit([nearest(smooth(rng, 64, 64), codebook)[0] for _ in range(8)], codebook)
    path = folder / "vq-model"
    path.mkdir(parents=True, exist_ok=True)
    coder = Coder(model_folder.write_vq(path, info=info, index_tables=[fitted]), DECODER_ID)
    indices = nearest(smooth(rng, 11, 17), codebook)
    for mode in IndexMode:
        write(folder, coder, f"vq-{mode.name.lower()}", indices, Settings(modes=(mode,)))
    write(folder, coder, "vq-tiles", nearest(smooth(rng, 20, 17), codebook), Settings(tile=8))
    write(folder, coder, "vq-one-pixel", indices[:, :1, :1], Settings(), width=1, height=1)
    every = np.arange(11 * 17, dtype=np.int32).reshape(1, 11, 17) % K
    write(folder, coder, "vq-every-code", every, Settings(modes=(IndexMode.CONTEXT,)))


def remake_maps(folder: Path) -> None:
    """Write tables of two index maps, files of them, and the planes of their indices."""
    rng = np.random.default_rng(2)
    codebooks = [rng.normal(size=(each.codebook_size, CHANNELS)) * 3 + np.array([1.0, -2.0]) for each in MAPS]

    def indices(h: int, w: int) -> np.ndarray:
        fine = smooth(rng, 2 * h, 2 * w)
        levels = (fine.reshape(CHANNELS, h, 2, w, 2).mean(axis=(2, 4)), fine)
        return to_planes([nearest(z, vectors)[0] for z, vectors in zip(levels, codebooks, strict=True)])

    grids = zip(*(to_grids(indices(32, 32), MAPS) for _ in range(8)), strict=True)
    info = {"name": "golden-maps", "family": "vq", "f": F, "latent_channels": 5 * CHANNELS, "decoder_id": DECODER_ID}
    path = folder / "maps-model"
    path.mkdir(parents=True, exist_ok=True)
    fitted = map_tables.fit(MAPS, list(grids), codebooks)
    coder = Coder(model_folder.write_vq(path, info=info, index_tables=[fitted]), DECODER_ID)
    write(folder, coder, "maps-context", indices(11, 17), Settings(modes=(IndexMode.CONTEXT,)))
    write(folder, coder, "maps-tiles", indices(10, 9), Settings(tile=4))
    write(folder, coder, "maps-one-pixel", indices(1, 1), Settings(), width=1, height=1)


def nearest(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Return the codes of (D, h, w) latents, (1, h, w) int32."""
    distance = ((z[:, None] - codebook.T[:, :, None, None]) ** 2).sum(axis=0)
    found: np.ndarray = distance.argmin(axis=0).astype(np.int32)
    return found[None]


def write(
    folder: Path,
    coder: Coder,
    name: str,
    z: np.ndarray,
    settings: Settings,
    width: int = 0,
    height: int = 0,
    chunks: list[bitstream.Chunk] | None = None,
) -> None:
    """Code latents, and keep what a reader finds."""
    data = coder.code(z, width or z.shape[2] * F, height or z.shape[1] * F, settings, chunks or []).data
    save(folder, name, data, coder.read(bitstream.unpack(data)))


def save(folder: Path, name: str, data: bytes, indices: np.ndarray) -> None:
    """Write a file and its latents."""
    write_atomic(folder / f"{name}.lcx", data)
    np.save(folder / f"{name}.npy", indices)


if __name__ == "__main__":
    remake(GOLDEN)
    remake_vq(GOLDEN)
    remake_maps(GOLDEN)
