# SPDX-License-Identifier: Apache-2.0
"""The shipped demo: small, and evaluated on text that it was not trained on."""

from __future__ import annotations

import importlib.util
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


def test_an_answer_shows_exits_and_what_was_not_confirmed() -> None:
    """A character of several tokens is shown when it is whole."""
    spec = importlib.util.spec_from_file_location("run_demo", DEMO / "run_demo.py")
    assert spec is not None
    assert spec.loader is not None
    run_demo = importlib.util.module_from_spec(spec)
    sys.modules["run_demo"] = run_demo  # dataclasses look their module up
    spec.loader.exec_module(run_demo)
    pieces = {
        1: b"a",
        2: b"b",
        3: "\N{EURO SIGN}".encode()[:1],
        4: b"\x82\xac",
        5: b"c",
    }

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return b"".join(pieces[i] for i in ids).decode(errors="replace")

    answer = run_demo.Answer("ours", Tokenizer(), {2: "green", 4: "cyan"})
    answer.add({"tokens": [(1, None)], "rejected": [], "seconds": 0.5})
    answer.add(
        {"tokens": [(2, 2), (3, 4), (4, None)], "rejected": [(5, 4)], "seconds": 1.0}
    )
    panel = answer.panel()
    text = panel.renderable
    assert text.plain == "abc\N{EURO SIGN}"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["b"] == "green"
    assert styles["c"] == "red strike"
    assert panel.subtitle == "4 tokens, 2 steps, 4 tok/s"
