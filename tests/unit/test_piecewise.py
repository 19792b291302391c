# SPDX-License-Identifier: Apache-2.0
"""The inputs of piecewise graphs, and the kinds of graphs of whole steps."""

from __future__ import annotations

import pytest
import torch
from vllm.config import CUDAGraphMode

from adadecode_vllm.engine.piecewise import PiecewiseInputs
from adadecode_vllm.engine.segment_graphs import StepKind, step_kinds


def make_inputs(sizes: tuple[int, ...] = (8, 1, 4, 1024)) -> PiecewiseInputs:
    return PiecewiseInputs(sizes, 2, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, None)]
)
def test_the_smallest_size_that_holds_a_batch(tokens: int, size: int | None) -> None:
    """Sizes beyond the largest that pays are not captured."""
    assert make_inputs().size(tokens) == size


def test_without_sizes_nothing_is_captured() -> None:
    assert make_inputs(()).size(1) is None


def test_inputs_are_copied_and_padded() -> None:
    inputs = make_inputs()
    positions = torch.tensor([5, 6, 7])
    hidden = torch.arange(6.0).view(3, 2)
    filled = inputs.fill(4, positions, hidden, hidden + 10)
    assert filled[0].tolist()[:3] == [5, 6, 7]
    assert filled[1].shape == (4, 2)
    assert torch.equal(filled[1][:3], hidden)
    assert filled[2] is not None
    assert torch.equal(filled[2][:3], hidden + 10)
    # The same memory every time, which is what graphs read.
    again = inputs.fill(4, positions, hidden, hidden)
    for one, other in zip(filled, again, strict=True):
        assert one is not None
        assert other is not None
        assert one.data_ptr() == other.data_ptr()


def test_a_segments_outputs_may_be_views_of_the_inputs() -> None:
    """In-place norms return what they were given."""
    inputs = make_inputs()
    positions = torch.arange(2)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    _, embeddings, none = inputs.fill(4, positions, first, None)
    assert none is None
    # Segment 0 ran: its residual is the input itself, its output a new tensor.
    output = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    _, hidden, residual = inputs.fill(4, positions, output, embeddings[:2])
    assert residual is not None
    assert torch.equal(residual[:2], first)
    assert torch.equal(hidden[:2], output)
    # A middle segment ran in place: its residual is the residual input.
    residual += 1
    _, _, residual = inputs.fill(4, positions, output, residual[:2])
    assert residual is not None
    assert torch.equal(residual[:2], first + 1)


def test_the_forward_context_names_size_and_mode() -> None:
    context = PiecewiseInputs.context(8)
    assert context["cudagraph_runtime_mode"] == CUDAGraphMode.PIECEWISE
    assert context["batch_descriptor"].num_tokens == 8
    warm = PiecewiseInputs.context(8, graph=False)
    assert warm["cudagraph_runtime_mode"] == CUDAGraphMode.NONE


def test_kinds_of_steps() -> None:
    kinds = step_kinds(num_segments=3, exits_at_embedding=0, window=6)
    assert kinds == [
        StepKind(0, True, 1),
        StepKind(1, True, 1),
        StepKind(1, True, 6),
        StepKind(0, False, 6),
        StepKind(1, False, 6),
        StepKind(2, False, 6),
    ]
    assert len({kind.name for kind in kinds}) == len(kinds)


def test_kinds_of_steps_with_an_exit_at_the_embedding() -> None:
    kinds = step_kinds(num_segments=2, exits_at_embedding=1, window=6)
    assert kinds == [
        StepKind(-1, True, 1),
        StepKind(0, True, 1),
        # Tokens that were predicted before any layer wait at level 0.
        StepKind(0, True, 6),
        StepKind(0, False, 6),
        StepKind(1, False, 6),
    ]
    assert len({kind.name for kind in kinds}) == len(kinds)
    # Alone, it leaves the whole forward to vLLM.
    assert step_kinds(1, 1, 6) == [StepKind(-1, True, 1)]
