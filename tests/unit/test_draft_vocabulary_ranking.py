# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary's ranking: counted, of a training and by the command."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import load_texts, split_held_out
from adadecode_vllm.toolkit.training import draft_vocabulary
from adadecode_vllm.toolkit.training.draft_vocabulary import (
    MAX_TOKENS,
    count_tokens,
    rank_tokens,
)
from adadecode_vllm.toolkit.training.output import alone
from tests.command import run
from tests.data_directory import write_rows
from tests.harness import DEMO
from tests.published_heads import DRAFT_VOCABULARY_ROW as ROW
from tests.tiny import VOCAB_SIZE
from tests.training import train

# The ranking


def test_ties_are_ranked_by_id() -> None:
    counts = count_tokens([[5, 2, 2], [9, 5], [7]], 10)
    assert counts.tolist() == [0, 0, 2, 0, 0, 2, 0, 1, 0, 1]
    assert rank_tokens(counts).tolist() == [2, 5, 7, 9]
    assert rank_tokens(counts, 3).tolist() == [2, 5, 7]
    assert rank_tokens(counts).dtype == torch.int64


@given(st.lists(st.lists(st.integers(0, 19), max_size=8), max_size=8))
def test_the_ranking_is_that_of_a_counter(answers: list[list[int]]) -> None:
    expected = Counter(token for answer in answers for token in answer)
    counts = count_tokens(answers, 20)
    assert rank_tokens(counts).tolist() == sorted(
        expected, key=lambda token: (-expected[token], token)
    )


def test_text_is_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "_CHUNK", 4)
    answers = [list(range(index % 7)) for index in range(30)]
    expected = Counter(token for answer in answers for token in answer)
    counts = count_tokens(answers, 8)
    assert counts.tolist() == [expected[token] for token in range(8)]


def test_the_ranking_is_bounded() -> None:
    counts = torch.ones(MAX_TOKENS + 5, dtype=torch.int64)
    assert rank_tokens(counts).tolist() == list(range(MAX_TOKENS))


@pytest.mark.parametrize("token", [-1, 10])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 10"):
        count_tokens([[1, token]], 10)


# Training


def test_training_ranks_the_tokens_that_it_predicts(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path / "heads", epochs=1, held_out=0.2, max_length=12)
    texts, _ = split_held_out(load_texts([data], teacher, 12), 0.2, 0)
    expected = Counter(token for text in texts for token in text.answer)
    config = load_heads_config(tmp_path / "heads")
    token_ids = load_tensors(tmp_path / "heads", config).draft_token_ids
    assert token_ids is not None
    assert token_ids.tolist() == sorted(
        expected, key=lambda token: (-expected[token], token)
    )
    assert config.draft_vocabulary == len(expected) < VOCAB_SIZE
    assert "| Draft vocabulary | the " in (tmp_path / "heads/README.md").read_text()


# The command


def small_data(
    directory: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    vocab_size: int = 1024,
) -> Path:
    """Write data in which 900 occurs five times, 8 and 20 twice and 3 once."""
    rows = rows or [
        ([4, 5, 6], [900, 900, 8, 20]),  # an answer: its prompt is not predicted
        ([], [17, 900, 900, 900, 8]),  # finished text: its first token is not
        ([1], [20, 3]),
    ]
    return write_rows(directory, rows, vocab_size=vocab_size)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo's heads as they are without a draft vocabulary."""
    directory = tmp_path / "demo"
    shutil.copytree(DEMO / "heads", directory)
    config = load_heads_config(directory)
    save_heads(
        directory,
        load_tensors(directory, config).weights,
        config.model_copy(update={"draft_vocabulary": None}),
    )
    return directory


def test_the_command_ranks_the_tokens_of_data(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "data")
    config = load_heads_config(demo)
    before = load_tensors(demo, config).weights
    assert run("draft-vocabulary", demo, "--data", data) == 0
    assert capsys.readouterr().out == (
        "10 tokens of text, 4 distinct\n"
        "the first 25% of the ranking, 1 tokens: 50.0% of the text\n"
        "the first 50% of the ranking, 2 tokens: 70.0% of the text\n"
        "the first 100% of the ranking, 4 tokens: 100.0% of the text\n"
        f"Wrote a draft vocabulary of 4 tokens to {demo}\n"
        "What is known of the exits' probabilities was measured among other tokens "
        "than the 4 that gates now see; `adadecode train --draft-vocabulary` measures "
        "it anew\n"
    )
    after = load_heads_config(demo)
    assert after == config.model_copy(update={"draft_vocabulary": 4})
    token_ids = load_tensors(demo, after).draft_token_ids
    assert token_ids is not None
    assert token_ids.tolist() == [900, 8, 20, 3]
    weights = load_tensors(demo, after).weights
    for layer, weight in before.items():
        assert weights[layer].numpy().tobytes() == weight.numpy().tobytes()
    assert (demo / "README.md").read_text().count(ROW) == 1
    assert sorted(os.listdir(demo)) == sorted(os.listdir(DEMO / "heads"))


def test_the_command_adds_data_up_and_replaces_what_was_there(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_data(tmp_path / "first")
    second = small_data(tmp_path / "second", [([1], [3] * 5)])
    assert run("draft-vocabulary", demo, "--data", first) == 0
    argv = ("--data", first, "--data", second, "--size", "2")
    assert run("draft-vocabulary", demo, *argv) == 0
    assert "the first 100% of the ranking, 2 tokens: 73.3%" in capsys.readouterr().out
    token_ids = load_tensors(demo, load_heads_config(demo)).draft_token_ids
    assert token_ids is not None
    assert token_ids.tolist() == [3, 900]
    assert "the 2 most frequent tokens" in (demo / "README.md").read_text()


def test_the_command_leaves_other_cards_alone(demo: Path, tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    (tmp_path / "card.md").write_text((demo / "README.md").read_text())
    (demo / "README.md").unlink()
    assert run("draft-vocabulary", demo, "--data", data) == 0
    assert not (demo / "README.md").exists()
    (demo / "README.md").symlink_to(tmp_path / "card.md")
    before = (tmp_path / "card.md").read_bytes()
    assert run("draft-vocabulary", demo, "--data", data) == 0
    assert (demo / "README.md").is_symlink()
    assert (tmp_path / "card.md").read_bytes() == before
    (demo / "README.md").unlink()
    (demo / "README.md").write_bytes(b"\xff\xfe")
    assert run("draft-vocabulary", demo, "--data", data) == 0
    assert (demo / "README.md").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        (None, 1000, "it was tokenised for tiny with a vocabulary of 1000, and that"),
        ([([1], [1024])], 1024, "it holds token ids outside the vocabulary of 1024; "),
        ([([], [7])], 1024, "no text has a token to predict; give more text"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: Any,
    vocab_size: int,
    message: str,
) -> None:
    data = small_data(tmp_path / "data", rows, vocab_size)
    before = (demo / "config.json").read_bytes()
    assert run("draft-vocabulary", demo, "--data", data) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --data {data}: {message}")
    assert error.count("\n") == 1
    assert (demo / "config.json").read_bytes() == before


def test_damaged_data_is_called_so(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "data")
    path = data / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    assert run("draft-vocabulary", demo, "--data", data) == 2
    expected = f"error: --data {data}: part-00000.parquet is damaged ("
    assert capsys.readouterr().err.startswith(expected)


def test_missing_heads_or_data_is_one_sentence(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("draft-vocabulary", demo, "--data", tmp_path / "none") == 2
    assert f"error: --data {tmp_path / 'none'}: " in capsys.readouterr().err
    data = small_data(tmp_path / "data")
    assert run("draft-vocabulary", tmp_path / "none", "--data", data) == 2
    assert f"error: HEADS {tmp_path / 'none'}: " in capsys.readouterr().err


def test_heads_that_are_being_trained_are_left_alone(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "d", [([], [5] * 9)], vocab_size=1024)
    before = {path.name: path.read_bytes() for path in demo.iterdir()}
    with alone(demo):
        assert run("draft-vocabulary", demo, "--data", data) == 2
    assert "`adadecode train` is writing there" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in demo.iterdir()} == before


def test_the_shipped_heads_have_one() -> None:
    config = load_heads_config(DEMO / "heads")
    token_ids = load_tensors(DEMO / "heads", config).draft_token_ids
    assert token_ids is not None
    assert len(token_ids) <= config.vocab_size
    # The end of an answer can be predicted early as well.
    model = json.loads((DEMO / "model" / "config.json").read_text())
    assert model["eos_token_id"] in token_ids
