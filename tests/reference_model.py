# SPDX-License-Identifier: Apache-2.0
"""A model in plain torch that checks what the core does to it.

:class:`ReferenceModel` implements the core's ``SegmentExecutor`` over a paged KV cache.
Every row of its arithmetic is independent of the other rows, so batching cannot change
a bit. It also keeps books, and an ``AssertionError`` tells the first violation:

* Hidden states carry three columns more: token id, position and request; residuals
  carry them negated. A state that reaches another token, or the wrong argument, shows.
* Every KV entry remembers the request and the token ids up to it. Attention accepts
  only entries of its own request and prefix, hence no stale or foreign ones.
* KV may be written only at positions that the engine announced, in owned blocks (I3).
* A token's memory must be the final state that the engine announced, or what the exit
  that predicted the token has returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from adadecode_vllm.method.executor import ExitAnswer, StepRunner, TokenSubset

TAGS = 3
WIDTH = 6

ExitFunction = Callable[[int, tuple[int, ...], int], tuple[int, float]]
"""(request, prefix, exit) to (token, confidence)."""


@dataclass
class View:
    """What the model may know of a batch row.

    Attributes:
        request: Number of the request.
        blocks: Its blocks.
        tokens: Its token ids; drafting appends predictions.
        writable: First position and end of what may be written.
        memory: By position, what the token there was taken from.
    """

    request: int
    blocks: list[int]
    tokens: list[int]
    writable: tuple[int, int]
    memory: dict[int, torch.Tensor] = field(default_factory=dict)


class Write(NamedTuple):
    """One KV entry written: by whom, and where."""

    drafting: bool
    layer: int
    request: int
    position: int
    slot: int


class ReferenceModel:
    """A decoder with exits, its paged KV cache, and the books about both."""

    def __init__(
        self,
        exit_layers: Sequence[int] = (1, 2),
        num_layers: int = 3,
        *,
        vocab_size: int = 7,
        num_blocks: int = 64,
        block_size: int = 2,
        seed: int = 0,
        exit_function: ExitFunction | None = None,
    ) -> None:
        """Draw the weights.

        Args:
            exit_layers: Layer counts of the exits.
            num_layers: L.
            vocab_size: V.
            num_blocks: Blocks of the KV cache.
            block_size: Tokens per block.
            seed: Seed of the weights.
            exit_function: What the exits answer; None for the model's own LM head.
        """
        self.bounds = [0, *filter(None, exit_layers), num_layers]
        self.exits_at_embedding = int(exit_layers[0] == 0)
        self.exit_layers = tuple(exit_layers)
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.exit_function = exit_function
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            scale = 1.5 / math.sqrt(shape[-1])
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        self.embedding = weight(vocab_size, WIDTH) * 2
        self.lm_head = weight(vocab_size, WIDTH)
        names = ("q", "k", "v", "o", "up", "down")
        self.layers = [
            {name: weight(WIDTH, WIDTH) for name in names} for _ in range(num_layers)
        ]
        shape = (num_layers, num_blocks * block_size, WIDTH)
        self.keys = torch.full(shape, torch.nan)
        self.values = torch.full(shape, torch.nan)
        self.provenance = np.zeros(shape[:2], np.int64)
        self.views: dict[int, View] = {}
        self.drafting = False
        self.writes: list[Write] = []
        self.steps: StepRunner | None = None
        self.scorings = 0

    @property
    def num_segments(self) -> int:
        return len(self.bounds) - 1

    @property
    def state_width(self) -> int:
        return WIDTH + TAGS

    def poison(self, slots: Iterable[int]) -> None:
        """Destroy KV entries, as handing their blocks to others does."""
        index = list(slots)
        self.keys[:, index] = torch.nan
        self.values[:, index] = torch.nan
        self.provenance[:, index] = 0

    def block_slots(self, blocks: Iterable[int]) -> list[int]:
        size = self.block_size
        return [block * size + i for block in blocks for i in range(size)]

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert int(token_ids.min()) >= 0
        tags = torch.zeros(len(token_ids), TAGS)
        tags[:, 0] = token_ids
        return torch.cat((self.embedding[token_ids].float(), tags), dim=1)

    def run(
        self,
        segment: int,
        subset: TokenSubset,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a segment; see the protocol."""
        assert len(subset.rows) == len(subset.first) == len(subset.count) > 0
        assert len(set(subset.rows.tolist())) == len(subset.rows)
        assert (subset.count > 0).all()
        assert hidden.shape == (subset.num_tokens, self.state_width)
        placed = [
            (self.views[row], position)
            for row, first, count in zip(
                subset.rows.tolist(),
                subset.first.tolist(),
                subset.count.tolist(),
                strict=True,
            )
            for position in range(first, first + count)
        ]
        if segment == 0:
            assert residual is None
            hidden = self._enter(placed, hidden)
        else:
            assert residual is not None
            expected = torch.tensor(
                [[view.tokens[at], at, view.request] for view, at in placed]
            ).float()
            assert torch.equal(hidden[:, WIDTH:], expected), "hidden of other tokens"
            assert torch.equal(residual[:, WIDTH:], -expected), "residual of others"
        tags = hidden[:, WIDTH:]
        state = hidden[:, :WIDTH]
        stream = None if residual is None else residual[:, :WIDTH]
        for layer in range(self.bounds[segment], self.bounds[segment + 1]):
            state, stream = self._layer(layer, placed, state, stream)
        assert stream is not None
        if segment == self.num_segments - 1:
            return _norm(state.double() + stream.double()).float(), None
        return torch.cat((state, tags), 1), torch.cat((stream, -tags), 1)

    def final_states(self, final: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        """Final states that say where they belong.

        Args:
            final: (n, WIDTH) final states.
            places: (n, 2), the tokens' positions and requests.

        Returns:
            (n, state_width).
        """
        tags = torch.zeros(len(final), TAGS)
        tags[:, 1:] = torch.from_numpy(places)
        return torch.cat((final, tags), dim=1)

    def score_exit(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        memory: torch.Tensor | None,
    ) -> ExitAnswer:
        """Score with an exit; see the protocol."""
        assert memory is not None
        # The memory is of the token before.
        tags = memory[:, WIDTH:] + torch.tensor([0.0, 1.0, 0.0])
        state = hidden[:, :WIDTH].double()
        if residual is None:
            assert (exit_index, self.exits_at_embedding) == (0, 1)
            tags[:, 0] = hidden[:, WIDTH]
        else:
            tags[:, 0] = hidden[:, WIDTH]
            assert torch.equal(hidden[:, WIDTH:], tags), "memory of another token"
            assert torch.equal(residual[:, WIDTH:], -tags)
            state = state + residual[:, :WIDTH].double()
        by_request = {view.request: view for view in self.views.values()}
        answers = []
        normed = _norm(state)
        # An exit's output is told from another's by the order of scoring.
        self.scorings += 1
        output = torch.cat((normed.float() + self.scorings, tags), dim=1)
        output[:, WIDTH] = 0
        for row, (token, position, request) in enumerate(tags.long().tolist()):
            view = by_request[request]
            if self.drafting and position == len(view.tokens):
                view.tokens.append(token)
            prefix = tuple(view.tokens[: position + 1])
            assert prefix[position] == token
            assert torch.equal(memory[row], view.memory[position]), "another memory"
            view.memory[position + 1] = output[row]
            if self.exit_function is not None:
                answers.append(self.exit_function(request, prefix, exit_index))
        if self.exit_function is None:
            top = _linear(normed, self.lm_head).softmax(-1).max(-1)
            return ExitAnswer(top.indices.numpy(), top.values.float().numpy(), output)
        tokens, confidences = zip(*answers, strict=True)
        return ExitAnswer(
            np.array(tokens, np.int64), np.array(confidences, np.float32), output
        )

    def forward(self, subset: TokenSubset, token_ids: torch.Tensor) -> torch.Tensor:
        """Run the whole model, as vLLM does without a pending token."""
        hidden, residual = self.embed(token_ids), None
        for segment in range(self.num_segments):
            hidden, residual = self.run(segment, subset, hidden, residual)
        return hidden

    def next_tokens(self, final: torch.Tensor) -> list[int]:
        """Greedy tokens after (n, d) final hidden states."""
        return _linear(final.double(), self.lm_head).argmax(-1).tolist()

    def _enter(
        self, placed: list[tuple[View, int]], hidden: torch.Tensor
    ) -> torch.Tensor:
        hidden = hidden.clone()
        for index, (view, position) in enumerate(placed):
            token = int(hidden[index, WIDTH])
            if self.drafting and position == len(view.tokens):
                view.tokens.append(token)
            assert view.tokens[position] == token, "another token was embedded"
            hidden[index, WIDTH + 1] = position
            hidden[index, WIDTH + 2] = view.request
        return hidden

    def _layer(
        self,
        layer: int,
        placed: list[tuple[View, int]],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.layers[layer]
        # As vLLM's fused add-and-norm, the norm sees the sum before it is rounded.
        total = hidden.double()
        if residual is not None:
            total = total + residual.double()
        residual = total.float()
        normed = _norm(total)
        positions = torch.tensor([[position] for _, position in placed])
        phase = torch.sin((positions + 1) * torch.arange(1, WIDTH + 1) * 0.7).double()
        query = _linear(normed, weights["q"]) + phase
        key = (_linear(normed, weights["k"]) + phase).float()
        value = _linear(normed, weights["v"]).float()
        origins = {view.request: _provenance(view) for view, _ in placed}
        for index, (view, position) in enumerate(placed):
            slot = self._writable_slot(layer, view, position)
            self.keys[layer, slot] = key[index]
            self.values[layer, slot] = value[index]
            self.provenance[layer, slot] = origins[view.request][position]
        mixed = torch.stack(
            [
                self._attend(layer, view, position, origins[view.request], query[index])
                for index, (view, position) in enumerate(placed)
            ]
        )
        attended = _linear(mixed, weights["o"]).float()
        total = attended.double() + residual.double()
        inner = _linear(_norm(total), weights["up"]).tanh()
        return _linear(inner, weights["down"]).float(), total.float()

    def _writable_slot(self, layer: int, view: View, position: int) -> int:
        first, end = view.writable
        assert first <= position < end, f"KV write at {position}, not {first}..{end}"
        assert position < len(view.blocks) * self.block_size, "slot is not owned"
        block = view.blocks[position // self.block_size]
        slot = block * self.block_size + position % self.block_size
        self.writes.append(Write(self.drafting, layer, view.request, position, slot))
        return slot

    def _attend(
        self,
        layer: int,
        view: View,
        position: int,
        origins: list[int],
        query: torch.Tensor,
    ) -> torch.Tensor:
        slots = self.block_slots(view.blocks)[: position + 1]
        valid = self.provenance[layer, slots] == origins[: position + 1]
        assert valid.all(), (
            f"layer {layer}, request {view.request}, position {position}: KV at "
            f"{np.flatnonzero(~valid).tolist()} is not that of its tokens"
        )
        keys = self.keys[layer, slots].double()
        values = self.values[layer, slots].double()
        score = (keys * query).sum(-1).softmax(-1)
        return (score[:, None] * values).sum(0)


def _linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product whose rows do not depend on how many there are."""
    return (rows[:, None, :] * weight).sum(-1)


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return rows / (rows * rows).mean(-1, keepdim=True).add(1e-6).sqrt()


def _provenance(view: View) -> list[int]:
    """A number for each of a request's prefixes; 0 is that of no prefix."""
    value = view.request + 1
    numbers = []
    for token in view.tokens:
        value = hash((value, token)) or 1
        numbers.append(value)
    return numbers
