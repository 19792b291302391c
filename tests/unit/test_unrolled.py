# SPDX-License-Identifier: Apache-2.0
"""Heads with memory along known texts, against loops over cycles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.nn import functional

from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.toolkit.evaluation.answers import known_answers
from adadecode_vllm.toolkit.evaluation.measure import measure
from adadecode_vllm.toolkit.evaluation.simulate import Setting, total
from adadecode_vllm.toolkit.states.teacher import KeyValues, Teacher
from adadecode_vllm.toolkit.states.texts import load_texts
from adadecode_vllm.toolkit.training import ridge
from adadecode_vllm.toolkit.training.objective import Objective, evaluate_unrolled
from adadecode_vllm.toolkit.training.probe import choose_exits
from adadecode_vllm.toolkit.training.ridge import ridge_heads
from tests.data_directory import write_answers
from tests.tiny import NUM_LAYERS
from tests.unit.test_training_objective import _LargestTensor

D, V = 6, 19
LENGTHS = [7, 1, 2, 11, 3]
N = sum(LENGTHS)
UNROLL = 3
LOW = 0.0127
"""The tiny model is hardly ever surer."""

Cycle = Callable[[int, int, torch.Tensor], None]


def make(count: int = 1, **kind: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(count, N, D, **kind),
        torch.randn(N, D, **kind),
        torch.randn(V, D, **kind),
        torch.randn(count, D, D, **kind) / 2,
        torch.randn(count, D, D, **kind) / 2,
    )


def walk(
    inputs: torch.Tensor,
    final: torch.Tensor,
    weight: torch.Tensor,
    memory: torch.Tensor,
    visit: Cycle,
) -> None:
    """Every cycle of every text, draft by draft: (position, draft, output)."""
    start = 0
    for length in LENGTHS:
        for first in range(length):
            before = final[start + first - 1] if first else torch.zeros_like(final[0])
            for draft in range(min(UNROLL, length - first)):
                position = start + first + draft
                before = weight @ inputs[position] + memory @ before
                visit(position, draft, before)
        start += length


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 1000])
@pytest.mark.parametrize("objective", ["kl", "greedy"])
def test_loss_and_gradient_equal_autograd_through_the_cycles(
    objective: Objective, chunk_tokens: int
) -> None:
    states, final, lm_head, weights, memories = make(2, dtype=torch.float64)
    gradients = {
        layer: (torch.zeros(D, D).double(), torch.zeros(D, D).double())
        for layer in (0, 2)
    }
    found = evaluate_unrolled(
        dict(zip((0, 2), weights, strict=True)),
        dict(zip((0, 2), memories, strict=True)),
        dict(zip((0, 2), states, strict=True)),
        final,
        LENGTHS,
        lm_head,
        objective=objective,
        chunk_tokens=chunk_tokens,
        unroll=UNROLL,
        gradients=gradients,
    )
    teacher = final @ lm_head.T
    for index, layer in enumerate((0, 2)):
        leaves = [x[index].clone().requires_grad_() for x in (weights, memories)]
        losses: list[list[torch.Tensor]] = [[] for _ in range(UNROLL)]
        agreed = [0] * UNROLL

        def visit(
            position: int,
            draft: int,
            output: torch.Tensor,
            losses: list[list[torch.Tensor]] = losses,
            agreed: list[int] = agreed,
        ) -> None:
            logits, target = lm_head @ output, teacher[position]
            agreed[draft] += int(logits.argmax() == target.argmax())
            if objective == "kl":
                loss = functional.kl_div(
                    logits.log_softmax(-1),
                    target.log_softmax(-1),
                    reduction="sum",
                    log_target=True,
                )
            else:
                loss = functional.cross_entropy(logits, target.argmax())
            losses[draft].append(loss)

        walk(states[index], final, leaves[0], leaves[1], visit)
        torch.stack([torch.stack(part).sum() for part in losses]).sum().backward()
        for draft in range(UNROLL):
            assert found[layer][draft].tokens == len(losses[draft])
            assert found[layer][draft].agreed == agreed[draft]
            expected = torch.stack(losses[draft]).sum().item()
            assert found[layer][draft].loss == pytest.approx(expected, rel=1e-9)
        for gradient, leaf in zip(gradients[layer], leaves, strict=True):
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-9)
    assert [draft.tokens for draft in found[0]] == [24, 19, 15]


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    torch.manual_seed(0)
    tokens, vocabulary, chunk = 400, 300, 10
    inputs, final = torch.randn(2, tokens, D)
    with _LargestTensor() as largest:
        evaluate_unrolled(
            {1: torch.eye(D)},
            {1: torch.eye(D)},
            {1: inputs},
            final,
            [tokens],
            torch.randn(vocabulary, D),
            objective="kl",
            chunk_tokens=chunk,
            unroll=UNROLL,
            gradients={1: (torch.zeros(D, D), torch.zeros(D, D))},
        )
    assert chunk * vocabulary <= largest.elements <= max(chunk * vocabulary, tokens * D)


class Source:
    """States by hand."""

    def __init__(self, inputs: torch.Tensor, final: torch.Tensor) -> None:
        self.layers = [2, 4]
        self.all = [
            torch.stack(pair)
            for pair in zip(inputs.split(LENGTHS), final.split(LENGTHS), strict=True)
        ]

    def __len__(self) -> int:
        return len(LENGTHS)

    def states(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.cat([self.all[index] for index in indices], dim=1)

    def lengths(self, indices: Sequence[int]) -> list[int]:
        return [LENGTHS[index] for index in indices]


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_every_draft_of_a_cycle_is_measured(chunk_tokens: int, batch: int) -> None:
    (inputs,), final, lm_head, (weight,), (memory,) = make()
    token_ids = torch.tensor([3, 11, 0, 7, 5])
    found = measure(
        {2: weight},
        Source(inputs, final),
        lm_head,
        memory={2: memory},
        drafts=UNROLL,
        draft_token_ids=token_ids,
        chunk_tokens=chunk_tokens,
        batch=batch,
    )[2]
    expected: list[tuple[int, int, bool]] = []
    top = (final @ lm_head.T).argmax(-1)

    def visit(position: int, draft: int, output: torch.Tensor) -> None:
        token = token_ids[(lm_head[token_ids] @ output).argmax()]
        expected.append((draft, int(token), bool(token == top[position])))

    walk(inputs, final, weight, memory, visit)
    rows = zip(found.draft, found.token, found.agreed, strict=True)
    assert sorted(map(tuple, rows)) == sorted(expected)
    right = [[agreed for d, _, agreed in expected if d == draft] for draft in range(3)]
    assert found.agreement_by_draft == [sum(r) / len(r) for r in right]


# Least squares


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("most", [20, 1000])
def test_least_squares_find_what_there_is(
    memory: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "MOST_TOKENS", most)
    monkeypatch.setattr(ridge, "_RIDGE", 1e-6)
    (inputs,), final, _, (weight,), (matrix,) = make()
    start = 0
    for length in LENGTHS:
        for position in range(start, start + length):
            final[position] = weight @ inputs[position]
            if memory and position > start:
                final[position] += matrix @ final[position - 1]
        start += length
    if most == 20:  # the first four texts have 21 tokens: the last counts for nothing
        final[sum(LENGTHS[:4]) :] = 7
    found = ridge_heads(Source(inputs, final), [2], memory=memory)
    assert list(found) == [2]
    torch.testing.assert_close(found[2][0], weight, rtol=1e-3, atol=1e-3)
    if memory:
        assert found[2][1] is not None
        torch.testing.assert_close(found[2][1], matrix, rtol=1e-3, atol=1e-3)
    else:
        assert found[2][1] is None


# The simulation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_answers(tmp_path_factory.mktemp("data") / "d", model, 6, 20)


def heads(teacher: Teacher, layers: Sequence[int]) -> list[dict[int, torch.Tensor]]:
    torch.manual_seed(3)
    size = teacher.hidden_size
    return [
        {layer: torch.eye(size) * own + torch.randn(size, size) / 9 for layer in layers}
        for own in (1, 0.3)
    ]


@pytest.mark.parametrize("draft_vocabulary", [False, True])
@pytest.mark.parametrize("layers", [(0,), (0, 2), (1, 3)])
def test_gates_remember_what_the_drafts_heads_said(
    teacher: Teacher, data: Path, layers: tuple[int, ...], draft_vocabulary: bool
) -> None:
    """Asked in the simulation's order, and compared with whole passes of the model."""
    weights, memory = heads(teacher, layers)
    texts = load_texts([data], teacher, None)[:3]
    token_ids = torch.arange(0, 90, 2) if draft_vocabulary else None
    answers = known_answers(
        teacher, layers, weights, texts, draft_token_ids=token_ids, memory=memory
    )
    assert len(answers) == 3
    scored = 0

    def expected(text: tuple[int, ...], drafts: tuple[int, ...], last: int) -> int:
        streams = teacher.streams([text], [*layers, NUM_LAYERS])
        front = len(text) - 1 - len(drafts)
        carried = streams[NUM_LAYERS][front - 1]
        for place, exit_index in enumerate((*drafts, last)):
            layer = layers[exit_index]
            state = streams[layer][front + place]
            carried = weights[layer] @ state + memory[layer] @ carried
        logits = teacher.lm_head @ carried
        if token_ids is None:
            return int(logits.argmax())
        return int(token_ids[logits[token_ids].argmax()])

    for text, answer in zip(texts, answers, strict=True):
        inner = answer.scores

        def scores(
            prefix: tuple[int, ...],
            drafted_by: tuple[int, ...],
            exit_index: int,
            inner: Callable[..., tuple[int, float]] = inner,
            prompt: tuple[int, ...] = text.prompt,
        ) -> tuple[int, float]:
            nonlocal scored
            scored += len(drafted_by) > 1
            found = inner(prefix, drafted_by, exit_index)
            assert found[0] == expected((*prompt, *prefix), drafted_by, exit_index)
            # Asking again, which the grid does, changes nothing.
            assert inner(prefix, drafted_by, exit_index) == found
            return found

        object.__setattr__(answer, "scores", scores)
        for threshold in (0.0, LOW, 0.5):
            policy = ThresholdPolicy([threshold] * len(layers), 4)
            counters = total([answer], Setting(layers, NUM_LAYERS, policy))
            assert counters.generated_tokens == len(answer.tokens) - 1
    assert scored > 50


def test_without_memory_drafts_are_tokens_like_any_other(
    teacher: Teacher, data: Path
) -> None:
    weights, memory = heads(teacher, (0, 2))
    texts = load_texts([data], teacher, None)
    zeros = {layer: torch.zeros_like(matrix) for layer, matrix in memory.items()}
    counters = [
        total(
            known_answers(teacher, (0, 2), weights, texts, memory=chosen),
            Setting((0, 2), NUM_LAYERS, ThresholdPolicy([LOW, LOW], 4)),
        )
        for chosen in (None, zeros, memory)
    ]
    assert min(counters[0].early_predictions) > 0
    assert counters[0] == counters[1]
    assert counters[0] != counters[2]


@pytest.mark.parametrize("with_memory", [False, True])
def test_few_answers_keep_what_was_computed_off_them(
    teacher: Teacher,
    data: Path,
    with_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others compute the same again, to the bit."""
    weights, memory = heads(teacher, (0, 2))
    texts = load_texts([data], teacher, None)
    caches: WeakSet[KeyValues] = WeakSet()
    begin = KeyValues.__init__

    def counted(self: KeyValues) -> None:
        begin(self)
        caches.add(self)

    monkeypatch.setattr(KeyValues, "__init__", counted)

    def play(kept: int) -> tuple[list[list[tuple[object, ...]]], int]:
        caches.clear()
        answers = known_answers(
            teacher,
            (0, 2),
            weights,
            texts,
            memory=memory if with_memory else None,
            kept_answers=kept,
        )
        said: list[list[tuple[object, ...]]] = []
        for answer in answers:
            heard: list[tuple[object, ...]] = []
            inner = answer.scores

            def scores(
                *asked: Any,
                inner: Callable[..., tuple[int, float]] = inner,
                heard: list[tuple[object, ...]] = heard,
            ) -> tuple[int, float]:
                found = inner(*asked)
                heard.append((*asked, *found))
                return found

            object.__setattr__(answer, "scores", scores)
            said.append(heard)
        for threshold in (0.0, LOW, 0.5, 0.0):
            policy = ThresholdPolicy([threshold] * 2, 4)
            # All at once, so that they take turns.
            total(answers, Setting((0, 2), NUM_LAYERS, policy))
        gc.collect()
        return said, len(caches)

    few, many = play(1), play(100)
    assert few[0] == many[0]
    # Of each answer, and of the last text off it.
    assert few[1] <= 2 < many[1]


# The choice of exits


def test_a_gate_at_one_never_opens(teacher: Teacher, data: Path) -> None:
    texts = load_texts([data], teacher, None)
    for choice in choose_exits(
        teacher, texts, texts, threshold=1.0, max_draft_tokens=4
    ):
        assert (choice.coverage, choice.tokens_per_forward) == (0, 1)


def test_exits_are_chosen_for_heads_with_memory(teacher: Teacher, data: Path) -> None:
    texts = load_texts([data], teacher, None)

    def choose(drafts: int) -> dict[tuple[int, ...], float]:
        choices = choose_exits(
            teacher,
            texts,
            texts,
            threshold=0.0,
            max_draft_tokens=4,
            drafts=drafts,
        )
        return {choice.exit_layers: choice.acceptance for choice in choices}

    without, remembering = choose(0), choose(3)
    assert set(without) == set(remembering)
    assert {(0,), (0, 1), (0, 1, 3)} <= set(without)
    # On the text that they were fitted to, twice the matrix says more.
    assert remembering[(0,)] > without[(0,)]
