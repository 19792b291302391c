# SPDX-License-Identifier: Apache-2.0
"""Writing a report: the plots and the page."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from adadecode_vllm.files import atomic_write
from adadecode_vllm.toolkit.report.html import render_page
from adadecode_vllm.toolkit.report.plots import draw_plots
from adadecode_vllm.toolkit.report.schema import parse_evaluation, parse_history

PAGE_FILE = "report.html"
#: All that a report may consist of.
REPORT_FILES = (
    *(f"{name}.png" for name in ("agreement", "gates", "reliability", "speedup")),
    "loss.png",
    PAGE_FILE,
)


def write_report(
    directory: str | PathLike[str],
    evaluation: Mapping[str, Any],
    history: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the plots and one page that holds them.

    Everything is drawn before the first file is written, each file is renamed into
    place, and the page comes last: a page that is there is whole.

    Args:
        directory: Created with its parents if missing; files of the same names are
            replaced.
        evaluation: `evaluation.json`, decoded.
        history: `history.json`, decoded, if the training is known.

    Returns:
        The files: `agreement.png`, then `gates.png`, `reliability.png`, `speedup.png`
        and `loss.png` as far as there is data for them, and `report.html`.

    Raises:
        AdaDecodeError: The figures are incomplete, or matplotlib is not installed.
        OSError: A file cannot be written.
    """
    figures = parse_evaluation(evaluation)
    training = None if history is None else parse_history(history)
    plots = draw_plots(figures, training)
    page = render_page(figures, training, plots)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = [atomic_write(directory / f"{plot.name}.png", plot.png) for plot in plots]
    return [*written, atomic_write(directory / PAGE_FILE, page.encode())]
