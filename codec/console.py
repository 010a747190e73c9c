"""What the three commands share: exit codes, one-line errors, progress on stderr.

Exit codes: 0 all well; 1 some files failed (the rest were done, the failures are listed); 2 usage, missing or
empty source, unwritable output; 3 model missing or wrong for every file; 130 interrupted.

Imports neither torch nor diffusers, so that `--help` stays fast.
"""

import io
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from codec.errors import FormatError, ImageError, ModelError, UsageError, ran_out_of_memory
from codec.version import __version__


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    SOME_FAILED = 1
    USAGE = 2
    MODEL = 3
    INTERRUPTED = 130


stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def error(message: str) -> None:
    """Print `error: <message>` as one line on stderr (new-lines in the message become spaces)."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print one line on stderr (new-lines in the message become spaces)."""
    print(" ".join(str(message).split()), file=sys.stderr, flush=True)


def progress(*columns: ProgressColumn, disable: bool = False) -> Progress:
    """Return a progress bar on stderr: description, bar, n of m, the given extra columns, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8 if len(columns) > 1 else 40),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=stderr,
        disable=disable,
    )


def application(name: str, about: str) -> typer.Typer:
    """Return an empty typer application with the settings of all three commands, --version and a help text."""
    app = typer.Typer(
        name=name, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )

    def show(value: bool) -> None:
        if value:
            print(f"{name} {__version__}")
            raise typer.Exit

    @app.callback(help=about)
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None: ...

    return app


def run(app: typer.Typer, argv: Sequence[str] | None, name: str) -> int:
    """Run a typer application and turn every outcome into an exit code.

    Args:
        app: the application.
        argv: arguments without the program's name; None takes sys.argv[1:].
        name: the program's name, for the help text.

    Returns:
        The exit code. Commands return an int themselves, or None for 0. A user's mistake is one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):  # a file name that is no UTF-8 must not end a listing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    # Newer typer brings its own copy of click, so click's exceptions are found through typer's names.
    click_exception: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        result = command.main(args=None if argv is None else list(argv), prog_name=name, standalone_mode=False)
        if result == Exit.INTERRUPTED:  # newer typer turns Ctrl-C into this result
            raise KeyboardInterrupt
        return int(result or 0)
    except click_exception as exception:
        if type(exception).__name__ == "NoArgsIsHelpError":
            exception.show()
        else:
            error(exception.format_message())
        return Exit.USAGE
    except (KeyboardInterrupt, typer.Abort):
        error("interrupted")
        return Exit.INTERRUPTED
    except ModelError as exception:
        error(str(exception))
        return Exit.MODEL
    except (UsageError, ImageError) as exception:
        error(str(exception))
        return Exit.USAGE
    except OSError as exception:  # a full disk, a folder that went away
        error(f"{exception.filename}: {exception.strerror}" if exception.filename else str(exception))
        return Exit.USAGE
    except ImportError as exception:
        error(f"{exception}: pip install 'latent-codec[train,eval]'")
        return Exit.USAGE
    except (MemoryError, RuntimeError) as exception:
        if not ran_out_of_memory(exception):
            raise
        error(f"out of memory: {exception}")
        return Exit.SOME_FAILED
    except FormatError as exception:
        error(str(exception))
        return Exit.SOME_FAILED
