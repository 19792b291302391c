# SPDX-License-Identifier: Apache-2.0
"""The report's plots, as PNG bytes.

Figures are made without pyplot, so nothing global changes and no display is needed.
Exits are told apart by marker as well as by colour, from one ordered map that every
reader can see (viridis, without its light end); the gates by colour, marker and dash.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.report.schema import (
    Evaluation,
    History,
    Reliability,
    Simulation,
)
from adadecode_vllm.toolkit.report.text import percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI: Final = 150
_WIDTH: Final = 7.2  # inches: 1080 pixels, the width of the page's column twice over
_MARKERS: Final = "osD^vP*X"
_GATES: Final = (  # attribute, label, colour (Okabe and Ito's), marker, line
    ("probability", "probability", "#0072B2", "o", "-"),
    ("acceptance", "acceptance (calibrated)", "#D55E00", "s", "--"),
)


@dataclass(frozen=True)
class Plot:
    """A plot, ready for a file or a page.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: What is seen, in one or two sentences; also the alternative text.
        png: The file's content.
    """

    name: str
    title: str
    caption: str
    png: bytes


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
    require_matplotlib()
    plots = [_agreement(evaluation)]
    if any(figures.thresholds for figures in evaluation.exits):
        plots.append(_gates(evaluation))
    if any(figures.reliability for figures in evaluation.exits):
        plots.append(_reliability(evaluation))
    if evaluation.simulation:
        plots.append(_speedup(evaluation.simulation))
    if history and history.steps:
        plots.append(_loss(history))
    return plots


def require_matplotlib() -> None:
    """Say how to get matplotlib before anything is drawn.

    Raises:
        AdaDecodeError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise AdaDecodeError(
            f"report: the plots need matplotlib, which cannot be imported ({error}); "
            "install adadecode-vllm with its `train` extra"
        ) from error


def _agreement(evaluation: Evaluation) -> Plot:
    """Top-1 agreement with the final layer, by depth of the exit."""
    figure, (axes,) = _figure(1, height=3.4)
    exits = sorted(evaluation.exits, key=lambda figures: figures.layer)
    layers = [figures.layer for figures in exits]
    shares = [figures.agreement for figures in exits]
    axes.plot(layers, shares, color="#555555", linewidth=1, zorder=1)
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
        _png(figure),
    )


def _gates(evaluation: Evaluation) -> Plot:
    """Coverage and precision by threshold, a line per exit."""
    figure, (left, right) = _figure(2, height=3.6)
    exits = [figures for figures in evaluation.exits if figures.thresholds]
    layers = [figures.layer for figures in exits]
    lowest = 1.0
    for figures, style in zip(exits, _styles(layers), strict=True):
        rows = sorted(figures.thresholds, key=lambda row: row.threshold)
        thresholds = [row.threshold for row in rows]
        label = f"exit {figures.layer}"
        left.plot(thresholds, [row.coverage for row in rows], label=label, **style)
        precision = [_value(row.precision) for row in rows]
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
    _shared_legend(figure, [left])
    return Plot(
        "gates",
        "Coverage and precision by threshold",
        "Left: share of the tokens at which the head's top probability exceeds the "
        "threshold. Right: share of those at which its token is the final layer's.",
        _png(figure),
    )


def _reliability(evaluation: Evaluation) -> Plot:
    """Reliability diagrams, a panel per exit."""
    exits = [figures for figures in evaluation.exits if figures.reliability]
    columns = min(3, len(exits))
    rows = math.ceil(len(exits) / columns)
    figure, panels = _figure(columns, rows=rows, height=0.9 + 2.1 * rows, share=True)
    for panel, figures in zip(panels, exits, strict=False):
        panel.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
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
            confidence = [_value(b.confidence) for b in filled]
            accuracy = [_value(b.accuracy) for b in filled]
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
        panel.set_title(f"exit {figures.layer}   ECE {' / '.join(eces)}", fontsize=9)
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
    _shared_legend(figure, panels[: len(exits)])
    calibrated = any(f.reliability and f.reliability.acceptance for f in exits)
    return Plot(
        "reliability",
        "Reliability of the gates",
        "On the dotted line a gate means what it says; above it, it is too modest. "
        "Larger marks stand for more tokens. ECE: expected calibration error"
        + (", probability / acceptance." if calibrated else "."),
        _png(figure),
    )


def _speedup(simulation: Simulation) -> Plot:
    """Predicted speedup over the grid of thresholds and caps."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    grid = [[_value(cell) for cell in row] for row in simulation.speedup]
    rows, columns = len(grid), len(grid[0])
    known = [
        (value, row, column)
        for row, values in enumerate(grid)
        for column, value in enumerate(values)
        if value > 0
    ]
    lowest = min([1.0, *(value for value, _, _ in known)])
    highest = max([1.0, *(value for value, _, _ in known)])
    # Of ratios, so that twice as fast and half as fast look equally strong.
    reach = max(1.05, highest, 1 / lowest)
    colours = matplotlib.colormaps["PuOr"]
    figure, (axes,) = _figure(1, height=1.3 + 0.36 * rows)
    axes.grid(visible=False)
    image = axes.imshow(
        grid,
        cmap=colours,
        norm=LogNorm(1 / reach, reach),
        origin="lower",
        aspect="auto",
    )
    for value, row, column in known:
        place = 0.5 + 0.5 * math.log(value) / math.log(reach)
        red, green, blue, _ = colours(place)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9 if columns <= 10 else 7,
            color="white" if dark else "black",
        )
    if known:
        _, row, column = max(known)
        for colour, width in (("black", 5.0), ("white", 2.0)):  # seen on any cell
            axes.add_patch(
                Rectangle(
                    (column - 0.46, row - 0.42),
                    0.92,
                    0.84,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                )
            )
    axes.set_xticks(range(columns), [str(cap) for cap in simulation.caps])
    axes.set_yticks(range(rows), [short(value) for value in simulation.thresholds])
    axes.tick_params(length=0)
    axes.set_xlabel("cap: most early predictions at a time")
    axes.set_ylabel(f"threshold on the {simulation.gate}")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("speedup (ordinary decoding = 1)")
    if lowest < highest:
        bar.ax.set_ylim(lowest, highest)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return Plot(
        "speedup",
        "Predicted speedup",
        "Simulated on held-out text, priced by the cost formula. Purple is faster than "
        "ordinary decoding, orange slower; the frame marks the fastest cell.",
        _png(figure),
    )


def _loss(history: History) -> Plot:
    """Training and held-out loss by step, and held-out agreement by epoch."""
    layers = sorted({layer for step in history.steps for layer in step.loss})
    last_step = {step.epoch: step.step for step in history.steps}
    held_out = [point for point in history.held_out if point.epoch in last_step]
    with_agreement = any(point.agreement for point in held_out)
    figure, panels = _figure(2 if with_agreement else 1, height=3.6)
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
    _shared_legend(figure, [losses])
    if with_agreement:
        panels[1].set_ylabel("held-out agreement, top-1")
        _percent_axis(panels[1])
    for panel in panels:
        panel.set_xlabel("optimizer step")
    return Plot(
        "loss",
        "Training",
        "Loss by exit: thin lines are training batches, marks are held-out text after "
        "each epoch."
        if held_out
        else "Training loss by exit.",
        _png(figure),
    )


def _figure(
    columns: int,
    *,
    height: float,
    rows: int = 1,
    share: bool = False,
) -> tuple["Figure", list["Axes"]]:
    """Make a figure of the page's width; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(
        rows, columns, squeeze=False, sharex=share, sharey=share
    ).ravel()
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _styles(layers: Sequence[int]) -> list[dict[str, Any]]:
    """A colour and a marker per exit, the shallow ones dark."""
    import matplotlib

    viridis = matplotlib.colormaps["viridis"]
    last = max(1, len(layers) - 1)
    return [
        {
            "color": viridis(0.76 * rank / last),
            "marker": _MARKERS[rank % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.5,
        }
        for rank in range(len(layers))
    ]


def _percent_axis(axes: "Axes") -> None:
    """Label the vertical axis in percent, with the decimals that its ticks need."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def _shared_legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """One legend above all panels, where it hides no data; each label once."""
    found: dict[Any, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        handles=list(found.values()),
        labels=list(found),
        loc="outside upper center",
        ncols=min(7, len(found)),
        frameon=False,
        fontsize=9,
    )


def _png(figure: "Figure") -> bytes:
    """Render with Agg, without the version and date that would change every file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _value(value: float | None) -> float:
    """NaN for a missing value: matplotlib leaves a gap there."""
    return math.nan if value is None else value
