# SPDX-License-Identifier: Apache-2.0
"""Exits at the embedding and heads with memory: the same texts, and the very drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adadecode_vllm.heads import load_heads_config, load_tensors
from tests.harness import (
    MODEL,
    OUTPUT_TOKENS,
    Reference,
    adadecode_options,
    configure,
    generate,
    metric,
    start_engine,
    stats,
)
from tests.interpreted import process

pytestmark = [
    pytest.mark.engine,
    pytest.mark.feature("exits before the first layer, heads with memory", "supported"),
]
CAP = 4


@pytest.fixture(scope="module")
def heads(memory_heads: Path) -> Path:
    return memory_heads


@pytest.fixture(scope="module", params=["0", "0+2", "2+4"])
def engine(request: Any, heads: Path, reference: Reference) -> Iterator[Any]:
    layers = [int(layer) for layer in request.param.split("+")]
    options = adadecode_options(
        str(heads),
        exit_layers=layers,
        policy="threshold",
        max_early_predictions=CAP,
    )
    with start_engine(**options) as llm:
        llm.layers = layers
        yield llm


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_texts_are_the_same(
    engine: Any, prompts: list[str], reference: Reference, threshold: float
) -> None:
    configure(engine, threshold=threshold, last_guess=True)
    assert generate(engine, prompts) == reference["texts"]
    counted = stats(engine)
    assert (sum(counted["early_predictions"]) > 0) is (threshold < 1)
    if threshold < 1:
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
    # What was predicted before any layer is an ordinary token of the next forward.
    behind_layers = sum(
        scored
        for layer, scored in zip(engine.layers, counted["gates"], strict=True)
        if layer > 0
    )
    assert (counted["resumed_tokens"] > 0) is (behind_layers > 0)
    if threshold == 0.2:
        assert (behind_layers > 0) is (engine.layers != [0])


def test_beside_ngram_drafts(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    for ngram in ("tail", "first", "chain"):
        configure(engine, threshold=0.2, ngram=ngram)
        assert generate(engine, prompts) == reference["texts"]
        counted = stats(engine)
        assert counted["ngram_accepted"] > 0
        assert sum(counted["accepted"]) > 0
    configure(engine, ngram="off")


@dataclass
class Formula:
    """Drafts of one request in plain torch, on Transformers' model."""

    model: Any
    weights: dict[int, torch.Tensor]
    memory: dict[int, torch.Tensor]
    layers: list[int]
    threshold: float

    @torch.inference_mode()
    def drafts(self, token_ids: list[int], most: int) -> list[tuple[int, int]]:
        """Early predictions after verified tokens, each with its exit's layer."""
        tokens, found = list(token_ids), list[tuple[int, int]]()
        norm, lm_head = self.model.model.norm, self.model.lm_head
        memory: torch.Tensor | None = None
        while len(found) < most:
            # The last of Transformers' states is normed already.
            states = self.model(
                torch.tensor([tokens]), output_hidden_states=True
            ).hidden_states
            if memory is None:
                memory = states[-1][0, -2]
            for layer in self.layers:
                normed = norm(states[layer][0, -1])
                output = self.weights[layer] @ normed + self.memory[layer] @ memory
                top = lm_head(output).softmax(-1).max(-1)
                if float(top.values) > self.threshold:
                    break
            else:
                return found
            found.append((int(top.indices), layer))
            tokens.append(int(top.indices))
            memory = output
        return found


def test_drafts_are_those_of_the_formula(
    engine: Any, heads: Path, prompts: list[str]
) -> None:
    """Step by step, in a batch whose requests accept different numbers of drafts."""
    from vllm import SamplingParams

    tensors = load_tensors(heads, load_heads_config(heads))
    assert tensors.memory is not None
    formula = Formula(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        tensors.weights,
        tensors.memory,
        engine.layers,
        threshold=0.15,
    )
    configure(engine, threshold=0.15, last_guess=False)
    some = prompts[:5]
    core = engine.llm_engine
    for index, prompt in enumerate(some):
        params = SamplingParams(
            temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True
        )
        core.add_request(str(index), prompt, params)
    lengths, compared, exits = set[int](), 0, set[int]()
    while core.has_unfinished_requests():
        outputs = core.step()
        (drafts,) = engine.collective_rpc("adadecode_drafts")
        for output in outputs:
            generated = list(output.outputs[0].token_ids)
            left = OUTPUT_TOKENS - len(generated) - 1
            if output.finished or left < CAP:
                continue
            tokens = [*output.prompt_token_ids, *generated]
            (found,) = [
                early
                for request_id, early in drafts.items()
                if request_id.split("-")[0] == output.request_id
            ]
            assert found == formula.drafts(tokens, CAP)
            lengths.add(len(found))
            compared += 1
            exits |= {layer for _, layer in found}
    assert compared > 50
    assert len(lengths) > 2
    assert exits == set(engine.layers)


def test_with_preemption_and_chunked_prefill(
    heads: Path, prompts: list[str], reference: Reference
) -> None:
    options = adadecode_options(str(heads), exit_layers=[0, 2], threshold=0.2)
    with start_engine(
        **options,
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=9,
        max_num_seqs=6,
    ) as llm:
        assert generate(llm, prompts) == reference["texts"]
        assert metric(llm, "vllm:num_preemptions") > 0
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert counted["resumed_tokens"] > 0


@pytest.mark.parametrize("layers", [pytest.param([0], marks=pytest.mark.slow), [0, 2]])
def test_model_runner_v2(
    heads: Path, prompts: list[str], reference: Reference, layers: list[int]
) -> None:
    """With the same drafts whether steps run whole, as in CUDA graphs, or in parts."""
    options = adadecode_options(
        str(heads), exit_layers=layers, threshold=0.2, max_early_predictions=CAP
    )
    found = []
    with process.start_engine(**options) as llm:
        for whole in (False, True):
            llm.use_whole_steps(whole)
            llm.configure(threshold=0.2)
            assert llm.generate(prompts[:4]) == reference["texts"][:4]
            counted = llm.stats()
            assert (counted["resumed_tokens"] > 0) is (layers != [0])
            found.append([counted[name] for name in ("accepted", "rejected", "gates")])
    assert found[0] == found[1]
    assert all(map(sum, found[0]))
