"""The terms on the latents of an autoencoder: KL, codebook, rate, teacher, anchor, alignment; their frozen networks.

mean, log-variance, bits (`train.module.Outputs`) -> LatentTerms.terms -> named scalars, weighted
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from codec.errors import UsageError
from codec.latent_model import LatentModel, latent_model
from train.channels import Channels
from train.config import Config
from train.latent_losses import FeatureAlignment, LatentAnchor, latent_moments
from train.losses import kl_loss, kl_nats
from train.module import Draws, Outputs
from train.networks import adopt_normalisation, check_latents, check_teacher, load_reference, load_teacher
from train.rate import price
from train.schedules import kl_factor, parse_moment
from train.task import Step, Values
from train.vq.terms import CodebookTerms

_LEAST_KL_RELIEF = 1 / 64


class LatentTerms:
    """What a recipe asks of the latents.

    Attributes:
        kl_relief: what posterior collapse has multiplied the KL's weight by.
        has_kl: whether there is a KL term.
        codebooks: what there is to do with the quantiser of each map; empty without one.
    """

    def __init__(
        self, config: Config, model: LatentModel, channels: Channels, codebooks: Sequence[CodebookTerms] = ()
    ) -> None:
        """Load teacher, anchor and alignment network, where the recipe names them.

        Args:
            config: the recipe.
            model: the network to train; one that is anchored gets the anchor's normalisation.
            channels: of the images.
            codebooks: of a network that has some, one for each map, in its order.

        Raises:
            UsageError: one of them is missing or does not fit.
            ModelError: see `codec.latent_model.load_network`.
        """
        self._config = config
        self._channels = channels
        self.has_kl = config.kl.weight > 0 and not config.model.decoder_only and model.family == "kl"
        self.kl_relief = 1.0
        self.codebooks = tuple(codebooks)
        self.teacher = _load_teacher(config, model) if config.model.teacher else None
        self.anchor = _load_anchor(config, model) if config.latents.anchor_weight > 0 else None
        self.alignment: FeatureAlignment | None = None
        if config.latents.alignment_weight > 0:
            self.alignment = FeatureAlignment(Path(config.latents.alignment), config.latents.alignment_margins)
        if config.run.channels_last:
            for network in self._frozen():
                network.to(memory_format=torch.channels_last)

    def _frozen(self) -> list[nn.Module]:
        models = [self.teacher, None if self.anchor is None else self.anchor.model]
        return [model.network for model in models if model is not None]

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in [*self._frozen(), *([] if self.alignment is None else [self.alignment])]:
            network.to(device)

    def describe(self) -> list[str]:
        """Return the terms with their weights."""
        config, texts = self._config, []
        if self.has_kl:
            texts.append(f"{config.kl.weight:g} KL nats/{config.kl.reduction}")
        texts += [text for codebook in self.codebooks for text in codebook.loss()]
        if config.rate.probability > 0:
            texts.append(f"{config.rate.weight:g} bpp (at q 0; decoded {config.rate.decoded})")
        if self.teacher is not None:
            texts.append(f"{config.model.teacher_weight:g} teacher")
        if self.anchor is not None:
            texts.append(f"{config.latents.anchor_weight:g} anchor")
        if self.alignment is not None:
            texts.append(f"{config.latents.alignment_weight:g} alignment")
        return texts

    def relieve(self) -> float:
        """Halve the KL's weight, down to a limit, and return what is left of it."""
        self.kl_relief = max(_LEAST_KL_RELIEF, self.kl_relief / 2)
        return self.kl_relief

    def teacher_latents(self, x: torch.Tensor, step: Step) -> torch.Tensor | None:
        """Return the teacher's normalized latents of x, (B, D, h, w); None without a teacher."""
        if self.teacher is None:
            return None
        with torch.no_grad(), step.autocast():
            return self.teacher.normalize(self.teacher.encode(x).mean)

    def terms(
        self, outputs: Outputs, x: torch.Tensor, draws: Draws, step: Step, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the weighted terms of one batch, each a scalar, and add what they tell to `values`.

        Args:
            outputs: of the network.
            x: (B, C, H, W) in [-1, 1], what was encoded.
            draws: what the pass was made with.
            step: where the run stands.
            values: takes what is to be logged.
        """
        config = self._config
        values["latent_moments"] = latent_moments(outputs.mean)
        terms = {} if outputs.logvar is None else self._kl(outputs.mean, outputs.logvar, x, step, values)
        for codebook, codes in zip(self.codebooks, outputs.codes, strict=True):
            terms |= codebook.terms(codes, step, values)
        if outputs.bits is not None:
            assert draws.quality is not None
            assert draws.coded is not None
            bpp = outputs.bits / (x.shape[-2] * x.shape[-1])
            values["bpp"] = bpp.detach().mean()
            terms["rate"] = (draws.coded * price(draws.quality, config.rate) * bpp).mean()
        if draws.teacher_latents is not None:
            terms["teacher"] = config.model.teacher_weight * (outputs.mean - draws.teacher_latents).square().mean()
        if self.anchor is not None:
            with step.autocast():  # in the precision that the network computes in: equal weights give equal latents
                target = self.anchor.target(x)
            terms["anchor"] = config.latents.anchor_weight * self.anchor(outputs.mean, outputs.logvar, target)
        if self.alignment is not None and outputs.projected is not None:
            seen = self._channels.seen(x)
            aligned = self.alignment(outputs.mean, outputs.projected, seen)
            terms["alignment"] = config.latents.alignment_weight * aligned
        return terms

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """See `train.task.Task.after_step`."""
        return [line for codebook in self.codebooks for line in codebook.after_step(values, step, reduce)]

    def discard_step(self) -> None:
        """See `train.task.Task.discard_step`."""
        for codebook in self.codebooks:
            codebook.discard()

    def after_validation(self, metrics: Mapping[str, float]) -> list[str]:
        """See `train.task.Task.after_validation`."""
        return [line for codebook in self.codebooks for line in codebook.after_validation(metrics)]

    def _kl(
        self, mean: torch.Tensor, logvar: torch.Tensor, x: torch.Tensor, step: Step, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the KL term, where there is one, and log what the posterior says."""
        config = self._config.kl
        n_pixels, n_positions = x.shape[-2] * x.shape[-1], mean.shape[-2] * mean.shape[-1]
        per_channel = kl_nats(mean, logvar)
        per_pixel = per_channel.detach().sum() * n_positions / n_pixels
        values["kl_nats_per_pixel"], values["kl_bits_per_pixel"] = per_pixel, per_pixel / np.log(2)
        values["kl_per_channel"] = per_channel.detach()
        values["active_channels"] = (per_channel.detach() > self._config.health.active_nats).float().sum()
        if not self.has_kl:
            return {}
        ramp = parse_moment(config.ramp)
        factor = kl_factor(config.schedule, ramp, config.cycles, config.cycle_ramp, step.images, step.share)
        return {"kl": self.kl_relief * kl_loss(per_channel, config, n_pixels, n_positions, factor)}


def _load_teacher(config: Config, student: LatentModel) -> LatentModel:
    teacher = latent_model(load_teacher(config.model.teacher))
    if student.family != "tiny":
        raise UsageError(f"model.teacher: {config.model.init_from} is no AutoencoderTiny; only those are students")
    check_teacher(teacher, student)
    return teacher


def _load_anchor(config: Config, model: LatentModel) -> LatentAnchor:
    folder = config.latents.anchor or config.model.init_from
    if not folder:
        weight = config.latents.anchor_weight
        raise UsageError(
            f"latents.anchor_weight = {weight:g}: held to what? Set model.init_from or latents.anchor=FOLDER"
        )
    reference = latent_model(load_reference(folder, "latents.anchor"))
    check_latents(reference, model, "latents.anchor")
    if config.latents.anchor_deviation and not reference.family == model.family == "kl":
        raise UsageError("latents.anchor_deviation = true: only where the network and its anchor have a variance")
    adopt_normalisation(model.network, reference)
    return LatentAnchor(reference, deviation=config.latents.anchor_deviation)
