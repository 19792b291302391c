# SPDX-License-Identifier: Apache-2.0
"""States of all training tokens: computed once and kept on disk, or anew each time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import without_temporary, write_whole
from adadecode_vllm.training.teacher import Teacher, split_by_tokens
from adadecode_vllm.training.texts import Text, texts_fingerprint

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"states-\d{5,}\.bin")
SHARD_BYTES = 1 << 30


class StateSource(Protocol):
    """Where a trainer gets states from.

    Attributes:
        layers: Layer counts of the states, the last one L.
    """

    layers: list[int]

    def __len__(self) -> int:
        """Number of sequences."""

    def states(self, indices: Sequence[int]) -> torch.Tensor:
        """States of the used positions of some sequences.

        Args:
            indices: Indices of sequences.

        Returns:
            (len(layers), n, d) in the model's dtype on the model's device.
        """


class LiveStates:
    """States computed each time they are asked for."""

    def __init__(
        self,
        teacher: Teacher,
        texts: Sequence[Text],
        layers: Sequence[int],
        pass_tokens: int,
    ) -> None:
        """Remember what to run.

        Args:
            teacher: The model.
            texts: The texts.
            layers: Layer counts, the last one L.
            pass_tokens: Most tokens of one pass of the model.
        """
        self.teacher = teacher
        self.texts = texts
        self.layers = list(layers)
        self.pass_tokens = pass_tokens

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.texts)

    def states(self, indices: Sequence[int]) -> torch.Tensor:
        """Run the model; see the protocol."""
        chosen = [self.texts[index] for index in indices]
        parts = []
        lengths = [len(text.token_ids) for text in chosen]
        for group in self.teacher.groups(lengths, self.pass_tokens):
            members = [chosen[index] for index in group]
            streams = self.teacher.streams(
                [member.token_ids for member in members], self.layers
            )
            used = torch.cat(
                [
                    torch.arange(len(member.token_ids)) >= member.first
                    for member in members
                ]
            )
            ends = torch.tensor([len(member.token_ids) for member in members]).cumsum(0)
            used[ends - 1] = False  # the last token predicts nothing that is known
            used = used.to(self.teacher.device)
            parts.append(torch.stack([streams[layer][used] for layer in self.layers]))
        return torch.cat(parts, dim=1)


class CacheManifest(BaseModel):
    """What ``manifest.json`` of a cache says; it is written last.

    Attributes:
        key: Hash of the model, the texts, the layers and the dtype.
        layers: Layer counts.
        hidden_size: d.
        dtype: Name of the torch dtype.
        offsets: (sequences + 1) first state of each sequence.
        shard_tokens: Tokens in every shard but the last.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    layers: list[int]
    hidden_size: int
    dtype: str
    offsets: list[int]
    shard_tokens: int


class CachedStates:
    """States in memory-mapped shards, (tokens, layers, d) each."""

    def __init__(
        self, directory: Path, manifest: CacheManifest, device: torch.device
    ) -> None:
        """Map the shards.

        Args:
            directory: The cache.
            manifest: Its manifest.
            device: Where states are returned.

        Raises:
            AdaDecodeError: If a shard is missing or has another size.
        """
        self.layers = manifest.layers
        self.device = device
        self._offsets = manifest.offsets
        self._shard_tokens = manifest.shard_tokens
        dtype = getattr(torch, manifest.dtype)
        self._shards = []
        total = manifest.offsets[-1]
        for number, first in enumerate(range(0, total, manifest.shard_tokens)):
            tokens = min(manifest.shard_tokens, total - first)
            shape = (tokens, len(self.layers), manifest.hidden_size)
            count = shape[0] * shape[1] * shape[2]
            path = _shard_path(directory, number)
            size = path.stat().st_size if path.is_file() else 0
            if size != count * dtype.itemsize:
                raise AdaDecodeError(
                    f"--cache-dir {directory}: {path.name} is missing or damaged; "
                    "delete the directory to compute it anew"
                )
            flat = torch.from_file(str(path), shared=False, size=count, dtype=dtype)
            self._shards.append(flat.view(shape))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._offsets) - 1

    def states(self, indices: Sequence[int]) -> torch.Tensor:
        """Read states; see the protocol."""
        parts = []
        for index in indices:
            first, last = self._offsets[index], self._offsets[index + 1]
            while first < last:
                number, within = divmod(first, self._shard_tokens)
                shard = self._shards[number]
                count = min(last - first, len(shard) - within)
                parts.append(shard[within : within + count])
                first += count
        return torch.cat(parts).transpose(0, 1).to(self.device)


def cache_key(
    teacher: Teacher,
    fingerprint: str,
    texts: Sequence[Text],
    layers: Sequence[int],
) -> str:
    """Hash of everything that the states depend on.

    Args:
        teacher: The model.
        fingerprint: Hash of the model's weights.
        texts: The texts.
        layers: Layer counts.

    Returns:
        Hexadecimal digits.
    """
    parts = [fingerprint, list(layers), str(teacher.dtype), texts_fingerprint(texts)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_bytes(teacher: Teacher, texts: Iterable[Text], layers: Sequence[int]) -> int:
    """Size of the cache on disk."""
    tokens = sum(text.used for text in texts)
    return tokens * len(layers) * teacher.hidden_size * teacher.dtype.itemsize


def cached_states(
    directory: Path,
    teacher: Teacher,
    fingerprint: str,
    live: LiveStates,
    progress: Callable[[int], None] = lambda tokens: None,
    *,
    own: bool = False,
) -> CachedStates:
    """Open the cache, writing it first where it is missing.

    A cache is trusted only with its manifest, which is written after all shards.

    Args:
        directory: The cache.
        teacher: The model.
        fingerprint: Hash of the model's weights.
        live: Computes the states.
        progress: Called with the number of states written since the last call.
        own: Whether the directory is a run's own, so that what does not fit is
            written anew.

    Returns:
        The states.

    Raises:
        AdaDecodeError: If the directory holds something else or the disk is too small.
    """
    key = cache_key(teacher, fingerprint, live.texts, live.layers)
    try:
        manifest = _read_manifest(directory)
        if manifest is not None:
            if manifest.key != key:
                raise AdaDecodeError(
                    f"--cache-dir {directory}: it holds the states of another model, "
                    "other text or other exit layers; give another directory or delete "
                    "it"
                )
            return CachedStates(directory, manifest, teacher.device)
    except AdaDecodeError:
        if not own:
            raise
    try:
        manifest = _write(directory, teacher, key, live, progress)
    except OSError as error:
        raise AdaDecodeError(
            f"--cache-dir {directory}: writing failed ({error.strerror or error}); "
            "name another directory, or pass --no-cache to compute the states in every "
            "epoch"
        ) from error
    return CachedStates(directory, manifest, teacher.device)


def _read_manifest(directory: Path) -> CacheManifest | None:
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return CacheManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdaDecodeError(
            f"--cache-dir {directory}: {MANIFEST} cannot be read "
            f"({str(error).splitlines()[0]}); delete the directory to compute it anew"
        ) from error


def _write(
    directory: Path,
    teacher: Teacher,
    key: str,
    live: LiveStates,
    progress: Callable[[int], None],
) -> CacheManifest:
    directory.mkdir(parents=True, exist_ok=True)
    foreign = [path for path in directory.iterdir() if not _is_ours(path)]
    if foreign:
        raise AdaDecodeError(
            f"--cache-dir {directory}: it holds other files ({foreign[0].name}); give "
            "a directory of its own"
        )
    for left_over in directory.iterdir():
        left_over.unlink()
    size = cache_bytes(teacher, live.texts, live.layers)
    free = shutil.disk_usage(directory).free
    logger.info("writing %.2f GB of states to %s", size / 1e9, directory)
    if size > 0.98 * free:
        raise AdaDecodeError(
            f"--cache-dir {directory}: the states need {size / 1e9:.1f} GB and the "
            f"disk has {free / 1e9:.1f} GB free; name a larger disk, take less text, "
            "or pass --no-cache to compute them in every epoch"
        )
    row_bytes = len(live.layers) * teacher.hidden_size * teacher.dtype.itemsize
    shard_tokens = max(1, SHARD_BYTES // row_bytes)
    writer = _ShardWriter(directory, shard_tokens)
    lengths = [len(text.token_ids) for text in live.texts]
    try:
        for group in split_by_tokens(lengths, live.pass_tokens):
            states = live.states(list(group))
            writer.add(states.transpose(0, 1).contiguous().cpu())
            progress(states.shape[1])
        writer.close()
    finally:
        writer.abandon()
    offsets = [0]
    for text in live.texts:
        offsets.append(offsets[-1] + text.used)
    manifest = CacheManifest(
        key=key,
        layers=live.layers,
        hidden_size=teacher.hidden_size,
        dtype=str(teacher.dtype).removeprefix("torch."),
        offsets=offsets,
        shard_tokens=shard_tokens,
    )
    write_whole(directory / MANIFEST, manifest.model_dump_json().encode())
    return manifest


class _ShardWriter:
    """Writes rows one after the other into shards of equal length."""

    def __init__(self, directory: Path, shard_tokens: int) -> None:
        self._directory = directory
        self._shard_tokens = shard_tokens
        self._number = -1
        self._room = 0
        self._file: int | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Append (n, layers, d) rows."""
        while len(rows):
            if not self._room:
                self.close()
                self._number += 1
                path = _shard_path(self._directory, self._number)
                # Never through a link that somebody put there.
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self._room = self._shard_tokens
            assert self._file is not None
            part = rows[: self._room].contiguous()
            data = memoryview(part.view(torch.uint8).flatten().numpy().tobytes())
            while data:
                data = data[os.write(self._file, data) :]
            rows = rows[self._room :]
            self._room -= len(part)

    def close(self) -> None:
        """Finish the shard, so that it is on the disk before the manifest."""
        if self._file is not None:
            os.fsync(self._file)
            self.abandon()

    def abandon(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"states-{number:05d}.bin"


def _is_ours(path: Path) -> bool:
    name = without_temporary(path.name)
    return name == MANIFEST or _SHARD_NAME.fullmatch(name) is not None
