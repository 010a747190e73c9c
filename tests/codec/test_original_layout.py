"""The original layout, against a small network that is written from what LDM and taming compute."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import nn
from torch.nn import functional

from codec.errors import ModelError
from codec.original_layout import comfy_detects, from_original, is_diffusers_layout, original_limits, original_shapes
from codec.original_layout import to_original as rename
from codec.original_layout_config import infer_config
from codec.original_layout_find import find, looks_like

GROUPS = 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(self.norm(x)).flatten(2) for layer in (self.q, self.k, self.v))
        share = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", share, v).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, before, eps=1e-6), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Resize(nn.Module):
    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.interpolate(x, scale_factor=2.0) if self.up else functional.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Level(nn.Module):
    def __init__(self, before: int, width: int, n_blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(width if n else before, width) for n in range(n_blocks))
        self.attn = nn.ModuleList(Attention(width) for _ in range(n_blocks * attends))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n, block in enumerate(self.block):
            x = block(x)
            x = self.attn[n](x) if self.attn else x
        return x


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Half(nn.Module):
    """An encoder or a decoder."""

    def __init__(
        self, channels: tuple[int, int], widths: Sequence[int], n_blocks: int, attends: set[int], up: bool
    ) -> None:
        super().__init__()
        first, last = (widths[-1], widths[0]) if up else (widths[0], widths[-1])
        self.conv_in = nn.Conv2d(channels[0], first, 3, padding=1)
        befores = [*widths[1:], widths[-1]] if up else [widths[0], *widths]
        levels = [Level(befores[n], width, n_blocks, n in attends) for n, width in enumerate(widths)]
        for n, level in enumerate(levels):
            if up and n:
                level.upsample = Resize(widths[n], up)
            if not up and n < len(widths) - 1:
                level.downsample = Resize(widths[n], up)
        setattr(self, "up" if up else "down", nn.ModuleList(levels))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, last, eps=1e-6), nn.Conv2d(last, channels[1], 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        if hasattr(self, "up"):
            x = self.mid(x)
            for level in reversed(self.up):
                x = level(x)
                x = level.upsample(x) if hasattr(level, "upsample") else x
        else:
            for level in self.down:
                x = level(x)
                x = level.downsample(x) if hasattr(level, "downsample") else x
            x = self.mid(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Original(nn.Module):
    """An LDM autoencoder, or a taming VQGAN with `codes`."""

    def __init__(
        self,
        widths: Sequence[int] = (8, 16, 16),
        n_blocks: int = 2,
        channels: int = 3,
        attends: set[int] = frozenset(),
        quant: bool = True,
        codes: int = 0,
    ) -> None:
        super().__init__()
        moments = channels if codes else 2 * channels
        self.encoder = Half((3, moments), widths, n_blocks, attends, up=False)
        self.decoder = Half((channels, 3), widths, n_blocks + 1, attends, up=True)
        if quant:
            dimension = 5 if codes else channels
            self.quant_conv = nn.Conv2d(moments, dimension if codes else moments, 1)
            self.post_quant_conv = nn.Conv2d(dimension, channels, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, 5)
        with torch.no_grad():
            for parameter in self.parameters():  # norms too: weights of 1 and biases of 0 hide that two were swapped
                parameter.copy_(torch.randn_like(parameter) * 0.3)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        return self.quant_conv(h) if hasattr(self, "quant_conv") else h

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z)


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def as_diffusers(original: nn.Module) -> Any:
    state = original.state_dict()
    config = infer_config(shapes_of(state)) | {"norm_num_groups": GROUPS}
    kind = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}[config["_class_name"]]
    network = kind.from_config(config)
    network.load_state_dict(from_original(state, config))  # strict
    return network.eval()


def full(network: Any, **changes: Any) -> dict[str, Any]:
    return {**network.config, "_class_name": type(network).__name__, **changes}


NETWORKS = {
    "plain": {},
    "deep, one block": {"widths": (8, 8, 16, 16, 24), "n_blocks": 1},
    "attention inside levels": {"attends": {1, 2}},
    "no quant convs": {"quant": False, "channels": 16},
    "one level": {"widths": (8,)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_original_network_computes_the_same_in_diffusers_and_comes_back(name: str) -> None:
    torch.manual_seed(0)
    original = Original(**NETWORKS[name]).eval()
    network = as_diffusers(original)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        moments = original.moments(x)
        posterior = network.encode(x).latent_dist
        torch.testing.assert_close(posterior.parameters, moments, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            network.decode(posterior.mean).sample, original.decode(posterior.mean), rtol=1e-4, atol=1e-4
        )
    back = rename(network.state_dict(), full(network))
    expected = original.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    original.load_state_dict(back)  # shapes too: attention weights are convolutions


@pytest.mark.parametrize("attends", [set(), {2}])
def test_a_vqgan_of_taming_becomes_a_vqmodel(attends: set[int]) -> None:
    torch.manual_seed(0)
    original = Original(channels=6, codes=11, attends=attends).eval()
    network = as_diffusers(original)
    assert (network.config.num_vq_embeddings, network.config.vq_embed_dim, network.config.latent_channels) == (11, 5, 6)
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        latents = network.encode(x).latents
        torch.testing.assert_close(latents, original.moments(x), rtol=1e-4, atol=1e-4)
        codes = original.quantize.embedding.weight
        nearest = (latents[0, :, :, :, None] - codes.T[:, None, None, :]).square().sum(dim=0).argmin(dim=2)
        z_q = codes[nearest].permute(2, 0, 1)[None]
        torch.testing.assert_close(network.decode(latents).sample, original.decode(z_q), rtol=1e-4, atol=1e-4)
    assert set(rename(network.state_dict(), full(network))) == set(original.state_dict())


def test_a_file_in_diffusers_names_says_as_much_of_its_network() -> None:
    original = Original(attends={1}, n_blocks=1)
    network = as_diffusers(original)
    shapes = shapes_of(network.state_dict())
    assert is_diffusers_layout(shapes)
    assert not is_diffusers_layout(original.state_dict())
    assert infer_config(original_shapes(shapes)) == infer_config(shapes_of(original.state_dict()))
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v
        for key, v in network.state_dict().items()
    }
    assert set(rename(old, full(network))) == set(original.state_dict())


def test_what_the_layout_has_no_place_for_is_refused() -> None:
    network = as_diffusers(Original(n_blocks=1, attends={1}))
    state = network.state_dict()
    with pytest.raises(ModelError, match="AutoencoderKL and VQModel; this is AutoencoderTiny"):
        rename({}, full(AutoencoderTiny()))
    with pytest.raises(ModelError, match=r"has no place for the tensor encoder\.extra\.weight"):
        rename(state | {"encoder.extra.weight": torch.zeros(1)}, full(network))
    with pytest.raises(ModelError, match="in encoder and decoder, or in neither"):
        rename(state, full(network, up_block_types=("UpDecoderBlock2D",) * 3))
    with pytest.raises(ModelError, match="no blocks of type CrossAttnDownBlock2D"):
        rename(state, full(network, down_block_types=("CrossAttnDownBlock2D",) * 3))
    with pytest.raises(ModelError, match="group norms, not spatial"):
        rename(state, full(network, _class_name="VQModel", norm_type="spatial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder.down.1.block.0.conv1.weight", r"no tensor encoder\.down\.1\.block\.0\.conv1\.weight"),
        ("encoder.down.1.", r"no tensors encoder\.down\.1\.block"),
        ("decoder.up.", r"no tensors decoder\.up"),
        ("decoder.up.2.block.2.", r"2 blocks in decoder\.up\.2, 3 in others"),
        ("decoder.up.0.attn.1.", r"attention after 2 of the 3 blocks of decoder\.up\.0"),
        ("quant_conv.weight=(4, 6)", "embed_dim"),
        ("encoder.conv_out.weight=(3, 6)", "puts out 3 channels for 3 latent channels; expected 6"),
        ("encoder.conv_in.weight=(4, 3)", "first convolution has 4 channels"),
    ],
)
def test_shapes_that_make_no_network_are_named(change: str, message: str) -> None:
    shapes = shapes_of(Original(attends={0}).state_dict())
    name, _, shape = change.partition("=")
    if shape:
        shapes[name] = tuple(int(part) for part in shape.strip("()").split(","))
    else:
        shapes = {key: value for key, value in shapes.items() if not key.startswith(name)}
    with pytest.raises(ModelError, match=message):
        infer_config(shapes)


def kl(widths: Sequence[int] = (128, 256, 512, 512), attention: bool = False, **how: Any) -> tuple[dict, dict]:
    """The shapes of an AutoencoderKL in the original layout, and its config; no memory is used."""
    n, kind = len(widths), "Attn" * attention
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=(f"{kind}DownEncoderBlock2D",) * n,
            up_block_types=(f"{kind}UpDecoderBlock2D",) * n,
            **({"layers_per_block": 2} | how),
        )
    return shapes_of(rename(network.state_dict(), full(network))), full(network)


@pytest.mark.parametrize(
    ("how", "detected", "limits"),
    [
        ({}, "AutoencoderKL, f8, 4 latent channels", []),
        ({"latent_channels": 16}, "AutoencoderKL, f8, 16 latent channels", []),
        ({"widths": (128, 256, 512)}, "AutoencoderKL, f4, 4 latent channels", []),
        (
            {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
            "AutoencodingEngine (no quant convs, as SD3 and Flux), f8, 16 latent channels",
            ["LDM: it always has quant_conv"],
        ),
        ({"use_quant_conv": False}, None, ["ComfyUI: one of quant_conv"]),
        ({"widths": (128, 256, 512, 512, 512)}, None, ["ComfyUI: it knows networks of widths 128, 256, 512, 512"]),
        ({"widths": (64, 128, 256, 256)}, None, ["ComfyUI: it knows networks of widths"]),
        ({"layers_per_block": 1}, None, ["ComfyUI: it knows networks of widths"]),
        ({"attention": True}, None, ["diffusers: from_single_file", "ComfyUI: its network has attention in the"]),
        ({"mid_block_add_attention": False}, None, ["ComfyUI: its network has attention in the middle, this"]),
        ({"in_channels": 4}, None, ["ComfyUI: it knows 3 image channels, not 4"]),
        ({"latent_channels": 64}, None, ["ComfyUI: it takes 64 latent channels for HunyuanImage"]),
        ({"widths": (128, 192)}, None, ["LDM: its configs know widths", "ComfyUI: it knows networks"]),
        ({"norm_num_groups": 16}, "AutoencoderKL, f8, 4 latent channels", ["LDM, ComfyUI: they always compute Group"]),
        ({"act_fn": "gelu"}, "AutoencoderKL, f8, 4 latent channels", ["LDM, ComfyUI: they always compute silu"]),
    ],
)
def test_where_a_single_file_will_load(how: dict[str, Any], detected: str | None, limits: list[str]) -> None:
    shapes, config = kl(**how)
    assert comfy_detects(shapes) == detected
    said = original_limits(config)
    assert len(said) == len(limits)
    assert all(sentence.startswith(begin) for sentence, begin in zip(said, limits, strict=True))


def test_comfyui_knows_diffusers_names_of_four_levels_only() -> None:
    found = []
    for widths in ((128, 256, 512, 512), (128, 256, 512)):
        with torch.device("meta"):
            n = len(widths)
            types = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
            network = AutoencoderKL(block_out_channels=widths, layers_per_block=2, **types)
        found.append(comfy_detects(shapes_of(network.state_dict())))
    assert found == ["AutoencoderKL, f8, 4 latent channels", None]
    shapes, _ = kl()
    flat = {name: shape[:2] if ".mid.attn_1." in name else shape for name, shape in shapes.items()}
    assert comfy_detects(flat) is None  # attention weights must be convolutions there
    assert comfy_detects(shapes | {"bn.running_mean": (128,)}) is None
    assert comfy_detects({"model.diffusion_model.out.0.weight": (3,)}) is None


OWN = ("encoder.conv_in.weight", "encoder.mid.attn_1.q.weight", "decoder.conv_in.weight", "quant_conv.bias")


def below(prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in OWN]


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "state_dict.model.", "module.", "any.thing."])
def test_any_prefix_is_found_and_the_rest_left_out(prefix: str) -> None:
    rest = ["loss.logvar", "loss.discriminator.main.0.weight", "model.diffusion_model.out.weight", "betas"]
    found = find([*below(prefix), *rest], None)
    assert found.names == {name: prefix + name for name in OWN}
    assert (found.prefix, found.n_averaged) == (prefix, 0)
    assert found.left_out == "2 of loss, 1 of model.diffusion_model, 1 of betas"
    assert find(below(prefix)).left_out == ""


def test_averaged_weights_are_taken_or_not() -> None:
    flat = [f"p.model_ema.{name.replace('.', '')}" for name in OWN[:3]]  # LDM's: names without dots, one is not there
    names = [*below("p."), *flat, "p.model_ema.decay"]
    found = find(names)
    assert found.n_averaged == 3
    assert found.names["encoder.conv_in.weight"] == "p.model_ema.encoderconv_inweight"
    assert found.names["quant_conv.bias"] == "p.quant_conv.bias"
    assert find(names, averaged=False).names == {name: f"p.{name}" for name in OWN}

    for prefix in ("ema.", "ema_model.module.", "ema_state_dict.vae."):
        names = [*below("model."), *below(prefix)]
        assert (find(names).prefix, find(names, averaged=True).n_averaged) == (prefix, 4)
        assert find(names, averaged=False).prefix == "model."
    assert find(below("schema.")).n_averaged == 0
    with pytest.raises(ModelError, match="no averaged"):
        find(below("model."), averaged=True)
    with pytest.raises(ModelError, match=r"only averaged \(EMA\) weights in it, as ema\.\*: use --ema"):
        find(below("ema."), averaged=False)


def test_of_two_autoencoders_the_usual_one_is_taken_or_none() -> None:
    assert find([*below("first_stage_model."), *below("teacher.")]).prefix == "first_stage_model."
    with pytest.raises(ModelError, match=r"2 autoencoders in it: a\.\*, b\.\*"):
        find([*below("a."), *below("b.")])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "looks like a diffusion UNet"),
        (["lora_unet_mid.lora_up.weight"], "looks like a LoRA"),
        (["control_model.time_embed.0.weight"], "looks like a ControlNet"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "looks like a text encoder"),
        (["double_blocks.0.img_attn.qkv.weight"], "looks like a diffusion transformer"),
        (["encoder.layers.0.weight", "encoder.layers.0.bias"], "TAESD"),
        (["encoder.stages.0.op_list.0.weight"], "AutoencoderDC"),
        (["encoder.downsamples.0.residual.0.gamma"], "video"),
        (["something.else"], r"no autoencoder in it \(1 tensors: something\.else"),
        (below("x")[:1], "no autoencoder in it"),
        (below("")[:1], r"no tensor decoder\.conv_in\.weight: one half"),
        (below("")[2:3], r"no tensor encoder\.conv_in\.weight: one half"),
        ([*below(""), "bn.running_mean", "encoder.quant_conv.weight"], "FLUX.2's autoencoder"),
        ([*below(""), "decoder.mid.block_1.norm1.norm_layer.weight"], "MoVQ"),
        ([*below("first_stage_model."), "first_stage_model.quantize.embed.weight"], "Gumbel"),
        ([*below(""), "decoder.mid.block_1.mix_factor"], "video autoencoder"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(names: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find(names)


def test_no_idea_is_said_as_none() -> None:
    assert looks_like(["a.b.c"]) == ""
