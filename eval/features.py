"""Perceptual distances on backbones that the user already has; nothing here ever downloads.

    x, x_hat (B, 3, H, W) in [-1, 1]  ->  backbone, slice by slice  ->  unit length over channels  ->  distance (B,)

`SqueezeFeatures` is `lpips-sqz10`, the uncalibrated LPIPS on SqueezeNet 1.0; `load_lpips` and `Dists` are the metrics
of the packages `lpips` and `DISTS-pytorch` on a backbone file. All are frozen, in evaluation mode whatever a trainer
does, and differentiable in x_hat.
"""

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn

from codec.errors import UsageError

ENVIRONMENT = "LATENT_CODEC_FEATURES"
SUFFIXES = (".safetensors", ".pth")
LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SQUEEZE_SLICES = ((0, 2), (2, 5), (5, 8), (8, 9), (9, 10), (10, 11), (11, 13))
MIN_SIDE = 21  # pixels; below this SqueezeNet's third pooling has nothing left


@dataclass(frozen=True)
class Backbone:
    """Where the weights of a network come from.

    Attributes:
        stem: how the name of its file starts in torch hub's cache.
        command: fetches it there, on a machine with a network.
    """

    stem: str
    command: str


def _of_torchvision(name: str) -> Backbone:
    return Backbone(name, f"python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\"")


INCEPTION = "inception"
BACKBONES = {name: _of_torchvision(name) for name in ("squeezenet1_0", "squeezenet1_1", "alexnet", "vgg16")} | {
    # The Inception of FID is TensorFlow's of 2015, not torchvision's.
    INCEPTION: Backbone(
        "weights-inception-2015-12-05",
        'python -c "import torch; from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url; '
        'torch.hub.load_state_dict_from_url(url)"',
    )
}


class FeaturesError(UsageError):
    """A backbone file that is missing, unreadable or of another network; a ValueError with a one-line message."""


def places_of_backbones(path: str | Path | None = None) -> list[Path]:
    """Return where `find_backbone` looks: `path` alone if it is given, else the environment's place and hub's cache."""
    if path is not None:
        return [Path(path)]
    environment = os.environ.get(ENVIRONMENT)
    places = [Path(environment)] if environment else []
    return [*places, Path(torch.hub.get_dir()) / "checkpoints"]


def find_backbone(name: str, path: str | Path | None = None) -> Path:
    """Find the weights file of a classifier on this machine.

    Looks at `path`, and only there if it is given; else at $LATENT_CODEC_FEATURES, then in torch hub's cache.

    Args:
        name: of `BACKBONES`, or torchvision's name of another classifier.
        path: a weights file of any name, or a folder with `<name>.*` or `<name>-*` (.safetensors or .pth);
            None: not given.

    Returns:
        The file; of several in a folder the first by name.

    Raises:
        FeaturesError: there is none; the message names the file, the places and the way to get it.
    """
    places = places_of_backbones(path)
    if path is not None and places[0].is_file():
        return places[0]
    backbone = BACKBONES.get(name) or _of_torchvision(name)
    for place in places:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            if belongs_to(file, name) and file.is_file():
                return file
    raise FeaturesError(
        f"backbone weights {backbone.stem}-*.pth (or {name}.safetensors) not found in {', '.join(map(str, places))}. "
        f"On a machine with a network, fetch them once with {backbone.command}; elsewhere copy "
        f"{backbone.stem}-*.pth from that machine's torch hub cache and give it with --features or ${ENVIRONMENT}"
    )


def find_among(name: str, wanted: Collection[str | None], path: str | Path | None = None) -> Path:
    """Find the weights of one of several networks; a file at `path` counts for one of them only.

    It counts for the network that its name says; if that says none, for the one that is wanted, or for squeezenet1_0.

    Args:
        name: as in `find_backbone`.
        wanted: all names that are looked for.
        path: as in `find_backbone`.

    Raises:
        FeaturesError: as `find_backbone`, or the file counts for another network.
    """
    if path is not None and Path(path).is_file():
        named = [known for known in BACKBONES if belongs_to(Path(path), known)]
        owner = named[0] if named else name if set(wanted) == {name} else "squeezenet1_0"
        if name != owner:
            raise FeaturesError(f"{path}: taken for the weights of {owner}, not of {name}: give a folder with both")
    return find_backbone(name, path)


def belongs_to(file: Path, name: str) -> bool:
    """Whether a file is named as one with the weights of network `name`."""
    stems = {name, BACKBONES[name].stem if name in BACKBONES else name}
    named = any(file.stem == stem or file.stem.startswith(f"{stem}-") for stem in stems)
    return named and file.suffix in SUFFIXES


def sha256_of(*paths: Path) -> str:
    """Return the hex digest of files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors or, without running pickled code, from a torch file.

    Raises:
        FeaturesError: the file cannot be read or is not a dict of tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exception:  # each reader has its own exceptions for damaged files
        raise FeaturesError(f"{path}: cannot be read as weights: {exception}") from exception
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FeaturesError(f"{path}: expected a state dict (names to tensors), got {type(state).__name__}")
    return dict(state)


def fill(module: nn.Module, names: Mapping[str, str], path: Path) -> None:
    """Load a backbone file into `module`; `names` maps the names of its state dict to those in the file.

    Raises:
        FeaturesError: the file cannot be read or belongs to another network.
    """
    found, expected = load_state(path), module.state_dict()
    state = {}
    for own, name in names.items():
        tensor = expected[own]
        if name not in found:
            raise FeaturesError(f"{path}: has no tensor {name}: these are weights of another network")
        if found[name].shape != tensor.shape:
            raise FeaturesError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}: "
                "these are weights of another network"
            )
        state[own] = found[name].to(tensor.dtype)
    module.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in expected.values()))


class Distance(nn.Module):
    """A frozen perceptual distance: no trained parameters, always in evaluation mode.

    Attributes:
        name: what results call it.
        name_of_backbone: its network, a key of `BACKBONES`.
        sha256: hex digest of the backbone's file, or "random" for random weights.
    """

    name: str
    name_of_backbone: str
    sha256: str

    def reference(self, x: Tensor) -> Sequence[Tensor]:
        """Return what `between` needs of images (B, 3, H, W) in [-1, 1], so that it can serve many reconstructions."""
        return [x]

    def between(self, reference: Iterable[Tensor], x_hat: Tensor) -> Tensor:
        """Return the distances (B,) of x_hat (B, 3, H, W) from the images that `reference` was made of."""
        (x,) = reference
        distance: Tensor = self(x, x_hat)
        return distance

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a trainer's model.train() must not switch on dropout here."""
        return super().train(False)

    def _freeze(self, path: Path | None) -> None:
        self.requires_grad_(False).eval()
        self.sha256 = sha256_of(path) if path else "random"


class SqueezeFeatures(Distance):
    """`lpips-sqz10`: squared difference of unit-normalised SqueezeNet 1.0 features, summed over channels and slices.

    Zhang et al. 2018, arXiv:1801.03924, eq. 1 with w = 1 (uncalibrated). Measured numbers are named `lpips-sqz10`.

    Args:
        path: weights with torchvision's `squeezenet1_0` names; None takes random ones (tests).
        random_seed: seed of the random weights; ignored with a path.

    Raises:
        FeaturesError: the file cannot be read or belongs to another network.
    """

    name = "lpips-sqz10"
    name_of_backbone = "squeezenet1_0"
    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path | None = None, random_seed: int = 0) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_0

        with torch.random.fork_rng(devices=[]):  # building the network draws random weights
            torch.manual_seed(random_seed)
            layers = squeezenet1_0(weights=None).features
        file = None if path is None else Path(path)
        if file is not None:
            fill(layers, {name: f"features.{name}" for name in layers.state_dict()}, file)
        self.slices = nn.ModuleList(layers[start:stop] for start, stop in SQUEEZE_SLICES)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)
        self._freeze(file)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the distance of each pair: sum over channels, mean over pixels, sum over slices; not over B.

        Args:
            x: (B, 3, H, W) in [-1, 1], H, W >= 21; no gradient flows to it.
            x_hat: same shape; may leave [-1, 1].

        Returns:
            (B,) float32, >= 0.
        """
        assert x.shape == x_hat.shape, (x.shape, x_hat.shape)
        assert x.detach().abs().max() <= 1.01, "x must be in [-1, 1]"
        with torch.autocast(x.device.type, enabled=False):  # losses are computed in float32
            return self.between(self._slices(x.detach()), x_hat)

    def reference(self, x: Tensor) -> Sequence[Tensor]:
        """Return the unit-normalised features of all slices."""
        return list(self._slices(x.detach()))

    def between(self, reference: Iterable[Tensor], x_hat: Tensor) -> Tensor:
        """Return the distance of x_hat from the images with these features, as `forward` does."""
        total = torch.zeros(len(x_hat), device=x_hat.device)
        with torch.autocast(x_hat.device.type, enabled=False):
            features = self._normalize(x_hat)
            for layers, unit in zip(self.slices, reference, strict=True):
                features = layers(features)
                total = total + (unit - _unit(features)).square().sum(1).mean((1, 2))
        return total

    def _slices(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the unit-normalised features slice by slice, so that a loss keeps those of one slice only."""
        features = self._normalize(x)
        for layers in self.slices:
            features = layers(features)
            yield _unit(features)

    def _normalize(self, x: Tensor) -> Tensor:
        # Channels last halves the time on CPUs; it also decides the layout of every feature map that follows.
        return (((x.float() + 1) / 2 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _unit(features: Tensor) -> Tensor:
    # The eps stands inside the root (lpips has it outside): all-zero features then have a finite gradient.
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


class Lpips(Distance):
    """The `lpips` package's metric, version 0.1, behind the interface of `SqueezeFeatures`; made by `load_lpips`."""

    def __init__(self, net: str, path: Path) -> None:
        super().__init__()
        import lpips

        self.name, self.name_of_backbone = f"lpips-{net}", LPIPS_BACKBONES[net]
        # lpips uses torchvision's deprecated `pretrained=`, and draws random weights first.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        backbone = self.network.net  # its names are slice<k>.<n>.*, with n as in torchvision's features.<n>.*
        fill(backbone, {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}, path)
        self._freeze(path)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return LPIPS of each pair, (B,) float32; x and x_hat are (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            distance: Tensor = self.network(x.float(), x_hat.float())  # (B, 1, 1, 1)
        return distance.flatten()


def load_lpips(net: str, path: str | Path | None = None) -> Lpips:
    """Build LPIPS without a download: the package's linear heads on a backbone file found by `find_backbone`.

    Args:
        net: "alex", "vgg" or "squeeze" (SqueezeNet 1.1).
        path: as in `find_backbone`.

    Raises:
        FeaturesError: unknown net, no backbone file, or a file of another network.
    """
    if net not in LPIPS_BACKBONES:
        raise FeaturesError(f"unknown LPIPS network {net!r}: expected one of {', '.join(LPIPS_BACKBONES)}")
    return Lpips(net, find_backbone(LPIPS_BACKBONES[net], path))


class Dists(Distance):
    """The `DISTS-pytorch` package's metric, version 0.1 (Ding et al. 2020, arXiv:2004.07728), on a vgg16 file.

    Args:
        path: weights with torchvision's `vgg16` names.

    Raises:
        FeaturesError: the file cannot be read or belongs to another network.
    """

    name = "dists"
    name_of_backbone = "vgg16"

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        import torchvision
        from DISTS_pytorch import DISTS_pt as package  # type: ignore[import-untyped]

        def vgg16(**_: Any) -> nn.Module:
            with torch.device("meta"):  # the weights are filled in below; drawing 138 million takes a second
                network: nn.Module = torchvision.models.vgg16(weights=None)
            return network

        # Its constructor downloads VGG, and looks for its own weights below sys.prefix alone.
        with patch.object(package, "models", SimpleNamespace(vgg16=vgg16)), torch.random.fork_rng(devices=[]):
            self.network = package.DISTS(load_weights=False)
        heads = load_state(Path(package.__file__).parent / "weights.pt")
        self.network.alpha.data, self.network.beta.data = heads["alpha"], heads["beta"]
        kept = [name for name in self.network.state_dict() if name.endswith((".weight", ".bias"))]  # stage<k>.<n>.*
        fill(self.network, {name: "features." + name.split(".", 1)[1] for name in kept}, Path(path))
        self._freeze(Path(path))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return DISTS of each pair, (B,) float32; x and x_hat are (B, 3, H, W) in [-1, 1]; nothing is resized."""
        with torch.autocast(x.device.type, enabled=False):
            pair = [(image.float() + 1) / 2 for image in (x, x_hat)]
            distance: Tensor = self.network(*pair, require_grad=x_hat.requires_grad)
        return distance.reshape(len(x))  # the package squeezes a batch of one away
