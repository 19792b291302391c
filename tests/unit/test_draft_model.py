# SPDX-License-Identifier: Apache-2.0
"""The demo's small draft model: fits the demo, and can be trained anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.draft_model import (
    TOKENIZER_FILES,
    Demo,
    Recipe,
    Text,
    agreement,
    build_draft,
    make_draft,
    predict,
    training_texts,
)
from tests.harness import DEMO, demo_corpus

MODEL, DRAFT = DEMO / "model", DEMO / "draft"
TINY = Recipe(
    hidden_size=16,
    intermediate_size=16,
    layers=1,
    answers=4,
    open_ended=0.5,
    solutions=4,
    continuations=2,
    code=2,
    code_tokens=64,
    new_tokens=8,
    batch=4,
    warm_up_steps=1,
    heldout_problems=2,
    heldout_code=2,
    max_steps=2,
)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(MODEL)


def parameters(path: Path) -> int:
    return LlamaForCausalLM.from_pretrained(path).num_parameters()


def test_the_shipped_draft_fits_the_demo() -> None:
    assert parameters(DRAFT) <= 0.12 * parameters(MODEL)
    assert sum(path.stat().st_size for path in DRAFT.iterdir()) < 1_500_000
    configs = [json.loads((p / "config.json").read_text()) for p in (MODEL, DRAFT)]
    for name in ("vocab_size", "max_position_embeddings", "eos_token_id", "dtype"):
        assert configs[0][name] == configs[1][name]
    for name in TOKENIZER_FILES:
        assert (DRAFT / name).read_bytes() == (MODEL / name).read_bytes()
    text = demo_corpus().heldout_problems(1)[0]
    ids = [AutoTokenizer.from_pretrained(p)(text)["input_ids"] for p in (MODEL, DRAFT)]
    assert ids[0] == ids[1]


def test_the_shipped_draft_agrees_as_its_report_says(demo: Demo) -> None:
    report = json.loads((DRAFT / "training.json").read_text())
    said = report["agreement_with_demo"]["problems"]["same_argmax"]
    draft = LlamaForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    texts = demo.answer(demo.encode(demo_corpus().heldout_problems(16)), 96)
    demo.add_states(texts)
    assert agreement(draft, demo, texts) == pytest.approx(said, abs=0.05)


def test_training_texts(demo: Demo) -> None:
    texts = training_texts(TINY, demo)
    assert len(texts) == 4 + 4 + 2 + 2
    for text in texts:
        assert text.ids[0] == demo.tokenizer.bos_token_id
        assert 1 <= text.start < len(text.ids)
        assert text.states is not None
        assert text.states.shape == (len(text.ids) - text.start, 128)
    # The demo's own answers are what it predicts, padding or not.
    for text in texts[:4] + texts[-2:]:
        greedy = demo.logits([text]).argmax(-1)
        assert greedy.tolist() == text.ids[text.start :].tolist()
    # A worked answer begins where the prompt ends.
    solution = demo.tokenizer.decode(texts[4].ids[texts[4].start :])
    assert solution.startswith("1. ")
    assert solution.endswith("</s>")


def test_padding_changes_nothing(demo: Demo) -> None:
    draft = build_draft(TINY, demo)
    texts = [Text(torch.arange(3, 3 + n), 2) for n in (5, 9)]
    with torch.no_grad():
        together = predict(draft, texts)
        alone = torch.cat([predict(draft, [text]) for text in texts])
    torch.testing.assert_close(together, alone)


def test_two_steps(tmp_path: Path) -> None:
    make_draft(TINY, MODEL, tmp_path / "draft", minutes=10)
    report: dict[str, Any] = json.loads((tmp_path / "draft/training.json").read_text())
    assert report["progress"]["step"] == 2
    assert report["recipe"]["hidden_size"] == 16
    assert report["parameters"] == parameters(tmp_path / "draft")
    assert set(report["agreement_with_demo"]) == {"problems", "code"}
    draft = LlamaForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft.dtype == torch.bfloat16
    assert (tmp_path / "draft/tokenizer.json").exists()
