# SPDX-License-Identifier: Apache-2.0
"""How far a long command is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Task

#: Seconds between two lines where there is no terminal, as in a log file.
EVERY = 30.0

_WINDOW = 300.0  # what comes in bursts needs minutes to average out


class Rate:
    """Units per second over the last minutes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def see(self, total: float, ago: float = 0.0) -> None:
        """Take note of how much is done now.

        Args:
            total: All that is done, ever growing.
            ago: Seconds since it was so.
        """
        now = time.monotonic() - ago
        if len(self._seen) > 1 and now - self._seen[-2][0] < 1:
            self._seen.pop()  # one a second is enough
        self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW:
            self._seen.popleft()

    @property
    def started(self) -> bool:
        """Whether anything was seen."""
        return bool(self._seen)

    @property
    def per_second(self) -> float:
        """The rate; 0 while nothing was done."""
        if not self._seen:
            return 0.0
        began, before = self._seen[0]
        seconds = time.monotonic() - began
        return (self._seen[-1][1] - before) / seconds if seconds > 0 else 0.0


class Meter:
    """Shows one task after the other on stderr, with rate and time left.

    The lines for a log file are written by a thread of their own: they come also while
    nothing finishes.

    Attributes:
        note: What else is to be said of the task.
    """

    def __init__(self, visible: bool = True) -> None:
        """Show nothing yet.

        Args:
            visible: False for a meter that says nothing, as in the other processes of
                a training.
        """
        self.note = ""
        self._visible = visible
        self._task: _Task | None = None
        self._bar: Any = None
        self._lines: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._finish()
        self._ended.set()
        if self._lines is not None:
            self._lines.join()

    def start(
        self,
        what: str,
        unit: str,
        total: int | None,
        done: int = 0,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """Begin a task; the one before is over.

        Args:
            what: What is being done.
            unit: What is counted, in the plural.
            total: How many there will be; None if nobody knows.
            done: How many are there from an earlier run.
            describe: Says how fast it goes and how long it will take; None for units a
                second and what follows from them.
        """
        self._finish()
        self.note = ""
        self._task = _Task(what, unit, total, done, describe)
        if self._visible and not sys.stderr.isatty() and self._lines is None:
            self._lines = threading.Thread(target=self._write_lines, daemon=True)
            self._lines.start()

    def advance(self, count: int = 1) -> None:
        """So many further units are done; 0 only shows the task on a terminal."""
        task = self._task
        assert task is not None, "a task has been started"
        task.advance(count)
        if self._visible and sys.stderr.isatty():
            # Not earlier: what the task starts with may write a log of its own.
            if self._bar is None:
                self._bar = _make_bar(task, lambda: self._described(task))
                self._bar.start()
            self._bar.update(0, completed=task.done)

    def _described(self, task: _Task) -> str:
        return ", ".join(part for part in (task.describe(), self.note) if part)

    def _finish(self) -> None:
        """Leave the last state of the task on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._lines is not None and self._task is not None and self._task.advanced:
            self._write()
        self._task = None

    def _write_lines(self) -> None:
        while not self._ended.wait(EVERY):
            self._write()

    def _write(self) -> None:
        task = self._task
        if task is None:
            return
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            line = f"{task.so_far()}, {self._described(task)}".rstrip(", ")
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class _Task:
    """What a meter shows; see `Meter.start`."""

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None,
        done: int,
        describe: Callable[[], str] | None,
    ) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.describe = describe or self._describe
        self.advanced = False
        self._began = time.monotonic()
        self._rate = Rate()
        self._rate.see(done)

    def advance(self, count: int) -> None:
        """So many further units are done."""
        self.done += count
        self.advanced |= count > 0
        self._rate.see(self.done)

    def so_far(self) -> str:
        """What is done, and for how long."""
        of = "" if self.total is None else f" of {self.total:,}"
        passed = duration(time.monotonic() - self._began)
        return f"{self.what}: {self.done:,}{of} {self.unit} after {passed}"

    def _describe(self) -> str:
        rate = self._rate.per_second
        if not rate:
            return ""
        parts = [f"{number(rate)} {self.unit}/s"]
        if self.total is not None and self.total > self.done:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)


def number(value: float) -> str:
    """A number with what matters of its digits."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _make_bar(task: _Task, describe: Callable[[], str]) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Described(ProgressColumn):
        def render(self, _task: Task) -> Text:
            return Text(describe())

    bar = Progress(
        TextColumn(f"{task.what}, {task.unit}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Described(),
        console=Console(stderr=True),
    )
    bar.add_task(task.what, total=task.total, completed=task.done)
    return bar
