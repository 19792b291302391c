# SPDX-License-Identifier: Apache-2.0
"""Losses and hand-written gradients against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adadecode_vllm.toolkit.training.objective import Objective, evaluate

N, D, V = 23, 8, 31


def make(full_size: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    weight = torch.randn(V if full_size else D, D)
    return torch.randn(N, D), torch.randn(N, D), torch.randn(V, D), weight


@pytest.mark.parametrize("full_size", [False, True])
@pytest.mark.parametrize("objective", ["kl", "greedy"])
def test_loss_and_gradient_equal_autograd(
    objective: Objective, full_size: bool
) -> None:
    inputs, final, lm_head, weight = make(full_size)
    leaf = weight.clone().requires_grad_()
    logits = inputs @ leaf.T if full_size else inputs @ leaf.T @ lm_head.T
    teacher = final @ lm_head.T
    if objective == "kl":
        loss = functional.kl_div(
            logits.log_softmax(-1),
            teacher.log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
    else:
        loss = functional.cross_entropy(logits, teacher.argmax(-1), reduction="sum")
    loss.backward()

    gradients = {2: torch.zeros_like(weight)}
    found = evaluate(
        {2: weight},
        {2: inputs},
        final,
        lm_head,
        objective=objective,
        chunk_tokens=5,
        gradients=gradients,
    )[2]
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.tokens == N
    assert found.agreed == int((logits.argmax(-1) == teacher.argmax(-1)).sum())
    torch.testing.assert_close(gradients[2], leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_do_not_matter(chunk_tokens: int) -> None:
    inputs, final, lm_head, weight = make(False)
    results = []
    for size in (chunk_tokens, N):
        gradients = {1: torch.zeros_like(weight)}
        found = evaluate(
            {1: weight},
            {1: inputs},
            final,
            lm_head,
            objective="kl",
            chunk_tokens=size,
            gradients=gradients,
        )
        results.append((found[1].loss, gradients[1]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)


def test_the_final_states_themselves_have_no_divergence() -> None:
    _, final, lm_head, _ = make(False)
    found = evaluate(
        {1: torch.eye(D)},
        {1: final},
        final,
        lm_head,
        objective="kl",
        chunk_tokens=8,
    )[1]
    assert found.loss == pytest.approx(0, abs=1e-3)
    assert found.agreed == N


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    torch.manual_seed(0)
    tokens, vocabulary, chunk = 400, 300, 10
    inputs, final = torch.randn(2, tokens, D)
    weight = torch.eye(D)
    with _LargestTensor() as largest:
        evaluate(
            {1: weight, 2: weight},
            {1: inputs, 2: inputs},
            final,
            torch.randn(vocabulary, D),
            objective="kl",
            chunk_tokens=chunk,
            gradients={1: torch.zeros(D, D), 2: torch.zeros(D, D)},
        )
    assert chunk * vocabulary <= largest.elements <= max(chunk * vocabulary, tokens * D)
