"""The conditional head: what reaches what, what a condition changes, guidance, its folder, what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec.engine import Engine, EngineConfig
from codec.errors import ModelError, UsageError
from codec.head import Head
from codec.head.config import NetworkConfig, Space
from codec.head.folder import Origin, write
from codec.head.network import ConditionalHead, Drawing, Noise, Outputs
from codec.latent_model import Normalisation, encoder_id, load_network
from codec.runtime import Codec
from tests.conftest import photo

SPACE = Space(channels=4, height=8, width=8, n_classes=2)
TINY: dict[str, Any] = {"units": 6, "width": 16, "depth": 1, "spatial_units": 2, "flow_width": 16, "components": 3}
DECODERS = ("gaussian", "flow-matching")


def network_of(space: Space = SPACE, **how: Any) -> ConditionalHead:
    """A tiny network whose weights are far from those at the start, where much is zero."""
    torch.manual_seed(0)
    network = ConditionalHead(NetworkConfig(**{**TINY, **how}), space)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    network.standardise((torch.tensor([0.5, -0.5, 0.0, 1.0]), torch.tensor([2.0, 0.5, 1.0, 1.0])))
    return network


def latents(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SPACE.shape, generator=torch.Generator().manual_seed(seed))


def noise_of(network: ConditionalHead, n: int) -> Noise:
    rng = torch.Generator().manual_seed(1)
    units = tuple(torch.randn(n, *shape, generator=rng) for shape in network.unit_shapes)
    if network.config.decoder == "gaussian":
        return Noise(units=units)
    return Noise(units=units, time=torch.rand(n, generator=rng), latents=latents(n, seed=2))


def passed(network: ConditionalHead, c: torch.Tensor, hidden: bool = False) -> Outputs:
    n = len(c)
    out: Outputs = network(latents(n), c, torch.full((n,), hidden), noise_of(network, n))
    return out


ZERO, ONE = torch.tensor([0, 0]), torch.tensor([1, 1])
SEEN, HIDDEN = torch.tensor([False, False]), torch.tensor([True, True])
KINDS = [
    *[{"decoder": decoder, "levels": levels} for decoder in DECODERS for levels in (1, 2)],
    {"decoder": "gaussian", "posterior": "iaf", "prior": "flow"},
    {"decoder": "gaussian", "prior": "vamp"},
    {"decoder": "gaussian", "prior": "conditional-vamp"},
    {"decoder": "gaussian", "prior": "standard"},
]


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_reach_every_part(kind: dict[str, Any]) -> None:
    network = network_of(**kind)
    out = passed(network, ZERO)
    (out.error.mean() + sum(each.mean() for each in out.kl)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # What a parameter is to a decoder that has no second level's units to take, or to a class not met, is 0.
        assert name == "condition.table" or parameter.grad.abs().max() > 0, name
    assert network.condition.table.grad is not None
    assert network.condition.table.grad.abs().amax(1).gt(0).tolist()[:2] == [True, False]
    network.zero_grad()
    sum(each.mean() for each in passed(network, ZERO).kl).backward()
    assert all(p.grad is None or not p.grad.any() for p in network.decoder.parameters())  # nothing of the KL


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_condition_enters_encoder_prior_and_decoder(kind: dict[str, Any]) -> None:
    network = network_of(**kind).eval()
    z, noise = latents(2), noise_of(network, 2).units
    with torch.no_grad():
        units, _ = network.encode(z, ZERO, SEEN)
        others, _ = network.encode(z, ONE, SEEN)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(units, others, strict=True))
        choice = torch.tensor([0.1, 0.6])
        drawn = [network.draw_units(c, SEEN, noise, choice)[0] for c in (ZERO, ONE)]
        told = network.config.prior not in ("standard", "vamp")
        assert bool((drawn[0] - drawn[1]).abs().max() > 1e-3) == told
        drawing = Drawing(noise=latents(2, seed=5), steps=2)
        made = [network.decode(units, c, SEEN, drawing) for c in (ZERO, ONE)]
        assert (made[0] - made[1]).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hidden_condition_is_none_whatever_it_says(decoder: str) -> None:
    network = network_of(decoder=decoder, levels=2)
    a, b, known = passed(network, ZERO, True), passed(network, ONE, True), passed(network, ZERO)
    assert torch.equal(a.error, b.error)
    assert all(torch.equal(x, y) for x, y in zip(a.kl, b.kl, strict=True))
    assert not torch.equal(a.error, known.error)
    a.error.mean().backward()
    assert network.condition.table.grad is not None
    assert network.condition.table.grad.abs().amax(1).gt(0).tolist() == [False, False, True]


@pytest.mark.parametrize("decoder", DECODERS)
def test_guidance_of_one_is_conditional_and_of_zero_unconditional(decoder: str) -> None:
    network, drawing = network_of(decoder=decoder).eval(), Drawing(noise=latents(2, seed=5), steps=3)
    units = network.encode(latents(2), ZERO, SEEN)[0]
    with torch.no_grad():
        made = {w: network.decode(units, ZERO, SEEN, drawing, w) for w in (0.0, 1e-9, 1.0, 1 + 1e-9, 2.0)}
        without = network.decode(units, ONE, HIDDEN, drawing)
    assert torch.equal(made[0.0], without)
    torch.testing.assert_close(made[1e-9], without)
    torch.testing.assert_close(made[1 + 1e-9], made[1.0])
    assert (made[1.0] - without).abs().max() > 1e-3
    if decoder == "gaussian":
        torch.testing.assert_close(made[2.0], without + 2 * (made[1.0] - without))


def test_latents_are_standardised_inside_alone() -> None:
    network = network_of(decoder="gaussian")
    z, n = latents(2), SPACE.n
    plain = network_of(decoder="gaussian")
    plain.standardise((torch.zeros(4), torch.ones(4)))
    noise = noise_of(network, 2)
    inside = plain(network.standardised(z), ZERO, SEEN, noise)
    out = network(z, ZERO, SEEN, noise)
    torch.testing.assert_close(out.error, inside.error)
    torch.testing.assert_close(network.restored(network.standardised(z)), z)
    # The density of normalized latents: that of the Gaussian decoder, written out.
    x, _ = network.features(out.units, ZERO, SEEN)
    found = network.decoder(x)
    mean, std = network.restored(found.mean), torch.exp(0.5 * found.logvar) * network.scale[:, None, None]
    nats = -torch.distributions.Normal(mean, std).log_prob(z).sum((1, 2, 3)) / n
    torch.testing.assert_close(out.error + network.log_volume(), nats)


def test_a_copy_with_a_vamp_prior_encodes_by_itself() -> None:
    network = network_of(decoder="gaussian", prior="vamp")
    twin = copy.deepcopy(network)  # as the averaged weights are
    u, e = torch.zeros(1, 6), torch.zeros(1, 32)
    before = network.prior.log_prob(u, e)
    torch.testing.assert_close(twin.prior.log_prob(u, e), before)
    with torch.no_grad():
        twin.encoder.last.bias.add_(1.0)
    assert (twin.prior.log_prob(u, e) - before).abs() > 1e-3
    assert torch.equal(network.prior.log_prob(u, e), before)


@pytest.mark.parametrize(
    ("shape", "grids", "second"),
    [((8, 8), [(8, 8), (4, 4)], 1), ((32, 32), [(32, 32), (16, 16), (8, 8), (4, 4)], 2), ((4, 4), [(4, 4)], 0)],
)
def test_grids_halve_down_to_four(shape: tuple[int, int], grids: list[tuple[int, int]], second: int) -> None:
    space = Space(channels=1, height=shape[0], width=shape[1])
    assert (space.grids, space.second) == (grids, second)


def test_odd_grids_come_back_to_their_size() -> None:
    space = Space(channels=3, height=5, width=9, n_classes=0)
    network = ConditionalHead(NetworkConfig(**TINY, levels=2), space)
    noise = Drawing(noise=torch.zeros(2, *space.shape), steps=1)
    units = network.encode(torch.randn(2, *space.shape), ZERO, HIDDEN)[0]
    assert network.decode(units, ZERO, HIDDEN, noise).shape == (2, 3, 5, 9)


# --- its folder, its use --------------------------------------------------------------------------------------------


@pytest.fixture
def written(model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write heads for the tiny model's latents: written(name, space=..., **network)."""
    vae = load_network(model_dir)
    engine = Engine.load(model_dir, EngineConfig(device="cpu", dtype="float32"))
    origin = Origin(
        model="tiny",
        encoder_id=encoder_id(vae),
        decoder_id=engine.decoder_id,
        f=2,
        normalisation=Normalisation(0.1, 2.0),
    )

    def make(name: str = "head", space: Space = SPACE, **how: Any) -> Path:
        classes = ("coat", "hat") if space.n_classes else ()
        write(tmp_path / name, network_of(space, **how), origin, classes, {})
        return tmp_path / name

    return make


@pytest.mark.parametrize("how", [{"decoder": "gaussian", "posterior": "iaf"}, {"levels": 2, "prior": "vamp"}], ids=str)
def test_a_written_head_draws_the_same_samples(written: Callable[..., Path], how: dict[str, Any]) -> None:
    folder, network = written(**how), network_of(**how)
    head, again = Head.load(folder, "cpu"), Head.load(folder, "cpu")
    z = head.sample(["hat", None, 0], guidance=2.0, seed=3, steps=2)
    assert torch.equal(z, again.sample(["hat", None, 0], guidance=2.0, seed=3, steps=2))
    for name, tensor in network.state_dict().items():
        assert torch.equal(head.network.state_dict()[name], tensor)
    assert (head.head_id, head.classes, head.size) == (again.head_id, ("coat", "hat"), (16, 16))
    assert not torch.equal(z, head.sample(["hat", None, 0], guidance=2.0, seed=4, steps=2))
    z.requires_grad_().sum().backward()  # an ordinary tensor


def test_an_image_has_its_draws_by_seed_and_number(written: Callable[..., Path]) -> None:
    head = Head.load(written(), "cpu")
    head.batch = 2
    five = head.sample(["hat"] * 5, seed=1, steps=2)
    three = head.sample(["hat", "hat", "coat"], seed=1, steps=2, numbers=[4, 0, 0])
    torch.testing.assert_close(three[:2], five[[4, 0]], rtol=1e-4, atol=1e-4)
    units = head.draw_units(["hat", "coat"], seed=1, numbers=[0, 0], temperature=0.0)[0]
    assert torch.equal(units, head.draw_units(["hat", "coat"], seed=9, numbers=[7, 8], temperature=0.0)[0])
    without = head.sample([None] * 2, seed=1, steps=2)
    torch.testing.assert_close(head.sample(["hat"] * 2, seed=1, steps=2, guidance=0.0), without)


def test_what_is_encoded_under_one_condition_is_decoded_under_another(written: Callable[..., Path]) -> None:
    head = Head.load(written(decoder="gaussian", levels=2), "cpu")
    z = latents(2)
    units = head.encode(z, ["hat", "hat"])
    assert [tuple(each.shape) for each in units] == [(2, 6), (2, 2, 4, 4)]
    as_coat = head.reconstruct(z, ["hat", "hat"], to=["coat", "coat"])
    torch.testing.assert_close(as_coat, head.decode(units, ["coat", "coat"]))
    assert (as_coat - head.reconstruct(z, ["hat", "hat"])).abs().max() > 1e-3
    drawn = head.encode(z, ["hat", "hat"], seed=0)
    deviations = head.deviations(z, ["hat", "hat"])[0]
    assert ((drawn[0] - units[0]).abs() < 6 * deviations).all()
    assert not torch.equal(drawn[0], units[0])


def test_images_and_latents_go_through_the_codec(written: Callable[..., Path], model_dir: Path) -> None:
    head, codec = Head.load(written(), "cpu"), Codec.load(model_dir, "cpu", dtype="float32")
    image = photo(16, 16)
    z = head.latents([image], codec)
    torch.testing.assert_close(z[0], (torch.from_numpy(codec.latents(image)) - 0.1) * 2.0)
    assert np.array_equal(head.images(z, codec)[0], codec.reconstruct(image))
    assert head.images(head.sample(["hat"], steps=1), str(model_dir))[0].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"image 0: \(8, 16, 3\), expected \(16, 16, 3\)"):
        head.latents([photo(8, 16)], codec)


def test_another_codec_is_refused_and_another_decoder_is_not(
    written: Callable[..., Path], new_model: Callable[..., Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, other = Head.load(written(), "cpu"), new_model("other", seed=1)
    z = head.sample(["hat"], steps=1)
    for use in (lambda: head.images(z, other), lambda: head.latents([photo(16, 16)], other)):
        with pytest.raises(ModelError) as caught:
            use()
        mine, its = (encoder_id(load_network(folder)) for folder in (model_dir, other))
        assert str(caught.value) == f"{head.stored.folder}: latents of encoder {mine} (model tiny), not of {its}"
    network: Any = load_network(model_dir)
    network.decoder.conv_out.bias.data += 0.1
    network.save_pretrained(other)
    head.images(z, other)
    assert "another decoder" in capsys.readouterr().err
    network.encoder.conv_out.bias.data += 0.1
    network.decoder.conv_out.bias.data -= 0.1
    network.save_pretrained(other)
    head.images(z, other)  # the same decoder
    with pytest.raises(ModelError, match="latents of encoder"):
        head.latents([photo(16, 16)], other)


def test_embeddings_are_conditions(written: Callable[..., Path]) -> None:
    space = Space(channels=4, height=8, width=8, embedding_width=3)
    head = Head.load(written("e", space=space, decoder="gaussian"), "cpu")
    vectors = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    z = head.sample(vectors)
    assert (z[0] - head.sample([vectors[1], None])[0]).abs().max() > 1e-3
    torch.testing.assert_close(z[1:], head.sample(torch.tensor(vectors))[1:])
    with pytest.raises(UsageError, match="an embedding of 2 numbers, expected 3 numbers"):
        head.sample([[1.0, 2.0]])
    with pytest.raises(UsageError, match="an embedding of 'hat', expected 3 numbers"):
        head.sample(["hat"])


def test_a_head_that_always_knew_the_condition_is_not_asked_without(written: Callable[..., Path]) -> None:
    folder, none = written(), written("none", space=Space(channels=4, height=8, width=8))
    for each in (folder, none):
        about = json.loads((each / "head.json").read_text())
        (each / "head.json").write_text(json.dumps(about | {"objective": {"condition_dropout": 0.0}}))
    head, z = Head.load(folder, "cpu"), latents(2)
    for what, use in (
        ("guidance 2", lambda: head.sample(["hat"], guidance=2.0)),
        ("guidance 0", lambda: head.sample(["hat"], guidance=0.0)),
        ("guidance 1.5", lambda: head.reconstruct(z, ["hat"] * 2, guidance=1.5)),
        ("no condition", lambda: head.sample(["hat", None])),
        ("no condition", lambda: head.draw_units([None])),
        ("no condition", lambda: head.encode(z, ["hat", None])),
        ("no condition", lambda: head.reconstruct(z, ["hat"] * 2, to=None)),
    ):
        with pytest.raises(ValueError, match=f"{what}: the head was trained .* = 0, never without a condition"):
            use()
    assert head.sample(["hat"], steps=1).shape == (1, *SPACE.shape)
    assert Head.load(none, "cpu").sample([None], steps=1, guidance=2.0).shape == (1, *SPACE.shape)  # it has no other


def test_weights_of_another_head_are_refused(written: Callable[..., Path]) -> None:
    folder, other = written(), written("other")
    about = json.loads((other / "head.json").read_text())
    (other / "head.json").write_text(json.dumps(about | {"head_id": "0" * 16}))
    with pytest.raises(ModelError) as caught:
        Head.load(other, "cpu")
    its_id = Head.load(folder, "cpu").head_id
    assert about["head_id"] == its_id
    told = f"head.safetensors has the head id {its_id}, not {'0' * 16}, which head.json states"
    assert str(caught.value) == f"{other}: {told}"


def test_what_makes_no_sense_is_refused(written: Callable[..., Path], tmp_path: Path, model_dir: Path) -> None:
    folder = written()
    head = Head.load(folder, "cpu")
    for c, kind, text in (
        (["shoe"], UsageError, "no class shoe among coat, hat"),
        ([2], UsageError, "no class 2 among coat, hat"),
        ("hat", ValueError, r"expected one for each image: \['hat'\]"),
        ([], ValueError, "conditions: 0, expected 1 or more"),
    ):
        with pytest.raises(kind, match=text):
            head.sample(c)
    with pytest.raises(ValueError, match="conditions: 1, expected 2"):
        head.encode(latents(2), ["hat"])
    with pytest.raises(ValueError, match=r"latents \(2, 4, 4, 8\), expected \(B, 4, 8, 8\)"):
        head.encode(latents(2)[:, :, :4], ["hat"] * 2)
    for wrong in ({"temperature": -1.0}, {"guidance": -1.0}, {"steps": 0}, {"numbers": [1, 2]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            head.sample(["hat"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no head here"):
        Head.load(model_dir)
    weights = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ModelError, match="damaged"):
        Head.load(folder)
    about = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(about | {"version": 9}))
    with pytest.raises(ModelError, match="version 9, expected 1"):
        Head.load(folder)
    for wrong, text in (({"width": 20}, "multiples of 16"), ({"units": 1, "prior": "flow"}, ">= 2 with prior flow")):
        with pytest.raises(ValueError, match=text):
            NetworkConfig(**wrong)  # type: ignore[arg-type]
