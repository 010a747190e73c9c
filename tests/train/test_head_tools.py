"""The tools of a head: what each writes, that it is what the head says, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec import images
from codec.engine import Engine, EngineConfig
from codec.head import Head
from codec.head.config import NetworkConfig, Space
from codec.head.folder import Origin, write
from codec.head.network import ConditionalHead, Noise
from codec.latent_model import Normalisation, encoder_id, load_network
from eval.class_folders import listed, read_photos, side_of
from eval.protocol import folder_of
from tests.conftest import photo
from train.cli import main
from train.head import tools
from train.head.anomaly import auroc, elbo_bits, expected, latent_errors
from train.head.latent_walk import Spread, along, between, combined, effects, linear, spherical

SPACE = Space(channels=4, height=8, width=8, n_classes=2)


def network_of(decoder: Any, space: Space, **how: Any) -> ConditionalHead:
    """A tiny network whose weights are far from those at the start, where much is zero."""
    torch.manual_seed(0)
    network = ConditionalHead(NetworkConfig(units=6, width=16, depth=1, decoder=decoder, **how), space)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    network.standardise((torch.tensor([0.5, -0.5, 0.0, 1.0]), torch.tensor([2.0, 0.5, 1.0, 2.0])))
    return network


@pytest.fixture(scope="module")
def folders(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads of the tiny model's latents by decoder, "large" for 32 x 32 pixels, "strict" with no condition ever hidden;
    photos of two classes and a third."""
    folder, found = tmp_path_factory.mktemp("tools"), {}
    engine = Engine.load(model_dir, EngineConfig(device="cpu", dtype="float32"))
    its_id = encoder_id(load_network(model_dir))
    origin = Origin(
        model="tiny", encoder_id=its_id, decoder_id=engine.decoder_id, f=2, normalisation=Normalisation(0.1, 2.0)
    )
    large = Space(channels=4, height=16, width=16, n_classes=2)
    for name, decoder, space, how in (
        ("gaussian", "gaussian", SPACE, {"levels": 2, "spatial_units": 2}),
        ("flow", "flow-matching", SPACE, {}),
        ("large", "gaussian", large, {}),
        ("strict", "gaussian", SPACE, {}),
    ):
        found[name] = folder / name
        more = {"objective": {"condition_dropout": 0.0 if name == "strict" else 0.1}}
        write(found[name], network_of(decoder, space, **how), origin, ("coat", "hat"), more)
    for n in range(6):
        path = folder / "photos" / ("coat", "hat", "shoe")[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(40, 32, seed=n)))
    return {**found, "photos": folder / "photos", "model": model_dir}


@pytest.fixture
def run(folders: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Run a verb on the Gaussian head: run(verb, *arguments, name="out", head="gaussian", expected=0)."""

    def go(verb: str, *more: Any, name: str = "out", head: str = "gaussian", expected: int = 0) -> tuple[Path, Any]:
        out = tmp_path / name
        command = ["head", verb, str(folders[head]), *map(str, more)]
        assert main([*command, "-m", str(folders["model"]), "-o", str(out), "--device", "cpu"]) == expected
        path = next(iter(out.glob("*.json")), None) if out.is_dir() else None
        return out, None if path is None else json.loads(path.read_text())

    return go


def levels_apart(a: Path, b: Path) -> int:
    return int(np.abs(images.load(a).astype(int) - images.load(b).astype(int)).max())


# --- computations ---------------------------------------------------------------------------------------------------


def test_the_spherical_way_keeps_the_norm_and_has_the_right_ends() -> None:
    a, b = (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    a, b, t = 5 * a / a.norm(), 5 * b / b.norm(), torch.linspace(0, 1, 5)
    way = spherical(a, b, t)
    torch.testing.assert_close(way[0], a)
    torch.testing.assert_close(way[-1], b)
    torch.testing.assert_close(way.flatten(1).norm(dim=1), torch.full((5,), 5.0))
    steps = (way[1:] * way[:-1]).sum((1, 2, 3)) / 25
    torch.testing.assert_close(steps, steps[:1].expand(4))  # equal angles
    assert linear(a, b, t).flatten(1).norm(dim=1)[2] < 4.5
    quarter = spherical(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.5]))
    torch.testing.assert_close(quarter, torch.tensor([[2.0, 2.0]]) / 2**0.5)
    for other in (-a, 2 * a, torch.zeros_like(a)):  # no one direction of turning
        torch.testing.assert_close(spherical(a, other, t), linear(a, other, t))


def test_auroc_against_values_by_hand() -> None:
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auroc([4, 3, 2, 1], [False, False, True, True]) == 0
    assert auroc([1, 3, 2, 4], [False, False, True, True]) == 3 / 4  # 2 > 1, 4 > 1, 4 > 3 of 4 pairs
    assert auroc([1, 1, 1], [False, True, False]) == 1 / 2
    assert auroc([5, 5, 1, 7], [True, False, False, True]) == 3.5 / 4  # one tie
    with pytest.raises(ValueError, match="0 outliers and 2 others"):
        auroc([1, 2], [False, False])


def test_walks_reach_both_ends_and_units_move_alone(folders: dict[str, Path]) -> None:
    head = Head.load(folders["gaussian"], "cpu")
    spread = Spread.of(head, ["hat"])
    drawn = head.draw_units(["hat"] * 4000, seed=5)
    for level in (0, 1):
        assert (drawn[level].mean(0) - spread.mean[level]).abs().max() < 0.3 * spread.deviation[level].max()
        ratio = drawn[level].std(0) / spread.deviation[level]
        assert 0.8 < float(ratio.min()) < float(ratio.max()) < 1.25
    a, b = (head.draw_units(["hat"], seed=n) for n in (0, 1))
    for path in (linear, spherical):
        way = between(a, b, 5, path, spread)
        for level in (0, 1):
            torch.testing.assert_close(way[level][[0, -1]], torch.cat([a[level], b[level]]), rtol=1e-4, atol=1e-4)
    moved = along(a, 2, torch.tensor([-2.0, 0.0]), spread)
    assert torch.equal(moved[1], a[1].repeat(2, 1, 1, 1))
    others = [n for n in range(6) if n != 2]
    assert torch.equal(moved[0][:, others], a[0].repeat(2, 1)[:, others])
    expected = torch.stack([spread.mean[0][2] - 2 * spread.deviation[0][2], spread.mean[0][2]])
    torch.testing.assert_close(moved[0][:, 2], expected)
    torch.testing.assert_close(combined((torch.cat([a[0], b[0], a[0]]),), [1, -1, 1])[0], 2 * a[0] - b[0])
    # A unit that the way down does not look at does nothing.
    for layer in (head.network.top_down.modulate, head.network.top_down.first):
        layer.weight.data[:, 3] = 0
    found = effects(head, a, "hat", spread)
    assert found[3] < 1e-6
    assert found[[0, 1, 2, 4, 5]].min() > 1e-3


@pytest.mark.parametrize("decoder", ["gaussian", "flow"])
def test_scores_belong_to_the_image_and_rank_what_is_far(decoder: str, folders: dict[str, Path]) -> None:
    head = Head.load(folders[decoder], "cpu")
    z = torch.randn(3, *SPACE.shape, generator=torch.Generator().manual_seed(0))
    z[2] *= 5
    bits = elbo_bits(head, z, [None] * 3, 4)
    assert bits[2] > bits[:2].max() + 1
    head.batch = 2
    np.testing.assert_allclose(elbo_bits(head, z[[2, 0]], [None] * 2, 4), bits[[2, 0]], rtol=1e-5)
    errors = latent_errors(head, z, z + torch.tensor([0.0, 0.5, 2.0]).reshape(3, 1, 1, 1))
    scale = (1 / 4 + 4 + 1 + 1 / 4) / 4  # latents are standardised
    np.testing.assert_allclose(errors, [0, 0.25 * scale, 4 * scale], atol=1e-5)
    if decoder == "gaussian":  # by the network's own terms, with the same draws
        from codec.head.conditions import generators

        (rng,) = generators(0, [0], "anomaly")
        drawn = [torch.from_numpy(rng.standard_normal(each, dtype=np.float32)) for each in head.network.unit_shapes]
        noise = Noise(units=tuple(each[None] for each in drawn))
        out = head.network(z[:1], torch.tensor([0]), torch.tensor([True]), noise)
        nats = 256 * float(out.error) + sum(float(part.sum()) for part in out.kl)
        assert elbo_bits(head, z[:1], [None], 1)[0] == pytest.approx(nats / 256 / np.log(2) + 1 / 4, rel=1e-5)


def exact_velocity(deviation: float) -> Callable[..., torch.Tensor]:
    """The best velocity where p(z|u, c) = N(0, deviation^2), whatever u and c."""

    def velocity(z_t: torch.Tensor, t: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None, None]
        z = z_t * (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)
        return (z_t - z) / t

    return velocity


def test_the_error_of_a_flow_matching_head_is_that_of_its_mean_not_of_a_draw(folders: dict[str, Path]) -> None:
    head = Head.load(folders["flow"], "cpu")
    head.network._velocity = exact_velocity(0.5)  # type: ignore[method-assign]
    standardised = 0.5 * torch.randn(40, *SPACE.shape, generator=torch.Generator().manual_seed(0))
    standardised[20:] *= 1.1
    z, c, outlier = head.network.restored(standardised), [None] * 40, [False] * 20 + [True] * 20
    mean = latent_errors(head, z, expected(head, z, c, 2))
    np.testing.assert_allclose(mean, standardised.square().mean((1, 2, 3)), rtol=1e-4)
    drawn = latent_errors(head, z, head.reconstruct(z, c, numbers=[0] * 40))
    assert drawn[:20].mean() > 1.8 * mean[:20].mean()
    assert auroc(mean, outlier) > auroc(drawn, outlier) + 0.02


# --- commands -------------------------------------------------------------------------------------------------------


def test_samples_are_the_same_whatever_else_is_drawn(run: Callable[..., Any]) -> None:
    how = ("--flow-steps", 2, "--seed", 3, "--temperature", 0.9, "--guidance", 2)
    out, about = run("sample", "--per-class", 3, *how, name="a", head="flow")
    other, _ = run("sample", "--classes", "hat,any", "--per-class", 2, "--batch", 1, *how, name="b", head="flow")
    assert sorted(str(each.relative) for each in listed(out)) == [
        f"{c}/{n:03d}.png" for c in ("coat", "hat") for n in range(3)
    ]
    judged = read_photos(other, folder_of(side_of(other)), [])  # as `codec-eval generated` reads them
    assert [photo.label for photo in judged] == ["any", "any", "hat", "hat"]
    for n in range(2):
        assert levels_apart(out / "hat" / f"{n:03d}.png", other / "hat" / f"{n:03d}.png") <= 1
    assert levels_apart(out / "hat/000.png", out / "coat/000.png") > 1
    assert levels_apart(out / "hat/000.png", out / "hat/001.png") > 1
    assert images.load(out / "sheet.png").ndim == 3
    assert (about["settings"]["guidance"], about["settings"]["seed"]) == (2.0, 3)
    assert about["command"].startswith("codec-train head sample ")
    run("sample", name="a", expected=2)  # the folder is not empty


def test_an_edit_changes_the_condition_alone(run: Callable[..., Any], folders: dict[str, Path], tmp_path: Path) -> None:
    path, pixels = tmp_path / "coat" / "a.png", photo(16, 16)
    path.parent.mkdir()
    path.write_bytes(images.save_png(pixels))
    out, about = run("edit", path, folders["photos"] / "hat", "--to", "hat")
    assert [(row["image"], row["from"]) for row in about["images"]] == [
        ("a.png", "coat"),
        ("1.png", "hat"),
        ("4.png", "hat"),
    ]
    head, file = Head.load(folders["gaussian"], "cpu"), about["images"][0]["file"]
    engine = Engine.load(folders["model"], EngineConfig(device="cpu", dtype="float32"))
    units = head.encode(head.latents([pixels], engine), ["coat"])
    edited = images.load(out / file).astype(int)
    made = {c: head.images(head.decode(units, [c]), engine)[0] for c in ("coat", "hat")}
    assert np.abs(edited - made["hat"]).max() <= 1
    assert np.abs(edited - made["coat"]).max() > 1
    assert images.load(out / "sheet.png").shape[1] > 3 * 64
    again, _ = run("edit", path, "--to", "hat", "--from", "hat", name="again")
    assert levels_apart(out / file, again / file) > 1


def test_a_strip_has_a_row_for_each_class(
    run: Callable[..., Any], folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [folders["photos"] / "coat/0.png", folders["photos"] / "hat/1.png"]
    out, about = run("interpolate", *pair, "--steps", 4, "--kind", "linear")
    assert about["ends"] == ["coat", "hat"]
    tall = images.load(out / "strip.png").shape
    out, about = run("interpolate", "--seeds", "1,2", "--classes", "hat", "--steps", 4, name="seeds", head="flow")
    assert about["ends"] == ["hat", "hat"]
    low = images.load(out / "strip.png").shape
    assert (tall[0] - 4, tall[1]) == (3 * (low[0] - 4), low[1])  # originals, as coat, as hat
    assert "note" not in capsys.readouterr().err
    _, about = run("interpolate", "--seeds", "1,1", "--steps", 2, "--flow-steps", 1, name="none", head="flow")
    assert about["ends"] == ["any", "any"]
    assert "note" not in capsys.readouterr().err


def test_a_grid_shows_the_units_that_change_most(run: Callable[..., Any], folders: dict[str, Path]) -> None:
    out, about = run("traverse", "--class", "hat", "--units", 2, "--range", 2, "--steps", 5, head="flow")
    order = sorted(range(6), key=lambda n: -about["effects"][n])
    assert about["units"] == order[:2]
    assert images.load(out / "grid.png").shape[0] < 3 * 68
    _, about = run("traverse", folders["photos"] / "hat/1.png", "--units", "4,1", name="listed")
    assert about["units"] == [4, 1]


def test_arithmetic_of_an_image_with_itself_is_its_reconstruction(
    run: Callable[..., Any], folders: dict[str, Path]
) -> None:
    a, b = folders["photos"] / "hat/1.png", folders["photos"] / "hat/4.png"
    out, about = run("arithmetic", "--plus", a, "--minus", b, "--plus", b)
    _, edit = run("edit", a, "--to", "hat", name="edit")
    assert about["as"] == "hat"
    assert levels_apart(out / "result.png", out.parent / "edit" / edit["images"][0]["file"]) <= 1


def test_anomaly_scores_images_in_three_ways(
    run: Callable[..., Any], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import squeezenet1_0

    torch.manual_seed(0)
    torch.save(squeezenet1_0(weights=None).state_dict(), tmp_path / "squeezenet1_0.pth")
    more = ("--outlier", "shoe", "--draws", 2)
    out, about = run("anomaly", folders["photos"], *more, "--features", tmp_path / "squeezenet1_0.pth", head="large")
    rows = about["images"]
    assert [row["outlier"] for row in rows] == [False] * 4 + [True] * 2
    for name in ("latent_error", "elbo_bits", "feature_distance"):
        scores = [row[name] for row in rows]
        assert about["auroc"][name] == auroc(scores, [row["outlier"] for row in rows])
        assert len(set(scores)) == 6
    table = (out / "anomaly.csv").read_text().splitlines()
    assert table[0] == "image,folder,outlier,latent_error,elbo_bits,feature_distance"
    assert table[1].startswith("coat/0.png,coat,False,")
    assert images.load(out / "extremes.png").shape[0] > 6 * 64
    _, known = run("anomaly", folders["photos"], "--labels", "--draws", 1, name="b")
    assert [row["outlier"] for row in known["images"]] == [False] * 4 + [True] * 2
    assert known["auroc"]["feature_distance"] is None
    assert "feature_distance: n/a" in capsys.readouterr().err
    _, about = run("anomaly", folders["photos"], "--draws", 2, name="c", head="flow")
    head, engine = (
        Head.load(folders["flow"], "cpu"),
        Engine.load(folders["model"], EngineConfig(device="cpu", dtype="float32")),
    )
    photos = tools.read_images([folders["photos"]], head.size, [])
    z = head.latents([each.pixels for each in photos], engine)
    errors = latent_errors(head, z, expected(head, z, [None] * 6, 2))
    np.testing.assert_allclose([row["latent_error"] for row in about["images"]], errors, rtol=1e-3)


def test_features_are_the_units_with_their_names(run: Callable[..., Any], folders: dict[str, Path]) -> None:
    from safetensors import safe_open

    out, _ = run("features", folders["photos"], name="u.npz")
    with np.load(out, allow_pickle=False) as found:
        assert found["names"].tolist()[:2] == ["coat/0.png", "coat/3.png"]
        assert found["folders"].tolist() == ["coat", "coat", "hat", "hat", "shoe", "shoe"]
        assert (found["units"].shape, found["units_2"].shape) == ((6, 6), (6, 2, 4, 4))
        units = found["units"]
    out, _ = run("features", folders["photos"], "--as", "hat", name="u.safetensors")
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["settings"]["as"] == "hat"
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["names"])[0] == "coat/0.png"
        assert np.abs(file.get_tensor("units").numpy() - units).max() > 1e-3


def test_damaged_images_are_listed_and_the_rest_is_done(
    run: Callable[..., Any], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    _, about = run("edit", folder, "--to", "hat", expected=2)
    assert about is None
    assert "none of 1 images can be used" in capsys.readouterr().err
    (folder / "b.png").write_bytes((folders["photos"] / "hat/1.png").read_bytes())
    _, about = run("edit", folder, "--to", "hat", expected=1)
    assert [row["image"] for row in about["images"]] == ["b.png"]
    error = capsys.readouterr().err
    assert f"error: {folder}/a.png: not an image" in error
    assert "1 of 2 images failed" in error


def test_what_cannot_be_done_is_refused_in_one_line(
    run: Callable[..., Any],
    folders: dict[str, Path],
    new_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*command: Any) -> str:
        run(*command, expected=2)
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if not line.startswith(("note", "drawing"))]
        assert line.startswith("error: ")
        return line

    photos = folders["photos"]
    (tmp_path / "empty").mkdir()
    assert "no class shoe among coat, hat" in refused("sample", "--classes", "shoe")
    assert "--temperature nan" in refused("sample", "--temperature", "nan")
    assert "--to: " in refused("edit", photos, "--to", "shoe")
    assert "no images found" in refused("edit", tmp_path / "empty", "--to", "hat")
    assert "--kind cubic" in refused("interpolate", "--seeds", "1,2", "--kind", "cubic")
    assert "expected two images" in refused("interpolate", photos / "hat/1.png")
    assert "expected an image, or --class" in refused("traverse")
    assert "the head has 6 units" in refused("traverse", "--class", "hat", "--units", "6,")
    assert "expected one --plus more" in refused("arithmetic", "--plus", "a.png", "--minus", "b.png")
    assert "b.png: no such file" in refused("interpolate", photos / "hat/1.png", tmp_path / "b.png")
    assert "no image in a folder of that name" in refused("anomaly", photos, "--outlier", "boot")
    assert "no image is an outlier" in refused("anomaly", photos / "hat", "--labels")
    assert "expected a name with suffix" in refused("features", photos)
    assert "the image is not finite: lower --guidance" in refused("sample", "--guidance", "1e38")
    reason = f"{folders['strict']}: {{}}: the head was trained with objective.condition_dropout = 0, never without"
    for what, command in (
        ("--classes any", ("sample", "--classes", "hat,any")),
        ("guidance 2", ("sample", "--guidance", "2")),
        ("guidance 0", ("edit", photos / "hat", "--to", "hat", "--guidance", "0")),
        ("2 of 4 images in no folder of a class", ("edit", photos / "hat", photos / "shoe", "--to", "hat")),
        ("--as any", ("anomaly", photos / "hat")),
        ("--as any", ("features", photos)),
    ):
        run(*command, name="x.npz", head="strict", expected=2)
        assert reason.format(what) in capsys.readouterr().err
    run("sample", "--classes", "hat", "--per-class", 1, head="strict")
    other = new_model("other", seed=1)
    assert main(["head", "sample", str(folders["flow"]), "-m", str(other), "-o", str(tmp_path / "x")]) == 3
    assert "latents of encoder" in capsys.readouterr().err
