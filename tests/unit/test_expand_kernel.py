# SPDX-License-Identifier: Apache-2.0
"""Drafts on CPUs get their request's temperature, top-k and top-p."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

from adadecode_vllm.patches import cpu_expand_kernel

pytestmark = pytest.mark.skipif(HAS_TRITON, reason="the kernel itself runs")

CU_NUM_TOKENS = torch.tensor([2, 2, 5], dtype=torch.int32)


@pytest.fixture
def installed() -> None:
    """As after two workers have set themselves up."""
    for _ in range(2):
        current_platform.register_triton_kernel_overrides()
        cpu_expand_kernel.install()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_draft_gets_its_requests_value(dtype: torch.dtype) -> None:
    values = torch.tensor([3, 7, 0], dtype=dtype)
    found = rejection_sampler.expand_batch_to_tokens(values, CU_NUM_TOKENS, 5, 0, 9)
    assert found.dtype == dtype
    assert found.tolist() == [3, 3, 9, 9, 9]


@pytest.mark.usefixtures("installed")
def test_fractions_stay() -> None:
    values = torch.tensor([0.7, 1.0, 0.0])
    found = rejection_sampler.expand_batch_to_tokens(values, CU_NUM_TOKENS, 5, 0, 1)
    assert torch.equal(found, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))


def test_vllm_still_fills_a_copy() -> None:
    """Once it does not, `patches/cpu_expand_kernel.py` can go."""
    output = torch.full((5,), -1.0)
    values = torch.tensor([3.0, 7.0, 0.0])
    cpu_triton_utils._expand_kernel_impl(output, values, CU_NUM_TOKENS, 0, 1)
    assert output.tolist() == [-1.0] * 5
