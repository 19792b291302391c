# SPDX-License-Identifier: Apache-2.0
"""Packed attention with xformers; needs a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adadecode_vllm.toolkit.states.teacher import Teacher
from tests.tiny import save_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)]
)
def test_xformers_equals_sdpa(tmp_path: Path, dtype: str, tolerance: float) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    save_tiny_llama(tmp_path, hidden_size=64, num_key_value_heads=1)
    sequences = [[5, 6, 7, 8], [9], list(range(10, 80))]
    found = [
        Teacher.load(str(tmp_path), dtype, "cuda", attention).streams(sequences, [1, 4])
        for attention in ("sdpa", "xformers")
    ]
    for layer in (1, 4):
        torch.testing.assert_close(
            found[0][layer], found[1][layer], rtol=tolerance, atol=tolerance
        )
