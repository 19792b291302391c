# SPDX-License-Identifier: Apache-2.0
"""One table, and plots, of result files that were measured on one machine.

    python benchmarks/report.py benchmarks/results/study_*.json --plots PLOTS

Results of different machines or of other prompts are refused: their ratios may be
compared by people who know why, not by standing in one table.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.options import run_command
from benchmarks.result_files import read_results
from benchmarks.tables import results_table


def main(
    files: Annotated[list[Path], typer.Argument(help="What --output-json wrote")],
    plots: Annotated[Path | None, typer.Option(help="Directory for PNG files")] = None,
) -> None:
    """Print the table as Markdown."""
    results = read_results(files)
    if plots is not None:
        from benchmarks.plots import draw_comparison

        for path in draw_comparison(results, plots):
            typer.echo(f"wrote {path}", err=True)
    typer.echo(results_table(results))


if __name__ == "__main__":
    run_command(partial(typer.run, main))
