# SPDX-License-Identifier: Apache-2.0
"""Answers of a shard that is not whole yet, kept as they come.

A shard is written when all of its rows are answered, which may take an hour. Until then
each answer is a line of `part-00000.unfinished.jsonl`, so that an interruption of any
kind costs at most the answers that were being made. Its first line names the request
that it belongs to, as a shard's footer does. Nothing but `adadecode data` reads it.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adadecode_vllm.files import write_all

JOURNAL_NAME = re.compile(r"part-\d{5,}\.unfinished\.jsonl")

_SYNC_SECONDS = 5.0


def journal_name(index: int) -> str:
    """Return the name of shard `index`'s journal."""
    return f"part-{index:05d}.unfinished.jsonl"


class Journals:
    """The journals of one run, one a shard.

    Args:
        directory: The data directory; it exists.
        request: What the rows follow from; the answers of another one are dropped.
        vocab_size: Token ids are below it.
    """

    def __init__(self, directory: Path, request: str, vocab_size: int) -> None:
        self._directory = directory
        self._request = request
        self._vocab_size = vocab_size
        self._files: dict[int, BinaryIO] = {}
        self._synced = time.monotonic()

    @contextmanager
    def closing(self) -> Iterator["Journals"]:
        """Close all files at the end of a block; what is in them stays."""
        try:
            yield self
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def read(self, index: int, rows: range) -> dict[int, list[int]]:
        """Return the answers that a run before has kept.

        Args:
            index: The shard.
            rows: Its row ids.

        Returns:
            Answers by row id. A line that was not written to its end, and what may
            stand behind it, is dropped.
        """
        answers, _ = self._parse(index, rows)
        return answers

    def add(self, index: int, rows: range, row: int, answer: list[int]) -> None:
        """Keep an answer.

        Args:
            index: The shard.
            rows: Its row ids.
            row: The row.
            answer: Token ids of the answer.

        Raises:
            OSError: It cannot be written.
        """
        if index not in self._files:
            self._files[index] = self._open(index, rows)
        # Unbuffered: a killed process loses nothing that was added.
        _write(self._files[index], [row, answer])
        if time.monotonic() - self._synced > _SYNC_SECONDS:  # the machine may fail, too
            for file in self._files.values():
                os.fsync(file.fileno())
            self._synced = time.monotonic()

    def remove(self, index: int) -> None:
        """Remove a shard's journal: the shard has been written."""
        if file := self._files.pop(index, None):
            file.close()
        self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._directory / journal_name(index)

    def _open(self, index: int, rows: range) -> BinaryIO:
        """Open a journal behind its last whole line, or begin it."""
        path = self._path(index)
        _, size = self._parse(index, rows)
        if not size:
            path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
        try:
            os.ftruncate(file.fileno(), size)
            if not size:
                _write(file, {"request": self._request})
        except BaseException:
            file.close()
            raise
        return file

    def _parse(self, index: int, rows: range) -> tuple[dict[int, list[int]], int]:
        """The answers in a journal, and up to which byte it is whole."""
        path = self._path(index)
        if path.is_symlink() or not path.is_file():
            return {}, 0
        answers: dict[int, list[int]] = {}
        size = 0
        with path.open("rb") as file:
            for line in file:
                value = _decode(line)
                if not size:
                    if value != {"request": self._request}:
                        return {}, 0
                elif self._is_answer(value, rows):
                    answers[value[0]] = value[1]
                else:
                    break
                size += len(line)
        return answers, size

    def _is_answer(self, value: Any, rows: range) -> bool:
        """Whether a line holds a row of the shard and token ids of the model."""
        if not isinstance(value, list) or len(value) != 2 or value[0] not in rows:
            return False
        return isinstance(value[1], list) and all(
            type(token) is int and 0 <= token < self._vocab_size for token in value[1]
        )


def _decode(line: bytes) -> Any:
    """The value in a line; None for one that is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _write(file: BinaryIO, value: Any) -> None:
    """Append a line, whole."""
    line = json.dumps(value, separators=(",", ":")) + "\n"
    write_all(file.fileno(), line.encode())
