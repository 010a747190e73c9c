"""Perceptual distances on backbones that the user already has; nothing here ever downloads.

    x, x_hat (B, 3, H, W) in [-1, 1]  ->  backbone, slice by slice  ->  unit length over channels  ->  distance (B,)

`SqueezeFeatures` is `lpips-sqz10`, the uncalibrated LPIPS on SqueezeNet 1.0; `load_lpips` is the `lpips` package's own
metric on a backbone file. Both are frozen, in evaluation mode whatever a trainer does, and differentiable in x_hat.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from codec.errors import UsageError

ENVIRONMENT = "LATENT_CODEC_FEATURES"
SUFFIXES = (".safetensors", ".pth")
LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SQUEEZE_SLICES = ((0, 2), (2, 5), (5, 8), (8, 9), (9, 10), (10, 11), (11, 13))
MIN_SIDE = 21  # pixels; below this SqueezeNet's third pooling has nothing left


class FeaturesError(UsageError):
    """A backbone file that is missing, unreadable or of another network; a ValueError with a one-line message."""


def find_backbone(name: str, path: str | Path | None = None) -> Path:
    """Find the weights file of a torchvision classifier on this machine.

    Looks at `path`, and only there if it is given; else at $LATENT_CODEC_FEATURES, then in torch hub's cache.

    Args:
        name: torchvision's name: squeezenet1_0, squeezenet1_1, alexnet or vgg16.
        path: a weights file of any name, or a folder with `<name>.*` or `<name>-*` (.safetensors or .pth);
            None: not given.

    Returns:
        The file; of several in a folder the first by name.

    Raises:
        FeaturesError: there is none; the message names the file, the places and the way to get it.
    """
    if path is not None:
        places = [Path(path)]
        if places[0].is_file():
            return places[0]
    else:
        environment = os.environ.get(ENVIRONMENT)
        places = [Path(environment)] if environment else []
        places.append(Path(torch.hub.get_dir()) / "checkpoints")
    for place in places:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            named = file.stem == name or file.stem.startswith(f"{name}-")
            if named and file.suffix in SUFFIXES and file.is_file():
                return file
    raise FeaturesError(
        f"backbone weights {name}-*.pth (or {name}.safetensors) not found in {', '.join(map(str, places))}. "
        "On a machine with a network, fetch them once with "
        f"python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\"; elsewhere copy "
        f"{name}-*.pth from that machine's torch hub cache and give it with --features or ${ENVIRONMENT}"
    )


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


def _fill(module: nn.Module, names: Mapping[str, str], path: Path) -> None:
    """Load a backbone file into `module`; `names` maps every name of its state dict to the name in the file."""
    found = load_state(path)
    state = {}
    for own, tensor in module.state_dict().items():
        name = names[own]
        if name not in found:
            raise FeaturesError(f"{path}: has no tensor {name}: these are weights of another network")
        if found[name].shape != tensor.shape:
            raise FeaturesError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}: "
                "these are weights of another network"
            )
        state[own] = found[name]
    module.load_state_dict(state)


class Distance(nn.Module):
    """A frozen perceptual distance: no trained parameters, always in evaluation mode.

    Attributes:
        name: what results call it.
        sha256: hex digest of the backbone's file, or "random" for random weights.
    """

    name: str
    sha256: str

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a trainer's model.train() must not switch on dropout here."""
        return super().train(False)

    def _freeze(self, path: Path | None) -> None:
        self.requires_grad_(False).eval()
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path else "random"


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
            _fill(layers, {name: f"features.{name}" for name in layers.state_dict()}, file)
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
        total = torch.zeros(len(x), device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # losses are computed in float32
            with torch.no_grad():
                reference = self._normalize(x)
            features = self._normalize(x_hat)
            for layers in self.slices:
                with torch.no_grad():
                    reference = layers(reference)
                features = layers(features)
                total = total + (_unit(reference) - _unit(features)).square().sum(1).mean((1, 2))
        return total

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

        self.name = f"lpips-{net}"
        with warnings.catch_warnings():  # lpips uses torchvision's deprecated `pretrained=`
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        backbone = self.network.net  # its names are slice<k>.<n>.*, with n as in torchvision's features.<n>.*
        _fill(backbone, {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}, path)
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
