# SPDX-License-Identifier: Apache-2.0
"""Plots of results: ratios by batch size, threshold, cap and variant, and the time.

The parts of a bar are told apart by hatch as well as by colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adadecode_vllm.files import atomic_write
from adadecode_vllm.toolkit.plotting import (
    COLOURS,
    GREY,
    LIGHT_GREY,
    add_legend,
    legend_entries,
    new_figure,
    require_matplotlib,
    series_style,
    to_png,
)
from benchmarks.plot_cases import PlotCase, read_cases
from benchmarks.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS: Final = (  # of `time_split`, with colour and hatch
    ("segments", COLOURS[0], ""),
    ("gates", COLOURS[4], "////"),
    ("draft bookkeeping", COLOURS[3], "...."),
    ("verification", COLOURS[2], "\\\\\\\\"),
    ("rest", "#DDDDDD", ""),
)
_RATIO: Final = "speed (plain vLLM = 1)"


def draw_comparison(
    results: Sequence[Mapping[str, Any]], directory: Path
) -> list[Path]:
    """Draw everything that the results allow, as PNG files.

    Args:
        results: Contents of result files of one machine and one workload.
        directory: Where to write; made if it is not there.

    Returns:
        The files. What has no data is left out.

    Raises:
        AdaDecodeError: matplotlib is not installed.
    """
    figures = comparison_figures(results)
    directory.mkdir(parents=True, exist_ok=True)
    return [
        atomic_write(directory / f"{name}.png", to_png(figure))
        for name, figure in figures.items()
    ]


def comparison_figures(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Make the figures of :func:`draw_comparison`.

    Args:
        results: Contents of result files.

    Returns:
        The figures by file name without suffix.

    Raises:
        AdaDecodeError: matplotlib is not installed.
    """
    require_matplotlib(
        "--plots", "install adadecode-vllm with its `bench` extra, or leave --plots out"
    )
    cases = read_cases(results)
    others = [case for case in cases if case.variant != BASELINE]
    # A study's cases have figures of their own; in these they stand only if alone.
    variants = [case for case in others if not case.changed] or others
    found = {
        "speedup_by_batch": _by_batch(variants),
        "speedup_by_threshold": _by_policy(
            [case for case in others if "threshold" in case.changed],
            value=lambda case: case.threshold,
            other=lambda case: f"cap {case.cap}",
            words="threshold",
        ),
        "speedup_by_cap": _by_policy(
            [case for case in others if "max_early_predictions" in case.changed],
            value=lambda case: case.cap,
            other=lambda case: (
                "by costs"
                if case.threshold is None
                else f"threshold {case.threshold:g}"
            ),
            words="cap: most early predictions at a time",
        ),
        "cycle_time": _cycle_time(
            [case for case in variants if case.parts is not None],
            [case for case in cases if case.variant == BASELINE],
        ),
        "variants": _variants(variants),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _by_batch(cases: Sequence[PlotCase]) -> Figure | None:
    """Ratio by batch size, a line per variant."""
    sizes = sorted({case.batch_size for case in cases})
    if len(sizes) < 2:
        return None
    figure, (axes,) = new_figure(height=4.0)
    labels = list(dict.fromkeys(case.label for case in cases))
    for rank, label in enumerate(labels):
        line = sorted(
            (case for case in cases if case.label == label),
            key=lambda case: case.batch_size,
        )
        # Side by side, else the bars of several variants hide each other.
        shift = 0.04 * (rank - (len(labels) - 1) / 2)
        places = [sizes.index(case.batch_size) + shift for case in line]
        _draw_line(axes, places, line, label, rank)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size: requests at a time")
    _finish_ratios(figure, axes)
    return figure


def _by_policy(
    cases: Sequence[PlotCase],
    *,
    value: Callable[[PlotCase], float],
    other: Callable[[PlotCase], str],
    words: str,
) -> Figure | None:
    """Ratio by threshold or cap, a line per combination of everything else."""
    lines: dict[tuple[str, ...], dict[float, PlotCase]] = {}
    for case in cases:
        name = (case.variant, other(case), f"batch {case.batch_size}")
        lines.setdefault(name, {})[value(case)] = case
    lines = {key: line for key, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    # The legend tells only what differs.
    differs = [len(set(part)) > 1 for part in zip(*lines, strict=True)]
    figure, (axes,) = new_figure(height=4.0)
    for rank, (key, line) in enumerate(lines.items()):
        parts = [
            part for part, differ in zip(key, differs, strict=True) if differ
        ] or key[:2]
        values = sorted(line)
        _draw_line(
            axes, values, [line[number] for number in values], ", ".join(parts), rank
        )
    ticks = sorted({number for line in lines.values() for number in line})
    if len(ticks) <= 12 and all(isinstance(tick, int) for tick in ticks):
        axes.set_xticks(ticks)
    axes.set_xlabel(words)
    _finish_ratios(figure, axes)
    return figure


def _cycle_time(
    cases: Sequence[PlotCase], baselines: Sequence[PlotCase]
) -> Figure | None:
    """Milliseconds per generated token by part of the cycle, a panel per batch size."""
    from matplotlib.patches import Patch

    if not cases:
        return None
    panels: list[list[PlotCase]] = []
    for size in sorted({case.batch_size for case in cases}):
        # Drawn from below; the baseline stands on top.
        panels.append(
            [case for case in cases if case.batch_size == size][::-1]
            + [case for case in baselines if case.batch_size == size]
        )
    bars = [len(panel) for panel in panels]
    height = 0.9 + 0.36 * sum(bars) + 0.75 * len(panels)
    figure, all_axes = new_figure(rows=len(bars), height_ratios=bars, height=height)
    for axes, panel in zip(all_axes, panels, strict=True):
        for place, case in enumerate(panel):
            parts = case.parts or {BASELINE: case.milliseconds}
            left = 0.0
            for part, milliseconds in parts.items():
                axes.barh(place, milliseconds, 0.7, left, **_part_style(part))
                left += milliseconds
            axes.annotate(
                f"{left:.1f}" if left >= 10 else f"{left:.2f}",
                (left, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(panel)), [case.label for case in panel])
        axes.set_ylim(-0.6, len(panel) - 0.4)
        axes.margins(x=0.1)  # room for the number at the longest bar's end
        axes.grid(visible=False, axis="y")
        if len(panels) > 1:
            axes.set_title(f"batch {panel[0].batch_size}", loc="left", fontsize=10)
    all_axes[-1].set_xlabel("milliseconds per generated token")
    names = [name for name, _, _ in _PARTS]
    if any(not case.parts for panel in panels for case in panel):
        names.append(BASELINE)
    labels = {BASELINE: "plain vLLM"}
    add_legend(
        figure,
        {labels.get(name, name): Patch(**_part_style(name)) for name in names},
    )
    return figure


def _variants(cases: Sequence[PlotCase]) -> Figure | None:
    """Ratio of every variant at every batch size, as bars."""
    if not cases:
        return None
    sizes = sorted({case.batch_size for case in cases})
    return bars(
        {
            f"batch {size}": [case for case in cases if case.batch_size == size]
            for size in sizes
        },
        list(dict.fromkeys(case.label for case in cases)),
    )


def bars(
    groups: Mapping[str, Sequence[PlotCase]], labels: Sequence[str] | None = None
) -> Figure:
    """Ratios as bars, those of one label beside each other.

    Args:
        groups: Cases, one of a label each, by what the legend calls them.
        labels: The labels from top to bottom; None for the order of the cases.

    Returns:
        The figure.
    """
    import matplotlib

    every = [case for group in groups.values() for case in group]
    if labels is None:
        labels = list(dict.fromkeys(case.label for case in every))
    figure, (axes,) = new_figure(height=1.1 + len(labels) * (0.12 + 0.2 * len(groups)))
    viridis = matplotlib.colormaps["viridis"]
    thickness = 0.84 / len(groups)
    for rank, (name, row) in enumerate(groups.items()):
        places = [
            labels.index(case.label) + thickness * (rank - (len(groups) - 1) / 2)
            for case in row
        ]
        axes.barh(
            places,
            [case.ratio["median"] for case in row],
            0.9 * thickness,
            xerr=_errors(row),
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "black"},
            color=viridis(0.4 + 0.5 * rank / max(1, len(groups) - 1)),
            label=name,
        )
        for place, case in zip(places, row, strict=True):
            axes.annotate(
                f"{case.ratio['median']:.2f}",
                (case.ratio["max"], place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                # Numbers just below 1 would else be struck out by the line there.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)  # the first variant on top
    axes.set_xlim(0, 1.1 * max(1.0, *(case.ratio["max"] for case in every)))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(_RATIO)
    add_legend(figure, legend_entries([axes]))
    return figure


def _draw_line(
    axes: Axes, places: Sequence[float], line: Sequence[PlotCase], label: str, rank: int
) -> None:
    axes.errorbar(
        places,
        [case.ratio["median"] for case in line],
        yerr=_errors(line),
        label=label,
        elinewidth=1,
        capsize=3,
        **series_style(rank),
    )


def _errors(cases: Sequence[PlotCase]) -> list[list[float]]:
    """Distances from the median to the smallest and the largest."""
    ratios = [case.ratio for case in cases]
    return [
        [ratio["median"] - ratio["min"] for ratio in ratios],
        [ratio["max"] - ratio["median"] for ratio in ratios],
    ]


def _finish_ratios(figure: Figure, axes: Axes) -> None:
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--", label="plain vLLM")
    # From zero, so that twice as high is twice as fast.
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_ylabel(_RATIO)
    add_legend(figure, legend_entries([axes]))


def _part_style(part: str) -> dict[str, Any]:
    styles = {name: (colour, hatch) for name, colour, hatch in _PARTS}
    colour, hatch = styles.get(part, (LIGHT_GREY, ""))
    return {
        "facecolor": colour,
        "hatch": hatch,
        "edgecolor": "white",
        "linewidth": 0.5,
    }
