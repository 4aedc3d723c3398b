"""Which recipe learns best? Short runs of several recipes on real tiles, at equal processor time and over seeds.

    DINO_TEST_DATA=… python -m benchmarks.learning OUTPUT costs [--recipes dino,ibot] [--teacher CHECKPOINT]
    DINO_TEST_DATA=… python -m benchmarks.learning OUTPUT run [--recipes dino,ibot] [--seeds 0,1] [--budget 1.0]
    python -m benchmarks.learning OUTPUT table [--budget 1.0] [--earlier RESULTS.json]

``costs`` times a step of each recipe in turn; ``run`` trains each recipe for as many steps as take the time of
``budget`` x 312 steps of DINO, and appends a line to OUTPUT/learning.jsonl for each finished run, so that several calls
add up; ``table`` compares what is there with DINO, seed by seed. ``--earlier`` adds the runs of recorded results with
the same budget and input size, which are not repeated; without costs in OUTPUT, theirs are taken.

The test tiles are split into two halves: recipes are chosen on the validation half and reported on the other half. The
score is the mean of the accuracies of 20-NN and of a ridge probe on the training tiles, after each quarter of the run.
Tiles are embedded at 112 px: the networks were trained on crops of 96 px, and at 224 px scoring a run took longer than
training it.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.crc5 import RECIPE as SMALL
from benchmarks.results import environment
from dino import api, randomness
from dino.config.load import load_config
from dino.config.schema import PatchConfig
from dino.data.images import decode
from dino.evaluate import LabelTable, knn_scores, read_labels
from dino.evaluate.retrieval import effective_rank, pixel_features
from dino.extraction.embed import FileEmbedder, normaliser
from dino.files import atomic_path, read_json, write_json
from dino.models.weights import LoadedBackbone, load_backbone_file

DINO_STEPS, QUARTERS, K = 312, 4, 20
INPUT_SIZE = 112  # at which the tiles are embedded
ROUNDS, TIMED_STEPS = 3, 6
ALPHAS = tuple(10.0**power for power in range(-1, 5))

SQUARES = {  # the masks of nanopath (MedARC)
    "objective.mask_shape": "squares",
    "objective.mask_probability": 1.0,
    "objective.mask_ratio": [0.34, 0.4],
}
DEMO = {  # what dino/demo.py sets for both levels: targets, KDE, average of the teacher, head, learning rate
    "objective.targets": "sinkhorn",
    "objective.kde": 0.05,
    "model.momentum_teacher": 0.9,
    "model.bottleneck_dim": 32,
    "model.hidden_dim": 512,
    "model.out_dim": 256,
    "optim.lr": 0.004,
}
SHARP = {"model.warmup_teacher_temp": 0.02, "model.teacher_temp": 0.02}
UNTIMED = {*SHARP, "model.momentum_teacher", "optim.lr"}  # settings that do not change the time of a step
PARTS = ("ibot", "regression", "koleo", "kde")
# What each recipe adds to the small recipe of benchmarks/crc5.py, which is DINO.
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {},
    "kde": {"objective.kde": 0.01},
    "kde 0.001": {"objective.kde": 0.001},
    "koleo": {"objective.koleo": 0.1},
    "koleo 0.01": {"objective.koleo": 0.01},
    "ibot": {"objective.ibot": 1.0},
    "ibot 0.3": {"objective.ibot": 0.3},
    "ibot 0.1": {"objective.ibot": 0.1},
    "ibot separate": {"objective.ibot": 1.0, "objective.ibot_head": "separate"},
    # Nearly no weight: what the masks alone do to the loss of DINO.
    "masked": {"objective.ibot": 1e-6, "objective.ibot_head": "separate"},
    "masked squares": {"objective.regression": 1e-6, **SQUARES},
    "ibot+kde": {"objective.ibot": 1.0, "objective.kde": 0.01},
    "ibot+kde+sinkhorn": {"objective.ibot": 1.0, "objective.kde": 0.01, "objective.targets": "sinkhorn"},
    "sinkhorn": {"objective.targets": "sinkhorn"},
    "prototypes 64": {"model.out_dim": 64},
    "prototypes 4096": {"model.out_dim": 4096},
    "prototypes 16384": {"model.out_dim": 16384},
    "prototypes 4096+ibot 0.1": {"model.out_dim": 4096, "objective.ibot": 0.1},
    "prototypes 4096+regression 0.1": {"model.out_dim": 4096, "objective.regression": 0.1, **SQUARES},
    # These settings learn from the few hundred tiles of the demo.
    "demo": DEMO,
    "momentum 0.9": {"model.momentum_teacher": 0.9},
    "prototypes 4096+momentum 0.9": {"model.out_dim": 4096, "model.momentum_teacher": 0.9},
    "temperature 0.02": SHARP,
    "prototypes 4096+temperature 0.02": {"model.out_dim": 4096, **SHARP},
    "regression": {"objective.regression": 1.0, **SQUARES},
    "regression+kde": {"objective.regression": 1.0, "objective.kde": 0.01, **SQUARES},
    # From the network --teacher: its cls features, as patch_distill.yaml does; or its prototypes, with local crops.
    "distil": {"objective.dino": 0.0, "distill.cls": 1.0, "aug.local_crops_number": 0},
    "distil prototypes": {"objective.dino": 0.0, "distill.cls": 0.0, "distill.dino": 1.0},
}


def distils(recipe: str) -> bool:
    """Whether a recipe learns from the frozen network ``--teacher``."""
    return any(key.startswith("distill.") for key in RECIPES[recipe])


def settings(recipe: str, data: Path, run: Path, seed: int, teacher: Path | None = None, **changes: Any) -> PatchConfig:
    """Settings of a run of a recipe."""
    folders = {"data_dir": str(data / "train"), "output_dir": str(run), "seed": seed}
    values = {**SMALL, **RECIPES[recipe], **folders, **changes}
    if distils(recipe):
        values["teacher"] = str(teacher)
    return load_config(PatchConfig, recipe="patch_pathology", overrides=values)


def measure_costs(data: Path, output: Path, recipes: Sequence[str], teacher: Path | None) -> None:
    """Seconds per step of each recipe, relative to DINO's, timed in turn; written to OUTPUT/costs.json."""
    seconds: dict[str, list[float]] = {name: [] for name in dict.fromkeys(["dino", *recipes])}
    for _ in range(ROUNDS):
        for name, found in seconds.items():
            config = settings(name, data, output / "unused", 0, teacher, profile=True, profile_steps=TIMED_STEPS)
            numbers = api.pretrain(config).numbers
            found.append(config.training.batch_size_per_gpu / numbers["samples_per_second"])
    # The shortest time is the one that other work on the machine disturbed least.
    costs = {name: min(found) / min(seconds["dino"]) for name, found in seconds.items()}
    path = output / "costs.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), **costs})
    print(json.dumps({name: round(cost, 3) for name, cost in costs.items()}))


def cost_of(recipe: str, costs: Mapping[str, float]) -> float:
    """Relative seconds per step of a recipe, or of one that differs only in the weights of its parts."""
    for name, cost in costs.items():
        if name == recipe or (name in RECIPES and timed_settings(name) == timed_settings(recipe)):
            return cost
    raise SystemExit(f"expected the cost of a step of {recipe!r}, found {list(costs)}; run `costs` first")


def timed_settings(recipe: str) -> set[tuple[str, str]]:
    """What decides how long a step takes: of the parts only whether they have a weight, not how large it is."""
    weights = {f"objective.{part}" for part in PARTS}
    timed = {key: value for key, value in RECIPES[recipe].items() if key not in UNTIMED}
    return {(key, "" if key in weights else str(value)) for key, value in timed.items()}


def train_and_score(
    data: Path, output: Path, recipe: str, seed: int, budget: float, cost: float, teacher: Path | None
) -> dict[str, Any]:
    """One run, scored after each quarter; a finished run is not repeated."""
    steps = round(DINO_STEPS * budget / cost / QUARTERS) * QUARTERS
    run = output / recipe / f"seed_{seed}"
    every = {
        "training.max_steps": steps,
        "logging.keep_every_steps": steps // QUARTERS,
        "logging.tensorboard": False,
        "logging.report": False,
    }
    api.pretrain(settings(recipe, data, run, seed, teacher, **every))
    checkpoints = [run / "checkpoints" / f"step_{steps * i // QUARTERS}.pt" for i in range(1, QUARTERS + 1)]
    table = read_labels(data / "labels.csv")
    networks = [load_backbone_file(str(path)) for path in [run / "checkpoints" / "start.pt", *checkpoints]]
    untrained, *quarters = [score(table, features(table, network)) for network in networks]
    status = read_json(run / "status.json")
    frozen = {"teacher": score(table, features(table, load_backbone_file(str(teacher))))} if distils(recipe) else {}
    return {
        **{"recipe": recipe, "seed": seed, "steps": steps, "cost": round(cost, 4)},
        **{"budget": budget, "input_size": INPUT_SIZE},
        **{"quarters": quarters, "untrained": untrained, **frozen, "settings": RECIPES[recipe]},
        "self_retrieval": status["floor"],
        "pixels": score(table, torch.cat([pixel_features(decode(path)[None]) for path in table.paths])),
        **environment(torch.device("cpu")),
    }


def features(table: LabelTable, loaded: LoadedBackbone) -> Tensor:
    """(N, D) features of all tiles."""
    assert loaded.transform is not None
    size = (INPUT_SIZE, INPUT_SIZE)
    normalise = normaliser(loaded.transform.mean, loaded.transform.std, loaded.backbone.spec.patch_size, size)
    embedder = FileEmbedder(table.paths, decode, normalise, torch.device("cpu"), "bf16")
    (found,) = embedder.embed(loaded.backbone)
    return found


def halves(table: LabelTable) -> dict[str, list[int]]:
    """Rows of the test tiles in two halves with equal shares of each class, the same for every run."""
    chosen: dict[str, list[int]] = {"validation": [], "report": []}
    for name in table.classes:
        rows = [row for row in table.rows("test") if table.labels[row] == name]
        order = randomness.generator(0, 0, f"halves/{name}").permutation(len(rows))
        for position, index in enumerate(order):
            chosen["validation" if position % 2 else "report"].append(rows[index])
    return chosen


def score(table: LabelTable, found: Tensor) -> dict[str, Any]:
    """Accuracies of 20-NN and a ridge probe on each half of the test tiles, their mean, and the features' rank."""
    train = table.rows("train")
    labels = [table.labels[row] for row in train]
    scaler = StandardScaler().fit(found[train].numpy())
    ridge = RidgeClassifierCV(ALPHAS).fit(scaler.transform(found[train].numpy()), labels)
    result: dict[str, Any] = {"effective_rank": round(effective_rank(found - found.mean(0)), 2)}
    for half, rows in halves(table).items():
        wanted = [table.labels[row] for row in rows]
        neighbours = knn_scores(found[train], labels, found[rows], wanted, [K], 0.07)[f"knn_{K}_accuracy"]
        probe = ridge.score(scaler.transform(found[rows].numpy()), wanted)
        assert neighbours is not None
        result[half] = {"knn": neighbours, "ridge": probe, "mean": (neighbours + probe) / 2}
    return result


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a JSONL file."""
    before = path.read_text() if path.exists() else ""
    with atomic_path(path) as temporary:
        temporary.write_text(before + json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % t-interval (infinite for a single one)."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, math.inf
    return mean, float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def print_table(runs: Sequence[Mapping[str, Any]], half: str) -> None:
    """Mean score of each recipe after each quarter, and its difference to DINO over the seeds that both have."""
    dino = {run["seed"]: run for run in runs if run["recipe"] == "dino"}
    print(f"{half} half\n{'recipe':24s} seeds  {'after each quarter':28s} untrained  rank  difference to dino")
    for name in dict.fromkeys(run["recipe"] for run in runs):
        own = {run["seed"]: run for run in runs if run["recipe"] == name}
        quarters = [statistics.mean(r["quarters"][i][half]["mean"] for r in own.values()) for i in range(QUARTERS)]
        untrained = statistics.mean(run["untrained"][half]["mean"] for run in own.values())
        rank = statistics.mean(run["quarters"][-1]["effective_rank"] for run in own.values())
        pairs = [(own[seed], dino[seed]) for seed in own if seed in dino]
        differences = [a["quarters"][-1][half]["mean"] - b["quarters"][-1][half]["mean"] for a, b in pairs]
        mean, width = interval(differences) if differences else (math.nan, math.inf)
        shown = " ".join(f"{score:.3f}" for score in quarters)
        print(f"{name:24s} {len(own):5d}  {shown:28s} {untrained:9.3f} {rank:5.1f}  {mean:+.3f} ± {width:.3f}")


def main() -> None:
    """Parse the arguments and do what they name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("action", choices=("costs", "run", "table"))
    usual = [recipe for recipe in RECIPES if not distils(recipe)]
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=usual)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--teacher", type=Path, help="checkpoint of the teacher of the recipes that distil one")
    parser.add_argument("--earlier", type=Path, help="recorded results, such as benchmarks/results/*-learning.json")
    arguments = parser.parse_args()
    log, earlier = arguments.output / "learning.jsonl", read_json(arguments.earlier) if arguments.earlier else {}

    def done() -> list[dict[str, Any]]:
        runs = [*earlier.get("runs", []), *read(log)]
        wanted = (arguments.budget, INPUT_SIZE)
        return [run for run in runs if (run["budget"], run.get("input_size")) == wanted]

    if arguments.action == "table":
        for half in ("validation", "report"):
            print_table(done(), half)
        return
    data = Path(os.environ.get("DINO_TEST_DATA", "."), "crc5")
    if not data.is_dir():
        parser.error(f"expected the tiles at {data}, found nothing; set DINO_TEST_DATA to the folder that holds crc5/")
    if any(distils(recipe) for recipe in arguments.recipes) and arguments.teacher is None:
        parser.error("expected --teacher CHECKPOINT for recipes that distil; or name others with --recipes")
    if arguments.action == "costs":
        measure_costs(data, arguments.output, arguments.recipes, arguments.teacher)
        return
    own = arguments.output / "costs.json"
    costs = read_json(own) if own.exists() else earlier["relative_seconds_per_step"]
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            if not any(run["recipe"] == recipe and run["seed"] == seed for run in done()):
                cost = cost_of(recipe, costs)
                row = train_and_score(data, arguments.output, recipe, seed, arguments.budget, cost, arguments.teacher)
                append(log, row)
                print_table(done(), "validation")


if __name__ == "__main__":
    main()
