# SPDX-License-Identifier: Apache-2.0
"""``VllmConfig`` keeps asynchronous scheduling with this plugin's speculative method.

Symptom without it: ``ValueError: Currently, async scheduling is only supported with
EAGLE/MTP/Draft Model/NGram GPU/DSpark/DFlash kind of speculative decoding``, from the
engine's process, which validates the configuration once more. The check is a list of
methods in the middle of ``__post_init__``; what it guards against, a proposer that must
return its drafts before the next step is scheduled, is not so for this one.

Upstream: ``__post_init__`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/config/vllm.py
The change to propose there: ask the speculative method whether it can, instead of
listing methods.

Needed until vLLM 0.32: 0.33 lists methods for Model Runner V1 only. Other methods are
checked as before.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap ``VllmConfig.__post_init__``; a second call does nothing."""
    from vllm.config import VllmConfig
    from vllm.logger import init_logger

    original = VllmConfig.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from adadecode_vllm.engine.arguments import SPECULATOR

        speculative = self.speculative_config
        scheduler = self.scheduler_config
        keep = (
            speculative is not None
            and speculative.model == SPECULATOR
            and scheduler.async_scheduling
        )
        if keep:
            # vLLM decides where nothing is asked for, and decides against.
            scheduler.async_scheduling = None
        original(self, *args, **kwargs)
        if keep:
            scheduler.async_scheduling = True

    setattr(__post_init__, _MARK, original)
    VllmConfig.__post_init__ = __post_init__
    init_logger("vllm.adadecode").debug(
        "VllmConfig keeps asynchronous scheduling for the adadecode speculator"
    )
