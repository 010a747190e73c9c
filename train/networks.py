"""The networks of a run, from a recipe with random weights, or from somebody's folder: diffusers' own classes.

But for those of `codec.adapters.OWN`, which diffusers has none for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from codec import fsq
from codec.codebook_model import CodebookModel
from codec.conditional_kl import ConditionalAutoencoderKL
from codec.errors import UsageError
from codec.latent_model import LatentModel, load_network
from codec.model_folder import resolve
from codec.two_level import TwoLevelModel, TwoLevelVQModel
from train.config import ModelConfig
from train.inflate import image_channels_of, inflate
from train.klt_init import ANCHOR, initialize_klt
from train.loss_config import LatentConfig
from train.vq.config import VQConfig
from train.vq.lattice import corners

_TRAINED = (AutoencoderKL, AutoencoderTiny, VQModel, TwoLevelVQModel)


def build_network(
    config: ModelConfig, *, alpha: bool = True, vq: VQConfig | None = None, classes: Sequence[str] = ()
) -> nn.Module:
    """Build the autoencoder to train, in float32; frozen where only the decoder learns.

    Args:
        config: with `init_from` the folder decides class and shape, and its image channels are inflated to
            `image_channels`; else the weights are random (torch's default generator).
        alpha: whether the fourth of four image channels is alpha; see `train.inflate`.
        vq: of the quantiser of a VQ model; None = the defaults.
        classes: names of those that encoder and decoder are told; empty = they are told nothing.

    Raises:
        ModelError: `init_from` is missing, damaged, or of a class that is not supported.
        UsageError: only the decoder of a network without trained weights is to be trained, or of one that has to learn
            to see more channels; a class that cannot be trained; more image channels than asked for.
    """
    if config.init_from:
        base = load_network(resolve(config.init_from), image_channels=None)
        if not isinstance(base, _TRAINED):
            *names, last = (kind.__name__ for kind in _TRAINED)
            raise UsageError(
                f"model.init_from: a {type(base).__name__}; only {', '.join(names)} and {last} can be trained"
            )
        network = inflate(base, config.image_channels, alpha=alpha and config.image_channels == 4).train()
        if network is not base and decoder_only(config):
            raise UsageError(
                f"model.trainable = decoder: the base has {image_channels_of(base)} image channels, and an encoder "
                f"that stays as it is cannot see {config.image_channels}; set model.trainable=all"
            )
    elif decoder_only(config):
        raise UsageError("model.trainable = decoder: the latents of which autoencoder? Set model.init_from=FOLDER")
    else:
        network = _new_network(config, vq or VQConfig(), classes)
    if decoder_only(config):
        freeze_encoder(network)
    return network


def decoder_only(config: ModelConfig) -> bool:
    """Whether the encoder stays as it is: `model.trainable`, resolved."""
    return config.decoder_only


def keeps_latents(config: ModelConfig, latents: LatentConfig | None = None) -> bool:
    """Whether the latents are meant to be another model's, and so their normalisation is.

    They are for a decoder that is trained alone, a student, and a model that is anchored to another's.
    """
    anchored = latents is not None and latents.anchor_weight > 0
    return decoder_only(config) or config.teacher != "" or anchored


def adopt_normalisation(network: Any, reference: LatentModel) -> None:
    """Give a network, whose raw latents are held to a reference's, that one's normalisation, in its config."""
    theirs: Any = reference.network.config
    settings = {name: theirs.get(name) for name in ("latents_mean", "latents_std")}
    settings |= {"scaling_factor": reference.scaling_factor, "shift_factor": reference.shift_factor}
    network.register_to_config(**{name: value for name, value in settings.items() if name in network.config})


def freeze_encoder(network: nn.Module) -> None:
    """Leave only the decoder, and the convolutions before it, to train."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "post_quant_conv.", "coarse_upsample.")))


def load_teacher(folder: str | Path) -> nn.Module:
    """Load the autoencoder whose latents a student shall learn; frozen, in evaluation mode, float32, on the CPU.

    A student's raw latents are its teacher's normalized ones, as in TAESD: an AutoencoderTiny decodes nothing beyond
    +-3, and its own scaling_factor 1 and shift_factor 0 then make it a drop-in for the teacher.

    Raises:
        ModelError: see `codec.latent_model.load_network`.
        UsageError: a VQ model.
    """
    return load_reference(folder, "model.teacher")


def load_reference(folder: str | Path, field: str) -> nn.Module:
    """Load an autoencoder whose latents another one is held to; frozen, in evaluation mode, float32, on the CPU.

    Args:
        folder: of a diffusers autoencoder, or of a pipeline with one in `vae/`; or the name of an available model.
        field: of the recipe, for the message.

    Raises:
        ModelError: see `codec.latent_model.load_network`.
        UsageError: a VQ model, whose latents are indices to those who use them.
    """
    network = load_network(resolve(folder), image_channels=None)
    if isinstance(network, VQModel | TwoLevelVQModel):
        name = type(network).__name__
        raise UsageError(f"{field}: a {name}; only of autoencoders with continuous latents can another one learn")
    return network.eval().requires_grad_(False)


def check_latents(reference: LatentModel, model: LatentModel, field: str) -> None:
    """Raise UsageError, naming the recipe's field of the reference, when the latents of the two have other shapes."""
    if (reference.f, reference.channels) != (model.f, model.channels):
        raise UsageError(
            f"{field}: f {reference.f}, {reference.channels} latent channels; the network: f {model.f}, "
            f"{model.channels} latent channels"
        )
    seen, given = (image_channels_of(each.network) for each in (reference, model))
    if seen > given:
        raise UsageError(f"{field}: {seen} image channels; the network: {given}")


def check_teacher(teacher: LatentModel, student: LatentModel) -> None:
    """Raise UsageError when the latents of the two have different shapes."""
    check_latents(teacher, student, "model.teacher")


def checkpoint_activations(network: Any) -> None:
    """Compute activations twice instead of keeping them.

    Raises:
        UsageError: for an AutoencoderTiny, whose encoder in diffusers then leaves out the scaling of its input.
    """
    if isinstance(network, AutoencoderTiny):
        raise UsageError("run.gradient_checkpointing = true: not with AutoencoderTiny, diffusers computes it wrongly")
    network.enable_gradient_checkpointing()


def _new_network(config: ModelConfig, vq: VQConfig, classes: Sequence[str]) -> nn.Module:
    if config.family == "vq":
        return _vq_network(config, vq)
    return _tiny_network(config) if config.family == "tiny" else _kl_network(config, classes)


def _common_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_add_attention,
    }


def _kl_network(config: ModelConfig, classes: Sequence[str]) -> nn.Module:
    """An AutoencoderKL, or with classes a ConditionalAutoencoderKL."""
    n = len(config.block_out_channels)
    fields: dict[str, Any] = {
        **_common_fields(config),
        "use_quant_conv": config.use_quant_conv,
    }
    if classes:
        network = ConditionalAutoencoderKL(**fields, classes=list(classes))
    else:
        network = AutoencoderKL(
            **fields,
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            use_post_quant_conv=config.use_quant_conv,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
    _initialize(network, config)
    kl: nn.Module = network
    return kl


def _vq_network(config: ModelConfig, vq: VQConfig) -> nn.Module:
    """A VQModel, or a TwoLevelVQModel, with random vectors, or with those of a lattice."""
    n = len(config.block_out_channels)
    fields: dict[str, Any] = {
        **_common_fields(config),
        "num_vq_embeddings": vq.codebook_size,
        "vq_embed_dim": vq.dim(config.latent_channels),
        "scaling_factor": 1.0,
    }
    if vq.coarse_codebook_size:
        network = TwoLevelVQModel(**fields, num_coarse_vq_embeddings=vq.coarse_codebook_size)
    else:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
        network = VQModel(**fields, **blocks)
    _initialize(network, config)
    with torch.no_grad():
        for weight in (TwoLevelModel if vq.coarse_codebook_size else CodebookModel)(network).codebooks:
            weight.normal_()
            if vq.cosine:
                weight.copy_(nn.functional.normalize(weight, dim=1))
            elif vq.kind == "fsq":
                weight.copy_(fsq.codebook(vq.fsq_levels))
                network.register_to_config(fsq_levels=list(vq.fsq_levels))  # see `codec.adapters.CodebookModel`
            elif vq.kind == "lfq":
                weight.copy_(corners(weight.shape[1]))
    built: nn.Module = network
    return built


def _tiny_network(config: ModelConfig) -> nn.Module:
    """The shape of TAESD: one block where pixels are many, `layers_per_block` at every level below."""
    blocks = (1, *[config.layers_per_block] * (len(config.block_out_channels) - 1))
    network = AutoencoderTiny(
        encoder_block_out_channels=config.block_out_channels,
        decoder_block_out_channels=config.block_out_channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        latent_channels=config.latent_channels,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    if config.init == "linear":
        _initialize_tiny(network)
    tiny: nn.Module = network
    return tiny


@torch.no_grad()
def _initialize_tiny(network: AutoencoderTiny) -> None:
    """Start with residual branches at zero and every other convolution at unit gain, as `initialize_linear` does.

    There are no norms to see to. 400 steps of L1 on crops of four photographs bring a fifth to 25 dB (widths of 32, two
    seeds); torch's default, which shrinks what passes by 0.58 at every convolution, to 17 dB.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith(".conv.4"):
                nn.init.zeros_(module.weight)
            elif ".conv." not in name:
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)


def _initialize(
    network: AutoencoderKL | VQModel | TwoLevelVQModel | ConditionalAutoencoderKL, config: ModelConfig
) -> None:
    if config.init == "diffusers":
        return
    initialize_linear(network)
    if config.init == "klt":
        white = config.family == "kl"  # a nearest vector should be nearest in the image
        initialize_klt(network.encoder, network.decoder, config.klt_channels, config.latent_channels, white=white)
        for convolution in (network.quant_conv, network.post_quant_conv):
            if convolution is not None:
                nn.init.dirac_(convolution.weight)
                nn.init.zeros_(cast(torch.Tensor, convolution.bias))


@torch.no_grad()
def initialize_linear(network: AutoencoderKL | VQModel | TwoLevelVQModel | ConditionalAutoencoderKL) -> None:
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
    for part in network.children():  # one encoder and decoder, or those of two levels
        if isinstance(part, Encoder):
            _anchor(part.mid_block.resnets[-1].conv2, part.conv_norm_out)
        elif isinstance(part, Decoder):
            _anchor(part.up_blocks[-1].resnets[-1].conv2, part.conv_norm_out)


def _anchor(before: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Make a GroupNorm start as nearly the identity on what passes it.

    A constant +-size pattern over the channels of each group makes the deviation that it divides by nearly constant;
    its own weight and bias then undo the pattern.
    """
    assert before.bias is not None
    sign = torch.ones(norm.num_channels)
    sign[1::2] = -1
    before.bias.copy_(ANCHOR * sign)
    norm.weight.fill_((ANCHOR**2 + 1) ** 0.5)
    norm.bias.copy_(-ANCHOR * sign)
