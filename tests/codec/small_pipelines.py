"""diffusers' own pipelines around a given autoencoder, all else small, of random weights and made here. For f = 8.

Case("sd", ...).build(vae) -> pipeline;   generate(case, pipeline) -> image in [0, 1], its last normalized latents
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

PROMPT = "a cat"
STEPS = 2
_WIDTH = 16  # of text


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        name: for reports.
        make: autoencoder -> pipeline.
        latents: channels of the latents.
        call: what the pipeline is called with, besides sizes and seeds.
        place: where the pipeline holds its autoencoder.
        shifts: whether it applies shift_factor.
        packs: whether its denoiser sees 2 x 2 latents as one token.
        sized: whether it takes height and width, else the denoiser's sample_size.
    """

    name: str
    make: Callable[..., Any]
    latents: int
    call: Callable[[], dict[str, Any]]
    place: str = "vae"
    shifts: bool = False
    packs: bool = False
    sized: bool = True

    def build(self, vae: Any) -> Any:
        """Return the pipeline, on the CPU, without progress bars; the same weights at every call."""
        torch.manual_seed(0)
        pipeline = self.make(vae)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module) and part is not vae:
                part.eval()
        return pipeline


@dataclass
class Made:
    """What a pipeline made.

    Attributes:
        image: (B, 3, H, W) in [0, 1].
        z: its last latents, (B, D, h, w), as the denoiser knows them; float32.
    """

    image: torch.Tensor
    z: torch.Tensor


def generate(case: Case, pipeline: Any, side: int = 64, **more: Any) -> Made:
    """Run a pipeline and look at its scheduler's last step."""
    seen: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def recorded(*arguments: Any, **how: Any) -> Any:
        result = step(*arguments, **how)
        seen.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    sizes = {"height": side, "width": side} if case.sized else {}
    how = {"num_inference_steps": STEPS} | sizes | case.call() | more
    how |= {name: each.to(pipeline.dtype) for name, each in how.items() if name.endswith("_embeds")}
    pipeline.scheduler.step = recorded
    try:
        result = pipeline(
            **how,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        )
    finally:
        del pipeline.scheduler.step
    image = result.images
    if isinstance(image, np.ndarray):  # what LDMPipeline gives, whatever it is asked for
        image = torch.from_numpy(np.moveaxis(image, -1, 1))
    z = seen[-1].float()[: len(image)]
    if case.packs:
        n, h, w = len(z), image.shape[2] // 16, image.shape[3] // 16
        z = z.reshape(n, h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, -1, 2 * h, 2 * w)
    return Made(image, z)


def _clip_parts(seed: int, projection: bool = False) -> tuple[Any, Any]:
    """Return a tokenizer that knows single characters and a text encoder for it."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=77
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    torch.manual_seed(seed)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, kind(config)


def _unet(channels: int, width: int = _WIDTH, inputs: int | None = None, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=inputs or channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=width,
        **more,
    )


def _ddim() -> Any:
    how = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", **how)


def _sd(kind: Any, **unet: Any) -> Callable[[Any], Any]:
    def make(vae: Any) -> Any:
        tokenizer, text_encoder = _clip_parts(1)
        return kind(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=_unet(vae.config.latent_channels, **unet),
            scheduler=_ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return make


def _sdxl(kind: Any) -> Callable[[Any], Any]:
    def make(vae: Any) -> Any:
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = _clip_parts(1), _clip_parts(2, projection=True)
        unet = _unet(
            vae.config.latent_channels,
            width=2 * _WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
            use_linear_projection=True,
        )
        return kind(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=_ddim(),
            add_watermarker=False,
        )

    return make


def _sd3(kind: Any) -> Callable[[Any], Any]:
    def make(vae: Any) -> Any:
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = (_clip_parts(n, projection=True) for n in (1, 2))
        channels = vae.config.latent_channels
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * _WIDTH,
            caption_projection_dim=_WIDTH,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=16,
        )
        return kind(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    return make


def _flux(kind: Any) -> Callable[[Any], Any]:
    def make(vae: Any) -> Any:
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * vae.config.latent_channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            axes_dims_rope=(4, 4, 8),
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return kind(scheduler=scheduler, vae=vae, transformer=transformer, **parts)

    return make


def _pixart(vae: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=_WIDTH,
        caption_channels=_WIDTH,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=_ddim()
    )


def _dit(vae: Any) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=_ddim())


def _ldm(vae: Any) -> Any:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    config = LDMBertConfig(
        vocab_size=len(words),
        encoder_layers=1,
        encoder_ffn_dim=_WIDTH,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=_WIDTH,
    )
    return diffusers.LDMTextToImagePipeline(
        vqvae=vae,
        bert=LDMBertModel(config),
        tokenizer=transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)}, model_max_length=77),
        unet=_unet(vae.config.latent_channels),
        scheduler=_ddim(),
    )


def _unconditional_unet(channels: int, inputs: int) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=inputs,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )


def _ldm_unconditional(vae: Any) -> Any:
    channels = vae.config.latent_channels
    return diffusers.LDMPipeline(vqvae=vae, unet=_unconditional_unet(channels, channels), scheduler=_ddim())


def _super_resolution(vae: Any) -> Any:
    channels = vae.config.latent_channels
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=vae, unet=_unconditional_unet(channels, channels + 3), scheduler=_ddim()
    )


def _embeddings(**more: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(5)
    return {
        "prompt_embeds": torch.randn(1, 6, _WIDTH, generator=random),
        **{name: torch.randn(1, width, generator=random) for name, width in more.items()},
    }


def _prompt() -> dict[str, Any]:
    return {"prompt": PROMPT, "guidance_scale": 3.0}


def _pixart_call() -> dict[str, Any]:
    mask = {"prompt_attention_mask": torch.ones(1, 6)}
    return _embeddings() | mask | {"prompt": None, "guidance_scale": 1.0, "use_resolution_binning": False}


def _flux_call() -> dict[str, Any]:
    return _embeddings(pooled_prompt_embeds=_WIDTH)


TEXT_TO_IMAGE = {
    case.name: case
    for case in (
        Case("sd", _sd(diffusers.StableDiffusionPipeline), 4, _prompt),
        Case("sdxl", _sdxl(diffusers.StableDiffusionXLPipeline), 4, _prompt),
        Case("sd3", _sd3(diffusers.StableDiffusion3Pipeline), 16, _prompt, shifts=True),
        Case("flux", _flux(diffusers.FluxPipeline), 16, _flux_call, shifts=True, packs=True),
        Case("pixart", _pixart, 4, _pixart_call),
        Case("dit", _dit, 4, lambda: {"class_labels": [7], "guidance_scale": 2.0}, sized=False),
        Case("ldm", _ldm, 4, _prompt, place="vqvae"),
    )
}

IMAGE_TO_IMAGE = {
    case.name: case
    for case in (
        Case("sd", _sd(diffusers.StableDiffusionImg2ImgPipeline), 4, _prompt, sized=False),
        Case("sdxl", _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), 4, _prompt, sized=False),
        Case("sd3", _sd3(diffusers.StableDiffusion3Img2ImgPipeline), 16, _prompt, shifts=True),
        Case("flux", _flux(diffusers.FluxImg2ImgPipeline), 16, _flux_call, shifts=True, packs=True),
    )
}

INPAINT = {
    case.name: case
    for case in (
        Case("sd", _sd(diffusers.StableDiffusionInpaintPipeline), 4, _prompt),
        Case("sd, nine channels", _sd(diffusers.StableDiffusionInpaintPipeline, inputs=9), 4, _prompt),
    )
}

CODEBOOK = {
    case.name: case
    for case in (
        Case("ldm unconditional", _ldm_unconditional, 3, dict, place="vqvae", sized=False),
        Case("ldm super-resolution", _super_resolution, 3, dict, place="vqvae", sized=False),
    )
}
