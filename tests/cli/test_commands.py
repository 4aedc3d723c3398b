"""Arguments that each command passes to the API, and its exit codes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import dino
from dino.cli.main import app
from dino.config import schema
from dino.config.load import load_config, settings
from dino.errors import CheckpointError, DataError, Stopped, TrainingFault
from dino.evaluate.results import Estimate, Result, ResultRow

COMMANDS = {
    ("tile",): schema.TileConfig,
    ("pretrain", "patch"): schema.PatchConfig,
    ("pretrain", "region"): schema.RegionConfig,
    ("extract",): schema.ExtractConfig,
    **{("evaluate", name): kind for name, kind in schema.EVALUATION_CONFIGS.items()},
    ("export",): schema.ExportConfig,
    ("info",): schema.InfoConfig,
    ("demo",): schema.DemoConfig,
    ("launch", "slurm"): schema.LaunchConfig,
}


@pytest.fixture
def calls(monkeypatch):
    """Replaces ``dino.api`` and records its calls."""
    made = []
    api = SimpleNamespace()
    for name, answer in {
        "tile": SimpleNamespace(exit_code=0),
        "pretrain": None,
        "extract": SimpleNamespace(exit_code=0),
        "export": None,
        "evaluate": Result(
            "knn",
            "labels.csv",
            "knn_20_accuracy",
            [
                ResultRow(
                    "run",
                    "model",
                    {"knn_20_accuracy": Estimate(0.51234, 0.4, 0.6), "knn_20_auc": Estimate(None)},
                    details={"selection": {"seen_rows": 3}, "leakage": {"seen_slides": ["s"]}},
                ),
                ResultRow(
                    "random initialization",
                    "random_initialization",
                    {"knn_20_accuracy": Estimate(0.4, 0.3, 0.5), "knn_20_auc": Estimate(0.5)},
                    {"knn_20_accuracy": Estimate(-0.11, -0.2, -0.05)},
                ),
            ],
            {"queries": 12},
        ),
        "info": {"arch": "vit_tiny", "transform": {"name": "imagenet"}, "config": {"min_lr": 1e-6}},
    }.items():
        setattr(api, name, lambda *args, name=name, answer=answer: made.append((name, *args)) or answer)
    monkeypatch.setitem(sys.modules, "dino.api", api)
    monkeypatch.setattr(dino, "api", api, raising=False)
    return made


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_tile(run, calls):
    assert run("tile", "a.svs", "qc=true", "b.svs", "root").exit_code == 0
    expected = load_config(schema.TileConfig, overrides={"qc": True})
    assert calls == [("tile", ["a.svs", "b.svs"], Path("root"), expected)]


def test_pretrain_uses_the_pathology_recipe_by_default(run, calls):
    assert run("pretrain", "patch", "root", "runs/a", "seed=3").exit_code == 0
    expected = load_config(schema.PatchConfig, recipe="patch_pathology", overrides={"seed": 3})
    expected.data_dir, expected.output_dir = "root", "runs/a"
    assert calls == [("pretrain", expected)]


def test_pretrain_accepts_another_recipe_and_a_config_file(run, calls, tmp_path):
    (tmp_path / "my.yaml").write_text("model:\n  out_dim: 77\ndata_dir: there\noutput_dir: here\n")
    assert run("pretrain", "patch", "--recipe", "patch", "--config", "my.yaml").exit_code == 0
    config = calls[0][1]
    assert (config.model.out_dim, config.aug.solarize, config.data_dir, config.output_dir) == (77, 0.2, "there", "here")


def test_pretrain_region(run, calls):
    assert run("pretrain", "region", "root", "run").exit_code == 0
    assert isinstance(calls[0][1], schema.RegionConfig)
    assert calls[0][1].model.arch == "hvit_xs"


def test_unusual_folder_names_are_not_parsed(run, calls, tmp_path):
    (tmp_path / "stain=[HE").mkdir()
    assert run("pretrain", "patch", "stain=[HE", "1e5").exit_code == 0
    assert (calls[0][1].data_dir, calls[0][1].output_dir) == ("stain=[HE", "1e5")


def test_extract_evaluate_export_info(run, calls):
    assert run("extract", "timm:vit_tiny_patch16_224", "root", "pretrained=false").exit_code == 0
    assert run("extract", "model=run", "data_dir=root").exit_code == 0
    result = run("evaluate", "knn", "run", "labels.csv", "k=[5]")
    text = " ".join(result.output.split())
    assert "run 0.512 [0.400, 0.600] undefined" in text
    assert "random initialization 0.400 [0.300, 0.500] 0.500 -0.110 [-0.200, -0.050]" in text
    assert "run: optimistic, 3 of 12 test rows that chose the checkpoint" in text
    assert "run: optimistic, 1 test slides that were pretrained on" in text
    assert run("export", "run", "folder").exit_code == 0
    assert "transform.name" in run("info", "run").stdout
    assert "lr" not in run("info", "run").stdout and "1e-06" in run("info", "run", "--all").stdout
    plain = [(name, *(a for a in args if isinstance(a, str | Path))) for name, *args in calls]
    assert plain == [
        ("extract", "timm:vit_tiny_patch16_224", Path("root")),
        ("extract", "run", Path("root")),
        ("evaluate", "knn", "labels.csv"),
        ("export", "run", Path("folder")),
        *[("info", "run")] * 3,
    ]
    assert calls[0][3].pretrained is False
    assert calls[2][2:4] == (["run"], "labels.csv")
    assert calls[2][4].k == [5]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_help_lists_every_setting_with_its_help(run, arguments):
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    shown = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert {item.key for item in settings(COMMANDS[arguments])} <= shown
    text = " ".join(result.stdout.split())
    for item in settings(COMMANDS[arguments]):
        assert " ".join(item.help.split()[:3]) in text
    assert "For example" in result.stdout
    assert f"dino {' '.join(arguments)}" in result.stdout


def test_help_shows_the_defaults_of_the_recipe(run):
    lines = run("pretrain", "patch", "--help").stdout.splitlines()
    shown = {line.split()[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    assert (shown["aug.solarize"], shown["aug.quarter_turns"], shown["optim.lr"]) == ("0.0", "true", "0.0005")


def test_help_of_dino_lists_the_commands_in_the_order_of_use(run):
    text = run("--help").stdout
    order = [text.index(f" {name} ") for name in ("tile", "pretrain", "extract", "evaluate", "export", "info")]
    assert order == sorted(order)


def test_dino_help_prints_the_help(run):
    assert run("help").stdout.split("COMMAND", 1)[1] == run("--help").stdout.split("COMMAND", 1)[1]
    assert "help" not in run("--help").stdout.split("Commands")[1]
    assert "spacing_um" in run("help", "tile").stdout
    assert "For example" in run("help", "pretrain", "patch").stdout
    assert run("help", "nothing").exit_code == 2


def test_version(run):
    assert run("--version").stdout == f"dino {dino.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tile"], "expected at least one SLIDE followed by ROOT, found no arguments"),
        (["tile", "a.svs"], "expected at least one SLIDE followed by ROOT, found 1 argument (a.svs)"),
        (["tile", "a.svs", "root", "spacing=0.5"], "unknown setting 'spacing'; did you mean 'spacing_um'?"),
        (["tile", "a.svs", "root", "qc=perhaps"], "expected true or false for 'qc'"),
        (["pretrain", "patch", "root"], "expected ROOT RUN, found 1 argument (root)"),
        (["pretrain", "patch", "output_dir=run"], "found no data_dir"),
        (["pretrain", "patch", "a", "b", "data_dir=c"], "expected ROOT once"),
        (["pretrain", "patch", "a", "b", "model.out_dims=1"], "did you mean 'model.out_dim'?"),
        (["pretrain", "patch", "a", "b", "--recipe", "best"], "expected a recipe"),
        (["pretrain", "patch", "a", "b", "--config", "no.yaml"], "expected a YAML file at no.yaml, found none"),
        (["pretrain", "region", "a", "b", "aug.hed_jitter=1"], "unknown setting 'aug.hed_jitter'"),
        (["extract", "run"], "expected RUN ROOT, found 1 argument (run)"),
        (["extract", "model=run"], "expected RUN ROOT (or model= and data_dir=), found run"),
        (["evaluate", "knn", "run"], "expected at least one MODEL followed by LABELS, found 1 argument (run)"),
        (["evaluate", "slide", "a"], "expected at least one FEATURES followed by LABELS, found 1 argument (a)"),
        (["export", "run", "a", "b"], "expected RUN DIR, found 3 arguments (run a b)"),
        (["info"], "expected CHECKPOINT, found no arguments"),
        (["demo", "a", "b"], "expected at most one DIR, found 2 arguments"),
        (["pretrain", "patch", "a", "b", "--training.nepochs", "1"], "passed as KEY=VALUE: training.nepochs=1"),
        (["tile", "--num-workers=3", "a", "b"], "passed as KEY=VALUE: num_workers=3"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(run, calls, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert calls == []
    *usage, error = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert len(usage) <= 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["tile", "a", "b", "--jobs", "3"], ["pretrain", "root", "run"], ["evaluate"], ["no"]]
)
def test_unknown_options_and_commands_exit_with_2(run, calls, arguments):
    result = run(*arguments)
    assert (result.exit_code, calls) == (2, [])


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (DataError("expected images in x,\n  found none"), 2, "error: expected images in x, found none\n"),
        (CheckpointError("damaged"), 2, "error: damaged\n"),
        (TrainingFault("the loss is nan"), 1, "error: the loss is nan\n"),
        (Stopped("saved; run again to continue"), 75, "error: saved; run again to continue\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(run, calls, raised, code, message):
    def fail(*_):
        raise raised

    sys.modules["dino.api"].info = fail  # type: ignore[attr-defined]
    result = run("info", "run")
    assert (result.exit_code, result.stderr) == (code, message)


def test_errors_of_other_processes_of_a_job_name_their_rank(run, calls, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run("info").stderr.splitlines()[-1].startswith("error in process 3: ")
    assert run("info", "run").stdout == ""


def test_a_failed_slide_sets_the_exit_code(run, calls):
    for name in ("tile", "extract"):
        setattr(sys.modules["dino.api"], name, lambda *_: SimpleNamespace(exit_code=2))
    assert run("tile", "a.svs", "root").exit_code == 2
    assert run("extract", "run", "root").exit_code == 2


def test_an_unexpected_error_is_not_hidden(run, calls):
    def fail(*_):
        raise ZeroDivisionError

    sys.modules["dino.api"].info = fail  # type: ignore[attr-defined]
    result = run("info", "run")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_public_functions_are_listed_before_they_are_imported():
    from dino import api

    assert {"load_backbone", "api", "config"} <= set(dir(dino)) and "Path" not in dir(dino)
    assert dir(api) == sorted(api.__all__) and "TYPE_CHECKING" not in dir(api)
    assert {"tile", "pretrain", "extract", "launch_slurm"} <= set(dir(api))
    assert all(callable(getattr(api, name)) for name in api.__all__)
