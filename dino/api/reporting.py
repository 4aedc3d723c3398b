"""``report``: one HTML page on runs, and on the slides and tiles that they were trained on."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dino.api.report_data import Gathering
from dino.config.schema import ReportConfig
from dino.environment import import_extra, versions
from dino.errors import ConfigError, DataError
from dino.files import oserror_to_data_error, write_text

NAME = "report.html"


def report(
    runs: Sequence[Path],
    root: Path | None = None,
    output: Path | None = None,
    config: ReportConfig | None = None,
    *,
    own_place: Mapping[str, Any] | None = None,
    notice: str = "",
) -> Path:
    """Write a self-contained HTML page on runs of either level, finished or running, and on their data.

    Parts whose slides, tiles or checkpoints are not there are left out, with a warning and a sentence on the page. The
    runs are not changed.

    Args:
        runs: Run folders; those of one level are compared.
        root: ROOT of `dino tile`, or a folder of images; None for the data folder of the runs, if it is there.
        output: The HTML file; None for ``report.html`` in the first run, or in ROOT.
        config: Which slide and how many tiles are shown, and the device.
        own_place: Self-retrieval accuracies: :func:`dino.report.self_retrieval.measure_self_retrieval` as a dict.
        notice: A paragraph at the top of the page.

    Returns:
        The HTML file.

    Raises:
        ConfigError: If neither ROOT nor a run is given, a folder is no run, or matplotlib or jinja2 is not installed.
        DataError: If the file cannot be written.
    """
    if not (runs or root):
        raise ConfigError("expected a run or a ROOT to report on, found neither; pass at least one")
    for package in ("matplotlib", "jinja2"):
        import_extra(package, "reports")
    output = output or (runs[0] if runs else Path(root or "")) / NAME
    from dino.report.page import render
    from dino.report.sections import make_page

    with oserror_to_data_error(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise DataError(f"expected to write {output}, found no permission; name another file: OUT.html")
    with ExitStack() as stack:
        gathering = Gathering(runs, root, config or ReportConfig(), stack)
        data = gathering.data(self_retrieval=own_place, notice=notice, versions=versions())
        page = render(make_page(data))
    with oserror_to_data_error(output.parent):
        write_text(output, page)
    return output
