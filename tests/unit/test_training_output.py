# SPDX-License-Identifier: Apache-2.0
"""`adadecode train` loses neither heads nor files nor epochs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import locked
from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.toolkit import progress as progress_module
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.training import trainer as trainer_module
from tests.command import run
from tests.harness import ROOT
from tests.tiny import save_tiny_llama
from tests.training import Killed
from tests.training import train as train_once

TRAIN = ("--exit-layers", "1,2", "--epochs", "2", "--batch-size", "8")
STEPS = 5  # of an epoch
FINISHED = ["README.md", "config.json", "model.safetensors", "run"]
# Two epochs of so many steps.
train = partial(train_once, epochs=2, held_out=0.1)
# A run of another kind, in place of what is there.
ANOTHER: dict[str, Any] = {"learning_rate": 1e-3, "overwrite": True}


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# Nothing is touched before everything has been read


def test_heads_survive_data_that_is_not_there(
    model: Path,
    teacher: Teacher,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads = tmp_path / "heads"
    train(teacher, data, heads)
    before = content(heads)
    for arguments, flag in (
        (("--data", "/nonexistent"), "--data /nonexistent: the path does not exist"),
        (("--data", data, "--exit-layers", "9"), "--exit-layers contains 9"),
        (
            ("--data", data, "--max-length", "65"),
            "--max-length 65: the model allows 64",
        ),
    ):
        assert run("train", model, heads, *TRAIN, *arguments, "--overwrite") == 2
        assert f"error: {flag}" in capsys.readouterr().err
        assert content(heads) == before


def models_directory(directory: Path) -> None:
    save_tiny_llama(directory, max_position_embeddings=64)


def notes(directory: Path) -> None:
    directory.mkdir()
    (directory / "README.md").write_text("mine")


def results(directory: Path) -> None:
    (directory / "run").mkdir(parents=True)
    (directory / "run" / "results.csv").write_text("mine")


def replacement(directory: Path) -> None:
    (directory / "run.new").mkdir(parents=True)
    (directory / "run.new" / "results.csv").write_text("mine")


def a_file(directory: Path) -> None:
    directory.write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (models_directory, "it holds config.json, but not that of exit heads; give"),
        (notes, "it holds README.md but no heads; give a directory that is new"),
        (results, "it holds run/results.csv, which no training wrote; give another"),
        (replacement, "it holds run.new/results.csv, which no training wrote; give"),
        (a_file, "the path is a file; give the name of a directory"),
    ],
)
def test_other_directories_are_refused(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    reason: str,
    overwrite: bool,
) -> None:
    output = tmp_path / "out"
    make(output)
    before = content(tmp_path)
    flags = ["--overwrite"] * overwrite
    assert run("train", model, output, "--data", data, *TRAIN, *flags) == 2
    assert f"error: OUT {output}: {reason}" in capsys.readouterr().err
    assert content(tmp_path) == before


# Heads are replaced at the end, or not at all


@pytest.mark.parametrize("kill_at", [1, STEPS, 2 * STEPS])
def test_old_heads_stay_until_the_new_are_trained(
    teacher: Teacher, data: Path, tmp_path: Path, kill_at: int
) -> None:
    output = tmp_path / "out"
    train(teacher, data, output)
    (output / "notes.md").write_text("mine")
    before = content(output)
    with pytest.raises(Killed):
        train(teacher, data, output, **ANOTHER, kill_at=kill_at)
    assert before.items() <= content(output).items()
    # The same command, --overwrite included, goes on after the last whole epoch.
    steps = train(teacher, data, output, **ANOTHER).steps
    assert len(steps) == 2 * STEPS - (kill_at - 1) // STEPS * STEPS
    record = yaml.safe_load((output / "run" / "run.yaml").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    train(teacher, data, tmp_path / "fresh", learning_rate=1e-3)
    fresh, replaced = content(tmp_path / "fresh"), content(output)
    for name in ("config.json", "model.safetensors", "run/history.json"):
        assert replaced[name] == fresh[name]
    assert sorted(replaced) == sorted([*fresh, "notes.md"])


def test_an_unfinished_run_of_another_kind_stays_until_then(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, kill_at=STEPS + 1)
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, **ANOTHER, kill_at=STEPS + 1)
    # Both go on.
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, kill_at=2 * STEPS)
    assert len(train(teacher, data, tmp_path, **ANOTHER).steps) == STEPS
    assert not (tmp_path / "run.new").exists()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_third_run_takes_the_place_of_the_second(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path)
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, **ANOTHER, kill_at=2 * STEPS)
    third = train(teacher, data, tmp_path, learning_rate=1e-4, overwrite=True)
    assert len(third.steps) == 2 * STEPS
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert record["settings"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("renames", range(7))
def test_the_end_may_be_interrupted_anywhere(
    teacher: Teacher,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    """Weights and configuration go and come, then the directory of the run."""
    train(teacher, data, tmp_path)
    calls = iter(range(100))

    def interrupt(move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(source: Path, target: Path) -> Any:
            # What happens within the new run's directory is none of the old one's.
            ends = target.name == "run" or target.parent == tmp_path
            if ends and next(calls) == renames:
                raise Killed
            return move(source, target)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt(os.rename))
        if renames < 6:
            with pytest.raises(Killed):
                train(teacher, data, tmp_path, **ANOTHER)
        else:
            train(teacher, data, tmp_path, **ANOTHER)
    load_tensors(tmp_path, load_heads_config(tmp_path))  # the old or the new
    steps = train(teacher, data, tmp_path, **ANOTHER).steps
    assert steps == ([] if renames < 6 else list(range(1, 2 * STEPS + 1)))
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    assert sorted(os.listdir(tmp_path)) == FINISHED


@pytest.mark.parametrize(
    "last", ["run.yaml", "model.safetensors", "config.json", "README.md"]
)
def test_the_end_of_a_first_run_may_be_interrupted(
    teacher: Teacher,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: str,
) -> None:
    """The same command ends it, although heads may be there by then."""

    def interrupt(move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(source: Path, target: Path) -> None:
            move(source, target)
            if Path(target).name == last:
                raise Killed

        return moved

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, interrupt(getattr(os, name)))
        with pytest.raises(Killed):
            train(teacher, data, tmp_path)
    assert train(teacher, data, tmp_path).steps == []
    load_tensors(tmp_path, load_heads_config(tmp_path))
    assert sorted(os.listdir(tmp_path)) == FINISHED
    with pytest.raises(AdaDecodeError, match=r"OUT .*already holds heads"):
        train(teacher, data, tmp_path)


def test_two_runs_do_not_write_to_one_directory(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    refusal = r"^OUT .*: another `adadecode train` is writing there; wait"
    with (
        locked(output, RuntimeError("not taken")),
        pytest.raises(AdaDecodeError, match=refusal),
    ):
        train(teacher, data, output)
    assert content(output) == {}
    run_it = trainer_module.Trainer.run

    def meanwhile(self: Any, **options: Any) -> Any:
        before = content(output)
        with pytest.raises(AdaDecodeError, match=refusal):
            train(teacher, data, output, **ANOTHER)
        assert content(output) == before
        return run_it(self, **options)

    monkeypatch.setattr(trainer_module.Trainer, "run", meanwhile)
    train(teacher, data, output)
    monkeypatch.undo()
    train(teacher, data, output, **ANOTHER)


@pytest.mark.parametrize("head", ["transform", "full"])
def test_heads_are_not_overwritten(
    teacher: Teacher, data: Path, tmp_path: Path, head: str
) -> None:
    train(teacher, data, tmp_path, head=head)
    before = content(tmp_path)
    with pytest.raises(AdaDecodeError, match=r"OUT .*already holds heads"):
        train(teacher, data, tmp_path, head=head)
    assert content(tmp_path) == before
    train(teacher, data, tmp_path, head=head, overwrite=True)


@pytest.mark.parametrize("failing", ["checkpoint", "outputs"])
def test_a_full_disk_is_a_sentence_and_costs_nothing(
    teacher: Teacher,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    train(teacher, data, tmp_path)
    before = content(tmp_path)

    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "checkpoint":
            patch.setattr(trainer_module, "save_tensors", full)
        else:
            patch.setattr("adadecode_vllm.heads.io.save_tensors", full)
        with pytest.raises(AdaDecodeError, match=r"OUT .*: writing failed \(No space"):
            train(teacher, data, tmp_path, **ANOTHER)
    assert before.items() <= content(tmp_path).items()
    steps = train(teacher, data, tmp_path, **ANOTHER).steps
    assert len(steps) == (2 * STEPS if failing == "checkpoint" else 0)


def test_left_overs_of_a_killed_run_do_not_stop_the_next(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, kill_at=STEPS + 1)
    for name in (".tmpB2dXq1", f"checkpoint.safetensors.tmp-1-{'0' * 16}"):
        (tmp_path / "run" / name).write_text("half")
    assert len(train(teacher, data, tmp_path).steps) == STEPS


# Progress


def test_progress_without_a_terminal(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.05)
    arguments = ("--exit-layers", "auto", "--epochs", "2", "--batch-size", "8")
    assert run("train", model, tmp_path, "--data", data, *arguments) == 0
    err = capsys.readouterr().err
    assert "\r" not in err
    rate = r" after \d s, [\d,.e+]+"
    for line in (
        rf"choosing exits: 14 of 14 sets{rate} sets/s",
        rf"states: \d+ of \d+ tokens{rate} tokens/s",
        rf"training: 10 of 10 steps{rate} steps/s, epoch 2, loss \d\.\d+",
        rf"calibrating: 2 of 2 texts{rate} texts/s",
    ):
        assert re.search(f"^{line}$", err, re.MULTILINE), err


# Several processes


def launch(*argv: str) -> list[subprocess.Popen[str]]:
    """Start two processes that train together, with nobody who would end them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "adadecode_vllm.cli", "train", *argv],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("what", ["output", "cache"])
def test_a_failure_of_the_main_process_ends_all(
    model: Path, data: Path, tmp_path: Path, what: str
) -> None:
    if what == "output":
        (tmp_path / "notes.md").write_text("mine")
        expected = f"error: OUT {tmp_path}: it holds notes.md but no heads; "
        flags: list[str] = []
    else:
        # Only the main process writes there.
        cache = tmp_path / "cache"
        cache.mkdir()
        (cache / "thesis.txt").write_text("mine")
        expected = f"error: --cache-dir {cache}: it holds other files"
        flags = ["--cache-dir", str(cache)]
    output = str(tmp_path if what == "output" else tmp_path / "out")
    processes = launch(str(model), output, "--data", str(data), *TRAIN, *flags)
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 2, errors
            assert expected in errors
            assert "Traceback" not in errors
    finally:
        for process in processes:
            process.kill()
