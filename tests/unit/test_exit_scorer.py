# SPDX-License-Identifier: Apache-2.0
"""Gates over a reduced draft vocabulary, without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adadecode_vllm.config import AdaDecodeConfig, parse_config
from adadecode_vllm.engine import exit_scorer as scorer_module
from adadecode_vllm.engine import served_heads
from adadecode_vllm.engine.exit_heads import ExitHeads
from adadecode_vllm.engine.exit_scorer import DraftVocabulary, ExitScorer
from adadecode_vllm.engine.heads_fit import resolve_draft_vocabulary
from adadecode_vllm.engine.served_heads import load_served_heads
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig, save_heads
from tests.tiny import FINGERPRINT

SIZE, VOCAB = 8, 40


def decoder(**processor: Any) -> Any:
    torch.manual_seed(0)
    head = nn.Linear(SIZE, VOCAB, bias=False)
    options = SimpleNamespace(scale=1.0, soft_cap=None)
    for name, value in processor.items():
        setattr(options, name, value)

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        if options.soft_cap is not None:
            logits = torch.tanh(logits / options.soft_cap) * options.soft_cap
        return logits * options.scale

    return SimpleNamespace(
        lm_head=head,
        norm=lambda hidden, residual: (hidden + residual, None),
        dtype=torch.float32,
        device=torch.device("cpu"),
        logits_processor=options,
        compute_logits=compute_logits,
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scorer_module, served_heads):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(6, SIZE, generator=generator),
        torch.randn(6, SIZE, generator=generator),
    )


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"soft_cap": 2.0}])
@torch.inference_mode()
def test_the_logits_are_the_whole_heads(
    options: dict[str, Any], states: tuple[torch.Tensor, torch.Tensor]
) -> None:
    parts = decoder(**options)
    chosen = torch.tensor([7, 3, 39, 0, 12])
    logits = DraftVocabulary(parts, chosen)(states[0])
    torch.testing.assert_close(logits, parts.compute_logits(states[0])[:, chosen])


@pytest.mark.parametrize("copied", [1, 2, 4096])
@pytest.mark.parametrize("packed", [True, False])
@torch.inference_mode()
def test_it_follows_an_lm_head_with_other_weights(
    states: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    copied: int,
) -> None:
    """However the rows are kept, and however many are copied at a time."""
    monkeypatch.setattr(scorer_module, "_COPIED_ROWS", copied)
    if not packed:  # as on a GPU
        monkeypatch.setattr(
            "adadecode_vllm.engine.packed_linear.dispatch_cpu_unquantized_gemm",
            lambda layer, remove_weight: None,
        )
    parts = decoder()
    chosen = torch.tensor([7, 3, 39, 0, 12])
    vocabulary = DraftVocabulary(parts, chosen)
    rows = vocabulary._head.weight
    before = vocabulary(states[0])
    parts.lm_head.weight.data.normal_()
    expected = parts.compute_logits(states[0])[:, chosen]
    assert not torch.allclose(before, expected)
    vocabulary.refresh()
    torch.testing.assert_close(vocabulary(states[0]), expected)
    if not packed:  # CUDA graphs know the address
        assert vocabulary._head.weight.data_ptr() == rows.data_ptr()
        assert torch.equal(rows, parts.lm_head.weight[chosen])


@torch.inference_mode()
def test_what_the_model_cannot_bring_back() -> None:
    """Of a draft vocabulary its tokens, and not the rows."""
    parts = decoder()
    heads = ExitHeads(
        {2: torch.randn(SIZE, SIZE), 3: torch.randn(SIZE, SIZE)}, torch.float32
    )
    scorer = ExitScorer(parts, heads, [2, 3], torch.tensor([1, 5]))
    assert sorted(scorer.lasting()) == [
        "_vocabulary.token_ids",
        "transforms.2.weight",
        "transforms.3.weight",
    ]
    assert list(ExitScorer(parts, heads, [2, 3]).lasting()) == [
        "transforms.2.weight",
        "transforms.3.weight",
    ]


@torch.inference_mode()
def test_tokens_have_their_own_ids(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    parts = decoder()
    heads = ExitHeads({2: torch.randn(SIZE, SIZE)}, torch.float32)
    chosen = torch.arange(VOCAB - 1, 4, -1)
    whole = ExitScorer(parts, heads, [2])(0, *states)
    some = ExitScorer(parts, heads, [2], chosen)(0, *states)
    among = torch.isin(whole[0], chosen)
    assert 0 < among.sum() < len(among), "both cases are met"
    assert torch.equal(some[0][among], whole[0][among])
    assert torch.isin(some[0], chosen).all()
    # A distribution over fewer tokens is never less sure of the same one.
    assert (some[1][among] >= whole[1][among]).all()


def test_a_quantized_head_is_refused() -> None:
    parts = decoder()
    parts.lm_head = SimpleNamespace(qweight=torch.zeros(1))
    with pytest.raises(AdaDecodeError, match=r"draft_vocabulary_size is .*Set it to 0"):
        DraftVocabulary(parts, torch.tensor([1]))


def heads_config(stored: int | None) -> ExitHeadsConfig:
    return ExitHeadsConfig(
        exit_layers=[2],
        hidden_size=SIZE,
        vocab_size=VOCAB,
        num_hidden_layers=4,
        base_model="M",
        lm_head_fingerprint=FINGERPRINT,
        draft_vocabulary=stored,
    )


def wanted(size: int | None) -> AdaDecodeConfig:
    return parse_config({"heads": "H", "draft_vocabulary_size": size})


@pytest.mark.parametrize(
    ("size", "stored", "resolved"),
    [
        (None, None, 0),
        (None, VOCAB // 2, VOCAB // 2),
        (None, VOCAB // 2 + 1, 0),
        (0, VOCAB // 2, 0),
        (0, None, 0),
        (5, VOCAB, 5),
    ],
)
def test_which_tokens_an_exit_looks_at(
    size: int | None, stored: int | None, resolved: int
) -> None:
    assert resolve_draft_vocabulary(wanted(size), heads_config(stored)) == resolved


@pytest.mark.parametrize(
    ("size", "stored", "sentence"),
    [(5, None, "has no draft vocabulary"), (6, 5, "ranks only 5 tokens")],
)
def test_more_tokens_than_are_ranked_are_refused(
    size: int, stored: int | None, sentence: str
) -> None:
    with pytest.raises(AdaDecodeError, match=sentence):
        resolve_draft_vocabulary(wanted(size), heads_config(stored))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_lm_head_has_no_rows_to_choose_from(dtype: torch.dtype) -> None:
    parts = decoder()
    parts.lm_head = SimpleNamespace(weight=torch.zeros(VOCAB, SIZE).to(dtype))
    with pytest.raises(AdaDecodeError, match="LM head is quantized and has no rows"):
        DraftVocabulary(parts, torch.tensor([1, 2]))


@pytest.fixture
def ranking_heads(tmp_path: Path) -> str:
    """Heads that rank half of the vocabulary."""
    ranked = torch.arange(VOCAB // 2)
    save_heads(tmp_path, {2: torch.eye(SIZE)}, heads_config(None), ranked)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("size", "quantized", "looked_at"),
    [
        (None, False, VOCAB // 2),
        (None, True, None),
        (0, True, None),
        # What was given is left to be refused.
        (5, True, 5),
    ],
)
def test_by_default_all_tokens_where_the_lm_head_is_quantized(
    ranking_heads: str,
    monkeypatch: pytest.MonkeyPatch,
    size: int | None,
    quantized: bool,
    looked_at: int | None,
) -> None:
    """Said once; every rank has the same kind of LM head."""
    lines: list[str] = []
    monkeypatch.setattr(
        served_heads.logger, "info_once", lambda line, **_: lines.append(line)
    )
    options = {"exit_layers": [2], "draft_vocabulary_size": size}
    dtype = torch.int8 if quantized else torch.float32
    parts: Any = SimpleNamespace(
        # Rows of zeros are anybody's.
        lm_head=SimpleNamespace(weight=torch.zeros((VOCAB, SIZE), dtype=dtype)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    config = parse_config({"heads": ranking_heads, **options})
    found = load_served_heads(config, parts, "M").draft_token_ids
    assert (None if found is None else len(found)) == looked_at
    assert len(lines) == (size is None and quantized)
