"""From defaults, recipe, config file and ``key=value`` words to one typed config."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dino.errors import ConfigError

C = TypeVar("C")

# Keys of the original system that are gone, and what takes their place.
REPLACED = {
    "speed.use_fp16": "speed.precision (bf16, fp32 or fp64)",
    "model.input_size": "aug.global_crops_size (level 2 reads its size from the grids)",
    "model.patch_size_region": "nothing: one cell is one token",
    "start_from_checkpoint": "model.init",
    "resume": "nothing: the same command again resumes",
    "resume_from_checkpoint": "nothing: the same command again resumes; model.init starts a new run from old weights",
    "experiment_name": "output_dir",
    "fold": "the slide list's partition column",
    "training.pct": "the slide list's partition column, or training.max_steps",
    "optim.wd": "optim.lr_scheduler.weight_decay",
    "optim.lr_scheduler.name": "nothing: the schedule is a cosine",
    "logging.save_snapshot_every": "logging.save_every_steps and logging.keep_every_steps",
    "training.save_every": "logging.save_every_steps and logging.keep_every_steps",
    "early_stopping.enable": "evaluate.early_stopping_patience",
    "early_stopping.patience": "evaluate.early_stopping_patience",
    "tuning.tune_every": "evaluate.every_steps",
    "wandb.enable": "logging.wandb",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a schema, as help pages and identity checks need it."""

    key: str
    type: str
    default: Any
    help: str
    identity: bool


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of ``schema``, depth first, with its dotted key."""
    for item in dataclasses.fields(schema):
        key = f"{prefix}{item.name}"
        default = item.default_factory() if item.default is dataclasses.MISSING else item.default  # type: ignore[misc]
        if dataclasses.is_dataclass(default):
            yield from settings(type(default), f"{key}.")
        else:
            kind = getattr(item.type, "__name__", None) if isinstance(item.type, type) else None
            yield Setting(key, kind or str(item.type), default, item.metadata["help"], item.metadata["identity"])


def recipe_path(name: str) -> Path:
    """Path of a recipe that ships with the package, e.g. ``patch_pathology``.

    Raises:
        ConfigError: If there is no such recipe.
    """
    folder = Path(str(resources.files("dino.config")))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"expected a recipe ({known}) or a YAML file, found '{name}'")
    return path


def load_config(
    schema: type[C],
    *,
    recipe: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> C:
    """Resolve a typed config: ``overrides`` over ``file`` over ``recipe`` over the schema's defaults.

    Args:
        schema: Dataclass of :mod:`dino.config.schema`.
        recipe: Name of a YAML that ships with the package.
        file: The user's YAML (only the keys it changes).
        overrides: ``key=value`` words, or a mapping of dotted keys.

    Returns:
        An instance of ``schema``.

    Raises:
        ConfigError: For an unknown key (naming the nearest one), a wrong type, or a file that is not YAML.
    """
    config = OmegaConf.structured(schema)
    layers = [(str(path), _read_yaml(path)) for path in (recipe and recipe_path(recipe), file) if path]
    layers += [(f"'{word}'", layer) for word, layer in _override_layers(overrides)]
    for origin, layer in layers:
        _refuse_unknown(schema, layer, origin)
        try:
            config = OmegaConf.merge(config, layer)
            result = OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise ConfigError(_type_message(schema, error, origin)) from None
    return result if layers else OmegaConf.to_object(config)  # type: ignore[return-value]


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts, ready for JSON, YAML or a checkpoint."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def identity_of(config: Any) -> dict[str, Any]:
    """Dotted identity keys of ``config`` with their values, without the runtime ones."""
    values = flatten(to_dict(config))
    return {s.key: values[s.key] for s in settings(type(config)) if s.identity}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_yaml(path: Path) -> Any:
    try:
        content = OmegaConf.load(path)
        OmegaConf.to_container(content, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"expected a YAML file at {path}, found none; check --config") from None
    except Exception as error:  # the YAML library has many error types of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"expected YAML settings in {path}, could not read them: {reason}") from None
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"expected `key: value` settings in {path}, found a list or a bare value")
    return content


def _override_layers(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            layer = OmegaConf.create()
            OmegaConf.update(layer, key, value, force_add=True)
            yield f"{key}={value}", layer
        return
    for word in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", word):
            raise ConfigError(f"expected key=value, found '{word}'; `--help` lists every key")
        try:
            yield word, OmegaConf.from_dotlist([word])
        except Exception as error:  # malformed YAML on the right-hand side
            raise ConfigError(f"could not read the value of '{word}': {str(error).splitlines()[0]}") from None


def _refuse_unknown(schema: type, layer: Any, origin: str) -> None:
    known = {s.key for s in settings(schema)}
    groups = {key.rsplit(".", i)[0]: key for key in sorted(known, reverse=True) for i in range(1, key.count(".") + 1)}
    for key, value in flatten(OmegaConf.to_container(layer)).items():  # type: ignore[arg-type]
        if key in groups and value != {}:
            found = "nothing" if value is None else f"'{value}'"
            raise ConfigError(f"{origin}: expected settings under '{key}', as {groups[key]}; found {found}")
        if key in known or key in groups:
            continue
        if key in REPLACED:
            raise ConfigError(f"{origin}: '{key}' is gone; use {REPLACED[key]}")
        close = [k for k in sorted(known) if k.endswith(f".{key}")] or difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"did you mean '{close[0]}'?" if close else "`--help` lists every key"
        raise ConfigError(f"{origin}: there is no setting '{key}'; {hint}")


def _type_message(schema: type, error: OmegaConfBaseException, origin: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "?"
    expected = next((s.type for s in settings(schema) if s.key == key), "another type")
    found = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        return f"{origin}: there is no setting '{key}'; `--help` lists every key"
    return f"{origin}: expected {expected} for '{key}'; {found[0].lower()}{found[1:]}"
