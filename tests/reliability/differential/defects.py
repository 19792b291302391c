# SPDX-License-Identifier: Apache-2.0
"""Faults that can be put into the process of the engine with AdaDecode.

To see whether the fuzzer finds them. Each is a function without arguments that gives a
context; what it replaces must be replaced before the engine starts, and it never
touches plain vLLM, which runs in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import pytest

Defect = Callable[[], AbstractContextManager[None]]

_LATE = 30
"""Engine steps before planted faults show."""


@contextmanager
def _replaced(name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """The scheduler with another method, made from the one it has."""
    from adadecode_vllm.engine.scheduler import AdaDecodeScheduler

    with pytest.MonkeyPatch.context() as patch:
        original = getattr(AdaDecodeScheduler, name)
        patch.setattr(AdaDecodeScheduler, name, make(original))
        yield


def _wrong_token() -> AbstractContextManager[None]:
    """Every thirtieth step yields another token than was sampled."""
    steps = count()

    def make(update: Any) -> Any:
        def changed(self: Any, scheduler_output: Any, output: Any) -> Any:
            if next(steps) % _LATE == _LATE - 1 and output.sampled_token_ids:
                output.sampled_token_ids = [
                    [7] * len(tokens) for tokens in output.sampled_token_ids
                ]
            return update(self, scheduler_output, output)

        return changed

    return _replaced("update_from_output", make)


def _in_schedule(fault: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Something that happens to a scheduler in its thirtieth step."""
    steps = count()

    def make(schedule: Any) -> Any:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(steps) == _LATE:
                fault(self)
            return schedule(self, *args, **kwargs)

        return changed

    return _replaced("schedule", make)


def _schedule_nothing(scheduler: Any) -> None:
    scheduler.max_num_scheduled_tokens = 0


def _keep_a_block(scheduler: Any) -> None:
    scheduler.kv_cache_manager.block_pool.get_new_blocks(1)


def _raise(scheduler: Any) -> None:
    raise RuntimeError("on purpose")


PLANTED: dict[str, Defect] = {
    "wrong token": _wrong_token,
    "nothing scheduled": lambda: _in_schedule(_schedule_nothing),
    "block kept": lambda: _in_schedule(_keep_a_block),
    "exception": lambda: _in_schedule(_raise),
}
"""Faults that nobody ever made, one for each way to fail; for the fuzzer's own test."""


def _filled_up(below_budget: bool) -> AbstractContextManager[None]:
    """Requests with one token left are filled up with drafts that nobody made.

    Where the step's budget is too small for that, vLLM does not schedule them at all.

    Args:
        below_budget: Whether to put the one back, or the other.
    """

    def make(schedule: Any) -> Any:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            small = self.max_num_scheduled_tokens < 1 + self.num_spec_tokens
            if small != below_budget:
                self.dynamic_sd_lookup = None
            return schedule(self, *args, **kwargs)

        return changed

    return _replaced("schedule", make)


@contextmanager
def _replaced_in(module: str, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.{name}", value)
        yield


def _late_compilation() -> AbstractContextManager[None]:
    """Segments are compiled for what they are first called with, while serving."""
    return _replaced_in(
        "adadecode_vllm.engine.split_model.SplitModel", "run_compiled", lambda *_: None
    )


def _drafts_of_all() -> AbstractContextManager[None]:
    """Requests get drafts that vLLM verifies without their logits processors."""

    def changed(params: Any) -> bool:
        from adadecode_vllm.request_options import needs_plain_steps

        return params is not None and not needs_plain_steps(params)

    return _replaced_in("adadecode_vllm.request_options", "verifiable", changed)


def _drafts_in_plain_steps() -> AbstractContextManager[None]:
    """Logprobs of chosen tokens are asked for in steps with drafts of others."""
    return _replaced_in(
        "adadecode_vllm.engine.settings.Settings", "forbid_drafts", lambda *_: False
    )


def _budgets_with_rows_of_drafts() -> AbstractContextManager[None]:
    """Thinking budgets look for rows as if there were drafts."""
    from adadecode_vllm.engine.runner_v1 import AdaDecodeCPUModelRunner

    initialize = AdaDecodeCPUModelRunner.initialize_kv_cache

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = True

    name = "AdaDecodeCPUModelRunner.initialize_kv_cache"
    return _replaced_in("adadecode_vllm.engine.runner_v1", name, changed)


DEFECTS: dict[str, Defect] = {
    "requests filled up with drafts": lambda: _filled_up(below_budget=True),
    "room above the token budget": lambda: _filled_up(below_budget=False),
    "segments compiled while serving": _late_compilation,
    "drafts verified without processors": _drafts_of_all,
    "drafts beside logprobs of chosen tokens": _drafts_in_plain_steps,
    "thinking budgets on rows of drafts": _budgets_with_rows_of_drafts,
}
"""Faults that were mended, put back by undoing what mended them."""
