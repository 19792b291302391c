# SPDX-License-Identifier: Apache-2.0
"""Several processes that train together fail together.

A process that fails alone would leave the others waiting for it, for as long as nobody
ends them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from adadecode_vllm.errors import AdaDecodeError

T = TypeVar("T")


class Processes(Protocol):
    """The part of accelerate's ``Accelerator`` that is needed here."""

    process_index: int
    num_processes: int
    is_main_process: bool


def all_or_none(processes: Processes, action: Callable[[], T]) -> T:
    """Run something in every process; if it fails in one, it fails in all.

    Args:
        processes: This process among those that train together.
        action: Must not wait for other processes itself.

    Returns:
        What the action returned here.

    Raises:
        AdaDecodeError: It failed in another process.
        Exception: It failed here.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if processes.num_processes > 1:
        from accelerate.utils import gather_object

        for index, sentence in enumerate(gather_object([_sentence(failure)])):
            if sentence is not None and failure is None:
                raise AdaDecodeError(
                    f"process {index}: {sentence}" if index else sentence
                )
    if failure is not None:
        raise failure
    return result


def main_first(processes: Processes, action: Callable[[], T]) -> T:
    """Run something in the main process, and then in the others.

    Args:
        processes: This process among those that train together.
        action: What to run, as in `all_or_none`.

    Returns:
        What the action returned here.

    Raises:
        AdaDecodeError: It failed in another process.
        Exception: It failed here.
    """
    first = processes.is_main_process
    result: Any = all_or_none(processes, action if first else lambda: None)
    if processes.num_processes == 1:
        return result
    return all_or_none(processes, (lambda: result) if first else action)


def in_main(processes: Processes, action: Callable[[], object]) -> None:
    """Run something in the main process only; its failure is that of all.

    Args:
        processes: This process among those that train together.
        action: What to run, as in `all_or_none`.

    Raises:
        AdaDecodeError: It failed in the main process.
        Exception: It failed here.
    """
    all_or_none(processes, action if processes.is_main_process else lambda: None)


def _sentence(failure: Exception | None) -> str | None:
    """What the others say."""
    if failure is None:
        return None
    known = isinstance(failure, AdaDecodeError)
    return str(failure) if known else f"{type(failure).__name__}: {failure}"
