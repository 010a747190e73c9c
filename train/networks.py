"""Networks with random weights, built from a recipe: diffusers' own classes, initialised to train fast."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from train.config import ModelConfig

_ANCHOR = 3.0  # in units of the content's deviation, about 1 at initialisation


def build_network(config: ModelConfig) -> AutoencoderKL:
    """Build a diffusers.AutoencoderKL with random weights (torch's default generator)."""
    n = len(config.block_out_channels)
    network = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_add_attention,
        use_quant_conv=config.use_quant_conv,
        use_post_quant_conv=config.use_quant_conv,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    if config.init == "linear":
        initialize_linear(network)
    return network


@torch.no_grad()
def initialize_linear(network: AutoencoderKL) -> None:
    """Start as a nearly linear pyramid that carries absolute brightness from end to end.

    torch's default shrinks the path that carries the image by 0.58 at every convolution on it, so what the decoder sees
    at first is the residual branches' noise. And the two norms that everything passes, the last of the encoder and of
    the decoder, divide by a deviation that depends on the image, so brightness and contrast are lost there and the
    network takes long to smuggle them past. Here residual branches start at zero (Goyal et al. 2017, arXiv:1706.02677,
    section 5.1, for norms' weights), every other convolution at unit gain, and those two norms as nearly the identity.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith(".conv2"):
                nn.init.zeros_(module.weight)
            elif not name.endswith(".conv1"):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    _anchor(network.encoder.mid_block.resnets[-1].conv2, network.encoder.conv_norm_out)
    _anchor(network.decoder.up_blocks[-1].resnets[-1].conv2, network.decoder.conv_norm_out)


def _anchor(before: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Make a GroupNorm start as nearly the identity on what passes it.

    A constant +-size pattern over the channels of each group makes the deviation that it divides by nearly constant;
    its own weight and bias then undo the pattern.
    """
    assert before.bias is not None
    sign = torch.ones(norm.num_channels)
    sign[1::2] = -1
    before.bias.copy_(_ANCHOR * sign)
    norm.weight.fill_((_ANCHOR**2 + 1) ** 0.5)
    norm.bias.copy_(-_ANCHOR * sign)
