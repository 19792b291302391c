# SPDX-License-Identifier: Apache-2.0
"""A compiled model runs as its segments, so that nothing is compiled twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from adadecode_vllm.engine.split_model import SplitModel


class Inner(nn.Module):
    """A decoder that vLLM compiles, or runs as it is."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        self.do_not_compile = not compiled

    def forward(self, *_: Any) -> str:
        return "the model's own"


def add(number: float) -> Any:
    """Some layers that add a number to the residual stream."""

    def run(
        positions: torch.Tensor, hidden: torch.Tensor, residual: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden + number, positions[:, None] if residual is None else residual

    return run


def end(
    positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """The last layers, with the final norm."""
    return 10 * hidden + residual


def split(segments: list[Any]) -> SplitModel:
    decoder: Any = SimpleNamespace(embed=lambda token_ids: token_ids[:, None].float())
    scorer: Any = SimpleNamespace(num_exits=len(segments) - 1)
    config: Any = None
    return SplitModel(decoder, segments, scorer, config)


def run(inner: Inner, *arguments: Any) -> Any:
    return inner(*arguments)


def test_runs_every_segment_once() -> None:
    inner = Inner(compiled=True)
    model: Any = SimpleNamespace(model=inner)
    split([add(1), add(2), end]).run_compiled(model)
    tokens, positions = torch.tensor([5, 7]), torch.tensor([3, 4])
    expected = [[83.0], [104.0]]  # 10 (token + 1 + 2) + position
    assert run(inner, tokens, positions, None, None).tolist() == expected
    embeddings = torch.tensor([[5.0], [7.0]])
    assert run(inner, None, positions, None, embeddings).tolist() == expected
    # vLLM's own compilation would begin here.
    assert inner.do_not_compile


def test_leaves_the_others_alone() -> None:
    for compiled, segments in ((False, [add(1), end]), (True, [end])):
        inner = Inner(compiled=compiled)
        model: Any = SimpleNamespace(model=inner)
        split(segments).run_compiled(model)
        assert run(inner) == "the model's own"
        assert inner.do_not_compile is not compiled
