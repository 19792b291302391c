# SPDX-License-Identifier: Apache-2.0
"""The final norm is computed by vLLM's kernel where it has one for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from adadecode_vllm.engine.final_norm import FinalNorm

SIZE = 64


@pytest.fixture(autouse=True)
def config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def random_norm(kind: Any, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    norm = kind(SIZE, eps=1e-3, **options)
    if getattr(norm, "has_weight", True):
        norm.weight.data = torch.randn(SIZE)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options", "by_kernel"),
    [
        (RMSNorm, {}, True),
        (RMSNorm, {"has_weight": False}, False),
        (RMSNorm, {"var_hidden_size": 32}, False),
        (GemmaRMSNorm, {}, False),
    ],
)
@torch.inference_mode()
def test_it_is_the_models(
    kind: Any, options: dict[str, Any], by_kernel: bool, dtype: torch.dtype
) -> None:
    norm = random_norm(kind, dtype, **options)
    hidden, residual = torch.randn(2, 5, SIZE).to(dtype)
    alone = norm(hidden.clone())
    both = norm(hidden.clone(), residual.clone())[0]
    final_norm = FinalNorm(norm, dtype)
    near = {}
    if dtype != torch.float32:
        bound = 2e-3 if dtype == torch.float16 else 2e-2
        near = {"rtol": bound, "atol": bound}
    with patch.object(norm, "forward", side_effect=norm.forward) as called:
        torch.testing.assert_close(final_norm(hidden.clone(), None), alone, **near)
        found = final_norm(hidden.clone(), residual.clone())
        torch.testing.assert_close(found, both, **near)
    assert called.called is not by_kernel


@torch.inference_mode()
def test_it_follows_new_weights() -> None:
    norm = random_norm(RMSNorm, torch.float32)
    final_norm, hidden = FinalNorm(norm, torch.float32), torch.randn(2, SIZE)
    before = final_norm(hidden, None)
    norm.weight = torch.nn.Parameter(2 * norm.weight)
    torch.testing.assert_close(final_norm(hidden, None), 2 * before)


@torch.inference_mode()
def test_a_norm_that_always_returns_a_pair() -> None:
    final_norm = FinalNorm(torch.nn.Identity(), torch.float32)
    hidden = torch.randn(2, SIZE)
    assert final_norm(hidden, None) is hidden
    with patch.object(final_norm, "_norm", return_value=(hidden, None)):
        assert final_norm(hidden, None) is hidden
