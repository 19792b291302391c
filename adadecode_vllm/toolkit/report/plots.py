# SPDX-License-Identifier: Apache-2.0
"""The report's plots, as PNG bytes.

Exits are told apart by marker as well as by colour, from one ordered map that every
reader can see (viridis, without its light end); the gates by colour, marker and dash.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from adadecode_vllm.toolkit.plotting import (
    COLOURS,
    GREY,
    LIGHT_GREY,
    SMALL,
    add_legend,
    legend_entries,
    new_figure,
    require_matplotlib,
    series_style,
    to_png,
)
from adadecode_vllm.toolkit.report.heat_map import draw_speedup
from adadecode_vllm.toolkit.report.plot import Plot, missing_as_nan
from adadecode_vllm.toolkit.report.schema import Evaluation, History, Reliability
from adadecode_vllm.toolkit.report.text import among, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GATES: Final = (  # attribute, label, colour, marker, line
    ("probability", "probability", COLOURS[0], "o", "-"),
    ("acceptance", "acceptance (calibrated)", COLOURS[1], "s", "--"),
)


def draw_plots(evaluation: Evaluation, history: History | None) -> list[Plot]:
    """Draw everything that the figures allow.

    Args:
        evaluation: Figures on held-out text.
        history: Of the training, if it is known.

    Returns:
        The plots in the order of the report. What has no data is left out.

    Raises:
        AdaDecodeError: matplotlib is not installed.
    """
    require_plots()
    plots = [_agreement(evaluation)]
    if any(figures.thresholds for figures in evaluation.exits):
        plots.append(_gates(evaluation))
    if any(figures.reliability for figures in evaluation.exits):
        plots.append(_reliability(evaluation))
    if evaluation.simulation:
        plots.append(draw_speedup(evaluation.simulation))
    if history and history.steps:
        plots.append(_loss(history))
    return plots


def require_plots() -> None:
    """Say how to get what the plots need before anything is measured.

    Raises:
        AdaDecodeError: matplotlib is not installed.
    """
    require_matplotlib("report", "install adadecode-vllm with its `train` extra")


def _agreement(evaluation: Evaluation) -> Plot:
    """Top-1 agreement with the final layer, by depth of the exit."""
    figure, (axes,) = new_figure(height=3.4)
    exits = sorted(evaluation.exits, key=lambda figures: figures.layer)
    layers = [figures.layer for figures in exits]
    shares = [figures.agreement for figures in exits]
    axes.plot(layers, shares, color=GREY, linewidth=1, zorder=1)
    crowded = len(exits) > 10
    for layer, share, style in zip(layers, shares, _styles(layers), strict=True):
        axes.plot(layer, share, **style | {"markersize": 8, "linestyle": "none"})
        if not crowded:
            axes.annotate(
                percent(share),
                (layer, share),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
            )
    axes.set_xlim(0, evaluation.num_layers)
    axes.set_xlabel(f"exit after this many of {evaluation.num_layers} layers")
    axes.set_ylabel("tokens with the final\nlayer's top token")
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _percent_axis(axes)
    if not crowded:
        axes.set_xticks([0, *layers, evaluation.num_layers])
    return Plot(
        "agreement",
        "Agreement by exit layer",
        "Share of held-out tokens at which the exit's top token is the final layer's. "
        "The deeper the exit, the more it knows and the less it saves.",
        to_png(figure),
    )


def _gates(evaluation: Evaluation) -> Plot:
    """Coverage and precision by threshold, a line per exit."""
    figure, (left, right) = new_figure(columns=2, height=3.6)
    exits = [figures for figures in evaluation.exits if figures.thresholds]
    layers = [figures.layer for figures in exits]
    lowest = 1.0
    for figures, style in zip(exits, _styles(layers), strict=True):
        rows = sorted(figures.thresholds, key=lambda row: row.threshold)
        thresholds = [row.threshold for row in rows]
        label = f"exit {figures.layer}"
        left.plot(thresholds, [row.coverage for row in rows], label=label, **style)
        precision = [missing_as_nan(row.precision) for row in rows]
        right.plot(thresholds, precision, label=label, **style)
        lowest = min([lowest, *(value for value in precision if value == value)])
    left.set_ylabel("coverage: tokens predicted early")
    left.set_ylim(0, 1.02)
    right.set_ylabel("precision: of those, right")
    # Precision lives near 1; the axis starts at the 5 % below the lowest of it.
    right.set_ylim(max(0.0, math.floor(20 * lowest - 0.5) / 20), 1.005)
    for axes in (left, right):
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("threshold")
        _percent_axis(axes)
    add_legend(figure, legend_entries([left]))
    return Plot(
        "gates",
        "Coverage and precision by threshold",
        "Left: share of the tokens at which the head's top probability exceeds the "
        "threshold. Right: share of those at which its token is the final layer's.",
        to_png(figure),
    )


def _reliability(evaluation: Evaluation) -> Plot:
    """Reliability diagrams, a panel per exit."""
    exits = [figures for figures in evaluation.exits if figures.reliability]
    columns = min(3, len(exits))
    rows = math.ceil(len(exits) / columns)
    figure, panels = new_figure(
        rows=rows, columns=columns, height=0.9 + 2.1 * rows, share=True
    )
    for panel, figures in zip(panels, exits, strict=False):
        panel.plot([0, 1], [0, 1], color=LIGHT_GREY, linewidth=1, linestyle=":")
        eces = []
        for name, label, colour, marker, line in _GATES:
            reliability: Reliability | None = getattr(figures.reliability, name)
            if reliability is None:
                continue
            eces.append(f"{reliability.ece:.3f}")
            filled = [
                b
                for b in reliability.bins
                if b.count and b.confidence is not None and b.accuracy is not None
            ]
            confidence = [missing_as_nan(b.confidence) for b in filled]
            accuracy = [missing_as_nan(b.accuracy) for b in filled]
            panel.plot(
                confidence,
                accuracy,
                line,
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1.2,
                label=label,
            )
            total = sum(b.count for b in filled) or 1
            # By the root: else one bin of most tokens leaves the others without size.
            sizes = [120 * math.sqrt(b.count / total) for b in filled]
            panel.scatter(
                confidence, accuracy, sizes, color=colour, marker=marker, alpha=0.6
            )
        panel.set_title(
            f"exit {figures.layer}   ECE {' / '.join(eces)}", fontsize=SMALL
        )
        panel.set_xlim(0, 1.05)  # room for the marks at 1
        panel.set_ylim(0, 1.05)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    for panel in panels[len(exits) :]:
        panel.set_axis_off()
    for index, panel in enumerate(panels[: len(exits)]):
        if index % columns == 0:
            panel.set_ylabel("share right, %")
        if index + columns >= len(exits):
            panel.set_xlabel("gate's value, %")
            panel.tick_params(labelbottom=True)
    add_legend(figure, legend_entries(panels[: len(exits)]))
    calibrated = any(f.reliability and f.reliability.acceptance for f in exits)
    return Plot(
        "reliability",
        "Reliability of the gates",
        "On the dotted line a gate means what it says; above it, it is too modest. "
        "Larger marks stand for more tokens. ECE: expected calibration error"
        + (", probability / acceptance." if calibrated else "."),
        to_png(figure),
    )


def _loss(history: History) -> Plot:
    """Training and held-out loss by step, and held-out agreement by epoch."""
    layers = sorted({layer for step in history.steps for layer in step.loss})
    last_step = {step.epoch: step.step for step in history.steps}
    held_out = [point for point in history.held_out if point.epoch in last_step]
    with_agreement = any(point.agreement for point in held_out)
    figure, panels = new_figure(columns=2 if with_agreement else 1, height=3.6)
    losses = panels[0]
    everything = []
    for layer, style in zip(layers, _styles(layers), strict=True):
        label = f"exit {layer}"
        values = [step.loss.get(layer, math.nan) for step in history.steps]
        losses.plot(
            [step.step for step in history.steps],
            values,
            color=style["color"],
            linewidth=1,
            alpha=0.4 if held_out else 1,
            label=None if held_out else label,
        )
        steps = [last_step[point.epoch] for point in held_out]
        if held_out:
            tested = [point.loss.get(layer, math.nan) for point in held_out]
            losses.plot(steps, tested, label=label, **style)
            values = values + tested
        if with_agreement:
            shares = [point.agreement.get(layer, math.nan) for point in held_out]
            panels[1].plot(steps, shares, label=label, **style)
        everything += values
    if all(value > 0 for value in everything if value == value):
        losses.set_yscale("log")
    losses.set_ylabel("loss, nats per token")
    add_legend(figure, legend_entries([losses]))
    if with_agreement:
        panels[1].set_ylabel("held-out agreement, top-1")
        _percent_axis(panels[1])
    for panel in panels:
        panel.set_xlabel("optimizer step")
    caption = "Training loss by exit."
    if held_out:
        caption = (
            "Loss by exit: thin lines are training batches, marks are held-out text "
            "after each epoch."
        )
        if few := among(held_out[-1].draft_vocabulary):
            caption += f" Agreement is that of the top tokens{few}."
    return Plot("loss", "Training", caption, to_png(figure))


def _styles(layers: Sequence[int]) -> list[dict[str, Any]]:
    """A colour and a marker per exit, the shallow ones dark."""
    import matplotlib

    viridis = matplotlib.colormaps["viridis"]
    last = max(1, len(layers) - 1)
    return [
        series_style(rank, viridis(0.76 * rank / last)) for rank in range(len(layers))
    ]


def _percent_axis(axes: "Axes") -> None:
    """Label the vertical axis in percent, with the decimals that its ticks need."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
