"""A trained head as a Python object: conditions -> latents, latents <-> units, latents <-> images of a codec.

    head = Head.load("runs/head")
    z = head.sample(["hat"] * 8, guidance=2.0, temperature=1.0, seed=0)
    images = head.images(z, "runs/first/model")

Imports torch and diffusers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec import console, model_folder
from codec.engine import Engine, EngineConfig, pick_device
from codec.head.conditions import Conditions, conditions_of, generators
from codec.head.fitted_folder import StoredPrior, read_fitted
from codec.head.folder import Stored, read
from codec.head.network import ConditionalHead, Drawing, Units
from codec.head.second_stage import FittedPrior
from codec.runtime import Codec

AnyCodec = Codec | Engine | str | Path
"""A codec, the engine of an autoencoder, or the folder or name of one, which is then loaded each time."""


@dataclass
class Head:
    """A head that is ready to use. Latents are normalized, (B, D, h, w) float32, and lie on the head's device.

    Attributes:
        stored: what its folder holds: network, classes, whose latents.
        batch: images that go through the network at once.
        steps: of a flow-matching decoder from noise to latents, where nothing else is said.
        fitted: the prior of the first level's units that samples are drawn from, in place of the head's own; None =
            that one. See `use`.
    """

    stored: Stored
    batch: int = 64
    steps: int = 20
    fitted: FittedPrior | None = None
    _told: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> "Head":
        """Read a head.

        Args:
            path: its folder, or the run that wrote it to `model`.
            device: where it computes; "auto" takes the first GPU, or else the CPU.

        Raises:
            ModelError: missing, damaged, or something else.
            UsageError: there is no such device.
        """
        where, stored = pick_device(device), read(Path(path))
        stored.network.to(where)
        return cls(stored)

    def use(self, path: str | Path) -> StoredPrior:
        """Draw first-level units from a prior that was fitted to them after training, and return it.

        Args:
            path: its folder, as `codec-train head fit` writes it.

        Raises:
            ModelError: missing, damaged, of another head, or of no head at all.
        """
        found = read_fitted(Path(path), self.device)
        found.require_head(self.head_id, self.classes)
        self.fitted = found.prior
        return found

    @property
    def network(self) -> ConditionalHead:
        """For inference."""
        return self.stored.network

    @property
    def head_id(self) -> str:
        """16 hex digits, SHA-256 over its weights."""
        return self.stored.head_id

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty with embeddings, and without a condition."""
        return self.stored.classes

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.network.shift.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of images, pixels."""
        space, f = self.network.space, self.stored.origin.f
        return space.height * f, space.width * f

    # --- latents ------------------------------------------------------------------------------------------------

    def sample(
        self,
        c: Conditions,
        *,
        temperature: float = 1.0,
        guidance: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        steps: int | None = None,
        heun: bool = False,
    ) -> Tensor:
        """Draw latents of conditions.

        Args:
            c: one for each, see `Conditions`: `["hat"] * 8`, `[None] * 8`, embeddings.
            temperature: of the units: 1 = as they are distributed, 0 = the middle.
            guidance: weight of classifier-free guidance of the decoder; 1 = none, 0 = as without a condition.
            seed: of all that is drawn.
            numbers: of the images; equal seed and number give the same draws, whatever else is drawn and under any
                condition. None = 0, 1, ...
            steps: of a flow-matching decoder; None = the head's own.
            heun: second-order steps, of two passes each.

        Returns:
            (B, D, h, w) normalized.

        Raises:
            UsageError: a class that it does not know, embeddings of another width; None, or guidance, and the head was
                trained with condition_dropout = 0.
            ValueError: a temperature or a guidance below 0, other steps than 1 or more, or not one number for each.
        """
        self._check_guidance(guidance)
        known = c if guidance or c is None else [None] * len(c)
        units = self.draw_units(known, temperature=temperature, seed=seed, numbers=numbers)
        return self.decode(units, c, guidance=guidance, seed=seed, numbers=numbers, steps=steps, heun=heun)

    def draw_units(
        self, c: Conditions, *, temperature: float = 1.0, seed: int = 0, numbers: Sequence[int] | None = None
    ) -> Units:
        """Draw units of p(u|c): one tensor for each level, (B, U) and (B, U2, h2, w2); see `sample`."""
        if not temperature >= 0:
            raise ValueError(f"temperature = {temperature}, allowed: >= 0")
        labels, hidden = self.conditions(c, None)
        rngs = _rngs(len(hidden), seed, numbers, "units")
        choice = torch.tensor([rng.random() for rng in rngs], dtype=torch.float32, device=self.device)
        noise = tuple(self._normal(rngs, shape) for shape in self.network.unit_shapes)

        def some(at: slice) -> Units:
            part, c, unknown = tuple(each[at] for each in noise), labels[at], hidden[at]
            if self.fitted is None:
                return self.network.draw_units(c, unknown, part, choice[at], temperature)
            n_classes = self.fitted.n_classes
            told = c.masked_fill(unknown, n_classes) if n_classes else None
            u = self.fitted.draw(part[0], choice[at], told, temperature)
            return self.network.complete(u, c, unknown, part, temperature)

        return self._in_batches(len(hidden), some)

    def encode(
        self,
        z: Tensor | np.ndarray,
        c: Conditions,
        *,
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Units:
        """Return units of q(u|z, c): one tensor for each level.

        Args:
            z: (B, D, h, w) normalized.
            c: one condition for each, see `Conditions`.
            seed: draw them, by this seed; None = the posterior's middle.
            numbers: see `sample`; of the draws.
        """
        return self._encode(z, c, seed, numbers)[0]

    def deviations(self, z: Tensor | np.ndarray, c: Conditions) -> Units:
        """Return the deviations of q(u|z, c), before any flow, level by level; see `encode`."""
        return self._encode(z, c, None, None)[1]

    def _encode(
        self, z: Tensor | np.ndarray, c: Conditions, seed: int | None, numbers: Sequence[int] | None
    ) -> tuple[Units, Units]:
        latents = self._checked(z)
        labels, hidden = self.conditions(c, len(latents))
        noise: Units | None = None
        if seed is not None:
            rngs = _rngs(len(latents), seed, numbers, "posterior")
            noise = tuple(self._normal(rngs, shape) for shape in self.network.unit_shapes)

        def some(at: slice) -> Units:
            part = None if noise is None else tuple(each[at] for each in noise)
            units, deviations = self.network.encode(latents[at], labels[at], hidden[at], part)
            return *units, *deviations

        both = self._in_batches(len(latents), some)
        n_levels = len(self.network.unit_shapes)
        return both[:n_levels], both[n_levels:]

    def decode(
        self,
        units: Units,
        c: Conditions,
        *,
        guidance: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        steps: int | None = None,
        heun: bool = False,
    ) -> Tensor:
        """Return latents of units under conditions, (B, D, h, w) normalized.

        A Gaussian decoder gives its mean; a flow-matching one starts from noise of `seed` and `numbers`. See `sample`.
        """
        self._check_guidance(guidance)
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps = {steps}, allowed: >= 1")
        units = tuple(torch.as_tensor(each, dtype=torch.float32, device=self.device) for each in units)
        n = len(units[0])
        if [tuple(each.shape) for each in units] != [(n, *shape) for shape in self.network.unit_shapes]:
            shapes = [tuple(each.shape) for each in units]
            raise ValueError(f"units of shapes {shapes}, expected (B, ...) of {self.network.unit_shapes}")
        labels, hidden = self.conditions(c, n)
        noise = self._normal(_rngs(n, seed, numbers, "latents"), self.network.space.shape)

        def some(at: slice) -> Units:
            drawing = Drawing(noise=noise[at], steps=steps, heun=heun)
            part = tuple(each[at] for each in units)
            return (self.network.decode(part, labels[at], hidden[at], drawing, guidance),)

        return self._in_batches(n, some)[0]

    def reconstruct(self, z: Tensor | np.ndarray, c: Conditions, to: Conditions = (), **how: Any) -> Tensor:
        """Return what the head makes of latents by way of their units, the posterior's middle.

        Args:
            z: (B, D, h, w) normalized.
            c: what they are encoded under, one for each.
            to: what they are decoded under: "the same, as a coat"; () = c.
            how: see `decode`.
        """
        same = isinstance(to, tuple) and not to
        return self.decode(self.encode(z, c), c if same else to, **how)

    # --- images -------------------------------------------------------------------------------------------------

    def latents(self, images: Sequence[np.ndarray], codec: AnyCodec) -> Tensor:
        """Return the normalized latents of images, the means of their posteriors, (B, D, h, w).

        Args:
            images: (H, W, 3) uint8 each, of `size`.
            codec: whose encoder the head was trained with.

        Raises:
            ModelError: another encoder.
            ValueError: images of another size.
        """
        engine = self._engine(codec, "encoder")
        found = []
        for number, image in enumerate(images):
            if image.shape != (*self.size, 3):
                raise ValueError(f"image {number}: {image.shape}, expected {(*self.size, 3)}")
            raw = torch.from_numpy(engine.encode(image))[None]
            found.append(self.stored.origin.normalisation.normalize(raw))
        return torch.cat(found).to(self.device)

    def images(self, z: Tensor, codec: AnyCodec) -> list[np.ndarray]:
        """Return the images of normalized latents (B, D, h, w): (H, W, 3) uint8 each.

        Args:
            z: of this head.
            codec: whose latents they are. A decoder that was trained further serves.

        Raises:
            ModelError: the codec of other latents.
        """
        engine = self._engine(codec, "decoder")
        raw = self.stored.origin.normalisation.denormalize(self._checked(z)).cpu().numpy()
        return [engine.decode(one, *self.size) for one in raw]

    def _engine(self, codec: AnyCodec, part: str) -> Engine:
        if isinstance(codec, Codec):
            engine = codec.engine
        elif isinstance(codec, Engine):
            engine = codec
        else:
            engine = Engine.load(model_folder.resolve(codec), EngineConfig(device=str(self.device)))
        note = self.stored.origin.require(engine, str(self.stored.folder), part)
        if note and part == "decoder" and note not in self._told:
            self._told.add(note)
            console.note(f"note: {self.stored.folder}: {note}")
        return engine

    def conditions(self, c: Conditions, n: int | None) -> tuple[Tensor, Tensor]:
        """Return conditions as its network takes them: classes (B,) or embeddings (B, E), and which are none, (B,).

        Raises:
            UsageError: see `conditions_of`; or one is none, of a head that does not know what that is.
        """
        width, where = self.network.space.embedding_width, str(self.stored.folder)
        found, hidden = conditions_of(c, n, self.classes, where, width)
        if bool(hidden.any()):
            self.stored.require_none("no condition")
        return found.to(self.device), hidden.to(self.device)

    def _check_guidance(self, guidance: float) -> None:
        if not guidance >= 0:
            raise ValueError(f"guidance = {guidance}, allowed: >= 0")
        if guidance != 1:
            self.stored.require_none(f"guidance {guidance:g}")

    def _checked(self, z: Tensor | np.ndarray) -> Tensor:
        latents, shape = torch.as_tensor(z, dtype=torch.float32, device=self.device), self.network.space.shape
        if latents.ndim != 4 or tuple(latents.shape[1:]) != shape:
            raise ValueError(f"latents {tuple(latents.shape)}, expected (B, {', '.join(map(str, shape))})")
        return latents

    def _normal(self, rngs: Sequence[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
        drawn = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(drawn)).to(self.device)

    def _in_batches(self, n: int, some: Callable[[slice], Units]) -> Units:
        with torch.inference_mode():
            parts = [some(slice(start, start + self.batch)) for start in range(0, n, self.batch)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))  # outside: ordinary tensors


def _rngs(n: int, seed: int, numbers: Sequence[int] | None, purpose: str) -> list[np.random.Generator]:
    if numbers is not None and len(numbers) != n:
        raise ValueError(f"numbers: {len(numbers)}, expected {n}")
    return generators(seed, range(n) if numbers is None else numbers, purpose)
