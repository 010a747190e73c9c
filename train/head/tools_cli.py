"""`codec-train head VERB`: what a trained head is used for."""

import typer

from train.head.evaluate_cli import evaluate_command
from train.head.fit_cli import draw_command, fit_command
from train.head.sample_cli import edit_command, sample_command
from train.head.units_cli import anomaly_command, features_command
from train.head.walk_cli import arithmetic_command, interpolate_command, traverse_command

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Use a trained head: draw, edit and mix images, look at its units, find unusual images; measure it; fit "
    "priors, and draw images of a codec by them.",
)

app.command("sample")(sample_command)
app.command("fit")(fit_command)
app.command("draw")(draw_command)
app.command("evaluate")(evaluate_command)
app.command("edit")(edit_command)
app.command("interpolate")(interpolate_command)
app.command("traverse")(traverse_command)
app.command("arithmetic")(arithmetic_command)
app.command("anomaly")(anomaly_command)
app.command("features")(features_command)
