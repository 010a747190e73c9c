"""Options that several commands share, each with its help."""

from typing import Annotated

import typer

from codec.limits import DEFAULT_MODEL

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SRC...", help="Files and folders; folders are read recursively. - is stdin."),
]
Out = Annotated[
    str,
    typer.Option(
        "-o",
        "--out",
        metavar="OUT",
        help="Folder to write to; a file's name for one source; - is stdout.",
    ),
]
EncodeModel = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="Model folder, or a name that `codec models` lists.",
        show_default=DEFAULT_MODEL,
    ),
]
DecodeModel = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="MODEL", help="Model folder or name. Default: found by the files' ids."),
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Leave outputs that exist as they are, without calling it a failure.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
Jobs = Annotated[
    int,
    typer.Option("-j", "--jobs", min=0, help="Workers that read, code and write; 0 = half the processors, 1 to 8."),
]
Device = Annotated[str, typer.Option(help="Where the network runs: auto (a GPU if there is one), cpu, cuda:1 ...")]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16 where the hardware computes in it), bfloat16, float16, float32.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile the network: pays for many images of one size.")
]
Memory = Annotated[
    float,
    typer.Option(min=0, help="GB that one image may take in the network, in tiles if need be; 0 = 40 % of all."),
]
Json = Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")]
