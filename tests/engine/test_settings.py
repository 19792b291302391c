# SPDX-License-Identifier: Apache-2.0
"""Greedy texts equal plain vLLM's under settings that change the flow (I6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads
from tests.harness import (
    HEADS,
    Reference,
    adadecode_options,
    configure,
    generate,
    metric,
    set_policy,
    start_engine,
    stats,
)
from tests.renamed_model import rename_frequent_tokens
from tests.short_model import save_short_model

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_single_exits(
    prompts: list[str], reference: Reference, exit_index: int
) -> None:

    layer = load_heads_config(HEADS).exit_layers[exit_index]
    options = adadecode_options(exit_layers=[layer], threshold=0.5)
    with start_engine(**options) as llm:
        assert generate(llm, prompts) == reference["texts"]
        counted = stats(llm)
        assert counted["exit_layers"] == (layer,)
        assert counted["accepted"][0] > 0
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == reference["texts"]
        assert stats(llm)["rejected"][0] > 0


@pytest.mark.feature("chunked prefill", "supported")
@pytest.mark.feature("preemption", "supported")
def test_chunked_prefill_and_preemption(
    prompts: list[str], reference: Reference
) -> None:
    """A token budget below the prompts' lengths and a KV cache that is too small."""
    with start_engine(
        # Without guesses, which shift the steps: in this schedule requests are
        # preempted while tokens of theirs are pending.
        **adadecode_options(threshold=0.5, last_guess=False),
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=20,
        max_num_seqs=12,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        assert max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) > 48
        assert generate(llm, prompts) == reference["texts"]
        assert metric(llm, "vllm:num_preemptions") > 0
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        # What was pending when a request was preempted did not survive it.
        assert counted["dropped"]["not_scheduled"] > 0
        assert metric(llm, "vllm:prefix_cache_hits") == 0
        configure(llm, last_guess=True)
        assert generate(llm, prompts) == reference["texts"]
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == reference["texts"]
        assert sum(stats(llm)["rejected"]) > 0


def test_drafting_stops_above_a_batch_size(
    prompts: list[str], reference: Reference
) -> None:
    options = adadecode_options(threshold=0.5, disable_by_batch_size=2)
    with start_engine(**options) as llm:
        # All at once: only the last requests that are left may draft.
        assert generate(llm, prompts[:8]) == reference["texts"][:8]
        crowded = stats(llm)["early_predictions"]
        configure(llm)
        for prompt, text in zip(prompts[:8], reference["texts"], strict=False):
            assert generate(llm, [prompt]) == [text]
        assert sum(crowded) < sum(stats(llm)["early_predictions"]) / 2
        configure(llm)
        # Texts of equal length, so that all end in the same step.
        generate(llm, prompts[:3], max_tokens=8, ignore_eos=True)
        assert sum(stats(llm)["early_predictions"]) == 0


@pytest.mark.feature("torch.compile", "supported")
def test_compiled_as_vllm_does_by_default(tmp_path: Path, prompts: list[str]) -> None:
    """Also what the engine's own threshold never lets run and a request asks for."""
    model, heads = save_short_model(tmp_path, layers=5, exits=[2, 4])
    with start_engine(model) as llm:
        texts = generate(llm, prompts)
    options = adadecode_options(heads, threshold=1.0)
    extra_args = {"adadecode_threshold": 0.5}
    with start_engine(model, **options, enforce_eager=False) as llm:
        # One request first: what it compiled would be compiled for one row.
        assert generate(llm, prompts[:1], extra_args=extra_args) == texts[:1]
        assert generate(llm, prompts, extra_args=extra_args) == texts
        assert min(stats(llm)["accepted"]) > 0
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == texts
        assert sum(stats(llm)["rejected"]) > 0


@pytest.mark.slow  # its neighbour: two ranks on V2
@pytest.mark.feature("tensor parallel", "supported")
def test_tensor_parallel_2(
    prompts: list[str], reference: Reference, a_core_each: None
) -> None:
    """Every rank takes the same decisions (I7), with a vocab-parallel LM head."""
    options = adadecode_options(threshold=0.0)
    with start_engine(**options, tensor_parallel_size=2) as llm:
        assert generate(llm, prompts) == reference["texts"]
        ranks = llm.collective_rpc("adadecode_stats")
    assert len(ranks) == 2
    for counter in ("early_predictions", "accepted", "rejected", "resumed_tokens"):
        assert ranks[0][counter] == ranks[1][counter]
    assert sum(ranks[0]["accepted"]) > 0
    assert sum(ranks[0]["rejected"]) > 0


@pytest.mark.slow
@pytest.mark.feature("tensor parallel", "supported")
def test_a_ranking_of_half_the_vocabulary_is_used_by_default(
    tmp_path: Path, prompts: list[str], reference: Reference, a_core_each: None
) -> None:
    """Also where two ranks share the LM head and the ranking does not divide."""
    config = load_heads_config(HEADS)
    tensors = load_tensors(HEADS, config)
    assert tensors.draft_token_ids is not None
    size = config.vocab_size // 2 - 1
    save_heads(
        tmp_path / "heads",
        tensors.weights,
        config.model_copy(update={"draft_vocabulary": size}),
        tensors.draft_token_ids[:size],
    )
    options = adadecode_options(str(tmp_path / "heads"), threshold=0.3)
    with start_engine(**options, tensor_parallel_size=2) as llm:
        sizes = llm.collective_rpc(
            lambda worker: len(worker._adadecode.scorer._vocabulary.token_ids)
        )
        assert sizes == [size, size]
        texts = reference["texts"][:6]
        assert generate(llm, prompts[:6]) == texts
        ranks = llm.collective_rpc("adadecode_stats")
        # Both ranks follow an LM head with other rows.
        model = rename_frequent_tokens(tmp_path / "model", size)
        tokenizer = llm.get_tokenizer()
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts[:6]]
        path = str(model.directory)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        assert llm.reset_prefix_cache()
        configure(llm)
        given = [{"prompt_token_ids": prompt} for prompt in model.renamed(tokens)]
        assert generate(llm, given) == model.renamed(texts)
        renamed = llm.collective_rpc("adadecode_stats")
    assert sum(ranks[0]["accepted"]) > 0
    assert sum(ranks[0]["rejected"]) > 0
    for counter in ("accepted", "rejected"):
        assert ranks[0][counter] == ranks[1][counter]
        assert renamed[0][counter] == renamed[1][counter] == ranks[0][counter]
