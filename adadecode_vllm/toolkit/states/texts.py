# SPDX-License-Identifier: Apache-2.0
"""Texts to train on, from the directories that `adadecode data` writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.shards import load_dataset_info, read_rows
from adadecode_vllm.toolkit.states.teacher import Teacher


@dataclass(frozen=True)
class Text:
    """A text to train on.

    Attributes:
        token_ids: All tokens.
        first: The first position whose state is used: the last token of the prompt,
            which predicts the first token of the answer.
        prompted: Whether the text is a model's answer to a prompt.
        source: Where the text came from, for people.
    """

    token_ids: tuple[int, ...]
    first: int
    prompted: bool = False
    source: str = ""

    @property
    def used(self) -> int:
        """Number of states used: those that predict a token of the answer."""
        return len(self.token_ids) - 1 - self.first

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of the prompt; the first token of a text without one."""
        return self.token_ids[: self.first + 1]

    @property
    def answer(self) -> tuple[int, ...]:
        """Tokens after the prompt."""
        return self.token_ids[self.first + 1 :]


def used_tokens(texts: Iterable[Text]) -> int:
    """Number of states used of some texts.

    Args:
        texts: The texts.

    Returns:
        Their sum.
    """
    return sum(text.used for text in texts)


def load_texts(
    directories: Sequence[Path], teacher: Teacher, max_length: int | None
) -> list[Text]:
    """Read data directories and check them against the model.

    Args:
        directories: Written by `adadecode data`, one after the other.
        teacher: The model.
        max_length: Tokens after which a text is cut; None for the model's length.

    Returns:
        The texts that have at least one token to predict.

    Raises:
        AdaDecodeError: If the data cannot be used with this model.
    """
    if max_length is not None and max_length > teacher.max_length:
        raise AdaDecodeError(
            f"--max-length {max_length}: the model allows {teacher.max_length} tokens; "
            "give at most that"
        )
    length = max_length or teacher.max_length
    texts = []
    for directory in directories:
        info = load_dataset_info(directory)
        if info.vocab_size != teacher.vocab_size:
            raise AdaDecodeError(
                f"--data {directory}: it was tokenised for {info.model} with a "
                f"vocabulary of {info.vocab_size}, and {teacher.name} has "
                f"{teacher.vocab_size}; run `adadecode data` with this model"
            )
        for row in read_rows(directory):
            ids = tuple(row.prompt_ids) + tuple(row.response_ids)
            prompted = len(row.prompt_ids) > 0
            first = max(0, len(row.prompt_ids) - 1)
            text = Text(ids[:length], first, prompted, row.source)
            if text.used < 1:
                continue
            if not 0 <= min(text.token_ids) <= max(text.token_ids) < info.vocab_size:
                raise AdaDecodeError(
                    f"--data {directory}: row {row.row_id} holds token ids outside the "
                    f"vocabulary of {info.vocab_size}; run `adadecode data` again"
                )
            texts.append(text)
    if not texts:
        raise AdaDecodeError(
            f"--data {', '.join(map(str, directories))}: no text has a token to "
            f"predict within {length} tokens; give more text or a larger --max-length"
        )
    return texts


def split_held_out(
    texts: Sequence[Text], share: float, seed: int
) -> tuple[list[Text], list[Text]]:
    """Put a share of the texts aside, the same ones for the same seed.

    A text that occurs again goes where it is already: what was trained on tells nothing
    of other text.

    Args:
        texts: All texts, one at least.
        share: Of the different ones, in [0, 1); at least one is held out if it is
            positive and two exist.
        seed: Chooses them.

    Returns:
        The texts to train on and those held out, both in their order.
    """
    different = list(dict.fromkeys(text.token_ids for text in texts))
    count = min(round(share * len(different)) or int(share > 0), len(different) - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(different), generator=generator)[:count].tolist()
    aside = {different[index] for index in drawn}
    training = [text for text in texts if text.token_ids not in aside]
    return training, [text for text in texts if text.token_ids in aside]


def texts_fingerprint(texts: Sequence[Text]) -> str:
    """Hash of texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((text.first, text.token_ids)).encode())
    return digest.hexdigest()


def model_fingerprint(teacher: Teacher) -> str:
    """Hash of a sample of every weight: tells models apart, also fine-tuned ones."""
    digest = hashlib.sha256()
    for name, weight in teacher.model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
