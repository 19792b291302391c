# SPDX-License-Identifier: Apache-2.0
"""What the plots of reports and of benchmarks have in common.

Figures are made without pyplot, so nothing global changes and no display is needed.
Series are told apart by marker as well as by colour. Importing this costs little:
matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from adadecode_vllm.errors import AdaDecodeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's, which every reader can tell apart, and a grey.
COLOURS: Final = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    "#555555",
)
GREY: Final = "#555555"
LIGHT_GREY: Final = "#999999"
SMALL: Final = 9  # points: legends, and titles of panels

_MARKERS: Final = "osD^vP*X"  # one more than colours: 56 different pairs
_DPI: Final = 150
_WIDTH: Final = 7.2  # inches: 1080 pixels, the width of a report's column twice over


def require_matplotlib(place: str, remedy: str) -> None:
    """Say how to get matplotlib before anything is drawn.

    Args:
        place: What asked for plots, such as a flag.
        remedy: What to do.

    Raises:
        AdaDecodeError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise AdaDecodeError(
            f"{place}: matplotlib, which draws the plots, cannot be imported "
            f"({error}); {remedy}"
        ) from error


def new_figure(
    *,
    height: float,
    rows: int = 1,
    columns: int = 1,
    height_ratios: Sequence[float] | None = None,
    share: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of the common width.

    Args:
        height: Of the whole figure, in inches.
        rows: Panels below each other.
        columns: Panels side by side.
        height_ratios: Of the rows; None for equal ones.
        share: Whether all panels have the same axes.

    Returns:
        The figure and its panels, row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=share,
        sharey=share,
        height_ratios=height_ratios,
    ).ravel()
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def series_style(rank: int, colour: Any = None) -> dict[str, Any]:
    """Style of a line.

    Args:
        rank: Its number in the figure.
        colour: Its colour; None for the next of `COLOURS`.

    Returns:
        Arguments of `Axes.plot` and `Axes.errorbar`.
    """
    return {
        "color": COLOURS[rank % len(COLOURS)] if colour is None else colour,
        "marker": _MARKERS[rank % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def legend_entries(panels: Iterable[Axes]) -> dict[str, Any]:
    """What stands in the panels, by label."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    return entries


def add_legend(figure: Figure, entries: Mapping[str, Any]) -> None:
    """Put a legend above all panels, where it hides no data.

    Args:
        figure: The figure.
        entries: Artists by label.
    """
    longest = max(map(len, entries))
    figure.legend(
        handles=list(entries.values()),
        labels=list(entries),
        loc="outside upper center",
        # About 95 characters fit across, a handle is as wide as seven.
        ncols=max(1, min(len(entries), 95 // (longest + 7))),
        frameon=False,
        fontsize=SMALL,
    )


def to_png(figure: Figure) -> bytes:
    """Render with Agg, without the version and date that would change every file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
