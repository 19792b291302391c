# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences, through Transformers' interface.

Under these names Transformers makes no masks of its own: PyTorch's attention has the
mask that it is given, or else is causal, which takes none. By itself Transformers makes
one of tokens x tokens for some families, even where no layer slides.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from adadecode_vllm.errors import AdaDecodeError

_SDPA = "adadecode_sdpa"
_XFORMERS = "adadecode_xformers"


def packed_attention(attention: str, device: torch.device | str) -> str:
    """Name of the implementation that Transformers is to use.

    Args:
        attention: ``sdpa`` or ``xformers``.
        device: The model's device.

    Returns:
        A value for ``attn_implementation``.

    Raises:
        AdaDecodeError: If it is unknown, not installed or not for this device.
    """
    if attention == "sdpa":
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_SDPA, sdpa_attention_forward)
        return _SDPA
    if attention != "xformers":
        raise AdaDecodeError(
            f"--attn {attention}: unknown; choose sdpa or xformers (CUDA only)"
        )
    if torch.device(device).type != "cuda":
        raise AdaDecodeError(
            "--attn xformers: its kernels for packed sequences need a CUDA device; use "
            "--attn sdpa here"
        )
    if find_spec("xformers") is None:
        raise AdaDecodeError(
            "--attn xformers: xformers is not installed; run `pip install xformers` or "
            "use --attn sdpa"
        )
    from transformers import AttentionInterface

    AttentionInterface.register(_XFORMERS, xformers_attention)
    return _XFORMERS


def xformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sequence_lengths: list[int] | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed sequence; Transformers' signature.

    Args:
        module: The attention layer, which knows how many query heads share a key.
        query: (1, heads, n, head size).
        key: (1, kv heads, n, head size).
        value: (1, kv heads, n, head size).
        attention_mask: Unused: the lengths say it all.
        scaling: Factor on the scores; None for 1 / sqrt(head size).
        sequence_lengths: Tokens of each sequence, n in all.

    Returns:
        (1, n, heads, head size), and None in place of the weights.
    """
    from xformers.ops import fmha

    assert sequence_lengths is not None, "passed by the teacher"
    groups = getattr(module, "num_key_value_groups", 1)
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(sequence_lengths)
    output = fmha.memory_efficient_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_bias=bias,
        scale=scaling,
    )
    return output, None
