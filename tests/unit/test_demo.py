# SPDX-License-Identifier: Apache-2.0
"""The shipped demo: small, and evaluated on text that it was not trained on."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

from tests.harness import DEMO, demo_corpus


def test_model_and_heads_are_small() -> None:
    files = [
        path
        for folder in ("model", "heads")
        for path in (DEMO / folder).rglob("*")
        if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) < 12_000_000


def test_held_out_phrasings_are_never_trained_on() -> None:
    corpus = demo_corpus()
    for kind in corpus.KINDS:
        assert kind.held_out
        assert not set(kind.held_out) & set(kind.train)
    trained = {
        problem.prompt for problem in itertools.islice(corpus.training_problems(), 5000)
    }
    assert not trained & set(corpus.heldout_problems(500))


def test_held_out_files_are_never_trained_on() -> None:
    corpus = demo_corpus()
    trained = "\n".join(corpus.training_code())
    prompts = corpus.heldout_code_prompts(20)
    assert len(prompts) == 20
    assert not [prompt for prompt in prompts if prompt in trained]


def test_prompts_are_reproducible() -> None:
    corpus = demo_corpus()
    assert corpus.heldout_problems(8) == corpus.heldout_problems(8)
    assert corpus.heldout_problems(8) != corpus.heldout_problems(8, seed=1)
    assert corpus.heldout_code_prompts(8) == corpus.heldout_code_prompts(8)


def test_worked_answers_state_the_answer() -> None:
    corpus = demo_corpus()
    for problem in corpus.heldout_problems_with_solutions(100):
        assert corpus.parse_answer(problem.solution) == problem.answer


def run(program: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / program), *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120
    )


def test_texts_are_not_written_over_others(tmp_path: Path) -> None:
    counts = ("--problems", 3, "--code-files", 1, "--heldout-problems", 2)
    argv = (tmp_path, *counts, "--heldout-code", 2)
    for _ in range(2):  # the same text again is no loss
        assert run("write_texts.py", *argv).returncode == 0
    (tmp_path / "problems.jsonl").write_text("mine")
    done = run("write_texts.py", *argv)
    assert done.returncode == 2
    assert "holds other text" in done.stderr
    assert (tmp_path / "problems.jsonl").read_text() == "mine"


def test_a_model_is_not_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    argv = ("--work-dir", tmp_path / "work", "--out", tmp_path)
    done = run("train_model.py", *argv, "--export-only")
    assert done.returncode == 2
    assert "it holds a model that was not made here" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
