# SPDX-License-Identifier: Apache-2.0
"""Whole steps and exits of the reference model, for the imitated engine."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import torch

from adadecode_vllm.method.executor import TokenSubset
from adadecode_vllm.method.states import PendingStates
from tests.reference_model import ReferenceModel


class RandomExits:
    """Answers that depend on nothing but the prefix, the exit and a seed.

    Attributes:
        continuations: Request number to its true tokens, prompt included.
    """

    def __init__(self, seed: int, vocab_size: int, accuracy: float) -> None:
        """Remember the parameters.

        Args:
            seed: Seed of all answers.
            vocab_size: V.
            accuracy: How often to answer with the true token.
        """
        self.seed = seed
        self.vocab_size = vocab_size
        self.accuracy = accuracy
        self.continuations: dict[int, list[int]] = {}

    def __call__(
        self, request: int, prefix: tuple[int, ...], exit_index: int
    ) -> tuple[int, float]:
        draw = random.Random(repr((self.seed, request, prefix, exit_index)))
        true = self.continuations.get(request, [])
        knows = len(true) > len(prefix) and tuple(true[: len(prefix)]) == prefix
        token = draw.randrange(self.vocab_size)
        if knows and draw.random() < self.accuracy:
            token = true[len(prefix)]
        return token, draw.random()


class WholeSteps:
    """Steps as CUDA graphs run them: states in, states out, and the exits."""

    def __init__(
        self, model: ReferenceModel, states: PendingStates, max_tokens: int
    ) -> None:
        """Wire the steps."""
        self.model = model
        self.states = states
        self.max_tokens = max_tokens
        self.resumed = 0
        self.drafted = 0
        self.prefetched = Counter[int]()

    def draft(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Run a draft step; wide ones are taken apart."""
        if len(states) > self.max_tokens:
            return None
        self.drafted += 1
        ids = torch.from_numpy(token_ids)
        residual: torch.Tensor | None = None
        if segment < 0:
            hidden = self.model.embed(ids)
        else:
            hidden, residual = self._run(segment, subset, states, ids)
            assert residual is not None
        front = np.cumsum(subset.count) - 1
        index = torch.from_numpy(states[front])
        answer = self.model.score_exit(
            segment + self.model.exits_at_embedding,
            hidden[front],
            None if residual is None else residual[front],
            self.states.read_memory(index),
        )
        assert answer.output is not None
        self.states.write_memory(index, answer.output)
        return answer.token_ids, answer.confidence

    def prefetch_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> torch.Tensor:
        """Run a segment of the next forward."""
        assert len(states) == len(token_ids) <= self.max_tokens
        self.prefetched[segment] += len(states)
        return self._run(segment, subset, states, torch.from_numpy(token_ids))[0]

    def resume(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a step of a resumed forward."""
        assert len(states) <= self.max_tokens
        assert len(set(states.tolist())) == len(states)
        assert (token_ids is not None) == (segment == 0)
        self.resumed += 1
        return self._run(segment, subset, states, token_ids)[0]

    def _run(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        index = torch.from_numpy(states)
        residual: torch.Tensor | None = None
        if segment == 0:
            assert token_ids is not None
            hidden = self.model.embed(token_ids)
        else:
            hidden, residual = self.states.read(index)
        hidden, residual = self.model.run(segment, subset, hidden, residual)
        if residual is not None:
            self.states.write(index, hidden, residual)
        return hidden, residual
