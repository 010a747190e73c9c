"""A model folder: a diffusers folder with the entropy tables, ids and statistics of the codec beside the weights.

    config.json, diffusion_pytorch_model.safetensors    diffusers' own; `from_pretrained` works as it is
    codec.json, codec.safetensors                       name, ids, statistics; mean, step and integer table sets,
                                                        or the index tables of a VQ model, one for each of its maps
    README.md                                           model card

Reads everything but the weights without torch, so that `codec models` starts fast.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from codec.errors import ModelError, UsageError
from codec.files import write_atomic
from codec.index_maps import IndexMap
from codec.index_tables import IndexTables
from codec.limits import DEFAULT_MODEL
from codec.map_tables import CodeTables, MapTables, describe
from codec.tables import TableSet

CODEC_JSON = "codec.json"
CODEC_TENSORS = "codec.safetensors"
FOLDER_VERSION = 1
MODELS_VARIABLE = "CODEC_MODELS"
PACKAGE_MODELS = Path(__file__).parent / "models"
"""Models that come with the package."""
_WEIGHTS = "diffusion_pytorch_model"  # how files of weights begin
CONDITIONAL = "ConditionalAutoencoderKL"
"""The class of `codec.conditional_kl`, which the codec does not code."""

# For each class, the fields of diffusers' config that decide what its decoder computes from raw latents.
DECODER_FIELDS = {
    "AsymmetricAutoencoderKL": (
        "_class_name",
        "act_fn",
        "latent_channels",
        "layers_per_up_block",
        "norm_num_groups",
        "out_channels",
        "up_block_out_channels",
        "up_block_types",
    ),
    "AutoencoderDC": (
        "_class_name",
        "attention_head_dim",
        "decoder_act_fns",
        "decoder_block_out_channels",
        "decoder_block_types",
        "decoder_conv_act_fn",
        "decoder_in_shortcut",
        "decoder_layers_per_block",
        "decoder_norm_types",
        "decoder_qkv_multiscales",
        "in_channels",
        "latent_channels",
        "upsample_block_type",
    ),
    "AutoencoderKL": (
        "_class_name",
        "act_fn",
        "block_out_channels",
        "latent_channels",
        "layers_per_block",
        "mid_block_add_attention",
        "norm_num_groups",
        "out_channels",
        "up_block_types",
        "use_post_quant_conv",
    ),
    "AutoencoderKLFlux2": (
        "_class_name",
        "act_fn",
        "block_out_channels",
        "decoder_block_out_channels",
        "latent_channels",
        "layers_per_block",
        "mid_block_add_attention",
        "norm_num_groups",
        "out_channels",
        "up_block_types",
        "use_post_quant_conv",
    ),
    "AutoencoderTiny": (
        "_class_name",
        "act_fn",
        "decoder_block_out_channels",
        "latent_channels",
        "num_decoder_blocks",
        "out_channels",
        "upsample_fn",
        "upsampling_scaling_factor",
    ),
    "TwoLevelVQModel": (
        "_class_name",
        "act_fn",
        "block_out_channels",
        "latent_channels",
        "layers_per_block",
        "mid_block_add_attention",
        "norm_num_groups",
        "num_coarse_vq_embeddings",
        "num_vq_embeddings",
        "out_channels",
        "vq_embed_dim",
    ),
    "VQModel": (
        "_class_name",
        "act_fn",
        "block_out_channels",
        "latent_channels",
        "layers_per_block",
        "mid_block_add_attention",
        "norm_num_groups",
        "norm_type",
        "num_vq_embeddings",
        "out_channels",
        "up_block_types",
        "vq_embed_dim",
    ),
}
# Beginnings of the decoder's tensors' names.
_DECODER_PARTS = ("decoder.", "post_quant_conv.", "quantize.", "coarse_quantize.", "coarse_upsample.")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The torch-free part of a model folder.

    Attributes:
        path: the folder.
        name: short name, the folder's unless codec.json says otherwise.
        f: downsampling factor.
        channels: D.
        mean: (D,) float32, the raw latent that index 0 stands for; empty for a VQ model.
        step: (D,) float32, the quantiser's step at q = 0; empty for a VQ model.
        table_sets: stream id -> tables, oldest first; new files use the last one. Empty for a VQ model.
        index_tables: the same of a VQ model; empty for the others.
        decoder_id: 16 hex digits.
        info: the whole of codec.json.
    """

    path: Path
    name: str
    f: int
    channels: int
    mean: np.ndarray
    step: np.ndarray
    table_sets: Mapping[str, TableSet]
    decoder_id: str
    info: Mapping[str, Any]
    index_tables: Mapping[str, CodeTables] = field(default_factory=dict)

    @property
    def maps(self) -> tuple[IndexMap, ...]:
        """The index maps of a VQ model, whose files hold codebook indices; empty for the others."""
        return next((tables.maps for tables in self.index_tables.values()), ())

    @property
    def streams(self) -> Mapping[str, TableSet | CodeTables]:
        """All tables by stream id, oldest first."""
        return {**self.table_sets, **self.index_tables}

    @property
    def stream_id(self) -> str:
        """The stream id of new files."""
        return next(reversed(list(self.streams)))

    @property
    def search_below(self) -> int:
        """From this quality on the encoder's search does not serve the model (`codec.search_limit`); 101 = never."""
        return int(self.info.get("search_below", 101))


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like a model of the codec."""
    return (path / CODEC_JSON).is_file()


def require_unconditional(path: Path) -> None:
    """Raise ModelError where a folder holds an autoencoder that has to be told the class of each image."""
    try:
        name = json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):  # whoever needs it says what is wrong with it
        return
    if name == CONDITIONAL:
        raise ModelError(
            f"{path}: a {name}: its latents mean something only under a class, which files, caches and measurements "
            "have no place for; use it from Python, codec.latent_model.load_conditional (docs/head.md)"
        )


def read(path: Path) -> ModelFolder:
    """Read codec.json and codec.safetensors of a folder.

    Raises:
        ModelError: missing, damaged, inconsistent or of a later version; the message names the folder.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    require_unconditional(path)
    if not is_model_folder(path):
        raise ModelError(f"{path}: no {CODEC_JSON} in it: not a model of the codec (export one with codec-train)")
    try:
        info = json.loads((path / CODEC_JSON).read_text(encoding="utf-8"))
        version = info["folder_version"]
        if version != FOLDER_VERSION:
            advice = ": export the model again with codec-train" if version < FOLDER_VERSION else ""
            raise ModelError(f"{path}: folder version {version}, this program reads {FOLDER_VERSION}{advice}")
        tensors = load_file(path / CODEC_TENSORS)
        maps = _stated_maps(info)
        if maps:
            mean = step = np.empty(0, np.float32)
        else:
            mean, step = tensors["mean"], tensors["step"]
        table_sets: dict[str, TableSet] = {}
        index_tables: dict[str, CodeTables] = {}
        for n, stream_id in enumerate(info["stream_ids"]):
            prefix = f"tables.{n}."
            parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if maps:
                index_tables[stream_id] = tables = _index_tables(parts, maps)
                fits = tables.maps == maps and tables.digest() == stream_id
            else:
                table_sets[stream_id] = table_set = TableSet.from_tensors(parts)
                fits = table_set.channels == mean.size and table_set.digest(mean, step) == stream_id
            if not fits:
                raise ModelError(
                    f"{path}: table set {n} does not have the stream id {stream_id} that {CODEC_JSON} states"
                )
        if not (table_sets or index_tables):
            raise ModelError(f"{path}: no entropy tables")
        return ModelFolder(
            path=path,
            name=info["name"],
            f=info["f"],
            channels=info["latent_channels"],
            mean=mean,
            step=step,
            table_sets=table_sets,
            index_tables=index_tables,
            decoder_id=info["decoder_id"],
            info=info,
        )
    except ModelError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as exception:
        raise ModelError(f"{path}: damaged model folder: {type(exception).__name__}: {exception}") from exception


def state_maps(maps: Sequence[IndexMap]) -> dict[str, Any]:
    """Return what codec.json says of a VQ model's index maps: `codebook_size` of a single one, `maps` of several."""
    return {"codebook_size": maps[0].codebook_size} if len(maps) == 1 else {"maps": [asdict(each) for each in maps]}


def _stated_maps(info: Mapping[str, Any]) -> tuple[IndexMap, ...]:
    """Return what codec.json says of the index maps of a VQ model; of another model nothing."""
    if "maps" in info:
        return tuple(IndexMap(**each) for each in info["maps"])
    return (IndexMap(info["codebook_size"], 1),) if "codebook_size" in info else ()


def _index_tables(tensors: Mapping[str, np.ndarray], maps: tuple[IndexMap, ...]) -> CodeTables:
    return IndexTables.from_tensors(tensors) if len(maps) == 1 else MapTables.from_tensors(tensors, maps)


def write(
    path: Path, *, info: Mapping[str, Any], mean: np.ndarray, step: np.ndarray, table_sets: Sequence[TableSet]
) -> ModelFolder:
    """Write codec.json and codec.safetensors into a folder that diffusers has saved a model to.

    Args:
        path: the folder.
        info: what codec.json holds besides the ids: at least name, f, latent_channels and decoder_id.
        mean: (D,) float32.
        step: (D,) float32, at q = 0.
        table_sets: at least one, oldest first.

    Returns:
        The folder, read back.
    """
    tensors = {"mean": mean.astype(np.float32), "step": step.astype(np.float32)}
    for n, tables in enumerate(table_sets):
        tensors |= {f"tables.{n}.{part}": tensor for part, tensor in tables.tensors().items()}
    return _write(path, info, tensors, [tables.digest(tensors["mean"], tensors["step"]) for tables in table_sets])


def write_vq(path: Path, *, info: Mapping[str, Any], index_tables: Sequence[CodeTables]) -> ModelFolder:
    """Write codec.json and codec.safetensors into a folder that a VQ model was saved to.

    Args:
        path: the folder.
        info: what codec.json holds besides the ids and codebook_size, or maps: at least name, f, latent_channels,
            decoder_id.
        index_tables: at least one, of the same maps, oldest first.

    Returns:
        The folder, read back.
    """
    tensors: dict[str, np.ndarray] = {}
    for n, tables in enumerate(index_tables):
        tensors |= {f"tables.{n}.{part}": tensor for part, tensor in tables.tensors().items()}
    info = {**info, **state_maps(index_tables[0].maps)}
    return _write(path, info, tensors, [tables.digest() for tables in index_tables])


def _write(
    path: Path, info: Mapping[str, Any], tensors: dict[str, np.ndarray], stream_ids: Sequence[str]
) -> ModelFolder:
    document = {"folder_version": FOLDER_VERSION, **info, "stream_ids": list(stream_ids)}
    write_atomic(path / CODEC_TENSORS, save(tensors))
    write_atomic(path / CODEC_JSON, (json.dumps(document, indent=2) + "\n").encode())
    return read(path)


def add_tables(path: Path, tables: TableSet | CodeTables) -> ModelFolder:
    """Add a table set to a model folder, after a refit: new files use it, and old ones stay readable.

    Args:
        path: the folder.
        tables: fitted with the folder's mean and step, see `codec.tables.fit`; of a VQ model, to its codebook, see
            `codec.index_tables.fit`, or to each of its codebooks, see `codec.map_tables.fit`.

    Returns:
        The folder, read back.

    Raises:
        ModelError: the folder is damaged, or of another number of channels or other codebooks than the tables.
        ValueError: it has this table set already.
    """
    folder = read(path)
    if not isinstance(tables, TableSet):
        if tables.maps != folder.maps:
            raise ModelError(f"{path}: {describe(folder.maps)}, the tables are for {describe(tables.maps)}")
        if tables.digest() in folder.index_tables:
            raise ValueError(f"{path}: these tables are in it already")
        return write_vq(path, info=folder.info, index_tables=[*folder.index_tables.values(), tables])
    if folder.maps:
        raise ModelError(f"{path}: {describe(folder.maps)}, the tables are for integer latents")
    if tables.channels != folder.channels:
        raise ModelError(f"{path}: {folder.channels} channels, the tables have {tables.channels}")
    if tables.digest(folder.mean, folder.step) in folder.table_sets:
        raise ValueError(f"{path}: these tables are in it already")
    table_sets = [*folder.table_sets.values(), tables]
    return write(path, info=folder.info, mean=folder.mean, step=folder.step, table_sets=table_sets)


def decoder_digest(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Return the decoder id, 16 hex digits; FORMAT.md section 3.

    Args:
        config: diffusers' config, with `_class_name`, which must be one of `DECODER_FIELDS`.
        tensors: the model's state dict as float32 or float16 arrays; names outside the decoder are ignored.
    """
    fields = {name: config[name] for name in DECODER_FIELDS[config["_class_name"]] if name in config}
    sha = hashlib.sha256(b"latent-codec decoder 0")
    sha.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        if name.startswith(_DECODER_PARTS):
            with np.errstate(over="ignore"):  # beyond float16 is inf on both sides
                sha.update(name.encode() + b"\0" + np.ascontiguousarray(tensors[name], dtype="<f2").tobytes())
    return sha.hexdigest()[:16]


def check_weights(path: Path) -> None:
    """Raise ModelError where a model folder has no weights, or they are cut off; reads only their headers."""
    files = sorted(file for file in path.iterdir() if file.name.startswith(_WEIGHTS))
    if not files:
        raise ModelError(f"{path}: no weights: no {_WEIGHTS}.safetensors in it")
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as exception:
            size_bytes = file.stat().st_size
            raise ModelError(f"{file}: damaged weights, {size_bytes} bytes: {exception}") from exception


def search_path() -> list[Path]:
    """Folders in which models are looked for by name or id: those of $CODEC_MODELS, then the package's own."""
    named = [Path(part) for part in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if part]
    return [*named, PACKAGE_MODELS]


def available() -> list[Path]:
    """Every model folder on the search path: the entries themselves and the folders directly in them."""
    found: dict[Path, Path] = {}  # by real path
    for place in search_path():
        inside = sorted(child for child in place.iterdir() if child.is_dir()) if place.is_dir() else []
        for folder in (place, *inside):
            if is_model_folder(folder):
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _names(folder: Path) -> tuple[str, ...]:
    """What a model may be called: as codec.json says, which `codec models` prints, and as its folder is."""
    try:
        stated = str(json.loads((folder / CODEC_JSON).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return (folder.name,)
    return tuple(dict.fromkeys((stated, folder.name)))


def by_name() -> dict[str, Path]:
    """Return every available model by each of its names; of two with one name the first on the search path."""
    found: dict[str, Path] = {}
    for folder in available():
        for name in _names(folder):
            found.setdefault(name, folder)
    return found


def resolve(name: str | Path | None) -> Path:
    """Turn what a user gave for -m into a model folder.

    Args:
        name: a folder, of the codec or any diffusers autoencoder's; or the name of an available model, where there is
            no such folder. None = the default model, by its name alone.

    Raises:
        ModelError: neither.
        UsageError: none was named, and there is no default model.
    """
    if name is not None and Path(name).is_dir():
        return Path(name)
    known = by_name()
    if name is None and DEFAULT_MODEL not in known:
        raise UsageError(f"which model? Give -m MODEL: the default, {DEFAULT_MODEL}, is not there{_told(known)}")
    folder = known.get(DEFAULT_MODEL if name is None else str(name))
    if folder is None:
        raise ModelError(f"{name}: no such folder, and no model of that name{_told(known)}")
    return folder


def _told(known: Mapping[str, Path]) -> str:
    """Say which models there are, for the end of a message."""
    if known:
        return f"; there are: {', '.join(known)}"
    return f"; there are no models in {', '.join(str(place) for place in search_path())}"
