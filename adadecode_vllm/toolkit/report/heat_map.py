# SPDX-License-Identifier: Apache-2.0
"""The report's heat map: predicted speedup by threshold and cap."""

import math

from adadecode_vllm.toolkit.plotting import new_figure, to_png
from adadecode_vllm.toolkit.report.plot import Plot, missing_as_nan
from adadecode_vllm.toolkit.report.schema import Simulation
from adadecode_vllm.toolkit.report.text import conditions, short


def draw_speedup(simulation: Simulation) -> Plot:
    """Draw the predicted speedup.

    Args:
        simulation: The grid of thresholds and caps.

    Returns:
        A heat map with the numbers in its cells and a frame around the fastest.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    grid = [[missing_as_nan(cell) for cell in row] for row in simulation.speedup]
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
    figure, (axes,) = new_figure(height=1.3 + 0.36 * rows)
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
    bar.set_label("speedup (plain decoding = 1)")
    if lowest < highest:
        bar.ax.set_ylim(lowest, highest)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return Plot(
        "speedup",
        "Predicted speedup",
        "Simulated on held-out text, priced by the cost formula for "
        f"{conditions(simulation.requests, simulation.row_costs)}. Purple is faster "
        "than plain decoding, orange slower; the frame marks the fastest cell.",
        to_png(figure),
    )
