# SPDX-License-Identifier: Apache-2.0
"""Greedy drafts are verified as vLLM's rejection sampler does, with less."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from adadecode_vllm.engine.greedy_verification import (
    only_largest_logits_count,
    verify_greedily,
)

VOCAB = 50
COUNTS = [3, 0, 1, 5, 2]


def sampling(**changes: Any) -> SamplingMetadata:
    none = torch.empty(0)
    greedy = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return replace(greedy, **changes)


def verified(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """As vLLM's runner describes them."""
    counts = np.array([len(own) for own in drafts], np.int32)
    rows = np.cumsum(counts + 1, dtype=np.int32)
    last = rows - 1
    targets = np.setdiff1d(np.arange(rows[-1], dtype=np.int32), last)
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor(list(chain(*drafts)), dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=torch.from_numpy(np.cumsum(counts, dtype=np.int32)),
        cu_num_sampled_tokens=torch.from_numpy(rows),
        target_logits_indices=torch.from_numpy(targets),
        bonus_logits_indices=torch.from_numpy(last),
        logits_indices=torch.arange(int(rows[-1]), dtype=torch.int32),
    )


@pytest.mark.skipif(HAS_TRITON, reason="the kernel itself runs on GPUs only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_it_says_what_vllm_says(seed: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(seed)
    rows = sum(COUNTS) + len(COUNTS)
    # No two alike, in bfloat16 either.
    values = np.arange(rows * VOCAB) % VOCAB
    values = generator.permuted(values.reshape(rows, VOCAB), axis=1)
    logits = torch.tensor(values, dtype=dtype)
    drafts, first = [], 0
    for count in COUNTS:
        own = values[first : first + count].argmax(axis=1)
        wrong = generator.random(count) < 0.3
        drafts.append(np.where(wrong, (own + 1) % VOCAB, own).tolist())
        first += count + 1
    metadata = verified(drafts)
    current_platform.register_triton_kernel_overrides()
    found = verify_greedily(logits, metadata)
    sampler = RejectionSampler(Sampler())
    expected = sampler(metadata, None, logits.clone(), sampling())
    assert found.sampled_token_ids.dtype == expected.sampled_token_ids.dtype
    assert found.sampled_token_ids.tolist() == expected.sampled_token_ids.tolist()
    assert found.logprobs_tensors is None
    lengths = {(row >= 0).sum() for row in found.sampled_token_ids.numpy()}
    assert len(lengths) > 1


def test_of_equal_logits_the_same_counts_as_without_drafts() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, [7, 30]] = 1.0
    (plain,) = set(Sampler.greedy_sample(logits).tolist())
    found = verify_greedily(logits, verified([[plain] * 3]))
    assert found.sampled_token_ids.tolist() == [[plain] * 4]


def processor(kind: type, **state: Any) -> Any:
    made = kind.__new__(kind)
    vars(made).update(state)
    return made


@pytest.mark.parametrize(
    ("changes", "only"),
    [
        ({}, True),
        ({"all_greedy": False}, False),
        ({"no_penalties": False}, False),
        ({"max_num_logprobs": 0}, False),
        ({"logprob_token_ids": {0: [1]}}, False),
        ({"allowed_token_ids_mask": torch.zeros(1, VOCAB)}, False),
        ({"bad_words_token_ids": {0: [[1]]}}, False),
        ({"thinking_budget_state_holder": True}, False),
        ({"thinking_budget_state_holder": False}, True),
    ],
)
def test_only_where_nothing_else_counts(changes: dict[str, Any], only: bool) -> None:
    if (tracked := changes.get("thinking_budget_state_holder")) is not None:
        holder = SimpleNamespace(has_tracked_requests=lambda: tracked)
        changes = {"thinking_budget_state_holder": holder}
    assert only_largest_logits_count(sampling(**changes)) is only


@pytest.mark.parametrize(
    ("own", "only"),
    [
        (processor(MinTokensLogitsProcessor, min_toks={}), True),
        (processor(MinTokensLogitsProcessor, min_toks={0: ()}), False),
        (processor(LogitBiasLogitsProcessor, biases={}), True),
        (processor(LogitBiasLogitsProcessor, biases={0: {1: 2.0}}), False),
        (SimpleNamespace(), False),  # a custom one
    ],
)
def test_processors_count_where_they_have_something_to_do(own: Any, only: bool) -> None:
    processors = LogitsProcessors()
    processors.non_argmax_invariant.append(own)
    assert only_largest_logits_count(sampling(logitsprocs=processors)) is only
