# SPDX-License-Identifier: Apache-2.0
"""`adadecode eval` and the other commands: no file of somebody else is lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.toolkit import progress as progress_module
from adadecode_vllm.toolkit.evaluation import run as run_module
from adadecode_vllm.toolkit.evaluation.output import EVALUATION_FILE
from adadecode_vllm.toolkit.report.write import REPORT_FILES
from adadecode_vllm.toolkit.states.teacher import Teacher
from tests.command import run
from tests.data_directory import write_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_answers(tmp_path_factory.mktemp("data") / "d", model, 12, 8)


@pytest.fixture
def heads(model: Path, tmp_path: Path) -> Path:
    assert run("init-heads", model, tmp_path / "heads", "--exit-layers", "1,2") == 0
    return tmp_path / "heads"


@pytest.mark.parametrize("name", [EVALUATION_FILE, "report.html", "loss.png"])
def test_files_of_the_same_names_are_not_replaced(
    model: Path,
    heads: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("[]")
    argv = ("eval", model, heads, "--data", data, "--output", tmp_path / "mine")
    assert run(*argv) == 2
    expected = f"error: --output {tmp_path / 'mine'}: it holds {name}, which no"
    assert expected in capsys.readouterr().err
    assert [p.read_text() for p in (tmp_path / "mine").iterdir()] == ["[]"]


def test_an_evaluation_is_replaced_and_other_files_stay(
    model: Path, heads: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e"
    output.mkdir()
    (output / "notes.md").write_text("mine")
    argv = ("eval", model, heads, "--data", data, "--output", output)
    for _ in range(2):
        assert run(*argv) == 0
    assert (output / "notes.md").read_text() == "mine"
    written = {path.name for path in output.iterdir()}
    # `loss.png` is missing: untrained heads have no history.
    assert written == {EVALUATION_FILE, "notes.md", *REPORT_FILES} - {"loss.png"}


def test_a_card_of_ones_own_is_kept(model: Path, heads: Path, data: Path) -> None:
    (heads / "README.md").write_text("Mine\n")
    assert run("eval", model, heads, "--data", data, "--no-plots") == 0
    assert (heads / "README.md.old").read_text() == "Mine\n"
    assert "## Figures" in (heads / "README.md").read_text()


@pytest.mark.parametrize("name", ["history.json", "run.yaml"])
def test_what_cannot_be_read_is_told_before_anything_is_written(
    model: Path,
    heads: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (heads / "run").mkdir()
    (heads / "run" / name).write_text("{")
    assert run("eval", model, heads, "--data", data) == 2
    assert f"error: HEADS {heads}: run/{name} cannot be" in capsys.readouterr().err
    assert sorted(path.name for path in heads.iterdir()) == [
        *("config.json", "model.safetensors", "run")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gate", "acceptance"), "error: --gate acceptance: the heads are not cal"),
        (("--output", "{}/file/new"), "error: --output {0}/file/new: {0}/file is a fi"),
        (("--max-length", "-5"), "--max-length"),
        (("--overhead", "inf"), "error: --overhead inf: give a number"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    model: Path,
    heads: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def load(*_arguments: object, **_options: object) -> Teacher:
        raise AssertionError("the model is not needed")

    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(Teacher, "load", load)
    given = [argument.format(tmp_path) for argument in arguments]
    assert run("eval", model, heads, "--data", data, *given) == 2
    assert message.format(tmp_path) in capsys.readouterr().err


def test_without_a_simulation_any_gate_will_do(
    model: Path, heads: Path, data: Path
) -> None:
    argv = ("eval", model, heads, "--data", data, "--no-plots", "--answers", 0)
    assert run(*argv, "--gate", "acceptance") == 0


def test_heads_that_were_replaced_meanwhile_get_no_figures_of_the_old(
    model: Path,
    heads: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = run_module.evaluate_heads

    def evaluate_and_replace(*args: Any, **options: Any) -> dict[str, Any]:
        report = evaluate(*args, **options)
        new = ("init-heads", model, heads, "--exit-layers", "1", "--overwrite")
        assert run(*new) == 0
        return report

    monkeypatch.setattr(run_module, "evaluate_heads", evaluate_and_replace)
    assert run("eval", model, heads, "--data", data) == 2
    assert "they were replaced while they were evaluated" in capsys.readouterr().err
    assert not (heads / "evaluation").exists()


@pytest.mark.parametrize("damage", ["cut", "other shapes"])
def test_a_damaged_model_is_a_sentence(
    model: Path,
    heads: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    if damage == "cut":
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config = json.loads((broken / "config.json").read_text())
        config["intermediate_size"] += 1
        (broken / "config.json").write_text(json.dumps(config))
    assert run("eval", broken, heads, "--data", data) == 2
    error = capsys.readouterr().err
    assert f"error: MODEL {broken}: it cannot be loaded (" in error


def test_errors_name_the_argument(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the server's flag, which nobody has given."""
    missing = tmp_path / "none"
    for argv, flag in (
        (("eval", model, missing, "--data", data), "HEADS"),
        (("draft-vocabulary", missing, "--data", data), "HEADS"),
        (("push", missing, "me/heads"), "DIR"),
    ):
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert f"error: {flag} {missing}: the path does not exist" in error
        assert "--adadecode-heads" not in error


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size, which is what the system says of a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["init-heads", "draft-vocabulary"])
def test_a_full_disk_leaves_heads_as_they_were(
    model: Path,
    heads: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    before = {path.name: path.read_bytes() for path in heads.iterdir()}
    argv: tuple[object, ...] = ("draft-vocabulary", heads, "--data", data)
    if command == "init-heads":
        argv = ("init-heads", model, heads, "--exit-layers", "1,2,3", "--overwrite")
    capsys.readouterr()
    with full_disk(1000):
        assert run(*argv) == 2
    assert re.fullmatch(
        r"error: .*model\.safetensors\S*: it cannot be written \(File too large\); "
        r"make room\n",
        capsys.readouterr().err,
    )
    assert {path.name: path.read_bytes() for path in heads.iterdir()} == before


def test_progress_without_a_terminal(
    model: Path,
    heads: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.05)
    argv = ("eval", model, heads, "--data", data, "--no-plots")
    assert run(*argv, "--row-costs", "1:1,6:1.6", "--batch-size", 2) == 0
    err = capsys.readouterr().err
    for line in (
        r"measuring: 12 of 12 texts after \d s, \S+ texts/s",
        r"reading exits: 12 of 12 answers after \d s, \S+ answers/s",
        r"simulating: 12 of 12 answers after \d s, \S+ answers/s",
        r"playing the defaults: 12 of 12 answers after \d s, \S+ answers/s",
    ):
        assert re.search(f"^{line}$", err, re.MULTILINE), err


def test_an_exit_that_is_recommended_and_missing_is_told_first(
    model: Path,
    heads: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the engine tells it."""

    def measure(*_arguments: object, **_options: object) -> object:
        raise AssertionError("nothing is measured before")

    monkeypatch.setattr(run_module, "measure", measure)
    config = json.loads((heads / "config.json").read_text())
    config["recommended"] = {"exit_layers": [3]}
    (heads / "config.json").write_text(json.dumps(config))
    assert run("eval", model, heads, "--data", data) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --adadecode-config: exit_layers = [3] is refused: ")
    assert f"{heads} has no head after layer 3. Choose among [1, 2]" in error


def test_the_engines_defaults_are_played(
    model: Path, heads: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", model, heads, "--data", data, "--no-plots", "--row-costs")
    assert run(*argv, "6:1") == 2
    assert "error: --row-costs 6:1: expected" in capsys.readouterr().err
    found = []
    for _ in range(2):
        assert run(*argv, "1:1,6:1.6") == 0
        shown = " ".join(capsys.readouterr().out.split())
        report = json.loads((heads / "evaluation" / EVALUATION_FILE).read_text())
        defaults = report["defaults"]
        # Of both predictions.
        assert shown.count("one request at a time, where 6 rows cost 1.60 times") == 2
        assert f"With the engine's defaults {defaults['speedup']:.2f}x" in shown
        found.append(defaults)
    assert found[0] == found[1]
    assert (defaults["policy"], defaults["ngram"]) == ("cost", "chain")
    assert defaults["exit_layers"] == [1, 2]
    assert defaults["requests"] == 1
    assert defaults["answers"] == report["simulation"]["answers"]
    # Untrained heads are never sure enough of this random model.
    assert defaults["exits"]["drafts"] == 0
    assert defaults["lookup"]["drafts"] > 0
