# SPDX-License-Identifier: Apache-2.0
"""States of all training tokens: computed once and kept on disk, or anew each time.

A cache holds the states of texts, each under the hash of its tokens. A run computes
what is missing, so an interrupted one goes on, and text that is added, left out or held
out another time costs nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.states.state_files import (
    Entry,
    Manifest,
    UnfitCacheError,
    begin,
    check_states,
    clear,
    end_of,
    map_states,
    one_writer,
    read_index,
    read_manifest,
)
from adadecode_vllm.toolkit.states.teacher import Teacher, split_by_tokens
from adadecode_vllm.toolkit.states.texts import Text, texts_fingerprint, used_tokens

logger = logging.getLogger(__name__)


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

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Number of states of each of some sequences, which sum to n of `states`.

        Args:
            indices: Indices of sequences.
        """


def first_texts(source: StateSource, tokens: int) -> list[int]:
    """Choose so many of the first texts that they have enough states.

    Args:
        source: States of the texts.
        tokens: How many states are enough.

    Returns:
        Indices of the texts; all, if together they have fewer states.
    """
    indices: list[int] = []
    while len(indices) < len(source) and sum(source.lengths(indices)) < tokens:
        indices.append(len(indices))
    return indices


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

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """See the protocol."""
        return [self.texts[index].used for index in indices]

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


class CachedStates:
    """States of some texts in a memory-mapped file."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        entries: Sequence[Entry],
        device: torch.device,
    ) -> None:
        """Map the file, which holds what the entries say.

        Args:
            directory: The cache.
            manifest: Its manifest.
            entries: Of the texts, in their order.
            device: Where states are returned.
        """
        self.layers = manifest.layers
        self.device = device
        self._entries = entries
        self._rows = map_states(directory, manifest, end_of(entries))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._entries)

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """See the protocol."""
        return [self._entries[index].tokens for index in indices]

    def states(self, indices: Sequence[int]) -> torch.Tensor:
        """Read states; see the protocol."""
        entries = [self._entries[index] for index in indices]
        parts = [self._rows[e.first : e.first + e.tokens] for e in entries]
        return torch.cat(parts).transpose(0, 1).to(self.device)


def cache_key(teacher: Teacher, fingerprint: str, layers: Sequence[int]) -> str:
    """Hash of everything but the texts that the states depend on.

    Args:
        teacher: The model.
        fingerprint: Hash of the model's weights.
        layers: Layer counts.

    Returns:
        Hexadecimal digits.
    """
    parts = [fingerprint, list(layers), str(teacher.dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_bytes(teacher: Teacher, texts: Iterable[Text], layers: Sequence[int]) -> int:
    """Size of texts' states on disk."""
    tokens = used_tokens(texts)
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
    """Open the states of some texts, after those that are missing were computed.

    Args:
        directory: The cache.
        teacher: The model.
        fingerprint: Hash of the model's weights.
        live: Computes the states.
        progress: Called with the number of states found or written since the last
            call.
        own: Whether the directory is a run's own, so that what does not fit is
            written anew.

    Returns:
        The states.

    Raises:
        AdaDecodeError: If the directory holds something else, another run writes to it
            or the disk is too small.
    """
    key = cache_key(teacher, fingerprint, live.layers)
    try:
        try:
            return _open(directory, teacher, key, live, progress)
        except UnfitCacheError:
            if not own:
                raise
            clear(directory)
            return _open(directory, teacher, key, live, progress)
    except OSError as error:
        raise AdaDecodeError(
            f"--cache-dir {directory}: writing failed ({error.strerror or error}); "
            "name another directory, or pass --no-cache to compute the states in every "
            "epoch"
        ) from error


def _open(
    directory: Path,
    teacher: Teacher,
    key: str,
    live: LiveStates,
    progress: Callable[[int], None],
) -> CachedStates:
    manifest = read_manifest(directory)
    if manifest is None:
        begin(directory, _manifest_of(teacher, key, live.layers))
        # Another run may have begun it meanwhile.
        manifest = read_manifest(directory)
        assert manifest is not None, "written above"
    if manifest.key != key:
        raise UnfitCacheError(
            f"--cache-dir {directory}: it holds the states of another model or other "
            "exit layers; give another directory or delete it"
        )
    entries, _ = read_index(directory)
    check_states(directory, manifest, end_of(entries.values()))
    keys = [_text_key(text) for text in live.texts]
    wanted = {key: index for index, key in enumerate(keys)}
    if wanted.keys() - entries.keys():
        with one_writer(directory, manifest) as writer:
            # Another run may have added to it until now.
            entries = writer.entries
            missing = [i for key, i in wanted.items() if key not in entries]
            _check_disk_space(directory, teacher, live, missing)
            left = used_tokens(live.texts[i] for i in missing)
            progress(used_tokens(live.texts) - left)
            lengths = [len(live.texts[i].token_ids) for i in missing]
            for group in split_by_tokens(lengths, live.pass_tokens):
                members = [missing[place] for place in group]
                states = live.states(members).transpose(0, 1).contiguous().cpu()
                writer.add([(keys[i], live.texts[i].used) for i in members], states)
                progress(len(states))
    else:
        progress(used_tokens(live.texts))
    found = [entries[key] for key in keys]
    return CachedStates(directory, manifest, found, teacher.device)


def _manifest_of(teacher: Teacher, key: str, layers: Sequence[int]) -> Manifest:
    return Manifest(
        key=key,
        layers=list(layers),
        hidden_size=teacher.hidden_size,
        dtype=str(teacher.dtype).removeprefix("torch."),
    )


def _check_disk_space(
    directory: Path, teacher: Teacher, live: LiveStates, missing: Sequence[int]
) -> None:
    size = cache_bytes(teacher, (live.texts[i] for i in missing), live.layers)
    free = shutil.disk_usage(directory).free
    logger.info("writing %.2f GB of states to %s", size / 1e9, directory)
    if size > 0.98 * free:
        raise AdaDecodeError(
            f"--cache-dir {directory}: the states need {size / 1e9:.1f} GB and the "
            f"disk has {free / 1e9:.1f} GB free; name a larger disk, take less text, "
            "or pass --no-cache to compute them in every epoch"
        )


def _text_key(text: Text) -> str:
    """Hash of a text's tokens and of which of them are used."""
    return texts_fingerprint([text])[:32]
