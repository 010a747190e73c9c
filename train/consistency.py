"""What the sections of a recipe ask of each other: `train.config` has each section's own limits. No torch."""

from typing import TYPE_CHECKING

from train.checks import require
from train.schedules import parse_moment
from train.vq.config import LEARNED

if TYPE_CHECKING:  # of types alone: config imports this module
    from train.config import Config


def check(config: "Config") -> None:
    """Raise ValueError, naming the field, where sections of a recipe contradict each other."""
    if not config.model.init_from:  # a folder's own f is known when it is read
        for name in ("crop", "final_crop"):
            side = getattr(config.data, name)
            require(side % config.model.f == 0, f"data.{name}", side, f"multiples of f = {config.model.f}")
        for side in config.data.crops:
            require(side % config.model.f == 0, "data.crops", side, f"multiples of f = {config.model.f}")
    _check_across(config)
    if config.model.family == "vq":
        check_vq(config)
        widths, levels = config.model.block_out_channels, 2 if config.vq.coarse_codebook_size else 1
        why = "one width for each level at least: the last is that of vq.coarse_codebook_size"
        require(len(widths) >= levels or config.model.init_from != "", "model.block_out_channels", widths, why)
        require(
            config.kl.weight == 0 or config.model.init_from != "",
            "kl.weight",
            config.kl.weight,
            "0 with model.family vq: it has no variance",
        )
    if config.model.family == "tiny" and not config.model.init_from:
        require(config.kl.weight == 0, "kl.weight", config.kl.weight, "0 with model.family tiny: it has no variance")
        require(
            not config.run.gradient_checkpointing,
            "run.gradient_checkpointing",
            True,
            "false with model.family tiny: diffusers' EncoderTiny then leaves out its scaling of the input",
        )


def _check_across(config: "Config") -> None:
    model, adversarial = config.model, config.adversarial
    _check_image_channels(config)
    _check_anchor(config)
    if model.condition != "none":
        _check_condition(config)
    if model.starts_klt:
        _check_klt(config)
    if model.teacher:
        require(config.rate.probability == 0, "rate.probability", config.rate.probability, "0 with model.teacher")
        require(model.trainable != "decoder", "model.trainable", model.trainable, "all or auto with model.teacher")
    if adversarial.weight > 0 and adversarial.start == "auto":
        require(config.data.n_validation > 0, "data.n_validation", 0, '> 0 with adversarial.start = "auto"')
        every, whole = config.run.validate_every, config.run.n_images
        require(every < whole, "run.validate_every", every, f"< run.n_images = {whole} with adversarial.start auto")


def _check_image_channels(config: "Config") -> None:
    count, data = config.model.image_channels, config.data
    if data.samples == "image":
        require(count in (3, 4), "model.image_channels", count, "3 or 4 (RGBA) with data.samples image")
    if count != 3 or data.samples == "npy":
        why = f"with model.image_channels {count} and data.samples {data.samples}"
        require(data.mode == "indexed", "data.mode", data.mode, f"indexed {why}")
        require(data.memory == "none", "data.memory", data.memory, f"none {why}")
        require(config.model.teacher == "", "model.teacher", config.model.teacher, f"empty {why}")


def _check_anchor(config: "Config") -> None:
    model, latents = config.model, config.latents
    if latents.anchor_weight > 0:
        require(not model.decoder_only, "latents.anchor_weight", latents.anchor_weight, "0: the encoder stays as it is")
        require(model.teacher == "", "latents.anchor_weight", latents.anchor_weight, "0 with model.teacher")


def _check_klt(config: "Config") -> None:
    """Refuse networks that cannot hold the transform of `train.klt_init`."""
    model = config.model
    shape = (model.family != "tiny", model.condition == "none", config.vq.coarse_codebook_size == 0)
    why = "linear with family tiny, a condition, a coarse codebook or more than 3 image channels"
    require(all(shape) and model.image_channels == 3, "model.init", model.init, why)
    widths = model.block_out_channels
    why = "two or more that do not fall, the first of them 6 or more, with model.init klt"
    good = len(widths) > 1 and widths[0] >= 6 and list(widths) == sorted(widths)
    require(good, "model.block_out_channels", widths, why)
    why = "at most half of the last width, and what the widths before let pass, with model.init klt"
    fits = model.latent_channels <= min(widths[-1] // 2, model.klt_channels[-1])
    require(fits, "model.latent_channels", model.latent_channels, why)


def _check_condition(config: "Config") -> None:
    """Refuse what does not go along with a condition: it would not be told, or has no place for one."""
    model, anchor = config.model, config.latents.anchor_weight
    for name, value, fits, allowed in (
        ("model.family", model.family, model.family == "kl", "kl"),
        ("model.init_from", model.init_from, not model.init_from, "empty"),
        ("data.mode", config.data.mode, config.data.mode == "indexed", "indexed"),
        ("rate.probability", config.rate.probability, config.rate.probability == 0, "0"),
        ("latents.anchor_weight", anchor, anchor == 0, "0"),
        ("run.gradient_checkpointing", True, not config.run.gradient_checkpointing, "false"),
        ("export.formats", config.export.formats, "onnx" not in config.export.formats, "none of onnx"),
    ):
        require(fits, name, value, f"{allowed} with model.condition {model.condition}")


def check_vq(config: "Config") -> None:
    """Raise ValueError where something is asked for that a VQModel cannot have; also called for one of a folder."""
    why = "of a VQModel's latents only codebook vectors reach the decoder"
    for name, value in (
        ("rate.probability", config.rate.probability),
        ("latents.noise", config.latents.noise),
        ("latents.equivariance", config.latents.equivariance),
    ):
        require(value == 0, name, value, f"0 with model.family vq: {why}")
    anchor = config.latents.anchor_weight
    require(anchor == 0, "latents.anchor_weight", anchor, "0 with model.family vq: indices have no distance")
    checkpointed = config.run.gradient_checkpointing
    require(not checkpointed, "run.gradient_checkpointing", True, "false with model.family vq: diffusers has none")
    late = config.vq.kind in LEARNED and parse_moment(config.vq.start).images >= config.run.n_images
    require(not late, "vq.start", config.vq.start, f"less than run.n_images = {config.run.n_images}")
