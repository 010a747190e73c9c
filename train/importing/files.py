"""Reading weights of other people's: safetensors and torch checkpoints, whole folders; never running code of theirs.

    file or folder -> Weights: names and shapes at once, tensors when they are asked for

A whole checkpoint of a diffusion model may be many times its autoencoder: tensors are mapped, not read.
Entries: `open_weights`, `weights_in`.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codec.errors import ModelError, UsageError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Classes that trainers leave in their checkpoints beside the weights. They stand in the file by name alone; whatever
# it asks for under these names gets `_Inert`, so none of them is imported, and nothing of theirs runs.
_HARMLESS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf|antlr4)\..+"
    r"|numpy(\.core|\._core)?\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|numpy\.dtypes\.\w+"
    r"|argparse\.Namespace|easydict\.EasyDict|typing\.Any|pathlib\.\w*Path|torch\.torch_version\.TorchVersion"
    r"|(builtins|__builtin__)\.(dict|list|tuple|int|float|str|bool|NoneType)|collections\.defaultdict"
)
_ASKED_FOR = re.compile(r"GLOBAL (\S+)")
_MAPPINGS = ("collections.defaultdict", "easydict.EasyDict")  # filled by the unpickler, so they must be dictionaries


class Weights:
    """The tensors of one or several files.

    Attributes:
        files: where they lie.
        shapes: name -> shape. Dictionaries in a checkpoint are joined by dots.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.files = tuple(files)
        self.shapes = dict(shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, on the CPU, as they are stored.

        Raises:
            ModelError: the file is damaged.
        """
        raise NotImplementedError


class _Safetensors(Weights):
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        with _errors_of(path), safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        super().__init__([path], shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with _errors_of(self.files[0]), safe_open(self.files[0], "pt") as file:
            return {name: file.get_tensor(name) for name in names}


class _Pickled(Weights):
    """A checkpoint of torch.save, read without running what its pickle asks for."""

    def __init__(self, path: Path) -> None:
        self._tensors = dict(_flat("", _unpickle(path)))
        super().__init__([path], {name: tuple(tensor.shape) for name, tensor in self._tensors.items()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}


class _Joined(Weights):
    """Several files that together are one set of weights."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        self._at = {name: part for part in parts for name in part.shapes}
        shapes = {name: part.shapes[name] for name, part in self._at.items()}
        super().__init__([path for part in parts for path in part.files], shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(id(self._at[name]), []).append(name)
        return {name: tensor for some in wanted.values() for name, tensor in self._at[some[0]].read(some).items()}


def open_weights(path: Path) -> Weights:
    """Open a file of weights, whatever its name ends with; or the `.index.json` of several.

    Raises:
        ModelError: damaged, truncated, of another kind, or a pickle that asks for code.
    """
    if path.name.endswith(".index.json"):
        return _Joined([open_weights(part) for part in _parts(path)])
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exception:
        raise UsageError(f"{path}: cannot be read: {exception.strerror}") from exception
    if not head:
        raise ModelError(f"{path}: damaged: an empty file")
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a pointer of Git LFS, not the weights themselves: git lfs pull")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _Pickled(path)
    if head[8:9] == b"{":
        return _Safetensors(path)
    raise ModelError(f"{path}: neither safetensors nor a checkpoint of torch ({len(head)} bytes looked at)")


def weights_in(folder: Path, stem: str = "") -> Path | None:
    """Return the file of weights in a folder: the whole one before parts, safetensors before pickles.

    Args:
        folder: where to look, not below.
        stem: what the name begins with, "diffusion_pytorch_model" in a folder of diffusers; "" = anything.

    Returns:
        A file or an `.index.json`; None where there is none, or several that are equally good.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(stem))
    indices = [path for path in found if path.name.endswith(".index.json")]
    parts = {part for index in indices for part in _parts(index)}
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        whole = [path for path in found if path.suffix in suffixes and path not in parts]
        exact = [path for path in whole if path.stem == stem]
        for candidates in (exact, whole):
            if len(candidates) == 1:
                return candidates[0]
        fitting = [path for path in indices if any(part.suffix in suffixes for part in _parts(path))]
        if len(fitting) == 1 and not whole:
            return fitting[0]
        if whole:
            return None
    return None


def _parts(index: Path) -> list[Path]:
    """Return the files that an `.index.json` names, each once."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as exception:
        raise ModelError(f"{index}: not an index of weights: {type(exception).__name__}: {exception}") from exception
    paths = [index.parent / Path(name).name for name in names]  # beside the index, wherever it says
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{index}: {len(missing)} of {len(paths)} files are missing: {', '.join(missing[:3])}")
    return paths


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn what safetensors raises into a ModelError."""
    try:
        yield
    except (SafetensorError, OSError) as exception:
        raise ModelError(f"{path}: damaged or truncated: {exception}") from exception


def _unpickle(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    stand_ins: list[Any] = []
    with suppress(Exception):  # what is wrong with the file is said by torch.load below
        if mapped:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(_stand_in(name), name) for name in names if _HARMLESS.fullmatch(name)]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as exception:
        asked = _ASKED_FOR.search(str(exception))
        if asked is None:
            raise ModelError(f"{path}: damaged, or not a checkpoint of torch: {exception}") from exception
        raise ModelError(
            f"{path}: refused: the pickle asks for {asked[1]}, which is code, not weights; nothing of it was run. "
            "If you trust where it comes from, load it there and save the weights alone: "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from exception
    except Exception as exception:  # torch raises many types for damaged files
        first = str(exception).splitlines()[0] if str(exception) else type(exception).__name__
        raise ModelError(f"{path}: damaged or truncated: {first}") from exception


class _Inert:
    """What takes the place of a harmless object: takes everything, does nothing."""

    def __new__(cls, *_arguments: object, **_named: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_named: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _empty(*_arguments: object) -> dict[Any, Any]:
    return {}


def _stand_in(name: str) -> Any:
    return _empty if name in _MAPPINGS else _Inert


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    """Yield the named tensors of nested dictionaries; what is in lists or under other keys is of optimizers."""
    if isinstance(value, Tensor):
        yield prefix.removesuffix("."), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _flat(f"{prefix}{key}.", inner)
