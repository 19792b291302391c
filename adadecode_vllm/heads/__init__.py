# SPDX-License-Identifier: Apache-2.0
"""Exit heads: their directory format, and the check of the base model.

A heads directory holds `config.json` (`ExitHeadsConfig`) and `model.safetensors` with
one tensor `exit_heads.{layer}.weight` of shape (d, d) per exit, perhaps as many
`exit_heads.{layer}.memory`, and perhaps `draft_token_ids`, the most frequent tokens of
the training text. The logits of the exit after `layer` decoder layers are

    LM_head(T @ final_norm(hidden + residual) + U @ g)

with the base model's own final norm and LM head; T is the exit's weight and U its
memory. g belongs to the token before: the final layer's normed state where it is known,
otherwise what the head that drafted this token gave to the LM head.

Names are imported on first use, so that reading a configuration does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adadecode_vllm.heads.artifact import Heads
    from adadecode_vllm.heads.config import ExitHeadsConfig, load_heads_config
    from adadecode_vllm.heads.fingerprint import (
        LMHeadRows,
        check_fingerprint,
        lm_head_fingerprint,
        read_lm_head,
        same_lm_head,
    )
    from adadecode_vllm.heads.hub import (
        from_pretrained,
        pin_heads,
        resolve_heads,
    )
    from adadecode_vllm.heads.init import init_heads
    from adadecode_vllm.heads.io import HeadsTensors, load_tensors, save_heads

__all__ = [
    "ExitHeadsConfig",
    "Heads",
    "HeadsTensors",
    "LMHeadRows",
    "check_fingerprint",
    "from_pretrained",
    "init_heads",
    "lm_head_fingerprint",
    "load_heads_config",
    "load_tensors",
    "pin_heads",
    "read_lm_head",
    "resolve_heads",
    "same_lm_head",
    "save_heads",
]

_MODULE_OF = {
    "Heads": "artifact",
    "HeadsTensors": "io",
    "resolve_heads": "hub",
    "pin_heads": "hub",
    "from_pretrained": "hub",
    "ExitHeadsConfig": "config",
    "LMHeadRows": "fingerprint",
    "check_fingerprint": "fingerprint",
    "init_heads": "init",
    "lm_head_fingerprint": "fingerprint",
    "load_heads_config": "config",
    "load_tensors": "io",
    "read_lm_head": "fingerprint",
    "same_lm_head": "fingerprint",
    "save_heads": "io",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
