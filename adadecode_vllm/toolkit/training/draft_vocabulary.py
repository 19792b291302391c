# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: the tokens of a text, the most frequent ones first.

At every gate the LM head over the whole vocabulary is a real cost. A gate that looks
only at the tokens which the text is mostly made of saves most of it; verification is
always over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import atomic_write, locked
from adadecode_vllm.heads.config import load_heads_config
from adadecode_vllm.heads.files import CARD_FILE
from adadecode_vllm.heads.io import load_tensors, save_heads
from adadecode_vllm.toolkit.data.info import data_error
from adadecode_vllm.toolkit.data.shards import DataRow, load_dataset_info, read_rows
from adadecode_vllm.toolkit.publishing.card import name_draft_vocabulary

# 256 KB in a file. Of a vocabulary several times as large, text rarely leaves it.
MAX_TOKENS = 32_768

_CHUNK = 1 << 20  # tokens counted at once: 8 MB


def count_tokens(answers: Iterable[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """Count how often every token occurs.

    Args:
        answers: Token ids in [0, vocab_size): those of each text that are predicted.
        vocab_size: Rows of the model's LM head.

    Returns:
        Counts by token id, shape (vocab_size,), int64.

    Raises:
        ValueError: A token id is outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    token_ids = chain.from_iterable(answers)
    while len(chunk := np.fromiter(islice(token_ids, _CHUNK), np.int64)):
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            raise ValueError(f"token ids outside the vocabulary of {vocab_size}")
        counts += torch.from_numpy(chunk).bincount(minlength=vocab_size)
    return counts


def rank_tokens(counts: torch.Tensor, size: int = MAX_TOKENS) -> torch.Tensor:
    """Rank the tokens that occur.

    Args:
        counts: By token id.
        size: Most tokens to return.

    Returns:
        Token ids by falling count, ties by id, shape (m,), int64.
    """
    order = counts.argsort(descending=True, stable=True)
    return order[: min(size, int(counts.count_nonzero()))]


def data_counts(heads: Path, data: Sequence[Path]) -> torch.Tensor:
    """Count the tokens to predict in data for a model's heads.

    Args:
        heads: The heads directory.
        data: Directories that `adadecode data` wrote with the heads' model.

    Returns:
        Counts by token id: of answers, and of finished text without its first token,
        as training counts them. Texts are not cut.

    Raises:
        AdaDecodeError: The heads or the data cannot be used.
    """
    vocab_size = load_heads_config(heads).vocab_size
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for directory in data:
        info = load_dataset_info(directory)
        if info.vocab_size != vocab_size:
            raise data_error(
                directory,
                f"it was tokenised for {info.model} with a vocabulary of "
                f"{info.vocab_size}, and that of the heads has {vocab_size}",
                "run `adadecode data` with the heads' model",
            )
        try:
            counts += count_tokens(_answers(read_rows(directory)), vocab_size)
        except AdaDecodeError:  # a file is damaged
            raise
        except ValueError as error:
            raise data_error(
                directory, f"it holds {error}", "run `adadecode data` again"
            ) from error
    if not counts.any():
        raise AdaDecodeError(
            f"--data {', '.join(map(str, data))}: no text has a token to predict; give "
            "more text"
        )
    return counts


def add_draft_vocabulary(
    heads: Path, counts: torch.Tensor, size: int | None = None
) -> torch.Tensor:
    """Give heads a draft vocabulary, or another one; the weights stay as they are.

    Args:
        heads: The heads directory. Its card is kept but for the line about this.
        counts: By token id, as `data_counts` returns them.
        size: Most tokens to store; None for `MAX_TOKENS`.

    Returns:
        The token ids that were stored.

    Raises:
        AdaDecodeError: The heads cannot be used, or a training is writing them.
        OSError: The files cannot be written.
    """
    load_heads_config(heads)  # locking would create what is not there
    refusal = AdaDecodeError(
        f"HEADS {heads}: `adadecode train` is writing there; wait until it has ended"
    )
    with locked(heads, refusal):
        return _add(heads, counts, size)


def _add(heads: Path, counts: torch.Tensor, size: int | None) -> torch.Tensor:
    config = load_heads_config(heads)
    tensors = load_tensors(heads, config)
    token_ids = rank_tokens(counts, size or MAX_TOKENS)
    config = config.model_copy(
        update={"draft_vocabulary": len(token_ids), "library_version": __version__}
    )
    save_heads(heads, tensors.weights, config, token_ids, tensors.memory)
    card = heads / CARD_FILE
    # A linked card may be anybody's file: it is neither copied nor changed.
    if card.is_file() and not card.is_symlink():
        try:
            text = card.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not one that was written here
            return token_ids
        atomic_write(card, name_draft_vocabulary(text, config).encode())
    return token_ids


def _answers(rows: Iterable[DataRow]) -> Iterator[list[int]]:
    """Of each row the tokens that training predicts."""
    for row in rows:
        # Nothing comes before the first token of finished text.
        yield row.response_ids[0 if row.prompt_ids else 1 :]
