# SPDX-License-Identifier: Apache-2.0
"""Plots of the benchmarks: what is drawn, from which numbers, into which files."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.plots import comparison_figures, draw_comparison
from benchmarks.result_files import read_results
from benchmarks.task_plots import agreement_by_tokens, speedup_by_task
from tests.harness import ROOT

pytest.importorskip("matplotlib")

RESULTS = ROOT / "benchmarks" / "results"

SPEEDS = {
    "baseline": 1.0,
    "installed": 0.99,
    "adadecode": 1.94,
    "threshold-1": 0.95,
    "single-exit:4": 1.52,
    "t-identity": 0.81,
    "ngram": 1.18,
    "draft-model": 1.33,
    "transformers": 0.36,
    "transformers-early-exit": 0.29,
}
EARLY = ("adadecode", "single-exit:4", "t-identity", "threshold-1")
PARTS = ("segments", "gates", "draft bookkeeping", "verification", "rest")


def case(variant: str, batch_size: int = 1, **policy: float) -> dict[str, Any]:
    """A case as the comparison writes it, with made-up figures."""
    median = 1 + (SPEEDS[variant] - 1) / batch_size**0.4
    median -= abs(policy.get("threshold", 0.62) - 0.62)
    median += 0.1 * (policy.get("max_early_predictions", 5) - 5)
    noise = random.Random(f"{variant} {batch_size} {policy}")
    low, high = noise.uniform(0.01, 0.12), noise.uniform(0.01, 0.08)
    if variant == "baseline":
        low = high = 0
    seconds, tokens = 18 / median / batch_size**0.8, 900
    split = None
    if variant in EARLY:
        shares = (0.34, 0.08, 0.06, 0.4, 0.12)
        split = {
            part: share * seconds for part, share in zip(PARTS, shares, strict=True)
        }
    names = {"threshold": "threshold", "max_early_predictions": "cap"}
    changes = [f"{names[name]} {value:g}" for name, value in policy.items()]
    return {
        "variant": variant,
        "label": ", ".join([variant, *changes]),
        "batch_size": batch_size,
        "policy": policy,
        "figures": {
            "tokens_per_s": {"median": tokens / seconds, "min": 1, "max": 90},
            "ratio": {"median": median, "min": median - low, "max": median + high},
            "time_split": split,
        },
        "runs": [{"seconds": seconds, "tokens": tokens}, {"seconds": 1, "tokens": 1}],
    }


def results(*cases: Mapping[str, Any]) -> dict[str, Any]:
    job = {"threshold": 0.75, "max_early_predictions": 5}
    return {"job": job, "variants": {}, "cases": list(cases)}


def all_variants(*batch_sizes: int) -> dict[str, Any]:
    return results(*(case(variant, size) for size in batch_sizes for variant in SPEEDS))


def grid() -> dict[str, Any]:
    return results(
        case("baseline"),
        *(
            case("adadecode", threshold=threshold, max_early_predictions=cap)
            for threshold in (0.3, 0.5, 0.7, 0.9)
            for cap in (2, 3, 5)
        ),
    )


def lines(axes: Any) -> dict[str, tuple[list[float], list[float], list[list[float]]]]:
    """By label: places, medians and [lowest, highest] of every error bar."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        spans = [[segment[0][1], segment[1][1]] for segment in bars.get_segments()]
        found[container.get_label()] = (
            list(line.get_xdata()),
            list(line.get_ydata()),
            spans,
        )
    return found


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_files_are_pngs_of_a_readable_size(tmp_path: Path) -> None:
    paths = draw_comparison(
        [all_variants(1, 4, 16), grid()], tmp_path / "new" / "plots"
    )
    assert [path.name for path in paths] == [
        "speedup_by_batch.png",
        "speedup_by_threshold.png",
        "speedup_by_cap.png",
        "cycle_time.png",
        "variants.png",
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == (
        sorted(path.name for path in paths)
    )
    for path in paths:
        width, height = png_size(path)
        assert width == 1080
        assert 300 <= height <= 1700, path.name


def test_only_what_has_data_is_drawn() -> None:
    assert comparison_figures([results(case("baseline"))]) == {}
    assert list(comparison_figures([all_variants(1)])) == ["cycle_time", "variants"]
    assert list(comparison_figures([results(case("baseline"), case("ngram"))])) == [
        "variants"
    ]
    one_cap = results(
        case("baseline"),
        *(
            case("adadecode", threshold=threshold, max_early_predictions=4)
            for threshold in (0.5, 0.9)
        ),
    )
    assert "speedup_by_cap" not in comparison_figures([one_cap])
    one_threshold = results(case("baseline"), case("adadecode", threshold=0.5))
    assert "speedup_by_threshold" not in comparison_figures([one_threshold])


def test_ratios_by_batch_are_those_given() -> None:
    given = all_variants(1, 4, 16)
    (axes,) = comparison_figures([given])["speedup_by_batch"].axes
    drawn = lines(axes)
    assert list(drawn) == [variant for variant in SPEEDS if variant != "baseline"]
    for variant, (places, medians, spans) in drawn.items():
        ratios = [
            c["figures"]["ratio"] for c in given["cases"] if c["variant"] == variant
        ]
        assert [round(place) for place in places] == [0, 1, 2]
        assert medians == pytest.approx([ratio["median"] for ratio in ratios])
        for span, ratio in zip(spans, ratios, strict=True):
            assert span == pytest.approx([ratio["min"], ratio["max"]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "16"]
    assert axes.get_ylim()[0] == 0


def test_a_line_per_cap_by_threshold_and_the_other_way_round() -> None:
    figures = comparison_figures([grid()])
    by_threshold = lines(figures["speedup_by_threshold"].axes[0])
    assert list(by_threshold) == ["cap 2", "cap 3", "cap 5"]
    places, medians, _ = by_threshold["cap 3"]
    assert places == [0.3, 0.5, 0.7, 0.9]
    assert medians == pytest.approx(
        [
            case("adadecode", threshold=threshold, max_early_predictions=3)["figures"][
                "ratio"
            ]["median"]
            for threshold in places
        ]
    )
    by_cap = lines(figures["speedup_by_cap"].axes[0])
    assert list(by_cap) == [f"threshold {t:g}" for t in (0.3, 0.5, 0.7, 0.9)]
    assert by_cap["threshold 0.9"][0] == [2, 3, 5]


def test_what_a_case_leaves_out_is_the_comparisons_own() -> None:
    study = results(
        case("baseline"),
        *(case("adadecode", threshold=threshold) for threshold in (0.5, 0.9)),
    )
    figures = comparison_figures([study])
    assert list(lines(figures["speedup_by_threshold"].axes[0])) == ["adadecode, cap 5"]
    both = results(*study["cases"], case("adadecode", 4, threshold=0.5))
    both["cases"].append(case("adadecode", 4, threshold=0.9))
    drawn = lines(comparison_figures([both])["speedup_by_threshold"].axes[0])
    assert list(drawn) == ["batch 1", "batch 4"]


def test_cycle_time_in_milliseconds_per_token_beside_the_baseline() -> None:
    given = results(
        *(
            case(variant, size)
            for size in (1, 4)
            for variant in ("baseline", "adadecode")
        )
    )
    figure = comparison_figures([given])["cycle_time"]
    assert [axes.get_title("left") for axes in figure.axes] == ["batch 1", "batch 4"]
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["adadecode", "baseline"]
    baseline, adadecode = given["cases"][:2]
    widths = [bar.get_width() for bars in axes.containers for bar in bars]
    split = adadecode["figures"]["time_split"]
    per_token = 1000 / adadecode["runs"][0]["tokens"]
    assert widths == pytest.approx(
        [
            *(per_token * split[part] for part in PARTS),
            1000 / baseline["figures"]["tokens_per_s"]["median"],
        ]
    )
    starts = [bar.get_x() for bars in axes.containers for bar in bars]
    assert starts[1:5] == pytest.approx([sum(widths[:n]) for n in (1, 2, 3, 4)])


def test_bars_of_all_variants() -> None:
    given = all_variants(1, 4)
    (axes,) = comparison_figures([given])["variants"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SPEEDS)[1:]
    bars = [group for group in axes.containers if group.get_label().startswith("batch")]
    assert [group.get_label() for group in bars] == ["batch 1", "batch 4"]
    for group, size in zip(bars, (1, 4), strict=True):
        ratios = [
            c["figures"]["ratio"]
            for c in given["cases"]
            if c["batch_size"] == size and c["variant"] != "baseline"
        ]
        widths = [bar.get_width() for bar in group]
        assert widths == pytest.approx([ratio["median"] for ratio in ratios])
        _, _, (spans,) = group.errorbar.lines
        for segment, ratio in zip(spans.get_segments(), ratios, strict=True):
            assert [segment[0][0], segment[1][0]] == pytest.approx(
                [ratio["min"], ratio["max"]]
            )


def test_the_same_variant_of_two_files_is_drawn_twice() -> None:
    (axes,) = comparison_figures([all_variants(1), all_variants(1)])["variants"].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "adadecode" in labels
    assert "adadecode (2)" in labels


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first = draw_comparison([grid()], tmp_path / "a")
    second = draw_comparison([grid()], tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_without_matplotlib_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AdaDecodeError, match=r"^--plots: .* `bench` extra, or leave"):
        draw_comparison([all_variants(1)], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_plots_of_the_real_model() -> None:
    results = {
        task: read_results([RESULTS / f"smollm2_chain_{task}_float32.json"])[0]
        for task in ("gsm8k", "xsum")
    }
    (axes,) = speedup_by_task(results).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    for group, result in zip(axes.containers[1::2], results.values(), strict=True):
        ratios = {
            case["label"]: case["figures"]["ratio"]["median"]
            for case in result["cases"]
            if case["variant"] != "baseline"
        }
        drawn = {
            labels[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width()
            for bar in group
        }
        assert drawn == pytest.approx(ratios)


def test_agreement_by_training_tokens() -> None:
    rows = json.loads((RESULTS / "smollm2_growth.json").read_text())["rows"]
    panels = agreement_by_tokens(rows).axes
    assert [axes.get_title() for axes in panels] == ["GSM8K", "HumanEval"]
    lines = panels[0].get_lines()
    assert [line.get_label() for line in lines] == [
        f"after {layer} layers" for layer in (2, 4, 8, 15)
    ]
    # docs/results.md, the first row and the last one of the mixture
    assert list(lines[0].get_xdata()) == pytest.approx([44.451, 91.4, 192.184])
    assert list(lines[0].get_ydata()) == pytest.approx([40.3, 42.1, 43.8], abs=0.05)
