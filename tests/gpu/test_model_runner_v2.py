# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CUDA device: compiled, in CUDA graphs; the demo model.

Float32 texts are plain vLLM's; bfloat16 texts may part at ties only (I6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.parity import (
    NUM_TOP_LOGITS,
    Parity,
    compare,
    first_difference,
    top_logits,
)
from tests.harness import (
    adadecode_options,
    configure,
    demo_corpus,
    generate,
    start_engine,
    stats,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Of several engines on one device, one after the other.
ENGINE: dict[str, Any] = {"gpu_memory_utilization": 0.3, "enforce_eager": False}
Reference = tuple[list[list[int]], list[list[list[list[float]]]]]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    corpus = demo_corpus()
    return corpus.heldout_problems(12) + corpus.heldout_code_prompts(4)


def _reference(prompts: list[str], dtype: str) -> Reference:
    """Plain vLLM's texts, and its best logits at each token."""
    from vllm import SamplingParams

    with start_engine(dtype=dtype, logprobs_mode="raw_logits", **ENGINE) as llm:
        texts = generate(llm, prompts)
        params = SamplingParams(temperature=0, max_tokens=40, logprobs=NUM_TOP_LOGITS)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    logits = [top_logits(output.outputs[0].logprobs) for output in outputs]
    return texts, logits


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: Any, prompts: list[str]) -> Iterator[tuple[str, Reference, Any]]:
    dtype: str = request.param
    reference = _reference(prompts, dtype)
    options = adadecode_options(policy="threshold", max_early_predictions=5)
    with start_engine(dtype=dtype, **options, **ENGINE) as llm:
        yield dtype, reference, llm


def _judge(case: tuple[str, Reference, Any], texts: list[list[int]]) -> Parity:
    dtype, (expected, logits), _ = case
    _show_differences(expected, texts, logits)
    return compare(expected, texts, logits if dtype == "bfloat16" else None)


def _show_differences(
    expected: list[list[int]],
    texts: list[list[int]],
    logits: list[list[list[list[float]]]],
) -> None:
    """Print where texts part, for the report of a test that fails."""
    for number, (reference, text) in enumerate(zip(expected, texts, strict=True)):
        index = first_difference(reference, text)
        if index is not None:
            print(  # noqa: T201
                f"text {number} parts at token {index}: {text[index : index + 1]}; "
                f"plain vLLM's best: {logits[number][index : index + 1]}"
            )


@pytest.mark.parametrize(("threshold", "cap"), [(0.0, 5), (0.5, 3), (0.75, 5), (1, 5)])
def test_texts(
    case: tuple[str, Reference, Any], prompts: list[str], threshold: float, cap: int
) -> None:
    dtype, _, llm = case
    configure(llm, threshold=threshold, max_early_predictions=cap)
    parity = _judge(case, generate(llm, prompts))
    counted = stats(llm)
    assert parity.different == 0
    if dtype == "float32":
        assert parity.ties == 0
    if threshold < 1:
        assert sum(counted["accepted"]) > 0
        assert counted["resumed_tokens"] > 0
    if threshold == 0.0:
        assert sum(counted["rejected"]) > 0


def test_one_at_a_time(case: tuple[str, Reference, Any], prompts: list[str]) -> None:
    _, _, llm = case
    configure(llm, threshold=0.5, max_early_predictions=5)
    texts = [generate(llm, [prompt])[0] for prompt in prompts]
    assert _judge(case, texts).different == 0


def test_draft_steps_run_in_graphs(
    case: tuple[str, Reference, Any], prompts: list[str]
) -> None:
    _, _, llm = case
    (measured,) = llm.collective_rpc("adadecode_profile")
    assert measured
    configure(llm, threshold=0.5, max_early_predictions=5)
    generate(llm, prompts[:1])
    counted = stats(llm)
    device_seconds, steps = counted["device_seconds"]["draft steps"]
    assert steps == sum(counted["draft_steps"]) > 0
    assert 0 < device_seconds < counted["drafting_seconds"]


def test_larger_batches_run_piecewise(
    case: tuple[str, Reference, Any], prompts: list[str]
) -> None:
    """A resumed forward beside a long prompt does not fit a graph."""
    _, (expected, _), llm = case
    configure(llm, threshold=0.5, max_early_predictions=5)
    longest = demo_corpus().heldout_code_prompts(1)[0] * 3
    texts = generate(llm, [*prompts[:2], longest, *prompts[2:4]])
    texts = texts[:2] + texts[3:]
    dtype, (_, logits), _ = case
    _show_differences(expected[:4], texts, logits[:4])
    parity = compare(expected[:4], texts, logits[:4] if dtype == "bfloat16" else None)
    assert parity.different == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_tensor_parallel_2(prompts: list[str], executor: str) -> None:
    """Every rank takes the same decisions (I7)."""
    if executor == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    parallel: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": executor,
        "multiprocessing": True,
        "dtype": "float32",
        **ENGINE,
    }
    with start_engine(**parallel) as llm:
        expected = generate(llm, prompts)
    with start_engine(**adadecode_options(threshold=0.3), **parallel) as llm:
        assert generate(llm, prompts) == expected
        ranks = llm.collective_rpc("adadecode_stats")
    assert len(ranks) == 2
    for counter in ("early_predictions", "accepted", "rejected", "resumed_tokens"):
        assert ranks[0][counter] == ranks[1][counter]
    assert sum(ranks[0]["accepted"]) > 0
