# SPDX-License-Identifier: Apache-2.0
"""The report's page: one file, images inside, no scripts, nothing loaded from afar."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adadecode_vllm import __version__
from adadecode_vllm.toolkit.report.defaults import defaults_in_words
from adadecode_vllm.toolkit.report.plot import Plot
from adadecode_vllm.toolkit.report.schema import Evaluation, History
from adadecode_vllm.toolkit.report.text import (
    among,
    count,
    decimal,
    percent,
    ratio,
    short,
)


def render_page(
    evaluation: Evaluation, history: History | None, plots: Sequence[Plot]
) -> str:
    """Render the page.

    Args:
        evaluation: Figures on held-out text.
        history: Of the training, if it is known.
        plots: To show, each under its title.

    Returns:
        A whole HTML document. Every string from the figures is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        base64=_base64, count=count, decimal=decimal, percent=percent, short=short
    )
    page = environment.get_template("page.html.j2").render(
        title=f"Exit heads for {evaluation.model}",
        headline=headline(evaluation),
        among=among,
        by_default=defaults_in_words(evaluation.defaults),
        evaluation=evaluation,
        last_held_out=history.held_out[-1] if history and history.held_out else None,
        plots=plots,
        version=__version__,
        **_gate_table(evaluation),
        **_grid_tables(evaluation),
    )
    return page.lstrip() + "\n"


def headline(evaluation: Evaluation) -> str:
    """Say in a sentence what speed to expect.

    Args:
        evaluation: Figures on held-out text.

    Returns:
        Plain text.
    """
    best = evaluation.best
    if best is None:
        return "No speed was predicted."
    if best.speedup <= 1:
        return (
            "No setting is predicted to be faster than plain decoding; the best of "
            f"the grid reaches {ratio(best.speedup)}."
        )
    return (
        f"Predicted speedup: {ratio(best.speedup)} over plain decoding, with "
        f"threshold {short(best.threshold)} and at most {best.cap} early predictions."
    )


def _base64(data: bytes) -> str:
    """Bytes as they stand in a `data:` address."""
    return base64.b64encode(data).decode()


def _gate_table(evaluation: Evaluation) -> dict[str, Any]:
    """Coverage and precision, a row per threshold and a column per exit."""
    exits = [e for e in evaluation.exits if e.thresholds]
    by_exit = [{row.threshold: row for row in e.thresholds} for e in exits]

    def cell(threshold: float, rows: dict[float, Any]) -> str:
        row = rows.get(threshold)
        coverage, precision = (row.coverage, row.precision) if row else (None, None)
        return f"{percent(coverage)} / {percent(precision)}"

    thresholds = {threshold for rows in by_exit for threshold in rows}
    return {
        "gate_header": ["Threshold", *(f"Exit {e.layer}" for e in exits)],
        "gate_rows": [
            (threshold, [cell(threshold, rows) for rows in by_exit])
            for threshold in sorted(thresholds)
        ],
    }


def _grid_tables(evaluation: Evaluation) -> dict[str, Any]:
    """The simulated grids, a row per threshold and a column per cap."""
    simulation = evaluation.simulation
    if simulation is None:
        return {}
    grids = [
        ("Speedup", simulation.speedup, ratio),
        ("Tokens per full forward", simulation.tokens_per_forward, decimal),
        ("Early predictions accepted", simulation.acceptance, percent),
        ("Tokens predicted early", simulation.coverage, percent),
    ]
    return {
        "grid_header": ["Threshold", *(f"Cap {cap}" for cap in simulation.caps)],
        "grids": [
            (
                caption,
                [
                    (threshold, [show(cell) for cell in row])
                    for threshold, row in zip(simulation.thresholds, grid, strict=True)
                ],
            )
            for caption, grid, show in grids
            if grid
        ],
    }
