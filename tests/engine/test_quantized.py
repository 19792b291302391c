# SPDX-License-Identifier: Apache-2.0
"""Quantized weights and a quantized KV cache, as far as vLLM runs them on CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_families import check_texts, run_baseline, save_family, started
from tests.tiny_quantized import quantize

pytestmark = pytest.mark.engine

needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's kernels for it need AVX-512"
)

# vLLM's kernel for AMX takes 16 bits only.
W8A8_DTYPE = "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"

TIES = "in 16 bits only, as in vLLM; a text may part at a tie; on CPUs with AVX-512"


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        pytest.param(
            "w8a8",
            W8A8_DTYPE,
            marks=pytest.mark.feature("quantized: W8A8 int8", "supported"),
        ),
        # vLLM runs these two in 16 bits only, where a text may part at a tie.
        pytest.param(
            "awq",
            "bfloat16",
            marks=[
                needs_avx512,
                pytest.mark.feature("quantized: AWQ", "supported", TIES),
            ],
        ),
        pytest.param(
            "gptq",
            "bfloat16",
            marks=[
                needs_avx512,
                pytest.mark.feature("quantized: GPTQ", "supported", TIES),
            ],
        ),
    ],
)
def test_quantized_weights(scheme: str, dtype: str, tmp_path: Path) -> None:
    """Untrained heads are made from the quantized checkpoint itself."""
    save_family(tmp_path / "plain", "Llama", num_key_value_heads=2)
    model = tmp_path / "model"
    quantize(tmp_path / "plain", model, scheme)
    expected = run_baseline(model, dtype)
    with started(model, tmp_path / "heads", dtype=dtype) as llm:
        assert llm.llm_engine.model_config.quantization is not None
        check_texts(llm, expected)


@needs_avx512
@pytest.mark.feature("fp8 KV cache", "supported", "on CPUs those with AVX-512")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_kv_cache(kv_cache_dtype: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_family(model, "Mistral")
    options = {"kv_cache_dtype": kv_cache_dtype}
    expected = run_baseline(model, **options)
    assert expected != run_baseline(model)
    with started(model, tmp_path / "heads", **options) as llm:
        check_texts(llm, expected)
