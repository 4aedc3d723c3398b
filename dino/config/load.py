"""Merge defaults, recipe, config file and ``key=value`` overrides into one typed config, and format it as YAML."""

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from dino.config.schema import PatchConfig, RegionConfig
from dino.errors import ConfigError

C = TypeVar("C")

# Recipes of each schema (NAME.yaml in this folder); the first one is the default of the command.
RECIPES: dict[type, tuple[str, ...]] = {
    PatchConfig: ("patch_pathology", "patch_dinov2", "patch_continue", "patch_distill", "patch"),
    RegionConfig: ("region", "region_ibot"),
}
DISTILL = "patch_distill"  # the default with a teacher

# Keys of the original system that no longer exist, and their replacements.
REPLACED = {
    "speed.use_fp16": "use speed.precision (bf16, fp32 or fp64)",
    "model.input_size": "use aug.global_crops_size (level 2 reads the size from the grids)",
    "model.patch_size_region": "omit it: one cell is one token",
    "start_from_checkpoint": "use model.init",
    "resume": "omit it: running the same command again resumes",
    "resume_from_checkpoint": "omit it: running the same command again resumes; model.init sets initial weights",
    "experiment_name": "use output_dir",
    "fold": "use the partition column of the slide list",
    "training.pct": "use the partition column of the slide list, or training.max_steps",
    "optim.wd": "use optim.lr_scheduler.weight_decay",
    "optim.lr_scheduler.name": "omit it: the schedule is a cosine",
    "logging.save_snapshot_every": "use logging.save_every_steps and logging.keep_every_steps",
    "training.save_every": "use logging.save_every_steps and logging.keep_every_steps",
    "early_stopping.enable": "use evaluate.early_stopping_patience",
    "early_stopping.patience": "use evaluate.early_stopping_patience",
    "tuning.tune_every": "use evaluate.every_steps",
    "wandb.enable": "use logging.wandb",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a schema.

    Attributes:
        key: Dotted key, such as ``model.arch``.
        type: Its type as written in Python, such as ``int`` or ``list[float]``.
        default: The schema's default.
        help: One line of help.
        identity: Whether it is part of a run's identity.
        length: Number of values of a list of fixed length, else None.
    """

    key: str
    type: str
    default: Any
    help: str
    identity: bool
    length: int | None

    @property
    def is_list(self) -> bool:
        """Whether the setting holds a list."""
        return isinstance(self.default, list)

    @property
    def expected(self) -> str:
        """Description of the allowed values, for error messages."""
        names = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}
        kind, _, optional = self.type.partition(" | ")
        if self.length is not None:
            return f"{_COUNTS[self.length]} numbers, such as {self.key}={_inline(self.default).replace(' ', '')}"
        if self.is_list:
            example = "[text]" if "str" in kind else "[10,20]"
            return f"a list, such as {self.key}={example}"
        return names.get(kind, kind) + (" or null" if optional else "")


_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of ``schema``, depth first, with its dotted key."""
    for item in dataclasses.fields(schema):
        key = f"{prefix}{item.name}"
        default = _default(item)
        if dataclasses.is_dataclass(default):
            yield from settings(type(default), f"{key}.")
        else:
            kind = getattr(item.type, "__name__", None) if isinstance(item.type, type) else None
            yield Setting(key, kind or str(item.type), default, **item.metadata)


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def recipe_path(schema: type, name: str) -> Path:
    """Path of a recipe of this package, e.g. ``patch_pathology`` of ``PatchConfig``.

    Raises:
        ConfigError: If the schema has no such recipe.
    """
    names = RECIPES.get(schema, ())
    if name in names:
        return Path(str(resources.files("dino.config"))) / f"{name}.yaml"
    if not names:
        raise ConfigError(f"expected no recipe, because this command has none, found '{name}'; omit --recipe")
    hint = ""
    if Path(name).suffix in (".yaml", ".yml"):
        hint = "; pass a file with --config"
    elif close := difflib.get_close_matches(name, names, 1, 0.3):
        hint = f"; did you mean '{close[0]}'?"
    raise ConfigError(f"expected a recipe ({', '.join(names)}), found '{name}'{hint}")


def default_recipe(schema: type, file: Path | None, overrides: Sequence[str]) -> str | None:
    """The recipe of a command that is given none: the first one of its schema, or that for a frozen teacher.

    Args:
        schema: Dataclass of :mod:`dino.config.schema`.
        file: The user's YAML.
        overrides: ``key=value`` strings.

    Returns:
        Its name; None if the schema has no recipes.

    Raises:
        ConfigError: See :func:`load_config`.
    """
    first = next(iter(RECIPES.get(schema, ())), None)
    teacher = first and getattr(load_config(schema, file=file, overrides=overrides), "teacher", None)
    return DISTILL if teacher else first


def load_config(
    schema: type[C],
    *,
    recipe: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> C:
    """Merge the schema's defaults, ``recipe``, ``file`` and ``overrides``; later values replace earlier ones.

    Args:
        schema: Dataclass of :mod:`dino.config.schema`.
        recipe: Name of a recipe of this package.
        file: The user's YAML; it needs to contain only the settings to change.
        overrides: ``key=value`` strings, or a mapping of dotted keys.

    Returns:
        An instance of ``schema``.

    Raises:
        ConfigError: For an unknown key (naming the nearest one), a wrong type, or a file that is not YAML.
    """
    paths = [recipe_path(schema, recipe)] if recipe else []
    layers = [(str(path), _read_yaml(path)) for path in (*paths, *([file] if file else []))]
    layers += [(f"'{override}'", layer) for override, layer in _override_layers(overrides)]
    for origin, layer in layers:
        _check_keys(schema, layer, origin)
        _check_lists(schema, layer, origin)
    config: Any = OmegaConf.structured(schema)
    try:  # all layers at once, because each merge copies the whole config
        return OmegaConf.to_object(OmegaConf.merge(config, *(layer for _, layer in layers)))  # type: ignore[return-value]
    except (OmegaConfBaseException, OverflowError):
        return _merge_one_by_one(schema, config, layers)


def _merge_one_by_one(schema: type[C], config: Any, layers: Sequence[tuple[str, Any]]) -> C:
    """Merge layers, and name the one that cannot be merged.

    Raises:
        ConfigError: For the first layer with a value that does not fit the schema.
    """
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
            OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise ConfigError(_plain_message(schema, error, layer, origin)) from None
        except OverflowError as error:  # an integer that no float can represent
            raise ConfigError(f"{origin}: could not read the settings: {error}") from None
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def given_keys(file: Path | None, overrides: Sequence[str]) -> set[str]:
    """Keys of the settings that the user gave, in a YAML file or as ``key=value``."""
    layers = [_read_yaml(file)] if file else []
    layers += [layer for _, layer in _override_layers(overrides)]
    return {key for layer in layers for key in flatten(OmegaConf.to_container(layer))}  # type: ignore[arg-type]


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts, ready for JSON, YAML or a checkpoint."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


COMMENT_COLUMN, WIDTH = 36, 120


def to_commented_yaml(config: Any) -> str:
    """The config as YAML text with the help of each setting; values that differ from the default are marked."""
    values, by_key = flatten(to_dict(config)), {item.key: item for item in settings(type(config))}
    return "\n".join(_commented_group(type(config), values, by_key, "")).strip("\n") + "\n"


def _commented_group(schema: type, values: dict[str, Any], by_key: dict[str, Setting], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for item in dataclasses.fields(schema):
        key, default = f"{prefix}{item.name}", _default(item)
        if dataclasses.is_dataclass(default):
            title = (type(default).__doc__ or "").splitlines()[0].removesuffix(".")
            yield from ([] if indent else [""])
            yield f"{indent}{item.name}:  # {title}"
            yield from _commented_group(type(default), values, by_key, f"{key}.")
            continue
        setting, value = by_key[key], values[key]
        entry = f"{indent}{item.name}: {_inline(value)}"
        text = setting.help + ("" if value == setting.default else f" [default: {_inline(setting.default)}]")
        # The comment follows the entry; for an entry that reaches the comment column, it precedes it.
        column = COMMENT_COLUMN if len(entry) < COMMENT_COLUMN - 1 else len(indent)
        comment = [f"{' ' * column}# {line}" for line in textwrap.wrap(text, WIDTH - column - 2)]
        if column == COMMENT_COLUMN:
            comment[0] = entry.ljust(column) + comment[0][column:]
            yield from comment
        else:
            yield from (*comment, entry)


def _inline(value: Any) -> str:
    """A value in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def recipe_comment(schema: type, recipe: str) -> str:
    """The comment at the start of a recipe: the sources of its values, and how to adapt them."""
    lines = recipe_path(schema, recipe).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def identity_of(config: Any) -> dict[str, Any]:
    """Values of the identity settings of ``config``, by dotted key."""
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
    except Exception as error:  # PyYAML and OmegaConf raise many types of errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"expected YAML settings in {path}, could not read them: {reason}") from None
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"expected `key: value` settings in {path}, found a list or a single value")
    return content


def _override_layers(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            layer = OmegaConf.create()
            OmegaConf.update(layer, key, value, force_add=True)
            yield f"{key}={value}", layer
        return
    for override in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", override):
            raise ConfigError(f"expected key=value, found '{override}'; --help lists all settings")
        try:
            yield override, OmegaConf.from_dotlist([override])
        except Exception as error:  # malformed YAML on the right-hand side
            raise ConfigError(f"could not read the value of '{override}': {str(error).splitlines()[0]}") from None


def _check_keys(schema: type, layer: Any, origin: str) -> None:
    """Raise a ConfigError for a key that the schema does not have, with the nearest key or the replacement."""
    keys = {s.key for s in settings(schema)}
    groups = {key.rsplit(".", i)[0]: key for key in sorted(keys, reverse=True) for i in range(1, key.count(".") + 1)}
    for key, value in flatten(OmegaConf.to_container(layer)).items():  # type: ignore[arg-type]
        if key in groups and value != {}:
            found = "nothing" if value is None else f"'{value}'"
            raise ConfigError(f"{origin}: expected settings under '{key}', such as {groups[key]}; found {found}")
        if key in keys or key in groups:
            continue
        if key in REPLACED:
            raise ConfigError(f"{origin}: '{key}' no longer exists; {REPLACED[key]}")
        close = [k for k in sorted(keys) if k.endswith(f".{key}")] or difflib.get_close_matches(key, keys, 1, 0.5)
        hint = f"did you mean '{close[0]}'?" if close else "--help lists all settings"
        raise ConfigError(f"{origin}: unknown setting '{key}'; {hint}")


def _check_lists(schema: type, layer: DictConfig, origin: str) -> None:
    """Convert a single value to a list where a list is expected, and check the length of lists.

    Raises:
        ConfigError: If a setting of fixed length gets another number of values.
    """
    for setting in settings(schema):
        value = _select(layer, setting.key) if setting.is_list else None
        if value is None:
            continue
        if OmegaConf.is_dict(value):
            raise ConfigError(f"{origin}: expected {setting.expected}, found {OmegaConf.to_container(value)}")
        if not OmegaConf.is_list(value):
            value = OmegaConf.create([value])
            OmegaConf.update(layer, setting.key, value, merge=False)
        if setting.length not in (None, len(value)):
            found: Any = OmegaConf.to_container(value)
            raise ConfigError(
                f"{origin}: expected {setting.expected}, found {_inline(found if len(found) != 1 else found[0])}"
            )


def _plain_message(schema: type, error: OmegaConfBaseException, layer: DictConfig, origin: str) -> str:
    """Error message for a wrong value, without OmegaConf's terms."""
    key = re.sub(r"\[\d+\]", "", str(getattr(error, "full_key", None) or getattr(error, "key", None) or ""))
    setting = next((s for s in settings(schema) if s.key == key), None)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, InterpolationKeyError):
        return f"{origin}: expected ${{…}} to name another setting; {reason}"
    if setting is None:
        return f"{origin}: could not read the settings: {reason}"
    if isinstance(error, MissingMandatoryValue):
        return f"{origin}: expected {setting.expected} for '{key}', found ???"
    value = _select(layer, key)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if setting.is_list:
        return f"{origin}: expected {setting.expected}, found {_inline(value)}"
    return f"{origin}: expected {setting.expected} for '{key}', found {_inline(value)}"


def _select(layer: DictConfig, key: str) -> Any:
    """The value of a dotted key; None if it is absent, or if it refers to a setting of another layer."""
    return OmegaConf.select(layer, key, throw_on_resolution_failure=False)
