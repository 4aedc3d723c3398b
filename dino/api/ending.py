"""What follows a run: its summary in the terminal, and its report."""

import time
from pathlib import Path

from dino import progress
from dino.config.schema import PretrainConfig, ReportConfig
from dino.errors import ConfigError
from dino.files import printable
from dino.report.terminal import next_commands, run_panel
from dino.train.run_folder import RunReader


def show_summary(run: RunReader, config: PretrainConfig) -> None:
    """Show the results of a complete run, and commands that use it.

    Args:
        run: Its folder.
        config: Its settings.
    """
    progress.show(run_panel(run, config))
    for command in next_commands(run.path, config):
        progress.say(f"next: {command}")


def write_report(folder: Path, config: PretrainConfig) -> None:
    """Write ``report.html`` of a run that has just ended; a failure is a warning.

    Args:
        folder: The run folder.
        config: Its settings.
    """
    start = time.monotonic()
    try:
        from dino.api.reporting import report

        path = report([folder], config=ReportConfig(device=config.speed.device))
    except ConfigError as error:  # matplotlib is not installed
        progress.say(f"no report: {error}")
    except Exception as error:  # nothing that goes wrong here may fail a finished run
        progress.warn(f"no report: {type(error).__name__}: {error}")
    else:
        progress.say(f"report: {printable(path)} ({time.monotonic() - start:.0f} s)")
