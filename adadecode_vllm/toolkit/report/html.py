# SPDX-License-Identifier: Apache-2.0
"""The report's page: one file, images inside, no scripts, nothing loaded from afar."""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final

from adadecode_vllm import __version__
from adadecode_vllm.toolkit.report.plots import Plot
from adadecode_vllm.toolkit.report.schema import Evaluation, Grid, History, Simulation
from adadecode_vllm.toolkit.report.text import count, decimal, percent, ratio, short

_Show = Callable[[float | None], str]

_STYLE: Final = """
:root { color-scheme: light; }
body { max-width: 46rem; margin: 0 auto; padding: 2rem 1rem 4rem; color: #222;
  background: #fff; font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 600; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.5rem 0 .5rem; }
p, figcaption { margin: .5rem 0; }
.headline { font-size: 1.15rem; }
figure { margin: .75rem 0 1.5rem; }
figcaption, caption, footer { color: #555; font-size: .9rem; text-align: left; }
img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0 1.25rem; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
caption { padding-bottom: .35rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd; }
thead th { border-bottom: 1px solid #888; font-weight: 600; vertical-align: bottom; }
th[scope="row"] { text-align: left; font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


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
    title = f"Exit heads for {evaluation.model}"
    tables = {
        "agreement": _exit_table(evaluation),
        "gates": _threshold_tables(evaluation),
        "reliability": _calibration_tables(evaluation),
        "speedup": _simulation_tables(evaluation),
        "loss": _held_out_table(history),
    }
    sections = "\n".join(_section(plot, tables[plot.name]) for plot in plots)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline(evaluation))}</p>
{_facts(evaluation)}
{sections}
<footer><p>Written by adadecode-vllm {escape(__version__)}. Agreement, coverage and
precision are measured on held-out text; speedups are predicted, not measured.</p>
</footer>
</body>
</html>
"""


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
            "No setting is predicted to be faster than ordinary decoding; the best of "
            f"the grid reaches {ratio(best.speedup)}."
        )
    return (
        f"Predicted speedup: {ratio(best.speedup)} over ordinary decoding, with "
        f"threshold {short(best.threshold)} and at most {best.cap} early predictions."
    )


def _facts(evaluation: Evaluation) -> str:
    """What was evaluated, on what, and what the speedups assume."""
    facts = [
        ("Model", f"{evaluation.model} ({evaluation.num_layers} layers)"),
        ("Heads", evaluation.heads),
        ("Exits after layers", ", ".join(str(e.layer) for e in evaluation.exits)),
        ("Held-out text", f"{evaluation.data} ({count(evaluation.tokens)} tokens)"),
    ]
    if cost := evaluation.cost:
        facts.append(
            (
                "Cost of a draft",
                f"LM head {percent(cost.head_share)}, transform "
                f"{percent(cost.transform_share)}, overhead {percent(cost.overhead)} "
                "of an ordinary step, and the layers it runs",
            )
        )
    rows = "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    return f"<dl>\n{rows}\n</dl>"


def _section(plot: Plot, tables: str) -> str:
    """A heading, the image and its tables."""
    data = base64.b64encode(plot.png).decode()
    return f"""<section>
<h2>{escape(plot.title)}</h2>
<figure>
<img alt="{escape(plot.caption)}" src="data:image/png;base64,{data}">
<figcaption>{escape(plot.caption)}</figcaption>
</figure>
{tables}
</section>"""


def _exit_table(evaluation: Evaluation) -> str:
    """Agreement and divergence of each exit."""
    return _table(
        "On held-out text, against the final layer",
        ["Exit", "Share of the layers", "Agreement, top-1", "KL, nats per token"],
        [
            [
                str(e.layer),
                percent(e.layer / evaluation.num_layers),
                percent(e.agreement),
                decimal(e.kl),
            ]
            for e in evaluation.exits
        ],
    )


def _threshold_tables(evaluation: Evaluation) -> str:
    """Coverage and precision, a row per threshold and two columns per exit."""
    exits = [e for e in evaluation.exits if e.thresholds]
    thresholds = sorted({row.threshold for e in exits for row in e.thresholds})
    by_exit = [{row.threshold: row for row in e.thresholds} for e in exits]
    rows = []
    for threshold in thresholds:
        cells = [short(threshold)]
        for figures in by_exit:
            row = figures.get(threshold)
            coverage = percent(row.coverage if row else None)
            cells.append(f"{coverage} / {percent(row.precision if row else None)}")
        rows.append(cells)
    header = ["Threshold", *(f"Exit {e.layer}" for e in exits)]
    return _folded("Figures", _table("Coverage / precision", header, rows))


def _calibration_tables(evaluation: Evaluation) -> str:
    """Calibration errors, and both gates where they are right equally often."""
    exits = [(e.layer, e.reliability) for e in evaluation.exits if e.reliability]
    parts = [
        _table(
            "Expected calibration error",
            ["Exit", "Probability", "Acceptance"],
            [
                [
                    str(layer),
                    decimal(gates.probability.ece),
                    decimal(gates.acceptance.ece if gates.acceptance else None),
                ]
                for layer, gates in exits
            ],
        )
    ]
    rows = [
        [
            percent(row.precision),
            percent(row.coverage_probability),
            percent(row.coverage_acceptance),
        ]
        for row in evaluation.equal_acceptance or []
    ]
    if rows:
        parts.append(
            _table(
                "All exits together: coverage where both gates are right equally often",
                ["Right", "Coverage, probability", "Coverage, acceptance"],
                rows,
            )
        )
    return "\n".join(parts)


def _simulation_tables(evaluation: Evaluation) -> str:
    """The simulated grids."""
    simulation = evaluation.simulation
    if simulation is None:
        return ""
    tokens = simulation.tokens_per_forward
    parts = [_grid_table("Speedup", simulation, simulation.speedup, ratio)]
    if tokens:
        parts.append(
            _grid_table("Tokens per full forward", simulation, tokens, decimal)
        )
    for name, grid in (
        ("Early predictions accepted", simulation.acceptance),
        ("Tokens predicted early", simulation.coverage),
    ):
        if grid:
            parts.append(_grid_table(name, simulation, grid, percent))
    return _folded("Figures by threshold and cap", "\n".join(parts))


def _grid_table(name: str, simulation: Simulation, grid: Grid, show: _Show) -> str:
    """One grid, thresholds down and caps across."""
    header = ["Threshold", *(f"Cap {cap}" for cap in simulation.caps)]
    rows = [
        [short(threshold), *(show(cell) for cell in row)]
        for threshold, row in zip(simulation.thresholds, grid, strict=True)
    ]
    return _table(name, header, rows)


def _held_out_table(history: History | None) -> str:
    """The last held-out figures of the training."""
    if history is None or not history.held_out:
        return ""
    last = history.held_out[-1]
    return _table(
        f"Held-out text after epoch {last.epoch}",
        ["Exit", "Loss, nats per token", "Agreement, top-1"],
        [
            [str(layer), decimal(loss), percent(last.agreement.get(layer))]
            for layer, loss in sorted(last.loss.items())
        ],
    )


def _folded(summary: str, content: str) -> str:
    """Fold long tables away; browsers do this without a script."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column heads the rows; cells are escaped."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )
