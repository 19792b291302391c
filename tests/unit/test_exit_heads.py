# SPDX-License-Identifier: Apache-2.0
"""The module of exit heads: casts, identities and memory."""

import pytest
import torch

from adadecode_vllm.engine.exit_heads import ExitHeads
from tests.published_heads import D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_casts_and_needs_no_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(D, D)
    heads = ExitHeads({3: weight}, dtype)
    assert heads.exit_layers == (3,)
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    hidden = torch.randn(2, D, dtype=dtype)
    torch.testing.assert_close(heads(3, hidden), hidden @ weight.to(dtype).T)


def test_identity_costs_nothing() -> None:
    heads = ExitHeads({1: torch.eye(D), 3: torch.eye(D) + 0.1}, torch.bfloat16)
    hidden = torch.randn(2, D, dtype=torch.bfloat16)
    assert heads.identity_layers == {1}
    assert heads(1, hidden) is hidden
    assert not torch.equal(heads(3, hidden), hidden)
    assert [name for name, _ in heads.named_parameters()] == ["transforms.3.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_adds_its_product(dtype: torch.dtype) -> None:
    weight, matrix = torch.randn(2, D, D)
    weights, memory = {1: weight, 3: torch.eye(D)}, {1: matrix, 3: matrix}
    heads = ExitHeads(weights, dtype, memory=memory)
    assert heads.has_memory
    assert heads.identity_layers == {3}
    x, g = torch.randn(2, 5, D, dtype=dtype)
    for layer in (1, 3):
        expected = x.float() @ weights[layer].T + g.float() @ matrix.T
        found = heads(layer, x, g)
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=0.1)
        torch.testing.assert_close(
            heads(layer, x), heads(layer, x, torch.zeros_like(g))
        )
        assert found.dtype == dtype
    assert not torch.equal(heads(1, x, g), heads(1, x))


def test_heads_without_memory_do_not_look_at_it() -> None:
    heads = ExitHeads({1: torch.eye(D), 3: torch.randn(D, D)}, torch.float32)
    x, g = torch.randn(2, 5, D)
    assert not heads.has_memory
    assert heads(1, x, g) is x
    assert torch.equal(heads(3, x, g), heads(3, x))


def test_memory_of_other_exits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exits \[1\], but memory of \[3\]"):
        ExitHeads({1: torch.eye(D)}, torch.float32, memory={3: torch.eye(D)})


def test_almost_the_identity_is_not_the_identity() -> None:
    weight = torch.eye(D)
    weight[0, 1] = 1e-9  # within allclose's tolerance
    assert ExitHeads({1: weight}, torch.float32).identity_layers == frozenset()
