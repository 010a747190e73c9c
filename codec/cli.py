"""The command `codec`: encode and decode folders of images, describe and check files, list models.

Torch and diffusers are imported only when a network is needed, so `--help`, `info`, `verify` and `models` start fast.
"""

import sys
from collections.abc import Sequence

from codec import console, decode_cli, encode_cli, inspect_cli

app = console.application(
    "codec",
    "Perceptual image codec for latent diffusion. "
    "Exit codes: 0 all well; 1 some files failed; 2 usage; 3 model missing or wrong; 130 interrupted.",
)
app.command(epilog=encode_cli.EPILOG)(encode_cli.encode)
app.command(epilog=decode_cli.EPILOG)(decode_cli.decode)
app.command(epilog=inspect_cli.INFO_EPILOG)(inspect_cli.info)
app.command(epilog=inspect_cli.VERIFY_EPILOG)(inspect_cli.verify)
app.command(epilog=inspect_cli.MODELS_EPILOG)(inspect_cli.models)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `codec.console.run`."""
    return console.run(app, argv, "codec")


if __name__ == "__main__":
    sys.exit(main())
