# SPDX-License-Identifier: Apache-2.0
"""The files of a cache of states.

``manifest.json`` says what all states have in common and is written first; shards hold
the states one after the other; ``index.jsonl`` has a line for every text whose states
are on the disk. Files only grow, so that whatever was finished stays.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import without_temporary, write_whole

MANIFEST = "manifest.json"
INDEX = "index.jsonl"
_SHARD_NAME = re.compile(r"states-(\d{5,})\.bin")


class UnfitCacheError(AdaDecodeError):
    """A cache is damaged, or of something else; a run's own may be made anew."""


class Manifest(BaseModel):
    """What ``manifest.json`` says.

    Attributes:
        key: Hash of the model, the layers and the dtype.
        layers: Layer counts.
        hidden_size: d.
        dtype: Name of the torch dtype.
        shard_tokens: Tokens in every shard but the last.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    layers: list[int]
    hidden_size: int
    dtype: str
    shard_tokens: int

    @property
    def row_bytes(self) -> int:
        """Size of one token's states."""
        itemsize = int(getattr(torch, self.dtype).itemsize)
        return len(self.layers) * self.hidden_size * itemsize


class Entry(BaseModel):
    """A line of ``index.jsonl``.

    Attributes:
        text: Hash of the text.
        first: Place of its first state in the cache.
        tokens: Number of its states.
    """

    model_config = ConfigDict(extra="forbid")

    text: str
    first: int
    tokens: int


def end_of(entries: Iterable[Entry]) -> int:
    """Tokens up to the last one of some entries."""
    return max((entry.first + entry.tokens for entry in entries), default=0)


def shard_path(directory: Path, number: int) -> Path:
    """File of a shard."""
    return directory / f"states-{number:05d}.bin"


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest; None where there is none yet.

    Raises:
        UnfitCacheError: If it cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(directory, MANIFEST, error) from error


def read_index(directory: Path) -> tuple[dict[str, Entry], int]:
    """Read the index.

    Returns:
        The entries by text, and the bytes of whole lines: a last line that was cut off
        does not count.

    Raises:
        UnfitCacheError: If it cannot be read.
    """
    path = directory / INDEX
    if not path.exists():
        return {}, 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        entries = [Entry.model_validate_json(line) for line in whole.splitlines()]
    except ValueError as error:
        raise _unreadable(directory, INDEX, error) from error
    return {entry.text: entry for entry in entries}, len(whole)


def check_shards(directory: Path, manifest: Manifest, tokens: int) -> None:
    """See whether the shards hold so many tokens.

    Raises:
        UnfitCacheError: If one is missing or too short.
    """
    for number, first in enumerate(range(0, tokens, manifest.shard_tokens)):
        wanted = min(manifest.shard_tokens, tokens - first) * manifest.row_bytes
        path = shard_path(directory, number)
        if not path.is_file() or path.stat().st_size < wanted:
            raise UnfitCacheError(
                f"--cache-dir {directory}: {path.name} is missing or damaged; delete "
                "the directory to compute it anew"
            )


def begin(directory: Path, manifest: Manifest) -> None:
    """Make an empty cache, in a directory that holds nothing else.

    Raises:
        AdaDecodeError: If there are other files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    clear(directory)
    write_whole(directory / MANIFEST, manifest.model_dump_json().encode())


def clear(directory: Path) -> None:
    """Remove a cache's files.

    Raises:
        AdaDecodeError: If there are other files.
    """
    foreign = [path for path in directory.iterdir() if not _is_ours(path)]
    if foreign:
        raise AdaDecodeError(
            f"--cache-dir {directory}: it holds other files ({foreign[0].name}); give "
            "a directory of its own"
        )
    for path in directory.iterdir():
        path.unlink()


class Writer:
    """Appends texts' states to a cache, and then the texts to its index."""

    def __init__(self, directory: Path, manifest: Manifest, index: int) -> None:
        """Take over an index that is open and locked; see `one_writer`."""
        self._directory = directory
        self._shard_tokens = manifest.shard_tokens
        self._index = index
        self.entries, whole = read_index(directory)
        # What is behind the last whole line was never finished.
        os.ftruncate(index, whole)
        self._end = end_of(self.entries.values())
        self._number, within = divmod(self._end, manifest.shard_tokens)
        self._room = manifest.shard_tokens - within
        self._file: int | None = None
        for path in directory.iterdir():
            found = _SHARD_NAME.fullmatch(path.name)
            if found and int(found[1]) >= self._number + (within > 0):
                path.unlink()
        if within:
            flags = os.O_WRONLY | os.O_NOFOLLOW
            self._file = os.open(shard_path(directory, self._number), flags)
            size = within * manifest.row_bytes
            os.ftruncate(self._file, size)
            os.lseek(self._file, size, os.SEEK_SET)

    def add(self, texts: Iterable[tuple[str, int]], states: torch.Tensor) -> None:
        """Append some texts.

        Args:
            texts: Hash and number of states of each.
            states: (n, layers, d), of all of them.
        """
        while len(states):
            if self._file is None:
                path = shard_path(self._directory, self._number)
                # Never through a link that somebody put there.
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            part = states[: self._room].contiguous()
            _write(self._file, part.view(torch.uint8).flatten().numpy().tobytes())
            states = states[self._room :]
            self._room -= len(part)
            if not self._room:
                self._flush()
                self.close()
                self._number += 1
                self._room = self._shard_tokens
        self._flush()
        lines = b""
        for text, tokens in texts:
            entry = Entry(text=text, first=self._end, tokens=tokens)
            self.entries[text] = entry
            self._end += tokens
            lines += entry.model_dump_json().encode() + b"\n"
        _write(self._index, lines)
        os.fsync(self._index)

    def close(self) -> None:
        """Close the shard."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        """Have the states on the disk before the index names them."""
        if self._file is not None:
            os.fsync(self._file)


@contextmanager
def one_writer(directory: Path, manifest: Manifest) -> Iterator[Writer]:
    """A cache, open to append to, while no other process has it so.

    Raises:
        AdaDecodeError: If another one has.
    """
    # Never through a link that somebody put there.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    index = os.open(directory / INDEX, flags, 0o666)
    try:
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdaDecodeError(
                f"--cache-dir {directory}: another run is writing to it; wait for it, "
                "or give another directory"
            ) from None
        writer = Writer(directory, manifest, index)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        os.close(index)


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _unreadable(directory: Path, name: str, error: ValueError) -> UnfitCacheError:
    return UnfitCacheError(
        f"--cache-dir {directory}: {name} cannot be read "
        f"({str(error).splitlines()[0]}); delete the directory to compute it anew"
    )


def _is_ours(path: Path) -> bool:
    name = without_temporary(path.name)
    return name in (MANIFEST, INDEX) or _SHARD_NAME.fullmatch(name) is not None
