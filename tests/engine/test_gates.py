# SPDX-License-Identifier: Apache-2.0
"""What a gate looks at changes what is predicted early, never the text (I6)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.heads import load_heads_config, load_tensors
from tests.harness import (
    HEADS,
    MODEL,
    Reference,
    adadecode_options,
    configure,
    generate,
    start_engine,
    stats,
)
from tests.renamed_model import rename_frequent_tokens

pytestmark = pytest.mark.engine

FEW = 128


@pytest.fixture(scope="module")
def reduced(
    reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Gates over an eighth of the vocabulary; their heads are gone after start-up."""
    heads = tmp_path_factory.mktemp("gone") / "heads"
    shutil.copytree(HEADS, heads)
    options = adadecode_options(
        str(heads), policy="threshold", draft_vocabulary_size=FEW
    )
    with start_engine(**options) as llm:
        shutil.rmtree(heads)
        yield llm


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_reduced_draft_vocabulary(
    reduced: Any, prompts: list[str], reference: Reference, threshold: float
) -> None:
    configure(reduced, threshold=threshold)
    assert generate(reduced, prompts) == reference["texts"]
    counted = stats(reduced)
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0


def test_only_its_tokens_are_predicted(reduced: Any, prompts: list[str]) -> None:
    config = load_heads_config(HEADS)
    token_ids = load_tensors(HEADS, config).draft_token_ids
    assert token_ids is not None
    allowed = set(token_ids[:FEW].tolist())
    drafted: set[int] = set()

    def watch(worker: Any) -> None:
        adadecode = worker.model_runner.proposer.adadecode
        draft = adadecode.draft

        def draft_and_note(*args: Any) -> list[list[int]]:
            drafts = draft(*args)
            drafted.update(token for tokens in drafts for token in tokens)
            return drafts

        adadecode.draft = draft_and_note

    reduced.collective_rpc(watch)
    configure(reduced, threshold=0.0, last_guess=False)
    generate(reduced, prompts)
    assert len(drafted) > 20
    assert drafted <= allowed


def test_the_last_guess(reduced: Any, prompts: list[str], reference: Reference) -> None:
    """Where no exit is sure, the last one's guess goes into the same verification."""
    configure(reduced, threshold=0.9, max_early_predictions=5, last_guess=False)
    assert generate(reduced, prompts) == reference["texts"]
    without = stats(reduced)
    configure(reduced, last_guess=True)
    assert generate(reduced, prompts) == reference["texts"]
    guessed = stats(reduced)
    assert guessed["early_predictions"][2] > without["early_predictions"][2]
    assert guessed["accepted"][2] > without["accepted"][2]
    assert guessed["rejected"][2] > without["rejected"][2]
    assert guessed["request_steps"] < without["request_steps"]


@pytest.mark.feature("weight reload", "supported")
def test_a_draft_vocabulary_follows_a_reloaded_lm_head(
    reduced: Any, prompts: list[str], reference: Reference, tmp_path: Path
) -> None:
    """Its tokens have other rows, and as much is predicted and accepted as before."""
    model = rename_frequent_tokens(tmp_path / "model", FEW)
    tokenizer = reduced.get_tokenizer()
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]

    def run(weights: Path | str, tokens: list[list[int]]) -> Any:
        reduced.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        assert reduced.reset_prefix_cache()
        configure(reduced, threshold=0.3)
        given = [{"prompt_token_ids": prompt} for prompt in tokens]
        texts, counted = generate(reduced, given), stats(reduced)
        return texts, counted["accepted"], counted["rejected"]

    expected = run(MODEL, tokens)
    assert expected[0] == reference["texts"]
    assert sum(expected[1]) > 0
    found = run(model.directory, model.renamed(tokens))
    assert found == (model.renamed(expected[0]), *expected[1:])
    assert run(MODEL, tokens) == expected


def test_a_requests_own_threshold_on_acceptance(
    reduced: Any, prompts: list[str], reference: Reference
) -> None:
    """Where it lies on the exits' probabilities is known without the heads' files."""
    configure(reduced, gate="acceptance", threshold=1.0)

    def early(threshold: float) -> int:
        configure(reduced)
        extra_args = {"adadecode_threshold": threshold}
        assert generate(reduced, prompts, extra_args=extra_args) == reference["texts"]
        return sum(stats(reduced)["early_predictions"])

    assert early(0.3) > early(0.9) > 0
    configure(reduced, gate="probability")


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_corrupted_predictions_are_rejected(
    reduced: Any, prompts: list[str], reference: Reference, rate: float
) -> None:
    """Speed by acceptance: the text stays the model's, since verification is real."""
    options = {"threshold": 0.75, "last_guess": False}
    configure(reduced, **options, synthetic_acceptance_rate=rate)
    assert generate(reduced, prompts) == reference["texts"]
    counted = stats(reduced)
    configure(reduced, synthetic_acceptance_rate=None)
    accepted, rejected = sum(counted["accepted"]), sum(counted["rejected"])
    assert accepted + rejected > 200
    assert accepted / (accepted + rejected) == pytest.approx(rate, abs=0.08)
    assert 0 < counted["contradicted_requests"] <= len(prompts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_early_predictions": 9}, "reserved room for 8"),
        ({"threshold": 1.5}, "threshold = 1.5 is refused"),
        ({"exit_layers": [2]}, "cannot be changed"),
    ],
)
def test_what_a_running_engine_cannot_change(
    reduced: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Exception, match=sentence):
        reduced.collective_rpc("adadecode_configure", kwargs=options)
