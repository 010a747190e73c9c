"""lpips-sqz10 against a plain recomputation, LPIPS and DISTS against torchmetrics'; backbones are never downloaded."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eval.features import Dists, FeaturesError, SqueezeFeatures, find_among, find_backbone, load_lpips, load_state


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of VGG-16's features; the classifier, which no metric reads, is not there."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("vgg") / "vgg16-00000000.pth"
    torch.save({f"features.{name}": tensor for name, tensor in make_layers(cfgs["D"]).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import squeezenet1_0

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_0.safetensors"
    save_file(squeezenet1_0(weights=None).state_dict(), path)
    return path


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 48, 40, generator=generator) * 2 - 1
    return x, x + 0.3 * torch.randn(x.shape, generator=generator)


def test_equals_a_plain_recomputation(weights: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchvision.models import squeezenet1_0

    network = squeezenet1_0(weights=None).eval()
    network.load_state_dict(load_state(weights))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.zeros(2)
    with torch.no_grad():
        a, b = ((((image + 1) / 2).movedim(1, -1) - mean) / std for image in pair)
        a, b = a.movedim(-1, 1), b.movedim(-1, 1)
        for n, layer in enumerate(network.features):
            a, b = layer(a), layer(b)
            if n in (1, 4, 7, 8, 9, 10, 12):
                unit_a = a / (a.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
                unit_b = b / (b.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
                expected += (unit_a - unit_b).pow(2).sum(1).flatten(1).mean(1)
    features = SqueezeFeatures(weights)
    distance = features(*pair)
    assert distance.shape == (2,)
    assert distance.min() > 0.01
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-6)
    assert len(features.sha256) == 64
    assert not torch.allclose(SqueezeFeatures()(*pair), distance)  # the file was used


def test_zero_for_equal_inputs(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert SqueezeFeatures()(pair[0], pair[0]).tolist() == [0, 0]


def test_a_reference_serves_many_reconstructions(weights: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    features = SqueezeFeatures(weights)
    x, x_hat = pair
    reference = features.reference(x)
    for reconstruction in (x_hat, 0.5 * x, x_hat):
        assert torch.equal(features.between(reference, reconstruction), features(x, reconstruction))


def test_gradient_reaches_x_hat_only(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    features = SqueezeFeatures()
    x, x_hat = (image.clone().requires_grad_() for image in pair)
    features(x, x_hat).sum().backward()
    assert x.grad is None
    assert x_hat.grad is not None
    assert torch.isfinite(x_hat.grad).all()
    assert (x_hat.grad.abs().sum((1, 2, 3)) > 0).all()  # each image of the batch
    assert all(not p.requires_grad and p.grad is None for p in features.parameters())


def test_gradient_is_finite_where_all_features_are_zero() -> None:
    features = SqueezeFeatures()
    for parameter in features.parameters():
        parameter.zero_()
    x_hat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    features(torch.ones(1, 3, 32, 32), x_hat).sum().backward()
    assert x_hat.grad is not None
    assert torch.isfinite(x_hat.grad).all()


def test_stays_frozen_in_a_trainer() -> None:
    features = SqueezeFeatures()
    torch.nn.ModuleList([features]).train()
    assert not any(module.training for module in features.modules())


def test_building_it_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    SqueezeFeatures()
    assert torch.rand(1) == expected


def test_wrong_weights(weights: Path, tmp_path: Path) -> None:
    state = load_state(weights)
    torch.save({k: v for k, v in state.items() if k != "features.3.squeeze.bias"}, tmp_path / "missing.pth")
    with pytest.raises(FeaturesError, match=r"missing\.pth: has no tensor features\.3\.squeeze\.bias"):
        SqueezeFeatures(tmp_path / "missing.pth")
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(FeaturesError, match=r"shape\.pth: features\.0\.weight has shape \(64, 3, 3, 3\), expected"):
        SqueezeFeatures(tmp_path / "shape.pth")
    for name in ("damaged.safetensors", "damaged.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(FeaturesError, match=name):
            SqueezeFeatures(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FeaturesError, match="state dict"):
        load_state(tmp_path / "list.pth")


def test_backbone_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, environment, hub = tmp_path / "given", tmp_path / "environment", tmp_path / "hub"
    for folder in (given, environment, hub / "checkpoints"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("LATENT_CODEC_FEATURES", str(environment))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    with pytest.raises(FeaturesError, match=r"vgg16-\*\.pth.*environment.*hub.checkpoints.*torchvision\.models\.vgg16"):
        find_backbone("vgg16")
    (hub / "checkpoints" / "vgg16_bn-1.pth").touch()  # another network
    (hub / "checkpoints" / "vgg16-397923af.pth").touch()
    assert find_backbone("vgg16").name == "vgg16-397923af.pth"
    (environment / "vgg16.safetensors").touch()
    assert find_backbone("vgg16") == environment / "vgg16.safetensors"
    with pytest.raises(FeaturesError, match="given"):  # what the user names is not replaced by something else
        find_backbone("vgg16", given)
    (given / "mine.pth").touch()
    assert find_backbone("vgg16", given / "mine.pth") == given / "mine.pth"


@pytest.mark.parametrize(("net", "backbone"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_uses_the_file(net: str, backbone: str, tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    import torchvision

    torch.manual_seed(7)
    network = getattr(torchvision.models, backbone)(weights=None).eval()
    torch.save({k: v for k, v in network.state_dict().items() if "features" in k}, tmp_path / f"{backbone}-1.pth")
    x, x_hat = (torch.nn.functional.interpolate(image, size=96) for image in pair)
    metric = load_lpips(net, tmp_path)
    last = max(int(name.split(".")[1]) for name in metric.network.net.state_dict()) + 1
    with torch.no_grad():
        expected = torch.relu(network.features[:last](x))
        assert torch.equal(torch.relu(metric.network.net(x)[-1]), expected)
    assert expected.std() > 0
    x_hat.requires_grad_()
    distance = metric.train()(x, x_hat)  # dropout of the heads stays off
    assert distance.shape == (2,)
    assert torch.equal(distance, metric(x, x_hat))
    distance.sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    assert all(not p.requires_grad for p in metric.parameters())


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_lpips_is_torchmetrics_on_the_same_backbone(
    net: str, vgg: Path, tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS

    path = vgg
    if net != "vgg":
        torch.manual_seed(8)
        layers = getattr(torchvision.models, {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net])(weights=None)
        path = tmp_path / "backbone.pth"
        torch.save(layers.state_dict(), path)
    state = load_state(path)
    with pytest.MonkeyPatch.context() as patch:
        plain = {"vgg": lambda **_: torch.nn.ModuleDict({"features": _vgg_layers(state)})}
        if net in plain:  # its other 120 million weights take seconds to draw
            patch.setattr("torchvision.models.vgg16", plain[net])
        theirs = _LPIPS(net=net, pnet_rand=True).eval()
    names = {name: re.sub(r"^(slices\.\d+|slice\d+)\.", "features.", name) for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({own: state[name] for own, name in names.items()})
    x, x_hat = (torch.nn.functional.interpolate(image, size=64) for image in pair)
    with torch.no_grad():
        expected = theirs(x, x_hat).flatten()
        ours = load_lpips(net, path)
        assert ours.sha256 != "random"
        torch.testing.assert_close(ours(x, x_hat), expected, rtol=1e-4, atol=1e-7)
        assert expected.min() > 1e-5
        assert ours(x, x).abs().max() == 0


def _vgg_layers(state: dict[str, torch.Tensor]) -> torch.nn.Sequential:
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["D"])
    layers.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()})
    return layers


def test_dists_is_torchmetrics_on_the_same_backbone(vgg: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchmetrics.functional.image import dists as package

    with pytest.MonkeyPatch.context() as patch:
        layers = _vgg_layers(load_state(vgg))
        patch.setattr(package, "vgg16", lambda **_: torch.nn.ModuleDict({"features": layers}))
        theirs = package.DISTSNetwork()
    ours = Dists(vgg)
    x, x_hat = (image.clamp(-1, 1) for image in pair)
    with torch.no_grad():
        expected = theirs((x + 1) / 2, (x_hat + 1) / 2)
        torch.testing.assert_close(ours(x, x_hat), expected, rtol=1e-4, atol=1e-6)
        assert expected.min() > 1e-3
        assert ours(x[:1], x_hat[:1]).shape == (1,)
        assert ours(x, x).abs().max() < 1e-5
    assert len(ours.sha256) == 64
    torch.nn.ModuleList([ours]).train()
    assert not any(module.training for module in ours.modules())
    heads = vgg.parent / "heads.pth"
    torch.save({"alpha": torch.zeros(1)}, heads)
    with pytest.raises(FeaturesError, match=r"has no tensor features\.0\.weight"):
        Dists(heads)


def test_building_networks_leaves_the_random_state_alone(vgg: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Dists(vgg)
    assert torch.rand(1) == expected


def test_one_file_is_one_network(vgg: Path, tmp_path: Path) -> None:
    assert find_among("vgg16", ["vgg16", "alexnet"], vgg) == vgg
    with pytest.raises(FeaturesError, match=r"taken for the weights of vgg16, not of alexnet"):
        find_among("alexnet", ["vgg16", "alexnet"], vgg)
    other = tmp_path / "mine.pth"
    other.touch()
    assert find_among("alexnet", ["alexnet"], other) == other
    assert find_among("squeezenet1_0", ["alexnet", "squeezenet1_0"], other) == other
    inception = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    inception.touch()
    assert find_backbone("inception", tmp_path) == inception


def test_unknown_lpips_network() -> None:
    with pytest.raises(FeaturesError, match="alex, vgg, squeeze"):
        load_lpips("resnet")
