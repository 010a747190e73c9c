"""More image channels for an autoencoder that exists: its first and last convolutions are inflated.

(O, 3, k, k) weight of the first convolution -> (O, C, k, k), zero for the new channels: latents stay as they were
(3, I, k, k) weight of the last one          -> (C, I, k, k), the first three images' channels stay as they were
"""

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from codec.errors import UsageError

_OPAQUE = 1.0  # what both classes put out for alpha 255


def image_channels_of(network: nn.Module) -> int:
    """Return C of an autoencoder, from its config."""
    config: Any = network.config
    return int(config.in_channels)


def inflate(network: nn.Module, image_channels: int, *, alpha: bool) -> nn.Module:
    """Give an autoencoder more image channels, behind those it has.

    Args:
        network: an AutoencoderKL or AutoencoderTiny; left as it is.
        image_channels: C, not less than it has now.
        alpha: the new channel is alpha, and starts opaque; else new channels start as the mean of the others.

    Returns:
        A network of the same class, whose latents of C channels are those of the first ones until it is trained;
        `network` itself where it has C channels already.

    Raises:
        UsageError: it has more, or is of another class.
    """
    before = image_channels_of(network)
    if before == image_channels:
        return network
    name = type(network).__name__
    if before > image_channels or not isinstance(network, AutoencoderKL | AutoencoderTiny):
        raise UsageError(
            f"model.image_channels = {image_channels}: the {name} of model.init_from has {before}; channels can only "
            "be added, to an AutoencoderKL or AutoencoderTiny"
        )
    known = inspect.signature(type(network).__init__).parameters  # a config may hold what other programs wrote into it
    config = {key: value for key, value in dict(network.config).items() if key in known}
    wider: nn.Module = type(network)(**config | {"in_channels": image_channels, "out_channels": image_channels})
    first, last = _ends(network)
    state = network.state_dict()
    new = wider.state_dict()
    for key in (f"{first}.weight", f"{last}.weight", f"{last}.bias"):
        if key in state:
            state[key] = _extended(state[key], new[key].shape, output=key.startswith(last), alpha=alpha)
    wider.load_state_dict(state)
    return wider.train(network.training)


def _ends(network: nn.Module) -> tuple[str, str]:
    """Return the names of the convolutions that read and that write pixels."""
    if isinstance(network, AutoencoderTiny):
        return "encoder.layers.0", f"decoder.layers.{len(network.decoder.layers) - 1}"
    return "encoder.conv_in", "decoder.conv_out"


def _extended(tensor: torch.Tensor, shape: torch.Size, *, output: bool, alpha: bool) -> torch.Tensor:
    """Return a weight or bias with the new channels behind the old ones."""
    wide = tensor.new_zeros(shape)
    n = tensor.shape[0 if output else 1]
    if not output:
        wide[:, :n] = tensor
        return wide
    wide[:n] = tensor
    if not alpha:
        wide[n:] = tensor.mean(dim=0)
    elif tensor.ndim == 1:
        wide[n:] = _OPAQUE
    return wide
