import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_checkpoint

from dino.api.evaluating import evaluate_knn
from dino.config.schema import KnnConfig
from dino.errors import DataError
from dino.evaluate.knn import knn_scores
from dino.extraction.embed import embed, normaliser
from dino.models.weights import load_backbone_file

CONFIG = KnnConfig(k=[1, 5, 200], device="cpu", precision="fp32", batch_size=5)
COLOURS = {"red": (131, 128, 128), "blue": (128, 128, 131)}


@pytest.fixture
def labelled(tmp_path):
    """24 noisy red and blue pictures of two sizes, one slide each."""
    rng = np.random.default_rng(0)
    lines = ["image_path,label,partition,slide_id"]
    for i in range(24):
        name, side = ("red", "blue")[i % 2], 32 if i < 12 else 48
        pixels = np.array(COLOURS[name]) + rng.integers(-99, 99, (side, side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{name},{'train' if i % 3 else 'test'},slide{i}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path / "labels.csv"


@pytest.fixture
def run(tmp_path):
    """A run folder."""
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", config={"seed": 3}, training_slides={"slide_ids": []})
    return tmp_path / "run"


def test_scores_are_returned_with_their_baselines(labelled, run):
    result = evaluate_knn(str(run), labelled, CONFIG)
    names = ["model", "random_initialization", "pixels_8x8"]
    assert [name for name in result if name in names] == names and "initial_weights" not in result
    for name in names:
        assert {f"knn_{k}_{s}" for k in (1, 5, 16) for s in ("accuracy", "balanced_accuracy", "auc")} == set(
            result[name]
        )
    assert result["model"] != result["random_initialization"]  # another seed
    assert result["about"]["queries"] == 8 and result["about"]["references"] == 16
    assert json.loads((run / "knn_labels.json").read_text())["model"] == result["model"]


def test_every_accuracy_has_its_standard_error(labelled, run):
    result = evaluate_knn(str(run), labelled, CONFIG)
    assert result["standard_errors"].keys() == {"model", "random_initialization", "pixels_8x8"}
    for name, errors in result["standard_errors"].items():
        assert errors.keys() == {f"knn_{k}_accuracy" for k in (1, 5, 16)}
        for metric, error in errors.items():
            right = round(8 * result[name][metric])  # of 8 queries
            outcomes = np.repeat([1.0, 0.0], [right, 8 - right])
            assert error == pytest.approx(outcomes.std() / np.sqrt(8))
    assert result["standard_error"] == result["standard_errors"]["model"]


def test_scores_on_other_labels_are_kept(labelled, run):
    evaluate_knn(str(run), labelled, CONFIG)
    before = (run / "knn_labels.json").read_bytes()
    other = labelled.with_name("grades.v2.csv")
    other.write_text(labelled.read_text().replace("red", "high"))
    evaluate_knn(str(run), other, CONFIG)
    assert (run / "knn_labels.json").read_bytes() == before
    assert json.loads((run / "knn_grades.v2.json").read_text())["about"]["labels"] == str(other)


def test_scores_are_those_of_the_features(labelled, run):
    result = evaluate_knn(str(run), labelled, CONFIG)
    backbone = load_backbone_file(run).backbone
    images = [Image.open(labelled.parent / f"{i}.png") for i in range(24)]
    tiles = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]
    features = embed(backbone, tiles, normaliser([0.5] * 3, [0.5] * 3, 16), torch.device("cpu"), "fp32")
    train, test = [i for i in range(24) if i % 3], list(range(0, 24, 3))
    names = ["red", "blue"] * 12
    wanted = knn_scores(features[train], [names[i] for i in train], features[test], [names[i] for i in test], [5], 0.07)
    assert {k: result["model"][k] for k in wanted} == pytest.approx(wanted)


def test_leakage_is_an_error_unless_allowed_and_then_recorded(labelled, tmp_path, capsys):
    model = str(save_checkpoint(tmp_path / "seen.pt", training_slides={"slide_ids": ["slide3"], "patient_ids": []}))
    with pytest.raises(DataError, match="slide3"):
        evaluate_knn(model, labelled, CONFIG)
    result = evaluate_knn(model, labelled, KnnConfig(**{**CONFIG.__dict__, "allow_leakage": True}))
    assert result["about"]["leakage"]["seen_slides"] == ["slide3"]
    assert "optimistic" in capsys.readouterr().out


def test_output_file_can_be_chosen(labelled, tmp_path):
    output = tmp_path / "out" / "scores.json"
    model = str(save_checkpoint(tmp_path / "model.pt"))
    evaluate_knn(model, labelled, KnnConfig(**{**CONFIG.__dict__, "output": str(output)}))
    assert json.loads(output.read_text())["about"]["source"] == model


def test_grids_need_a_level_2_model(labelled, run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    lines = ["image_path,label,partition"]
    for i in range(8):
        torch.save(torch.randn(16, 8, generator=generator) + 6 * (i % 2) - 3, tmp_path / f"s{i}_0_0.pt")
        lines.append(f"s{i}_0_0.pt,{i % 2},{'train' if i < 4 else 'test'}")
    table = tmp_path / "grids.csv"
    table.write_text("\n".join(lines))
    model = str(save_checkpoint(tmp_path / "region.pt", "region", 8))
    result = evaluate_knn(model, table, CONFIG)
    assert result["mean_of_cells"]["knn_1_accuracy"] == 1.0
    with pytest.raises(DataError, match="found the feature grid"):
        evaluate_knn(str(run), table, CONFIG)
    with pytest.raises(DataError, match=r"expected \.pt"):
        evaluate_knn(model, labelled, CONFIG)
    with pytest.raises(DataError, match="D=9"):
        evaluate_knn(str(save_checkpoint(tmp_path / "other.pt", "region", 9)), table, CONFIG)


def test_an_image_that_cannot_be_decoded_is_named(labelled, run):
    (labelled.parent / "5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"5\.png"):
        evaluate_knn(str(run), labelled, CONFIG)
