# SPDX-License-Identifier: Apache-2.0
"""The report: its files, what they show, and what is left out."""

import base64
import copy
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.report import parse_evaluation, parse_history, write_report
from tests.evaluations import make_evaluation, make_history

PLOTS = ["agreement", "gates", "reliability", "speedup", "loss"]
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page, insisting on balanced tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.ragged = False
        self._text: list[str] = []
        self._cells = 0
        self._widths: set[int] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "table":
            self._widths = set()
        elif tag == "tr":
            self._cells = 0
        elif tag in ("td", "th"):
            self._cells += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self._widths.add(self._cells)
        elif tag == "table" and len(self._widths) != 1:
            self.ragged = True

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self._text.append(data)


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("runs") / "new" / "report"
    write_report(directory, make_evaluation(), make_history())
    return directory


# What is written


def test_files(report: Path) -> None:
    expected = sorted([*(f"{name}.png" for name in PLOTS), "report.html"])
    assert sorted(os.listdir(report)) == expected


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_large_enough_to_read(report: Path, name: str) -> None:
    width, height = png_size((report / f"{name}.png").read_bytes())
    assert width == 1080
    assert 400 <= height <= 1600


def test_page_is_whole_and_stands_alone(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(report / "report.html")
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert "script" not in page.seen
    assert {"html", "head", "title", "body", "h1", "figure", "table"} <= page.seen
    assert all(link and link.startswith("data:") for link in page.links)
    assert not page.ragged


def test_page_holds_the_plots(report: Path) -> None:
    page = Page(report / "report.html")
    prefix = "data:image/png;base64,"
    for image, name in zip(page.images, PLOTS, strict=True):
        source, alt = image["src"], image["alt"]
        assert source is not None
        assert (
            base64.b64decode(source.removeprefix(prefix))
            == (report / f"{name}.png").read_bytes()
        )
        assert alt


@pytest.mark.parametrize(
    "figure",
    [
        "examples/demo/model",
        "13,047 tokens",
        "Predicted speedup: 1.52x over plain decoding, with threshold 0.6 and at "
        "most 8 early predictions.",
        "With the engine's defaults 1.41x over plain decoding is predicted, 2.35 "
        "tokens per forward, one request at a time, where 10 rows cost 1.42 times one.",
        "54.3 % of the exits' and - of n-gram lookup's are right; they make 21.1 % and "
        "0.0 % of the tokens.",
        "81.2 %",  # agreement of exit 2
        "0.123",  # KL of exit 4
        "0.071",  # ECE of the probability
        "0.013",  # ECE of acceptance
        "95.0 % 43.2 % 56.8 %",  # coverage where both gates are right equally often
        "99.0 % - 10.0 %",
        "7.1 %",  # the LM head's share
        "1.11x",  # a cell of the grid
        "0.0 % / -",  # no precision where the gate never opens
        "for one request at a time, where rows cost nothing. Purple is",
        "Held-out text after epoch 2 Exit Loss",
        "92.7 %",
    ],
)
def test_page_shows(report: Path, figure: str) -> None:
    assert figure in Page(report / "report.html").text


def test_same_figures_same_bytes(report: Path, tmp_path: Path) -> None:
    write_report(tmp_path, make_evaluation(), make_history())
    for name in os.listdir(report):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("agreement", lambda e: e["exits"][0].update(agreement=0.5)),
        ("gates", lambda e: e["exits"][0]["thresholds"][1].update(coverage=0.1)),
        (
            "reliability",
            lambda e: e["exits"][0]["reliability"]["acceptance"]["bins"][2].update(
                accuracy=0.2
            ),
        ),
        ("speedup", lambda e: e["simulation"]["speedup"][0].__setitem__(0, 1.2)),
    ],
)
def test_plots_follow_the_figures(
    report: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    evaluation = copy.deepcopy(make_evaluation())
    change(evaluation)
    write_report(tmp_path, evaluation)
    for other in PLOTS[:-1]:
        same = (tmp_path / f"{other}.png").read_bytes() == (
            report / f"{other}.png"
        ).read_bytes()
        assert same == (other != name), other


def test_strings_are_escaped(report: Path, tmp_path: Path) -> None:
    write_report(tmp_path, make_evaluation(model="<script>x</script>&", data='"<i>'))
    page = Page(tmp_path / "report.html")
    assert {"script", "i"}.isdisjoint(page.seen)
    assert "Exit heads for <script>x</script>&" in page.text


def test_files_are_replaced(report: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    (tmp_path / "notes.txt").write_text("mine")
    write_report(tmp_path, make_evaluation())
    assert "before" not in Page(tmp_path / "report.html").text
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_figures_are_for_is_said(report: Path, tmp_path: Path) -> None:
    evaluation, history = make_evaluation(), make_history()
    evaluation["simulation"] |= {"requests": 8, "row_costs": {"1": 1.0, "72": 3.456}}
    for point in history["held_out"]:
        point["draft_vocabulary"] = 1000
    write_report(tmp_path, evaluation, history)
    text = Page(tmp_path / "report.html").text
    assert "for 8 requests at a time, where 72 rows cost 3.46 times one." in text
    among = "among the 1,000 tokens of the draft vocabulary"
    assert f"Held-out text after epoch 2, agreement {among} Exit Loss" in text
    assert f"Agreement is that of the top tokens {among}." in text


# What is left out


def test_without_history_there_are_no_loss_curves(report: Path, tmp_path: Path) -> None:
    files = write_report(tmp_path, make_evaluation())
    assert names(files) == [
        "agreement.png",
        "gates.png",
        "reliability.png",
        "speedup.png",
        "report.html",
    ]
    assert len(Page(files[-1]).images) == 4


def test_without_simulation(report: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(simulation=None, cost=None, best=None, defaults=None)
    files = write_report(tmp_path, evaluation)
    assert "speedup.png" not in names(files)
    text = Page(files[-1]).text
    assert "No speed was predicted." in text
    assert "defaults" not in text


def test_without_calibration(report: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(equal_acceptance=None)
    for figures in evaluation["exits"]:
        figures["reliability"]["acceptance"] = None
    files = write_report(tmp_path, evaluation)
    assert "reliability.png" in names(files)
    page = Page(files[-1])
    assert "both gates are right equally often" not in page.text
    assert not page.ragged


def test_without_reliability(report: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation()
    for figures in evaluation["exits"]:
        figures["reliability"] = None
    assert "reliability.png" not in names(write_report(tmp_path, evaluation))


def test_one_exit_and_one_cell(report: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation()
    evaluation["exits"] = evaluation["exits"][:1]
    evaluation["simulation"] = {"thresholds": [0.75], "caps": [5], "speedup": [[None]]}
    history = make_history() | {"held_out": []}
    assert len(write_report(tmp_path, evaluation, history)) == 6


def test_an_exit_after_every_layer(report: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(num_layers=32)
    evaluation["exits"] = [
        evaluation["exits"][0] | {"layer": layer, "agreement": layer / 32}
        for layer in range(1, 32)
    ]
    assert len(write_report(tmp_path, evaluation)) == 5


def test_slower_than_plain_decoding_is_said(report: Path, tmp_path: Path) -> None:
    best = {"threshold": 0.9, "cap": 1, "speedup": 0.97}
    files = write_report(tmp_path, make_evaluation(best=best))
    text = Page(files[-1]).text
    assert "No setting is predicted to be faster" in text
    assert "0.97x" in text


# Bad input


def test_incomplete_figures_are_one_sentence(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    del evaluation["exits"][1]["agreement"]
    with pytest.raises(AdaDecodeError) as caught:
        write_report(tmp_path / "out", evaluation)
    assert str(caught.value) == (
        "evaluation.json: exits.1.agreement: Field required; run `adadecode eval` "
        "again to write the file"
    )
    assert not (tmp_path / "out").exists()


def test_a_ragged_grid_is_refused() -> None:
    evaluation = make_evaluation()
    evaluation["simulation"]["acceptance"][2].pop()
    with pytest.raises(AdaDecodeError, match="acceptance is not a grid of 5 thre"):
        parse_evaluation(evaluation)


def test_history_of_another_form_is_refused() -> None:
    with pytest.raises(AdaDecodeError, match=r"^history\.json: steps: Field required"):
        parse_history({"losses": []})


def test_unknown_keys_are_ignored() -> None:
    assert parse_evaluation(make_evaluation(novel=1)).tokens == 13047


def test_files_of_earlier_versions_are_read() -> None:
    """Their grid is one where rows cost nothing, for one request at a time."""
    simulation = parse_evaluation(make_evaluation()).simulation
    assert simulation is not None
    assert (simulation.requests, simulation.row_costs) == (1, {"1": 1.0})
    assert parse_history(make_history()).held_out[0].draft_vocabulary is None


def test_the_epoch_that_was_kept() -> None:
    history = make_history()
    history["held_out"][1]["loss"]["8"] = -1.0
    best = parse_history(history).best
    assert best is not None
    assert best.epoch == 1
    assert parse_history({"steps": []}).best is None


def test_layers_are_numbers() -> None:
    assert set(parse_history(make_history()).steps[0].loss) == {2, 4, 8}


def test_matplotlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AdaDecodeError, match="with its `train` extra") as caught:
        write_report(tmp_path / "out", make_evaluation())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_nothing_half_written(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")

    def no_space(source: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, make_evaluation())
    assert os.listdir(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_global_state_is_left_alone() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys, tempfile, matplotlib\n"
        "from tests.evaluations import make_evaluation, make_history\n"
        "from adadecode_vllm.toolkit.report import write_report\n"
        "before = matplotlib.rcParams.copy()\n"
        "write_report(tempfile.mkdtemp(), make_evaluation(), make_history())\n"
        "same = dict.__eq__(matplotlib.rcParams, before)\n"
        "print('matplotlib.pyplot' in sys.modules, same)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False True\n"
