# SPDX-License-Identifier: Apache-2.0
"""``EngineCore`` takes an outcome in before it schedules, where it is there already.

Symptom without it: with asynchronous scheduling a step's tokens reach the client one
step late. The engine schedules a step and runs it before it looks at the outcome of the
one before, so that the device never waits for the scheduler. A step that predicts early
has waited for its tokens itself, and what follows it is prefetched on the device: then
the order gains nothing, every token arrives a whole cycle late, and a request that has
ended runs one cycle more.

Upstream: ``EngineCore.step_with_batch_queue`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/core.py
The change to propose there: pop the oldest entry of the queue first if its future is
done.

Can go when vLLM does. Installed by our asynchronous scheduler, and without effect for
any other; it is the scheduler that then says for a moment that there is nothing to
schedule.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap ``EngineCore.step_with_batch_queue``; a second call does nothing."""
    from vllm.logger import init_logger
    from vllm.v1.engine.core import EngineCore

    original = EngineCore.step_with_batch_queue
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def step_with_batch_queue(self: Any) -> Any:
        outputs, executed = original(self)
        nothing_more = getattr(self.scheduler, "nothing_more", None)
        if outputs is None and nothing_more is not None:
            future = self.batch_queue[-1][0] if self.batch_queue else None
            if future is not None and future.done():
                with nothing_more():
                    outputs, _ = original(self)
        return outputs, executed

    setattr(step_with_batch_queue, _MARK, original)
    EngineCore.step_with_batch_queue = step_with_batch_queue
    init_logger("vllm.adadecode").debug(
        "EngineCore takes finished outcomes in before it schedules the next step"
    )
