"""The autoencoder task: AutoencoderKL (and one with a condition), AutoencoderTiny, VQ models: they differ inside alone.

    image -> AutoencoderModule -> x_hat -> reconstruction and adversarial terms -> gradients at x_hat -----+
                               -> mean, log-variance, codes, bits -> `train.latent_terms` -----------------+-> backward

Each term between x and x_hat is differentiated once, as far as x_hat; their weighted sum then goes back through the
networks in one pass. So every term's gradient is known, and the adaptive weight costs one layer instead of two more
passes through the perceptual network and the discriminator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codec import console
from codec.adapters import CodebookModel
from codec.conditional_kl import NO_CLASS
from codec.errors import UsageError
from codec.latent_model import LatentModel, latent_model
from codec.latent_transform import LatentTransform
from codec.model_folder import resolve
from codec.pixels import to_float
from codec.shards import SampleRef
from train import draws as positions_draws
from train.adversary import Adversary
from train.channels import Channels
from train.config import Config
from train.consistency import check_vq
from train.cvae.classes import classes_of
from train.cvae.export import export_conditional
from train.cvae.measure import HeldClasses, sentence
from train.data import share_of, whole_images
from train.discriminator import build_discriminator
from train.draws import CONDITION, LATENT_NOISE, PER_BATCH, PER_IMAGE, POSTERIOR, UNIFORM
from train.export import export_model, load_discriminator_state
from train.health import Monitor
from train.klt_init import equal_steps
from train.latent_losses import LatentScale
from train.latent_terms import LatentTerms
from train.losses import ReconstructionLoss, kl_weight_in_ldm
from train.module import AutoencoderModule, Draws, Outputs, compile_blocks
from train.networks import build_network, checkpoint_activations, decoder_only
from train.rate import RateModel, draw_quality
from train.task import Step, Terms, Values
from train.validation import estimated_rates, measure
from train.vq.export import export_codebook_model
from train.vq.lattice import FSQ, LFQ, whiten
from train.vq.terms import CodebookTerms, build_quantiser

_HEADROOM = 2.0**14
_FIRST_IMAGES = 16  # that a rate model's first steps and densities, and a lattice's latents, are fitted to


class AutoencoderTask:
    """See `train.task.Task`."""

    def __init__(self, config: Config, training: Sequence[SampleRef], validation: Sequence[SampleRef]) -> None:
        """Build networks and losses.

        Raises:
            UsageError: features, starting point or teacher missing; crops that the losses cannot take; images without a
                class where the network is told it.
        """
        self._config = config
        self._training = training
        self._validation = validation
        self._image = Channels.of(config.model.image_channels, config.data.samples)
        self.classes = classes_of(training, validation) if config.model.condition == "class" else ()
        self._held = HeldClasses.of(self.classes, validation, config.run.seed) if self.classes else None
        if self._held is not None:
            self._validation = self._held.mixed(validation)  # its picture shows the first ones
        network = build_network(config.model, alpha=self._image.alpha, vq=config.vq, classes=self.classes)
        model = latent_model(network)
        self.f, self._channels = model.f, model.channels
        self._has_variance = model.family == "kl"
        self._last_layer = model.decoder_out
        self._decoder_only = decoder_only(config.model)
        codebooks = self._build_codebooks(model) if isinstance(model, CodebookModel) else []
        self._latents = LatentTerms(config, model, self._image, codebooks)
        if config.run.gradient_checkpointing:
            checkpoint_activations(network)
        if config.run.channels_last:
            network.to(memory_format=torch.channels_last)
        alignment = self._latents.alignment
        rate = self._build_rate(model) if config.rate.probability > 0 else None
        self.module: nn.Module = AutoencoderModule(
            network,
            rate=rate,
            decodes_rounded=config.rate.decoded == "rounded",
            quantisers=[codebook.quantiser for codebook in codebooks],
            projection=alignment.projection(self._channels) if alignment else None,
            learned_scale=config.loss.learned_scale,
            frozen_encoder=self._decoder_only,
        )
        self.loss = ReconstructionLoss(config.loss, self._image)
        self.adversary = self._build_adversary() if config.adversarial.weight > 0 else None
        self.critic: nn.Module | None = self.adversary.discriminator if self.adversary else None
        self._monitor = Monitor(config.health, config.adversarial.adaptive_cap)
        self._scale = LatentScale()  # for the noise on normalized latents

    def _build_codebooks(self, model: CodebookModel) -> list[CodebookTerms]:
        config, trained = self._config, self._config.model.init_from != ""
        try:
            check_vq(config)
        except ValueError as exception:  # of a folder's family a recipe knows nothing
            raise UsageError(str(exception)) from exception
        how = {"trained": trained, "trains": not self._decoder_only}
        quantisers = [build_quantiser(config.vq, model, **how, level=n) for n in range(len(model.maps))]
        if isinstance(quantisers[0], FSQ | LFQ) and not trained and (found := self._first_latents(model)) is not None:
            whiten(model.network, found)
        return [CodebookTerms(quantiser, model, config.health, n) for n, quantiser in enumerate(quantisers)]

    def _build_rate(self, model: LatentModel) -> RateModel:
        """Build steps and densities, fitted to what the encoder makes of a few training images now."""
        rate = RateModel(self._channels, self._config.rate.components)
        found = self._first_latents(model)
        if found is not None:
            config = self._config.model
            proportions = equal_steps(config.klt_channels, self._channels) if config.starts_klt else None
            rate.initialize(found[None, ..., None], self.f, proportions=proportions)
        return rate

    @torch.no_grad()
    def _first_latents(self, model: LatentModel) -> torch.Tensor | None:
        """Return what the encoder makes of a few training images now, (D, N); None where none can be read."""
        side = max(self._config.data.sides)
        some, channels = self._training[:_FIRST_IMAGES], self._image.count
        pieces = [image for _, image in whole_images(some, side, self.f, bad=[], channels=channels)]
        found = [model.encode(to_float(image)[None]).mean[0].flatten(1) for image in pieces]
        return torch.cat(found, dim=1) if found else None

    def _build_adversary(self) -> Adversary:
        discriminator = build_discriminator(self._config.adversarial, self._image.judged_count)
        base, self._has_warm_critic = self._config.model.init_from, False
        state = load_discriminator_state(resolve(base)) if base else None
        if state is not None:  # released with the model: spares a cold start
            shapes = {name: tensor.shape for name, tensor in discriminator.state_dict().items()}
            if {name: tensor.shape for name, tensor in state.items()} == shapes:
                discriminator.load_state_dict(state)
                self._has_warm_critic = True
            else:
                console.error(f"{base}/discriminator: of another shape than [adversarial] says; starting cold")
        if self._config.run.channels_last:
            discriminator.to(memory_format=torch.channels_last)
        return Adversary(self._config.adversarial, discriminator)

    def check_shapes(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Raise UsageError when a batch of one of these (height, width) could not be trained on."""
        smallest = self._smallest_side()
        for height, width in shapes:
            if min(height, width) < smallest:
                raise UsageError(
                    f"data.crop: crops of {height} x {width}; this recipe's losses need at least {smallest} pixels"
                )
            if height % self.f or width % self.f:
                raise UsageError(f"data.crop: crops of {height} x {width}, expected multiples of f = {self.f}")
        side = self._config.data.validation_crop
        if side < max(self.f, self.loss.min_side):
            least = max(self.f, self.loss.min_side)
            raise UsageError(f"data.validation_crop = {side}: this recipe's losses need at least {least} pixels")

    def _smallest_side(self) -> int:
        discriminator = self.adversary.discriminator.min_side if self.adversary else 1
        return max(self.loss.min_side, discriminator)

    @property
    def _network(self) -> Any:
        return _unwrapped(self.module).network

    def to(self, device: torch.device) -> None:
        """Move the frozen networks; the loop moves `module` and `critic`."""
        self.loss.to(device)
        self._latents.to(device)

    def compile(self) -> None:
        """torch.compile block by block, the decoder's last layer left out: gradients at its weight are read apart."""
        compile_blocks(self._network)
        if self.critic is not None:
            self.critic.compile()
        if self.loss.perceptual is not None:
            self.loss.perceptual.compile()

    def describe(self) -> dict[str, str]:
        """Return what the run prints about the losses and the network."""
        config = self._config
        n_parameters = sum(p.numel() for p in self._network.parameters())
        n_trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        network = (
            f"{type(self._network).__name__} f{self.f} c{self._channels}, {n_parameters / 1e6:.2f} M parameters, "
            f"{n_trained / 1e6:.2f} M trained{' (decoder only)' if self._decoder_only else ''}"
        )
        if config.model.init_from:
            network += f", from {Path(config.model.init_from).resolve().name}"
        if not self._image.plain:
            network += f"; images: {self._image.describe()}"
        out = {"network": network, "loss": self._describe_losses()}
        if self._held is not None:
            hidden = f"{config.model.condition_dropout:.0%} hidden"
            out["condition"] = f"{len(self.classes)} classes, {hidden}; {self._held.describe()}"
        out |= {codebook.name: codebook.describe() for codebook in self._latents.codebooks}
        if self._latents.has_kl:
            side, count = max(config.data.sides), self._image.count
            ldm = kl_weight_in_ldm(config.kl, config.loss.pixel_weight, side, self.f, self._channels, count)
            out["kl"] = (
                f"weight {config.kl.weight:g} per {config.kl.reduction}, {config.kl.schedule}; {ldm:.3g} in LDM's "
                "convention (sums over pixels and latents)"
            )
        if self.adversary is not None:
            adversarial = config.adversarial
            out["discriminator"] = (
                f"{sum(p.numel() for p in self.adversary.discriminator.parameters()) / 1e6:.2f} M parameters, "
                f"{adversarial.loss}, weight {adversarial.weight:g}{', adaptive' if adversarial.adaptive else ''}, "
                f"{'of the base' if self._has_warm_critic else 'from random weights'}; "
                f"warm-up from {adversarial.start} for {adversarial.warmup}, ramp {adversarial.ramp}"
            )
        return out

    def _describe_losses(self) -> str:
        config = self._config
        terms = [self.loss.describe(), *self._latents.describe()]
        if self.adversary is not None:
            terms.append(f"{config.adversarial.weight:g} adversarial ({config.adversarial.loss})")
        missing = self.loss.perceptual is None
        return " + ".join(terms) + (f" (perceptual: n/a, {self.loss.why_not_perceptual})" if missing else "")

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the trainable parameters; steps and densities of the rate have a rate of their own."""
        model = _unwrapped(self.module).rate
        rate = set() if model is None else {id(p) for p in model.parameters()}
        trained = [p for p in self.module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in rate], "peak_lr": lr}]
        if rate:
            ratio = self._config.rate.lr_ratio
            groups.append({"params": [p for p in trained if id(p) in rate], "peak_lr": lr * ratio, "weight_decay": 0.0})
        return groups

    def generator_step(self, module: nn.Module, batch: Mapping[str, Any], step: Step) -> Terms:
        """See `train.task.Task.generator_step`."""
        x = batch["image"]
        if self.adversary is not None:
            self.adversary.begin(step)
        draws = self._draw(x, batch.get("label"), step)
        with step.autocast():
            outputs: Outputs = module(x, draws)
        target = x if draws.transform is None else draws.transform.image(x, self.f)
        background = self._image.draw_background(step.seed, step.positions)
        # From here on float32. The leaf takes each term's gradient apart; nothing reaches the networks before backward.
        leaf = outputs.x_hat.detach().requires_grad_()
        terms = self.loss(target, leaf, background)
        gradients = {name: torch.autograd.grad(term, leaf)[0] for name, term in terms.items()}
        values: dict[str, torch.Tensor] = {name: term.detach() for name, term in terms.items()}
        reconstruction = torch.stack(list(values.values())).sum()
        at_x_hat = torch.stack(list(gradients.values())).sum(0)
        objective = outputs.x_hat.new_zeros(())
        if outputs.log_scale is not None:  # the nll of a Laplace-like density of scale exp(s), per value
            scale = torch.exp(-outputs.log_scale)
            objective = objective + reconstruction * scale + outputs.log_scale
            at_x_hat = at_x_hat * scale.detach()
            values["log_scale"] = outputs.log_scale.detach()
        total = reconstruction if outputs.log_scale is None else objective.detach()
        if self.adversary is not None and self.adversary.plays(step):
            term = self.adversary.generator_term(self._image.judged(leaf, background), step)
            (gradient,) = torch.autograd.grad(term, leaf)
            if self._config.adversarial.adaptive:
                self.adversary.remember(*self._at_last_layer(outputs.x_hat, at_x_hat, gradient))
            weight = self.adversary.weight(step)
            at_x_hat = at_x_hat + weight * gradient
            gradients["adversarial"] = weight * gradient
            values["adversarial"] = weight * term.detach()
            total = total + values["adversarial"]
        objective = objective + (outputs.x_hat * at_x_hat).sum()
        for name, term in self._latents.terms(outputs, x, draws, step, values).items():
            if term.requires_grad:
                if outputs.latents[0].requires_grad:
                    found = torch.autograd.grad(term, outputs.latents, retain_graph=True, allow_unused=True)
                    gradients[name] = torch.cat(
                        [term.new_zeros(1), *(each.flatten() for each in found if each is not None)]
                    )
                objective = objective + term
            values[name] = term.detach()
            total = total + values[name]
        values |= {f"grad_{name}": gradient.norm() for name, gradient in gradients.items()}
        judged = tuple(self._image.judged(image, background) for image in (target, outputs.x_hat.detach()))
        return Terms(objective, {"loss": total, **values}, carry=judged)

    def _at_last_layer(self, x_hat: torch.Tensor, *gradients: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients at the decoder's last weight that belong to gradients at x_hat."""
        weight = self._last_layer.get_parameter("weight")
        # Only their ratio counts: enlarged, so that fp16 can hold what is left of a mean over many pixels.
        return [torch.autograd.grad(x_hat, weight, _HEADROOM * g, retain_graph=True)[0] for g in gradients]

    def _draw(self, x: torch.Tensor, labels: torch.Tensor | None, step: Step) -> Draws:
        """Draw what is random in one forward pass from (seed, position); `labels`: (B,) of the images' classes."""
        config, seed, at, device = self._config, step.seed, step.positions, x.device
        height, width = x.shape[-2] // self.f, x.shape[-1] // self.f
        shape = (self._channels, height, width)
        per_image = positions_draws.uniform(seed, PER_IMAGE, at, (3,)).to(device)
        out: dict[str, Any] = {}
        if self._has_variance:
            out["posterior"] = positions_draws.normal(seed, POSTERIOR, at, shape).to(device)
        rate = _unwrapped(self.module).rate
        if rate is not None:
            out["uniform"] = positions_draws.uniform(seed, UNIFORM, at, shape).to(device) - 0.5
            out["quality"] = draw_quality(per_image[:, 0])
            out["coded"] = per_image[:, 1] < config.rate.probability
        if config.latents.noise > 0:
            out["noise"] = positions_draws.normal(seed, LATENT_NOISE, at, shape).to(device)
            out["noise_deviation"] = per_image[:, 2] * config.latents.noise * self._scale.deviation
        if config.latents.equivariance > 0:
            rng = positions_draws.rng(seed, PER_BATCH, at[0])
            if rng.random() < config.latents.equivariance:
                out["transform"] = LatentTransform.draw(rng, height, width, self.f, self._smallest_side())
        out["teacher_latents"] = self._latents.teacher_latents(x, step)
        if self.classes:
            assert labels is not None
            chance = positions_draws.uniform(seed, CONDITION, at, ()).to(device)
            out["labels"] = labels.masked_fill(chance < config.model.condition_dropout, NO_CLASS)
        return Draws(**out)

    def critic_step(self, critic: nn.Module, batch: Mapping[str, Any], carry: Any, step: Step) -> Terms | None:
        """See `train.task.Task.critic_step`: the discriminator on the same images, reconstructions detached."""
        if self.adversary is None or self.adversary.phase(step) == "reconstruction":
            return None
        x, x_hat = carry
        return self.adversary.critic_terms(critic, x, x_hat, step)

    def after_step(self, values: Values, step: Step, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """See `train.task.Task.after_step`; adds phase and weights to `values`."""
        lines: list[str] = []
        self._scale.update(*values["latent_moments"])
        lines += self._latents.after_step(values, step, reduce)
        if self.adversary is not None:
            values.update(self.adversary.logged(step))
            lines += self.adversary.after_step(values, step, reduce)
        for symptom, text in self._monitor.update(values):
            done = "nothing is done about it"
            if symptom == "exploding adaptive weight":
                done = "the cap holds; a smaller adversarial.weight or a longer warm-up may help"
            elif self._config.health.act and symptom == "collapsed discriminator" and self.adversary is not None:
                self.adversary.rewarm(step)
                done = "the adversarial weight goes to 0 and the discriminator warms up again"
            elif self._config.health.act and symptom == "posterior collapse" and self._latents.has_kl:
                done = f"the KL's weight is now {self._latents.relieve():g} of the recipe's"
            lines.append(f"{text}; {done}")
        return lines

    def discard_step(self) -> None:
        """See `train.task.Task.discard_step`."""
        self._latents.discard_step()
        if self.adversary is not None:
            self.adversary.discard()

    def after_validation(self, metrics: Mapping[str, float], step: Step) -> list[str]:
        """See `train.task.Task.after_validation`."""
        lines = self._latents.after_validation(metrics)
        if self._held is not None and metrics:
            lines.append(sentence(metrics))
        if self.adversary is None or "loss" not in metrics:
            return lines
        return lines + self.adversary.after_validation(metrics["loss"], step)

    def state_dict(self) -> dict[str, Any]:
        """See `train.task.Task.state_dict`."""
        return {
            "adversary": self.adversary.state_dict() if self.adversary else None,
            "monitor": self._monitor.state_dict(),
            "kl_relief": self._latents.kl_relief,
            "scale": asdict(self._scale),
            "classes": list(self.classes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `train.task.Task.load_state_dict`."""
        if self.adversary is not None and state["adversary"] is not None:
            self.adversary.load_state_dict(state["adversary"])
        self._monitor.load_state_dict(state["monitor"])
        self._latents.kl_relief = state["kl_relief"]
        self._scale = LatentScale(**state["scale"])

    def evaluate(
        self, module: nn.Module, device: torch.device, rank: int, n_ranks: int
    ) -> tuple[list[dict[str, Any]], np.ndarray | None]:
        """Measure this rank's held-out images; see `train.task.Task.evaluate` and `train.validation.measure`."""
        samples = share_of(self._validation, rank, n_ranks)
        return measure(_unwrapped(module), samples, self.loss, self._config.data, device, self._held)

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """See `train.task.Task.export`; with a rate model the figures hold its estimate, of STATIC mode."""
        parts = _unwrapped(module)
        discriminator = self.critic if self._config.adversarial.export else None
        if parts.quantisers or self.classes:
            run = (self._config, self._training, self._validation)
            write = export_codebook_model if parts.quantisers else export_conditional
            return write(parts.network, out, *run, record=record, discriminator=discriminator)
        figures = export_model(
            parts.network,
            out,
            self._config,
            self._training,
            self._validation,
            record=record,
            device=device,
            step=None if parts.rate is None else parts.rate.step.cpu().numpy(),
            discriminator=discriminator,
        )
        if parts.rate is not None and "by_quality" in figures:
            checked = self._validation[: figures["n_checked"]]
            for quality, bpp in estimated_rates(parts, checked, out, figures["by_quality"], device).items():
                figures["by_quality"][quality]["estimated_bpp"] = bpp
        return figures


def _unwrapped(module: nn.Module) -> AutoencoderModule:
    assert isinstance(module, AutoencoderModule)
    return module
