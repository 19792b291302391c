# SPDX-License-Identifier: Apache-2.0
"""Processes that hold one engine at a time.

An engine that dies takes its process along at worst, and one that hangs is killed. The
process stays for the next engine, which spares it the imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.interpreted.process import interpreted_environment, join_or_kill
from tests.reliability.differential.case import Request

SECONDS = {"v1": 180.0, "v2": 540.0}
"""Most for a start or a stream; the watchdog of steps is usually much faster."""


class HostDied(Exception):
    """The process ended, or did not answer in time."""


class EngineFailed(Exception):
    """The engine could not be started."""


class Host:
    """A process with an engine, of one model runner."""

    def __init__(self, runner: str) -> None:
        """Start the process.

        Args:
            runner: "v1" or "v2".
        """
        context = multiprocessing.get_context("spawn")
        self._seconds = SECONDS[runner]
        self._connection, theirs = context.Pipe()
        self._directory = tempfile.TemporaryDirectory()
        self._log = Path(self._directory.name) / "log"
        self._process = context.Process(target=_serve, args=(theirs, str(self._log)))
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
            if runner == "v2":
                stack.enter_context(interpreted_environment())
            self._process.start()
        theirs.close()  # so that a child that dies ends our waiting

    def start(self, arguments: dict[str, Any], defect: str | None = None) -> None:
        """Start an engine; an earlier one is shut down.

        Args:
            arguments: Of `tests.harness.start_engine`.
            defect: A name in `defects.py`, to be there as long as the engine.

        Raises:
            EngineFailed: With its exception's text.
        """
        self._call("start", arguments, defect)

    def run(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Run a stream; see `drive.Driver.run`."""
        return self._call("run", requests)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        join_or_kill(self._process, 20)
        self._directory.cleanup()

    def _abort(self) -> str:
        """End the process if need be; its exit code, and where it was."""
        self._process.join(5)
        if self._process.is_alive():
            # Its fault handler then writes down what every thread is doing.
            os.kill(self._process.pid or 0, signal.SIGABRT)
            join_or_kill(self._process, 20)
        words = last_words(self._log.read_text(errors="replace"))
        return f"exit code {self._process.exitcode}: {words}"

    def _call(self, name: str, *args: Any) -> Any:
        try:
            self._connection.send((name, args))
            if not self._connection.poll(self._seconds):
                raise HostDied(
                    f"{name}: no answer within {self._seconds:.0f} s: {self._abort()}"
                )
            failed, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise HostDied(f"{name}: the process ended: {self._abort()}") from error
        if failed:
            raise EngineFailed(answer)
        return answer


def last_words(log: str) -> str:
    """What a process that crashed said: a line before the crash and its stack."""
    before, crashed, stack = log.rpartition("Fatal Python error")
    if not crashed:
        return log[-1000:]
    lines = before.strip().splitlines()[-1:]
    stack = stack.partition("Extension modules")[0]
    return "\n".join([*lines, crashed + stack])[:4000]


class _Calls:
    """What the process answers."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._driver: Any = None

    def start(self, arguments: dict[str, Any], defect: str | None) -> None:
        from tests import harness
        from tests.interpreted import grammar_kernel, top_k_kernel
        from tests.reliability.differential.defects import DEFECTS, PLANTED
        from tests.reliability.differential.drive import Driver

        self.stop()
        with ExitStack() as stack:
            if defect is not None:
                stack.enter_context({**PLANTED, **DEFECTS}[defect]())
            llm = stack.enter_context(harness.start_engine(**arguments))
            self._running = stack.pop_all()
        if llm.llm_engine.vllm_config.use_v2_model_runner:
            grammar_kernel.install()
            top_k_kernel.install()
        self._driver = Driver(llm)

    def run(self, requests: Sequence[Request]) -> dict[str, Any]:
        return self._driver.run(requests)

    def stop(self) -> None:
        self._driver = None
        self._running.close()


def _serve(connection: Connection, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable()
    calls = _Calls()
    try:
        while True:
            name, args = connection.recv()
            try:
                connection.send((False, getattr(calls, name)(*args)))
            except Exception:
                connection.send((True, traceback.format_exc()))
    except EOFError:
        calls.stop()
