"""Recipes: TOML files with `key=value` overrides -> `train.config.Config`, or the config of another `task`.

A recipe holds only what differs from the defaults. An unknown key is an error that names the nearest known one.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from codec.errors import UsageError
from train.checks import require
from train.config import Config
from train.head.config import HeadConfig
from train.prior.config import PriorConfig

AnyConfig = Config | HeadConfig | PriorConfig
CONFIGS: dict[str, type[Any]] = {"autoencoder": Config, "prior": PriorConfig, "head": HeadConfig}
"""task -> what its recipes set."""


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read an autoencoder's recipe; see `load_any`. Raises UsageError for one of another task, too."""
    config = load_any(recipe, overrides)
    if not isinstance(config, Config):
        raise UsageError(f"{recipe}: a recipe of task {config.task}, expected one of an autoencoder")
    return config


def load_any(recipe: str, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: path of a TOML file, or the name of one that comes with the package ("small-f8c8").
        overrides: "section.key=value" each; the value is TOML, or a bare string.

    Raises:
        UsageError: no such recipe, bad TOML, an unknown key (names the nearest), a value of the wrong type or range.
    """
    path = Path(recipe)
    packaged = resources.files("train.recipes") / f"{recipe}.toml"
    try:
        if path.is_file():
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        elif packaged.is_file():
            tree = tomllib.loads(packaged.read_text(encoding="utf-8"))
        else:
            raise UsageError(f"{recipe}: no such recipe file, and none of that name among {', '.join(recipe_names())}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exception:
        raise UsageError(f"{recipe}: not a readable TOML file: {exception}") from exception
    for override in overrides:
        _apply(tree, override)
    try:
        return _of_task(tree)
    except ValueError as exception:
        raise UsageError(f"{recipe}: {exception}") from exception


def _of_task(tree: Mapping[str, Any]) -> AnyConfig:
    task = tree.get("task", Config.task)
    require(isinstance(task, str) and task in CONFIGS, "task", task, ", ".join(CONFIGS))
    config: AnyConfig = _build(CONFIGS[task], tree, "")
    return config


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build the config that `Config.to_dict` gave (after a trip through JSON); raises UsageError if it is of another
    task, or another version of this program."""
    config = any_from_dict(tree)
    if not isinstance(config, Config):
        raise UsageError(f"a config of task {config.task}, expected one of an autoencoder")
    return config


def any_from_dict(tree: Mapping[str, Any]) -> AnyConfig:
    """Build the config of any task that its `to_dict` gave; see `from_dict`."""
    try:
        return _of_task(tree)
    except ValueError as exception:
        raise UsageError(f"a config of another version: {exception}") from exception


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("train.recipes").iterdir()
        if entry.name.endswith(".toml")
    )


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override}: expected key=value, for example optim.lr=2e-4")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{override}: {section} is not a section")
    tree[last] = value


def _build(cls: type[Any], tree: Mapping[str, Any], prefix: str, root: type[Any] | None = None) -> Any:
    """Build a dataclass from a TOML table.

    Args:
        cls: the dataclass.
        tree: the table.
        prefix: its dotted name, with its dot.
        root: the whole recipe's dataclass, for hints; None = `cls`.
    """
    root = root or cls
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key}; {_nearest(prefix + key, root)}")
        values[key] = _convert(value, hints[key], f"{prefix}{key}", root)
    return cls(**values)


def _convert(value: Any, hint: Any, name: str, root: type[Any]) -> Any:
    """Check a TOML value against a field's type; an int serves as a float, a list as a tuple. `root`: see `_build`."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} = {value!r}, expected a section")
        return _build(hint, value, f"{name}.", root)  # type: ignore[arg-type]
    if origin is Literal:
        require(value in args, name, value, ", ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ValueError(
                f"{name} = {value!r}, expected a list of {'numbers' if args[-1] is Ellipsis else len(args)}"
            )
        return tuple(_convert(item, args[0], name, root) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) is int:  # a moment in images
        return str(value)
    if type(value) is not hint:
        raise ValueError(f"{name} = {value!r}, expected {hint.__name__}")
    return value


def _keys(cls: type[Any], prefix: str = "") -> list[str]:
    """Every dotted key below a dataclass."""
    out = []
    for name, hint in get_type_hints(cls).items():
        out += _keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]  # type: ignore[arg-type]
    return out


def _nearest(key: str, root: type[Any]) -> str:
    """Name the known key nearest to an unknown one: of the same name, else like it in its section, else anywhere."""
    known = _keys(root)
    section, _, name = key.rpartition(".")
    in_section = [k for k in known if k.rpartition(".")[0] == section]
    same = [k for k in known if k.rpartition(".")[2] == name]
    beside = difflib.get_close_matches(key, in_section, n=1, cutoff=0.75)
    anywhere = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = same or beside or anywhere
    return f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(f.name for f in fields(root))}"
