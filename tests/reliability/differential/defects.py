# SPDX-License-Identifier: Apache-2.0
"""Faults that can be put into the process of the engine with AdaDecode.

To see whether the fuzzer finds them. Each is a function without arguments that gives a
context; what it replaces must be replaced before the engine starts, and it never
touches ordinary vLLM, which runs in another process.
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
    from adadecode_vllm.scheduler import AdaDecodeScheduler

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

DEFECTS: dict[str, Defect] = {}
"""Faults that were mended, put back by undoing what mended them."""
