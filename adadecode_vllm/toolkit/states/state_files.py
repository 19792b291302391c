# SPDX-License-Identifier: Apache-2.0
"""The files of a cache of states.

``manifest.json`` says what all states have in common and is written first;
``states.bin`` holds the states one after the other, (tokens, layers, d);
``index.jsonl`` has a line for every text whose states are on the disk. Files only grow,
so that whatever was finished stays.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.files import atomic_write, locked, without_temporary, write_all

MANIFEST = "manifest.json"
INDEX = "index.jsonl"
STATES = "states.bin"

# Never through a link that somebody put there.
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW


class UnfitCacheError(AdaDecodeError):
    """A cache is damaged, or of something else; a run's own may be made anew."""


class Manifest(BaseModel):
    """What ``manifest.json`` says.

    Attributes:
        key: Hash of the model, the layers and the dtype.
        layers: Layer counts.
        hidden_size: d.
        dtype: Name of the torch dtype.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    layers: list[int]
    hidden_size: int
    dtype: str

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


def check_states(directory: Path, manifest: Manifest, tokens: int) -> None:
    """See whether there are the states of so many tokens.

    Raises:
        UnfitCacheError: If their file is missing or too short.
    """
    path = directory / STATES
    wanted = tokens * manifest.row_bytes
    if wanted and not (path.is_file() and path.stat().st_size >= wanted):
        raise UnfitCacheError(
            f"--cache-dir {directory}: {STATES} is missing or damaged; delete the "
            "directory to compute it anew"
        )


def map_states(directory: Path, manifest: Manifest, tokens: int) -> torch.Tensor:
    """Map the states of the first tokens into memory.

    Args:
        directory: The cache, which :func:`check_states` looked at.
        manifest: Its manifest.
        tokens: Their number.

    Returns:
        (tokens, layers, d), of which nothing is read until it is used.
    """
    shape = (tokens, len(manifest.layers), manifest.hidden_size)
    dtype = getattr(torch, manifest.dtype)
    if not tokens:
        return torch.empty(shape, dtype=dtype)
    # Not numpy's memmap, which has no bfloat16.
    flat = torch.from_file(
        str(directory / STATES), shared=False, size=math.prod(shape), dtype=dtype
    )
    return flat.view(shape)


def begin(directory: Path, manifest: Manifest) -> None:
    """Make an empty cache, in a directory that holds nothing else.

    A cache that another run has made since this one looked is left as it is.

    Raises:
        UnfitCacheError: If there are states, or an index, of nobody knows what.
        AdaDecodeError: If there are other files, or another run is at it right now.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(directory)
    with locked(directory, _taken(directory)):
        if not (directory / MANIFEST).exists():
            # A cache begins with its manifest, and ends with it: see `clear`.
            for name in (INDEX, STATES):
                if (directory / name).exists():
                    raise UnfitCacheError(
                        f"--cache-dir {directory}: it holds a file {name}, and no "
                        f"{MANIFEST} that says of what; give a directory of its own"
                    )
            atomic_write(directory / MANIFEST, manifest.model_dump_json().encode())


def clear(directory: Path) -> None:
    """Remove a cache's files.

    Raises:
        AdaDecodeError: If there are other files.
    """
    _refuse_strangers(directory)
    # The manifest last, without which nothing shows that the others are a cache's.
    for path in sorted(directory.iterdir(), key=lambda path: path.name == MANIFEST):
        path.unlink()


class Writer:
    """Appends texts' states to a cache, and then the texts to its index."""

    def __init__(self, directory: Path, manifest: Manifest, index: int) -> None:
        """Take over an index that is open and locked; see `one_writer`."""
        self._index = index
        self.entries, whole = read_index(directory)
        # What is behind the last whole line was never finished.
        os.ftruncate(index, whole)
        self._end = end_of(self.entries.values())
        self._states = os.open(directory / STATES, _APPEND, 0o666)
        os.ftruncate(self._states, self._end * manifest.row_bytes)

    def add(self, texts: Iterable[tuple[str, int]], states: torch.Tensor) -> None:
        """Append some texts.

        Args:
            texts: Hash and number of states of each.
            states: (n, layers, d), of all of them.
        """
        values = states.contiguous().view(torch.uint8).flatten().numpy().data
        write_all(self._states, values)
        os.fsync(self._states)  # before the index names them
        lines = b""
        for text, tokens in texts:
            entry = Entry(text=text, first=self._end, tokens=tokens)
            self.entries[text] = entry
            self._end += tokens
            lines += entry.model_dump_json().encode() + b"\n"
        write_all(self._index, lines)
        os.fsync(self._index)

    def close(self) -> None:
        """Close the states' file."""
        os.close(self._states)


@contextmanager
def one_writer(directory: Path, manifest: Manifest) -> Iterator[Writer]:
    """A cache, open to append to, while no other process has it so.

    Raises:
        AdaDecodeError: If another one has.
    """
    index = os.open(directory / INDEX, _APPEND, 0o666)
    try:
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(directory) from None
        writer = Writer(directory, manifest, index)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        os.close(index)


def _taken(directory: Path) -> AdaDecodeError:
    return AdaDecodeError(
        f"--cache-dir {directory}: another run is writing to it; wait for it, or give "
        "another directory"
    )


def _refuse_strangers(directory: Path) -> None:
    """Refuse a directory with files of somebody else."""
    foreign = [path for path in directory.iterdir() if not _is_ours(path)]
    if foreign:
        raise AdaDecodeError(
            f"--cache-dir {directory}: it holds other files ({foreign[0].name}); give "
            "a directory of its own"
        )


def _unreadable(directory: Path, name: str, error: ValueError) -> UnfitCacheError:
    return UnfitCacheError(
        f"--cache-dir {directory}: {name} cannot be read ({first_line(error)}); give "
        "another directory, or delete this cache to compute it anew"
    )


def _is_ours(path: Path) -> bool:
    return without_temporary(path.name) in (MANIFEST, INDEX, STATES)
