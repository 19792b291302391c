# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/results.md: speed by task, and agreement by training tokens.

    python benchmarks/task_plots.py docs/images \
        --task GSM8K=benchmarks/results/smollm2_paper_gsm8k_bfloat16.json \
        --task HumanEval=benchmarks/results/smollm2_paper_humaneval_bfloat16.json \
        --task XSum=benchmarks/results/smollm2_paper_xsum_bfloat16.json \
        --growth benchmarks/results/smollm2_growth.json

Files of different tasks stand beside each other here, never in one ratio.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adadecode_vllm.files import atomic_write
from adadecode_vllm.toolkit.plotting import (
    add_legend,
    legend_entries,
    new_figure,
    require_matplotlib,
    series_style,
    to_png,
)
from benchmarks.options import run_command
from benchmarks.plot_cases import read_cases
from benchmarks.plots import bars
from benchmarks.result_files import read_results
from benchmarks.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(
    directory: Annotated[Path, typer.Argument(help="Where to write PNG files")],
    task: Annotated[list[str], typer.Option(help="NAME=FILE, a comparison's result")],
    growth: Annotated[Path, typer.Option(help="Agreement by training tokens")],
) -> None:
    """Draw both."""
    require_matplotlib("task_plots", "install adadecode-vllm with its `bench` extra")
    results = {}
    for text in task:
        name, _, path = text.partition("=")
        (results[name],) = read_results([Path(path)])
    rows = json.loads(growth.read_text(encoding="utf-8"))["rows"]
    figures = {
        "speedup_by_task": speedup_by_task(results),
        "agreement_by_tokens": agreement_by_tokens(rows),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        written = atomic_write(directory / f"{file}.png", to_png(figure))
        typer.echo(f"wrote {written}", err=True)


def speedup_by_task(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Ratio of every variant on every task, as bars.

    Args:
        results: Contents of a result file by task.
    """
    return bars(
        {
            task: [case for case in read_cases([result]) if case.variant != BASELINE]
            for task, result in results.items()
        }
    )


def agreement_by_tokens(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How often exits are right by training tokens: a panel a test, a line an exit.

    Args:
        rows: Heads with their ``tokens`` and ``tests``; those that were trained on the
            same mixture are drawn.
    """
    mixed = sorted(
        (row for row in rows if row["heads"] == "mixed"),
        key=lambda row: row["tokens"]["training"],
    )
    tokens = [row["tokens"]["training"] / 1000 for row in mixed]
    tests = list(mixed[0]["tests"])
    figure, panels = new_figure(height=3.2, columns=len(tests), share=True)
    for axes, test in zip(panels, tests, strict=True):
        exits = [row["tests"][test]["exits"] for row in mixed]
        for rank, one in enumerate(exits[0]):
            values = [100 * found[rank]["agreement"] for found in exits]
            label = f"after {one['layer']} layers"
            axes.plot(tokens, values, label=label, **series_style(rank))
        axes.set_title({"gsm8k": "GSM8K", "humaneval": "HumanEval"}.get(test, test))
        axes.set_xlabel("training tokens, thousands")
        axes.set_ylim(0, 60)
        axes.set_xlim(0)
    panels[0].set_ylabel("agreement, %")
    add_legend(figure, legend_entries(panels))
    return figure


if __name__ == "__main__":
    run_command(partial(typer.run, main))
