"""Precedence of settings, error messages for wrong settings, and settings as YAML."""

import re
from pathlib import Path

import pytest

from dino.config import schema
from dino.config.load import (
    REPLACED,
    flatten,
    identity_of,
    load_config,
    settings,
    to_commented_yaml,
    to_dict,
    to_yaml,
)
from dino.errors import ConfigError


def _write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_precede_the_file_the_recipe_and_the_defaults(tmp_path):
    file = _write(tmp_path, "seed: 3\nmodel:\n  out_dim: 512\n  norm_last_layer: true\n")
    config = load_config(schema.PatchConfig, recipe="patch", file=file, overrides=["model.out_dim=1024"])
    assert config.model.out_dim == 1024
    assert config.model.norm_last_layer is True
    assert config.seed == 3
    assert config.aug.color_jitter == 0.8


def test_a_mapping_of_dotted_keys_equals_key_value_strings():
    strings = load_config(schema.PatchConfig, overrides=["optim.lr_scheduler.min_lr=1e-5", "evaluate.k=[5,10]"])
    mapping = load_config(schema.PatchConfig, overrides={"optim.lr_scheduler.min_lr": 1e-5, "evaluate.k": [5, 10]})
    assert strings == mapping


def test_one_value_is_accepted_for_a_list_of_any_length():
    assert load_config(schema.KnnConfig, overrides=["k=5"]).k == [5]
    assert load_config(schema.PatchConfig, overrides={"evaluate.k": 5}).evaluate.k == [5]
    assert load_config(schema.LaunchConfig, overrides=["slurm.setup=module load cuda"]).slurm.setup == [
        "module load cuda"
    ]


def test_one_value_in_a_file_is_accepted_too(tmp_path):
    assert load_config(schema.KnnConfig, file=_write(tmp_path, "k: 5\n")).k == [5]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        (schema.PatchConfig, {"data_dir": "/some where/root", "aug.hue": 0.05, "model.init": "timm:x", "seed": 3}),
        (schema.RegionConfig, {"optim.lr_scheduler.min_lr": 1e-5, "speed.gpu_cache": 0.5, "speed.compile": "true"}),
        (schema.TileConfig, {}),
        (schema.LaunchConfig, {"slurm.setup": ["a: b", "c #d"], "slurm.folder": "/x" * 60, "slurm.name": "null"}),
    ],
)
def test_commented_yaml_loads_to_the_same_config(tmp_path, kind, overrides):
    config = load_config(kind, overrides=overrides)
    text = to_commented_yaml(config)
    assert load_config(kind, file=_write(tmp_path, text)) == config
    assert all(len(line) <= 120 or "/x/x" in line for line in text.splitlines())
    comments = " ".join(text.replace("#", " ").split())
    assert all(item.help in comments for item in settings(kind))
    assert text.count("[default:") == len(overrides)


def test_yaml_loads_to_the_same_config(tmp_path):
    config = load_config(schema.RegionConfig, recipe="region", overrides=["seed=7", "data_dir=/some where/root"])
    assert load_config(schema.RegionConfig, file=_write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.out_dims=3", "did you mean 'model.out_dim'?"),
        ("out_dim=3", "did you mean 'model.out_dim'?"),
        ("training.n_epochs=3", "did you mean 'training.nepochs'?"),
        ("model.out_dim=many", "expected an integer for 'model.out_dim', found many"),
        ("model.use_bn_in_head=perhaps", "expected true or false for 'model.use_bn_in_head', found perhaps"),
        ("aug.global_crops_scale=0.4", "expected two numbers, such as aug.global_crops_scale=[0.4,1.0], found 0.4"),
        (
            "aug.global_crops_scale=[a,b]",
            "expected two numbers, such as aug.global_crops_scale=[0.4,1.0], found [a, b]",
        ),
        ("aug.blur_sigma=[1,2,3]", "expected two numbers, such as aug.blur_sigma=[0.1,2.0], found [1, 2, 3]"),
        ("evaluate.k=many", "expected a list, such as evaluate.k=[10,20]"),
        ("training.max_steps=x", "expected an integer or null"),
        ("seed=${nowhere}", "expected ${…} to name another setting"),
        ("model=vit_small", "model"),
        ("speed.use_fp16=true", "speed.precision"),
        ("model.out_dim=[1", "could not read the value"),
        ("aug.blur_global={}", "expected two numbers, such as aug.blur_global=[1.0,0.1], found {}"),
        ("aug.blur_global={a: 1}", "unknown setting 'aug.blur_global.a'"),
        ("optim.lr=1" + "0" * 400, "could not read the settings"),
        ("--model.out_dim=3", "expected key=value"),
    ],
)
def test_a_wrong_override_is_an_error_of_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(schema.PatchConfig, overrides=[override])
    assert message in str(caught.value)
    assert not re.search(r"\n|AnyNode|ListConfig|Integer|'str'", str(caught.value))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  outdim: 3\n", "did you mean 'model.out_dim'?"),
        ("- a\n- b\n", "found a list"),
        ("model: [1\n", "could not read"),
        ("seed: ${nowhere}\n", "could not read"),
        ("seed: 1.5\n", "seed"),
        ("training: 3\n", "training"),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line_with_its_name(tmp_path, text, message):
    file = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema.PatchConfig, file=file)
    assert message in str(caught.value)
    assert "my.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(schema.PatchConfig, file=tmp_path / "nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config(schema.TileConfig, file=_write(tmp_path, "")) == schema.TileConfig()


def test_every_setting_has_help():
    for kind in (schema.PatchConfig, schema.RegionConfig, schema.TileConfig, schema.ExtractConfig, schema.KnnConfig):
        listed = {item.key: item for item in settings(kind)}
        assert set(listed) == set(flatten(to_dict(kind())))
        assert all(len(item.help) >= 8 for item in listed.values())


def test_only_settings_that_determine_the_result_are_identity():
    keys = identity_of(schema.PatchConfig())
    assert {"seed", "model.arch", "training.nepochs", "optim.lr", "aug.solarize"} <= set(keys)
    assert not {"output_dir", "speed.num_workers", "speed.device", "logging.wandb", "dry_run"} & set(keys)


def test_replaced_keys_do_not_exist():
    keys = {item.key for kind in (schema.PatchConfig, schema.RegionConfig) for item in settings(kind)}
    assert not keys & set(REPLACED)
