"""Where curves go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dino import distributed
from dino.errors import ConfigError

Tracker = Callable[[int, Mapping[str, float]], None]


def build_trackers(
    folder: Path, config: dict[str, Any], *, tensorboard: bool, wandb: bool, mlflow: bool
) -> tuple[Tracker, ...]:
    """The wanted trackers; none on processes other than the main one.

    Args:
        folder: The run folder.
        config: The resolved settings, shown beside the curves.
        tensorboard: Write event files to ``RUN/tensorboard``.
        wandb: Log to Weights & Biases.
        mlflow: Log to MLflow.

    Raises:
        ConfigError: If a wanted tracker is not installed.
    """
    if not distributed.is_main():
        return ()
    wanted = [(tensorboard, _tensorboard), (wandb, _wandb), (mlflow, _mlflow)]
    return tuple(build(folder, config) for chosen, build in wanted if chosen)


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard=true needs tensorboard: pip install tensorboard, or set logging.tensorboard=false"
        ) from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise ConfigError("logging.wandb=true needs an extra: pip install 'histodino[wandb]'") from None
    run = wandb.init(dir=str(folder), id=folder.name, resume="allow", config=config)
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _mlflow(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        import mlflow  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("logging.mlflow=true needs an extra: pip install 'histodino[mlflow]'") from None
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(config, "config.json")
    return lambda step, numbers: mlflow.log_metrics(dict(numbers), step=step)
