import dataclasses

import pytest

from dino.config.load import flatten, settings, to_dict
from dino.config.schema import LEVEL_CONFIGS
from dino.errors import ConfigError
from dino.models.backbone import BackboneSpec
from dino.models.checkpoint import Description
from dino.models.grid_source import GridSource, recorded
from dino.models.sharing import identifying, public_settings, shareable

SPEC = BackboneSpec("vit:dim=16,depth=1,heads=2", "patch", 3, (32, 32), 16)
SLIDES = {"slide_ids": ["a"], "patient_ids": ["p"]}


@pytest.mark.parametrize("level", LEVEL_CONFIGS)
def test_no_setting_of_a_run_publishes_a_folder(level: str) -> None:
    """Whatever setting a run has or will have, a path in it does not get into an export."""
    config = LEVEL_CONFIGS[level]()
    texts = [item for item in settings(type(config)) if "str" in item.type and not item.is_list]
    for item in texts:
        group = config
        *groups, name = item.key.split(".")
        for part in groups:
            group = getattr(group, part)
        setattr(group, name, rf"/home/anna/{item.key}/p12" if item.identity else rf"C:\anna\{item.key}")
    found = flatten(public_settings(level, to_dict(config)))
    assert found.keys() == {item.key for item in settings(type(config)) if item.identity or item not in texts}
    assert "anna" not in str(found) and found["model.init"] == "p12"


def test_timm_names_and_numbers_are_kept() -> None:
    config = LEVEL_CONFIGS["patch"]()
    config.model.init, config.training.batch_size_per_gpu = "timm:hf-hub:someone/model", 96
    found = flatten(public_settings("patch", to_dict(config)))
    assert found["model.init"] == "timm:hf-hub:someone/model" and found["training.batch_size_per_gpu"] == 96


def test_entries_that_are_not_known_are_left_out() -> None:
    training = {"total_steps": 9, "versions": {"torch": "2"}, "training_slides": SLIDES}
    made = Description(
        SPEC, config={"seed": 3, "host": "lab7", "data_dir": "/lab7"}, training={**training, "host": "lab7"}
    )
    found = shareable(made, "salt", ids=True, source="run")
    assert found.config == {"seed": 3}
    assert found.training == training
    assert dataclasses.replace(made, config=None, training={}) == dataclasses.replace(found, config=None, training={})


def test_the_level_1_model_of_grids_is_named_without_its_folder() -> None:
    grids = GridSource("/home/anna/run/best.pt", "ab12", None, "fp32", 0.5, 256)
    made = Description(SPEC, training={"grids": recorded(grids)})
    found = shareable(made, "salt", ids=False, source="run").training["grids"]
    assert found == dataclasses.asdict(dataclasses.replace(grids, model="best.pt"))
    assert shareable(Description(SPEC, training={"grids": "unknown"}), "", ids=False, source="").training == {
        "grids": "unknown"
    }


def test_ids_cannot_be_had_from_hashes() -> None:
    hashed = shareable(Description(SPEC, training={"training_slides": SLIDES}), "salt", ids=False, source="run")
    with pytest.raises(ConfigError, match="expected ids of slides in out for ids=true, found only hashes"):
        shareable(hashed, "other", ids=True, source="out")
    assert shareable(hashed, "other", ids=False, source="out") == hashed


def test_what_a_file_tells_is_told() -> None:
    config = {"seed": 1, "data_dir": "/data/anna", "evaluate": {"labels": "lab/l.csv"}, "model": {"init": "timm:a/b"}}
    assert identifying({"training_slides": SLIDES}, config) == {
        "slides": "1 ids",
        "patients": "1 ids",
        "folders": "data_dir, evaluate.labels",
    }
    hashed = shareable(
        Description(SPEC, config=config, training={"training_slides": SLIDES}), "s", ids=False, source=""
    )
    assert identifying(hashed.training, hashed.config) == {
        "slides": "1 salted hashes",
        "patients": "1 salted hashes",
        "folders": "none",
    }
    assert "14 salted hashes" in identifying({"selection": [{"count": 14}]}, None)["labels"]
    assert identifying({}, None) == {"slides": "none", "patients": "none", "folders": "none"}
