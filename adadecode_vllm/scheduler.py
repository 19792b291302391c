# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, with KV slots for early predictions."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class AdaDecodeScheduler(Scheduler):
    """Reserves the slots that drafting writes to (I3).

    vLLM reserves none for ``custom_class`` proposers, which normally bring tokens only.
    Drafting writes KV of up to ``max_early_predictions`` tokens past the scheduled
    ones. When blocks are short the reservation is dropped rather than a request
    preempted for it; the worker then predicts no further than the blocks that a request
    owns.
    """

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step; see vLLM."""
        self.num_lookahead_tokens = self._affordable_lookahead()
        return super().schedule(*args, **kwargs)

    def _affordable_lookahead(self) -> int:
        """The cap, or 0 if reserving might take a block that a request needs.

        In one step every running request may need blocks for its scheduled tokens (the
        sampled one and its drafts) and for the reservation.
        """
        tokens = 1 + 2 * self.num_spec_tokens
        blocks = -(-tokens // self.block_size) + 1
        needed = blocks * (len(self.running) + 1)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.num_spec_tokens if free >= needed else 0
