"""The command `codec-eval`. Heavy imports happen inside the commands, so that `--help` is fast."""

from collections.abc import Sequence

from codec import console
from eval.bench_cli import bench_command
from eval.compare_cli import compare_command
from eval.generated_cli import generated_command
from eval.latents_cli import latents_command
from eval.lint_cli import lint_command
from eval.prefer_cli import prefer_command
from eval.rd_cli import rd_command
from eval.recon_cli import recon_command
from eval.weights_cli import weights_command

app = console.application(
    "codec-eval",
    "Measure image codecs honestly: real file sizes, whole images, stated protocols. "
    "Exit codes: 0 all well; 1 some images failed (listed, the rest is measured); 2 usage; 3 model; 130 interrupted.",
)
app.command("rd")(rd_command)
app.command("recon")(recon_command)
app.command("compare")(compare_command)
app.command("bench")(bench_command)
app.command("latents")(latents_command)
app.command("lint")(lint_command)
app.command("prefer")(prefer_command)
app.command("generated")(generated_command)
app.command("weights")(weights_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `codec-eval` and return its exit code; argv None takes sys.argv[1:]."""
    return console.run(app, argv, "codec-eval")
