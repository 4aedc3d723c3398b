"""Files of results: what an evaluation writes, and the comparison of several."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino import files, progress
from dino.config.schema import CompareConfig
from dino.errors import ConfigError
from dino.evaluate.results import CHANCE, MODEL, Result, read_result
from dino.evaluate.task import Fold, write_folds
from dino.train.run_folder import result_file

BESIDE = (".csv", ".png")  # of a result's JSON file


def output_path(evaluation: str, first: str, labels: Path, output: str | None) -> Path | None:
    """Where the JSON file of a result goes: ``output``, else into the folder of the first model if that is a run.

    Args:
        evaluation: ``knn``, ``linear``, ...
        first: The first model.
        labels: The table.
        output: Setting ``output``.

    Raises:
        ConfigError: See :func:`check_output`.
    """
    path = Path(first) / result_file(evaluation, labels.stem) if (Path(first) / "checkpoints").is_dir() else None
    path = Path(output) if output else path
    if path is not None:
        check_output(path, [labels])
    return path


def check_output(output: Path, inputs: Sequence[str | Path | None]) -> None:
    """Check that what is written for a result replaces nothing that was read for it.

    Args:
        output: The JSON file of the result.
        inputs: Tables that are read, as far as they are given.

    Raises:
        ConfigError: If the name is that of one of the files beside it, or one of them is an input.
    """
    if output.suffix in BESIDE:
        raise ConfigError(f"expected output=FILE.json, with {' and '.join(BESIDE)} beside it, found {output}")
    written = [output, *(output.with_suffix(suffix) for suffix in BESIDE), _folds_path(output)]
    known = {path.resolve() for path in map(Path, filter(None, inputs))}
    replaced = next((path for path in written if path.resolve() in known), None)
    if replaced is not None:
        raise ConfigError(
            f"expected an output that replaces no table that is read, found output={output}, which writes {replaced}; "
            "give it another name"
        )


def _folds_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}_folds.csv")


def knn_record(result: Result) -> dict[str, Any]:
    """A result of kNN, and the scores of its first model and the baselines by name: :func:`dino.api.evaluate_knn`."""
    first, *others = result.rows
    shown = {MODEL: first, **{row.role: row for row in others if row.role not in (MODEL, CHANCE)}}
    scores = {role: {name: found.value for name, found in row.estimates.items()} for role, row in shown.items()}
    errors = {role: _standard_errors(found, result.about["queries"]) for role, found in scores.items()}
    facts = {"source": first.source, "fingerprint": first.fingerprint, **first.details}
    values = result.to_dict()
    about = {**values.pop("about"), **facts, "labels": result.labels}
    return {**scores, "standard_error": errors[MODEL], "standard_errors": errors, **values, "about": about}


def write_result(result: Result, output: Path, names: Sequence[str] = (), folds: Sequence[Fold] = ()) -> None:
    """Write a result as JSON, and with the same name as CSV and PNG; the folds of a cross-validation beside them.

    Args:
        result: The result.
        output: The JSON file.
        names: Name of each row: the image, slide or patient.
        folds: The folds, if the rows were cross-validated.

    Raises:
        DataError: If the disk cannot be written.
    """
    from dino.report.comparison import forest_plot

    with files.oserror_to_data_error(output.parent):
        files.write_json(output, knn_record(result) if result.evaluation == "knn" else result.to_dict())
        files.write_text(output.with_suffix(".csv"), result.to_csv())
        files.write_bytes(output.with_suffix(".png"), forest_plot([result]))
    progress.say(f"result: {output}, and beside it .csv and .png")
    if folds:
        path = _folds_path(output)
        with files.oserror_to_data_error(path.parent):
            write_folds(path, names, folds)
        progress.say(f"folds: {path}; splits={path} uses them again")


def compare(results: Sequence[Path], config: CompareConfig) -> tuple[list[list[str]], list[str]]:
    """Results of several evaluations as one table, and with ``config.output`` as a file and a figure beside it.

    Args:
        results: JSON files of evaluations.
        config: Settings.

    Returns:
        Rows and header of the table.

    Raises:
        DataError: If a file is missing or is no result; if the disk cannot be written.
        ConfigError: If ``config.output`` is of an unknown kind.
    """
    from dino.report import comparison

    writers = {
        ".md": comparison.markdown,
        ".tex": comparison.latex,
        ".csv": lambda found: "".join(one.to_csv() for one in found),
    }
    output = Path(config.output) if config.output else None
    if output is not None and output.suffix not in writers:
        raise ConfigError(f"expected output with the ending {', '.join(writers)}, found {output}")
    read = [read_result(path) for path in results]
    if output is not None:
        with files.oserror_to_data_error(output.parent):
            files.write_text(output, writers[output.suffix](read))
            files.write_bytes(output.with_suffix(".png"), comparison.forest_plot(read))
        progress.say(f"table: {output}, figure: {output.with_suffix('.png')}")
    return comparison.compared(read)


def _standard_errors(scores: Mapping[str, float | None], queries: int) -> dict[str, float]:
    """Binomial standard error of each accuracy; not of balanced accuracies and areas, which are no proportions."""
    return {
        name: math.sqrt(value * (1 - value) / queries)
        for name, value in scores.items()
        if name.endswith("_accuracy") and not name.endswith("_balanced_accuracy") and value is not None
    }
