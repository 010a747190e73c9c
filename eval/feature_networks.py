"""Networks whose features describe a set of images: classifiers, FID's Inception, vision transformers.

    (B, 3, H, W) uint8  ->  FeatureNetwork  ->  features (B, D) float32, one vector per image

Entry: `load_network`. Only local files are read; nothing here downloads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from codec.errors import UsageError
from eval.features import INCEPTION, FeaturesError, fill, find_backbone, load_state, sha256_of

TRANSFORMERS_COMMAND = "hf download facebook/dinov2-base --local-dir FOLDER"
_SIDES = (32, 64, 128, 256, 512)  # pixels; tried in turn: the first that a network takes is its least


class FeatureNetwork:
    """A frozen network, with what a result says about it.

    Attributes:
        name: the network's.
        sha256: of its file, or of its files one after another; "random" without one.
        settings: how an image becomes a vector; part of the protocol.
        least_side: shortest side of an image that it takes, pixels.
        dimension: D, the length of a vector.
    """

    def __init__(self, name: str, sha256: str, settings: str, function: Callable[[Tensor], Tensor]) -> None:
        """Ask the network for its dimension and its least side.

        Args:
            name: see above.
            sha256: see above.
            settings: see above.
            function: (B, 3, H, W) uint8 on the CPU to (B, D) of any dtype and device.
        """
        self.name, self.sha256, self.settings = name, sha256, settings
        self._function = function
        for self.least_side in _SIDES:
            try:
                self.dimension = self(torch.zeros(1, 3, self.least_side, self.least_side, dtype=torch.uint8)).shape[1]
                return
            except RuntimeError:  # nothing left after so many poolings
                if self.least_side == _SIDES[-1]:
                    raise

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features, (B, D) float32 on the CPU, of images (B, 3, H, W) uint8."""
        with torch.inference_mode():
            return self._function(images).float().cpu()

    def about(self) -> dict[str, Any]:
        """Return what a result says of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "dimension": self.dimension,
            "settings": self.settings,
        }


def load_network(name: str, place: str | Path | None = None, device: str = "cpu") -> FeatureNetwork:
    """Load a feature network.

    Args:
        name: "inception" (FID's), torchvision's name of a classifier ("squeezenet1_0", "vgg16", "resnet50" ...), or a
            folder with a transformers vision model.
        place: its file or the file's folder, as in `features.find_backbone`; not used with a folder as name.
        device: where it runs.

    Raises:
        FeaturesError: the file is missing, damaged, or of another network; the message says how to get it.
        UsageError: an unknown network, or a package that is missing.
    """
    if Path(name).is_dir():
        return transformers_features(Path(name), device)
    if name == INCEPTION:
        return inception_features(find_backbone(INCEPTION, place), device)
    from torchvision.models import list_models

    if name not in list_models(module=torch_models()):
        raise UsageError(
            f"unknown feature network {name!r}: expected {INCEPTION}, a classifier of torchvision (squeezenet1_0, "
            "vgg16 ...), or the folder of a transformers vision model"
        )
    return classifier_features(name, find_backbone(name, place), device)


def torch_models() -> Any:
    """Return torchvision's module of classifiers."""
    import torchvision

    return torchvision.models


def classifier_features(name: str, path: Path | None, device: str = "cpu") -> FeatureNetwork:
    """Take a torchvision classifier's last features, averaged over pixels and scaled to a mean square of 1.

    Args:
        name: torchvision's, of a network with `.features` (squeezenet, vgg, alexnet, mobilenet, efficientnet ...) or
            with `.fc` (resnet ...).
        path: its weights; None takes random ones (tests).
        device: where it runs.

    Raises:
        FeaturesError: the file is damaged or of another network.
        UsageError: the network has neither.
    """
    # Drawing random weights takes longer than reading: with a file there are none.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if path is None else "meta"):
        torch.manual_seed(0)
        whole: nn.Module = torch_models().get_model(name, weights=None)
    if isinstance(getattr(whole, "features", None), nn.Module):
        network = nn.Sequential(whole.get_submodule("features"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        names = {key: "features." + key.removeprefix("0.") for key in network.state_dict()}
    elif isinstance(getattr(whole, "fc", None), nn.Module):
        whole.fc = nn.Identity()
        network, names = nn.Sequential(whole), {f"0.{key}": key for key in whole.state_dict()}
    else:
        raise UsageError(f"feature network {name}: has no features to average; take another classifier of torchvision")
    if path is not None:
        fill(network, names, path)
    network.requires_grad_(False).eval().to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(images: Tensor) -> Tensor:
        output: Tensor = network((images.to(device) / 255 - mean) / std)
        # Features of networks without normalisation are in the hundreds, where KID's cubic kernel is all noise.
        return output * (output.square().mean(1, keepdim=True) + 1e-10).rsqrt()

    settings = (
        f"torchvision {name}, ImageNet mean and deviation, no resize, last feature map averaged over pixels, scaled to "
        "a mean square of 1 over channels"
    )
    return FeatureNetwork(name, sha256_of(path) if path else "random", settings, features)


def inception_features(path: Path, device: str = "cpu") -> FeatureNetwork:
    """Take the 2048 pooled features of FID's Inception, as torch-fidelity computes them.

    torchmetrics' own default resizes with a filter, which the networks of published FIDs do not: it is switched off.

    Raises:
        FeaturesError: the file is damaged or of another network.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as package  # type: ignore[import-untyped]
    from torchmetrics.image.fid import NoTrainInceptionV3

    state = load_state(path)
    try:  # without a path the constructor downloads; with one it runs pickled code: it gets what was read here
        with patch.object(package, "load_state_dict_from_url", lambda *_, **__: state), torch.random.fork_rng([]):
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
    except RuntimeError as exception:
        first = " ".join(str(exception).split())[:200]
        raise FeaturesError(f"{path}: not the weights of FID's Inception: {first}") from exception
    network.to(device)
    settings = "torch-fidelity's inception-v3-compat, 2048 pooled features, resized to 299 x 299 as TensorFlow 1 does"
    return FeatureNetwork(INCEPTION, sha256_of(path), settings, lambda images: network(images.to(device)))


def transformers_features(folder: Path, device: str = "cpu") -> FeatureNetwork:
    """Take the class token of a transformers vision model, or the mean over positions where it has none.

    Raises:
        UsageError: transformers is not installed, or the folder holds no such model; the message says how to get one.
    """
    how = f"on a machine with a network: {TRANSFORMERS_COMMAND}"
    missing = [file for file in ("config.json", "preprocessor_config.json") if not (folder / file).is_file()]
    if missing:
        raise UsageError(f"{folder}: not the folder of a transformers vision model (no {missing[0]}); {how}")
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as exception:
        raise UsageError(f"{folder}: reading it needs transformers; pip install transformers") from exception
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        model, report = AutoModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except Exception as exception:  # each network and file format has its own exceptions
        first = (str(exception).strip() or type(exception).__name__).splitlines()[0]
        raise UsageError(f"{folder}: cannot be loaded: {first}; {how}") from exception
    # What transformers does not find it makes up, with a warning. Only a pooler, which is not used here, may lack.
    made_up = sorted(key for key in report["missing_keys"] if "pooler" not in key) or sorted(report["mismatched_keys"])
    if made_up:
        raise UsageError(f"{folder}: weights do not fit the config: {made_up[0]}; {how}")
    network = getattr(model, "vision_model", model).float().eval().requires_grad_(False).to(device)
    has_class = any("cls_token" in key or "class_embedding" in key for key, _ in network.named_parameters())

    def features(images: Tensor) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        states: Tensor = network(pixel_values=pixels).last_hidden_state  # (B, tokens, D) or (B, D, rows, columns)
        if states.ndim == 4:
            return states.mean((2, 3))
        return states[:, 0] if has_class else states.mean(1)

    taken = "class token" if has_class else "mean over positions"
    its_processor = sha256_of(folder / "preprocessor_config.json")[:16]  # another resize or crop is another metric
    settings = (
        f"transformers {type(network).__name__}, last_hidden_state, {taken}, the folder's image processor, whose "
        f"config has the sha256 {its_processor}..."
    )
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return FeatureNetwork(folder.resolve().name, sha256_of(*weights), settings, features)
