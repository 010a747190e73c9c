"""How much memory coding an image takes, and how much there is. Imports torch.

estimate(model, height, width, "decode", tiled=False) <= available(device)   ->  whole, else tiled
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, AutoencoderTiny

from codec import fast, plan, tiled_tiny
from codec.errors import ModelError
from codec.latent_model import LatentModel
from codec.rows import BAND_BYTES, KL_STRIPE_BYTES, TINY_STRIPE_BYTES, Stripes
from codec.two_level import SCALE, TwoLevelVQModel

What = Literal["encode", "decode"]

_ROOT = Path("/")
_UNLIMITED = 2**60  # cgroups write no limit as a huge number
_BUFFERS = 6 * KL_STRIPE_BYTES + 4 * BAND_BYTES  # of an AutoencoderKL: stripes in work, bands half full or half read
_CONSTANT = 64 * 2**20  # what the libraries allocate at their first use
_STRIPED = 128 * 2**20  # buffers of `codec.kernels`
_TINY_SLACK = 1.25  # what the allocator cannot use of the memory between buffers
_DC_MAPS = {"ResBlock": (3, 2), "EfficientViTBlock": (15, 13)}  # of a block's width at once: in the dtype, in float32
_WHOLE_SLACK = 1.3  # copies in other layouts that the convolutions make


def estimate(
    model: LatentModel,
    height: int,
    width: int,
    what: What,
    tiled: bool,
    *,
    budget_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Return what one image will take beyond the loaded network, in bytes: its peak, to about 20 %.

    Args:
        model: the network that will run.
        height: of the image, in pixels.
        width: of the image.
        what: "encode" or "decode".
        tiled: by `tiled.encode` or `tiled.decode` rather than by the model's own methods.
        budget_bytes: as it will be given to `tiled`; None: none.
        dtype: as it will be given to `tiled`; None: that of the weights.

    Raises:
        ModelError: tiled, and the network has a part that cannot be run in stripes; or it is of an unknown class.
    """
    f = model.f
    n_pixels = (-(-height // f) * f) * (-(-width // f) * f)
    item_bytes = (dtype or next(model.network.parameters()).dtype).itemsize
    network: Any = model.network
    coder = network.encoder if what == "encode" else network.decoder
    if isinstance(network, plan.CLASSES):
        if tiled:
            return _kl_tiled(coder, f, n_pixels, item_bytes, budget_bytes)
        return _kl(network, coder, f, n_pixels, item_bytes)
    if isinstance(network, TwoLevelVQModel):
        inside = _within(network, what, n_pixels // (f // SCALE) ** 2)
        if tiled:
            return max(_kl_tiled(coder, f // SCALE, n_pixels, item_bytes, budget_bytes), inside + 3 * n_pixels)
        return max(_kl(network, coder, f // SCALE, n_pixels, item_bytes), inside)
    if isinstance(network, AutoencoderDC) and tiled:
        raise ModelError(f"a {type(network).__name__} cannot be run in stripes")
    if isinstance(network, AutoencoderDC):
        return _dc(network, what, n_pixels, item_bytes)
    if not isinstance(network, AutoencoderTiny):
        raise ModelError(f"no estimate of the memory that a {type(network).__name__} needs")
    layers = list(coder.layers)
    widest = max(layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d))
    whole = widest * n_pixels * item_bytes
    if tiled:
        columns = width if what == "encode" else -(-width // f)
        stripes = Stripes(dtype=dtype or next(network.parameters()).dtype, size_bytes=TINY_STRIPE_BYTES)
        held = int(_TINY_SLACK * tiled_tiny.buffer_bytes(layers, columns, stripes))
        return min(held, 5 * whole) + 4 * n_pixels + _CONSTANT
    if fast.compute_dtype(network) is not None:  # it may keep float32 whatever it computes in
        whole = widest * n_pixels * 4
    return 3 * whole + 24 * n_pixels + _CONSTANT


def _kl_tiled(coder: torch.nn.Module, f: int, n_pixels: int, item_bytes: int, budget_bytes: int | None) -> int:
    steps = plan.fit(plan.read(coder, f), n_pixels, item_bytes, for_maps(budget_bytes, n_pixels))
    held = max(plan.held_bytes(steps, index, n_pixels, item_bytes) for index in range(len(steps)))
    return held + 3 * n_pixels + _BUFFERS + _CONSTANT


def _kl(network: Any, coder: torch.nn.Module, f: int, n_pixels: int, item_bytes: int) -> int:
    try:
        steps = plan.read(coder, f)
    except ModelError:  # not one that can be run in stripes: as if each block were a resnet
        widest = max(int(channels) for channels in network.config.block_out_channels[:2])
        return 16 * widest * n_pixels * item_bytes + _CONSTANT
    maps = int(_WHOLE_SLACK * max(plan.whole_bytes(steps, at, n_pixels, item_bytes) for at in range(len(steps))))
    if fast.compute_dtype(network) is not None:  # it may run either way
        maps = max(maps, plan.striped_bytes(steps, n_pixels) + _STRIPED)
    return maps + 24 * n_pixels + _CONSTANT


def _within(network: TwoLevelVQModel, what: What, n_features: int) -> int:
    """Count what encodes and decodes the coarse level, after the fine one's encoder and whole; nothing to decode.

    Args:
        network: in float32 there.
        what: see `estimate`.
        n_features: positions of the fine level.
    """
    if what == "decode":
        return 0
    features: int = network.encoder.conv_out.out_channels * n_features * torch.float32.itemsize
    parts = (network.coarse_encoder, network.coarse_decoder)
    return features + max(_kl(network, part, SCALE, n_features, torch.float32.itemsize) for part in parts)


def _dc(network: Any, what: What, n_pixels: int, item_bytes: int) -> int:
    """Count the maps of the blocks at each level; norms and attention compute in float32 whatever the others do."""
    side = "encoder" if what == "encode" else "decoder"
    config = network.config
    widths, types = config[f"{side}_block_out_channels"], config[f"{side}_block_types"]
    most = 0
    for level, (width, n_layers) in enumerate(zip(widths, config[f"{side}_layers_per_block"], strict=True)):
        narrow, wide = _DC_MAPS[types if isinstance(types, str) else types[level]]
        held = narrow * item_bytes + wide * torch.float32.itemsize
        most = max(most, bool(n_layers) * held * width * n_pixels // 4**level)
    return most + 24 * n_pixels + _CONSTANT


def for_maps(budget_bytes: int | None, n_pixels: int) -> int | None:
    """Return what of a budget remains for the feature maps of an `AutoencoderKL`; None for no budget."""
    if budget_bytes is None:
        return None
    return budget_bytes - 3 * n_pixels - _BUFFERS - _CONSTANT


def available(device: str | torch.device = "cpu", root: Path = _ROOT) -> int:
    """Return what can be allocated now, in bytes.

    Args:
        device: a GPU's own memory, or the machine's within the limits of this process's control groups.
        root: where proc/ and sys/ are; for tests.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _meminfo(root, "MemAvailable")
    return max(0, min([free, *(limit - used for limit, used in _groups(root))]))


def total(device: str | torch.device = "cpu", root: Path = _ROOT) -> int:
    """Return the memory that there is, in use or not; see `available`. It does not change while a machine works."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _ in _groups(root))])


def _meminfo(root: Path, name: str) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024  # the file says kB
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: what is installed


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of every control group around this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = base / group.lstrip("/")
        for folder in (inside, *inside.parents):
            yield from _group(folder, *names)
            if folder == base:
                break


def _group(folder: Path, limit_name: str, used_name: str, reclaimable_name: str) -> Iterator[tuple[int, int]]:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        statistics = (folder / "memory.stat").read_text().splitlines()
    except OSError:  # a container sees its own group only, as the root
        return
    if limit == "max" or int(limit) >= _UNLIMITED:
        return
    cache = next((int(line.split()[1]) for line in statistics if line.startswith(f"{reclaimable_name} ")), 0)
    yield int(limit), used - cache
