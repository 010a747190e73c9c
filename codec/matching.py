"""Which model decodes a file: found by the two ids in its header. Imports no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from codec import bitstream, console, model_folder
from codec.bitstream import Header
from codec.errors import FormatError, ModelError, UsageError
from codec.launch import Launch
from codec.model_folder import ModelFolder


def candidates(model: str | None) -> list[ModelFolder]:
    """Return the models that may decode: the one that was named, or all that are installed.

    Raises:
        UsageError: none was named and none is installed.
        ModelError: the named one, or every installed one, is missing or damaged.
    """
    if model is not None:
        return [model_folder.read(model_folder.resolve(model))]
    folders = installed()
    if not folders and model_folder.available():
        raise ModelError(f"none of the models under ${model_folder.MODELS_VARIABLE} can be read")
    if not folders:
        raise UsageError(f"which model? Give -m MODEL, or name a folder of models in ${model_folder.MODELS_VARIABLE}")
    return folders


def installed() -> list[ModelFolder]:
    """Read every model on the search path; a damaged one is an error on stderr and left out."""
    folders = []
    for path in model_folder.available():
        try:
            folders.append(model_folder.read(path))
        except ModelError as exception:
            console.error(str(exception))
    return folders


def match(header: Header, folders: Sequence[ModelFolder], strict: bool = False) -> ModelFolder:
    """Return the model of a file: the very decoder if it is there, else one that knows its stream.

    Args:
        header: of the file.
        folders: of the models to choose from.
        strict: only the very decoder will do.

    Raises:
        ModelError: none will do.
    """
    knowing = [folder for folder in folders if header.stream_id in folder.streams]
    for folder in knowing:
        if folder.decoder_id == header.decoder_id:
            return folder
    if knowing and not strict:
        return knowing[0]
    if knowing:
        known = ", ".join(f"{folder.name} has {folder.decoder_id}" for folder in knowing)
        raise ModelError(f"made with another decoder of the same latents: it needs {header.decoder_id}, {known}")
    known = ", ".join(f"{folder.name} has {folder.stream_id}" for folder in folders)
    raise ModelError(
        f"made with another model: it needs stream {header.stream_id}, {known}; name the folder of the model that made "
        f"it with -m, or put it under ${model_folder.MODELS_VARIABLE} (a model that came with another version of "
        "latent-codec is in codec/models there)"
    )


def first_match(
    paths: Iterable[Path], folders: Sequence[ModelFolder], strict: bool = False, launch: Launch | None = None
) -> ModelFolder | None:
    """Return the model of the first file that has one; None when no file is whole.

    Args:
        paths: the files of this process.
        folders: of the models to choose from.
        strict: see `match`.
        launch: this process among its like; None = alone.

    Raises:
        ModelError: every whole file, of all processes, needs another model.
    """
    mismatch, first = "", None
    for path in paths:
        try:
            first = match(bitstream.unpack(path.read_bytes()).header, folders, strict)
            break
        except ModelError as exception:
            mismatch = mismatch or f"{path}: {exception}"
        except (FormatError, OSError):
            continue  # reported with its name when its turn comes
    told = (launch or Launch()).gather((first is not None, mismatch))
    if not any(found for found, _ in told):
        for _, reason in told:
            if reason:
                raise ModelError(reason)
    return first
