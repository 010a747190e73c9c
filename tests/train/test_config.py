import json
from pathlib import Path

import pytest

from codec.errors import UsageError
from train import config
from train.cli import main
from train.recipe import load_any, load_recipe, recipe_names


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_recipe_holds_differences_and_overrides_win(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", "[optim]\nlr = 1\nbatch_size = 3\n[model]\nblock_out_channels = [64, 128]\n")
    resolved = load_recipe(recipe, ["optim.lr=2e-4", "run.out=some/where", "data.flip=false", "optim.betas=[0.5, 0.9]"])
    assert (resolved.optim.lr, resolved.optim.batch_size, resolved.optim.betas) == (2e-4, 3, (0.5, 0.9))
    assert (resolved.model.f, resolved.run.out, resolved.data.flip) == (2, "some/where", False)
    assert resolved.optim.clip_norm == config.OptimConfig().clip_norm


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 1e-4", "unknown key optim.learning_rate"),
        ("[optim]\nbatchsize = 4", "did you mean optim.batch_size"),
        ("[model]\nlr = 1e-3", "did you mean adversarial.lr or optim.lr"),
        ("[optimizer]\nlr = 1", "unknown key optimizer"),
        ("[optim]\nlr = -1.0", "optim.lr = -1.0, allowed: > 0"),
        ("[optim]\nbetas = [1.0, 0.9]", "0 <= beta < 1"),
        ("[model]\nnorm_num_groups = 0", "model.norm_num_groups = 0, allowed: >= 1"),
        ("[run]\nseed = -1", "run.seed = -1"),
        ("[optim]\nlr = 'fast'", "expected float"),
        ("[optim]\nbatch_size = 1.5", "expected int"),
        ("[optim]\nschedule = 'linear'", "constant, cosine"),
        ("[optim]\nbetas = [0.9]", "expected a list of 2"),
        ("[model]\nblock_out_channels = [30]", "multiples of model.norm_num_groups = 32"),
        ("[data]\ncrop = 100", "multiples of f = 8"),
        ("optim = 3", "expected a section"),
        ("[optim", "not a readable TOML file"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_key(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", write(tmp_path / "r.toml", text)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="tiny"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("override", ["optim.lr", "optim.lrr=1", "lr=1"])
def test_a_wrong_override_names_the_nearest_key(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", override]) == 2
    assert "optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_of_the_package_resolves_and_states_its_command(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == load_any(recipe).task
    header = (Path(config.__file__).parent / "recipes" / f"{recipe}.toml").read_text().split("\n\n")[0]
    assert f"codec-train run {recipe}" in header
    assert "Hardware:" in header
    assert "Time:" in header
