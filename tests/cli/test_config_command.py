"""`dino config`: the settings of every command as YAML that --config accepts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dino.cli.commands import SCHEMAS
from dino.cli.main import app
from dino.config.load import RECIPES, load_config


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["config", *arguments])


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_output_can_be_passed_as_a_config_file(tmp_path: Path, command):
    kind = SCHEMAS[command]
    result = run(command.split()[-1])
    assert result.exit_code == 0, result.output
    assert run(*command.split()).stdout == result.stdout
    (tmp_path / "my.yaml").write_text(result.stdout, encoding="utf-8")
    recipe = next(iter(RECIPES.get(kind, ())), None)
    assert load_config(kind, file=tmp_path / "my.yaml") == load_config(kind, recipe=recipe)
    assert max(len(line) for line in result.stdout.splitlines()) <= 120


def test_every_command_is_listed_and_every_one_with_a_config_file_prints_its_settings():
    def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{path}{name} ")
            elif not command.hidden:
                yield f"{path}{name}", command

    group: Any = typer.main.get_command(app)
    found = dict(commands(group))
    assert set(group.list_commands(None)) == {name.split()[0] for name in found}
    with_file = {name for name, command in found.items() if any("--config" in p.opts for p in command.params)}
    assert with_file - {"config"} == set(SCHEMAS)


def test_overrides_precede_the_file_and_the_recipe(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("model:\n  out_dim: 512\nseed: 3\n")
    arguments = ["patch", "--recipe", "patch", "--config", str(tmp_path / "my.yaml"), "model.out_dim=1024"]
    lines = run(*arguments).stdout.splitlines()
    shown = {line.split(":")[0].strip(): line for line in lines if not line.startswith("#") and ":" in line}
    assert "recipe patch." in lines[0] and lines[1].startswith("# 3 of ")
    assert "out_dim: 1024" in shown["out_dim"] and "[default: 65536]" in shown["out_dim"]
    assert "seed: 3" in shown["seed"] and "norm_last_layer: false" in shown["norm_last_layer"]
    assert "default" not in shown["patch_size"]


def test_a_teacher_chooses_the_recipe_of_distillation(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("teacher: teacher.pth\n")
    for given in (["teacher=teacher.pth"], ["--config", str(tmp_path / "my.yaml")]):
        shown = run("patch", *given).stdout
        assert "recipe patch_distill." in shown.splitlines()[0] and "dino: 0.0" in shown
    assert "recipe patch." in run("patch", "--recipe", "patch", "teacher=teacher.pth").stdout.splitlines()[0]
    assert "recipe patch_pathology." in run("patch", "teacher=null").stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of tile, patch"),
        (["pretrain"], "expected one of tile, patch"),
        (["patch", "--recipe", "pathology"], "did you mean 'patch_pathology'?"),
        (["tile", "--recipe", "patch"], "has none"),
        (["patch", "out_dim=3"], "did you mean 'model.out_dim'?"),
    ],
)
def test_a_wrong_call_prints_one_line_and_exits_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
