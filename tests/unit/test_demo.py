# SPDX-License-Identifier: Apache-2.0
"""The shipped demo: small, and evaluated on text that it was not trained on."""

from __future__ import annotations

import itertools

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
